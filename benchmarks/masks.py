"""What a token mask costs: the first time that a state is met, and every time after, by kind of row and vocabulary.

python benchmarks/masks.py [MODEL ...] [--states 400] [--rounds 5]

MODEL is a GGUF file, or a folder with a checkpoint or a tokenizer.json; without one it is the demo model. States are
those of random ways through some grammars. Every round is a new table with an empty cache; of a state's visits the
quickest counts, since a visit that was interrupted says nothing. A vocabulary's first table also finds its tokens of
plain text.
"""

from __future__ import annotations

import argparse
import platform
import random
import subprocess
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from streamgen.checkpoints.base import TokenizerSource
from streamgen.checkpoints.open import open_checkpoint
from streamgen.cli.machine import cpu_model
from streamgen.grammar.automaton import AutomatonGrammar
from streamgen.grammar.tokens import AutomatonTokens
from streamgen.grammar.vocabulary import GrammarVocabulary
from streamgen.hub import resolve_model
from streamgen.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    import streamgen._cpu as _cpu
    from streamgen.text.tokenizer import Tokenizer

STRING = r'"(?:[^"\\\x00-\x1F]|\\["\\/bfnrt])*"'
NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?"
GRAMMARS = {
    "record": rf'\{{"name":[ ]?{STRING},[ ]?"price":[ ]?{NUMBER},[ ]?"tags":\[(?:{STRING}(?:,{STRING})*)?\]\}}',
    "at most 200 characters": r'\{"text":[ ]?"(?:[^"\\\x00-\x1F]|\\["\\/bfnrt]){0,200}"\}',
    "date": r"[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])",
    "prose": r"(?:[^\x00-\x08\x0B-\x1F])*",
}
KINDS = ("forced", "sparse", "dense")


def read_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model, or of a tokenizer.json alone."""
    path = Path(resolve_model(model))
    if path.is_dir() and not (path / "config.json").exists():
        return load_tokenizer(TokenizerSource(json_path=path / "tokenizer.json"))
    checkpoint = open_checkpoint(path)
    try:
        return load_tokenizer(checkpoint.tokenizer_source)
    finally:
        checkpoint.close()


def visited_states(table: _cpu.MaskTable, *, count: int) -> list[int]:
    """States on random ways, each step a token that is allowed."""
    rng, words = random.Random(1), np.zeros(-(-table.vocab_size // 32), np.uint32)
    seen, state = {0}, 0
    for _ in range(8 * count):
        table.fill_row(state, words.ctypes.data)
        bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[: table.vocab_size])
        after = table.next_state(state, int(rng.choice(bits))) if len(bits) else None
        state = 0 if after is None else after  # at an end: from the beginning again
        seen.add(state)
        if len(seen) >= count:
            break
    return sorted(seen)


def time_rows(table: _cpu.MaskTable, states: list[int], words: NDArray[np.uint32]) -> list[float]:
    """Seconds of each row."""
    address, seconds = words.ctypes.data, []
    for state in states:
        start = time.perf_counter()
        table.fill_row(state, address)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(name: str, grammar: AutomatonGrammar, vocabulary: GrammarVocabulary, *, states: int, rounds: int) -> None:
    """Print the lines of one grammar."""
    words = np.zeros(-(-vocabulary.vocab_size // 32), np.uint32)
    chosen = visited_states(AutomatonTokens.bind(grammar, vocabulary).table, count=states)
    firsts, laters = [], []
    for _ in range(rounds):
        table = AutomatonTokens.bind(grammar, vocabulary).table
        firsts.append(time_rows(table, chosen, words))
        laters.append(time_rows(table, chosen, words))
    first, later = np.min(firsts, axis=0), np.min(laters, axis=0)
    kinds = [table.row_kind(state) for state in chosen]
    for kind in KINDS:
        where = [i for i, found in enumerate(kinds) if found == kind]
        if where:
            times = [median(first[where]), first[where].max(), median(later[where]), later[where].max()]
            print(f"  {name:24} {kind:7} {len(where):6}" + "".join(f"{seconds * 1e6:10.2f}" for seconds in times))


def measure_vocabulary(model: str, *, states: int, rounds: int) -> None:
    """Print the table of one vocabulary."""
    tokenizer = read_tokenizer(model)
    vocabulary = GrammarVocabulary.from_tokenizer(tokenizer)
    start = time.perf_counter()
    trie = vocabulary.trie
    seconds = time.perf_counter() - start
    grammars = {name: AutomatonGrammar.compile(regex) for name, regex in GRAMMARS.items()}
    start = time.perf_counter()
    kept = AutomatonTokens.bind(grammars["record"], vocabulary)
    plain = time.perf_counter() - start
    print(
        f"\n{Path(model).name}: {vocabulary.vocab_size:,} tokens, trie of {trie.num_nodes:,} nodes, "
        f"{trie.num_bytes / 1e6:.1f} MB, made in {seconds * 1e3:.1f} ms, first table in {plain * 1e3:.2f} ms"
    )
    print(f"  {'':32} states{'first':>10}{'slowest':>10}{'later':>10}{'slowest':>10}  microseconds")
    for name, grammar in grammars.items():
        measure(name, grammar, vocabulary, states=states, rounds=rounds)
    del kept  # and with it, perhaps, what the first table found


def main() -> None:
    """Measure each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo"], metavar="MODEL")
    parser.add_argument("--states", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    print(f"{cpu_model()}, Python {platform.python_version()}, commit {commit.strip() or 'unknown'}")
    for model in options.models:
        measure_vocabulary(model, states=options.states, rounds=options.rounds)


if __name__ == "__main__":
    main()
