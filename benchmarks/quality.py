"""How far an engine's next-token distributions are from exact ones: KL divergence, agreement, perplexity.

    python benchmarks/quality.py TEXT [--model demo] [--engines ours,llama.cpp,torch] [--dtype ...] [--quantization ...]
                                 [--kv-dtype ...] [--peer-root DIR] [--json FILE]

Exact is a float32 run of the same dequantized weights by transformers. TEXT's first tokens are cut into windows, each
of which starts from nothing. *prefill*: a window in chunks of 512 rows, as a prompt is computed; *decode*: row by row.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from peersuite.adapters.base import Setting
from peersuite.adapters.llama_cpp import find_folder
from peersuite.logits import Distance, Ids, Logits, distance, llama_cpp_logits, our_logits, torch_logits
from peersuite.models import NAMES, MissingModel, Model, find_model
from peersuite.tools import PEERS_VARIABLE, find_tools

from streamgen.checkpoints.open import open_checkpoint
from streamgen.execution.threads import available_threads
from streamgen.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

ENGINES = ("ours", "llama.cpp", "torch")
PREFILL_ROWS = 512
PATHS = {"prefill": PREFILL_ROWS, "decode": 1}
HEAD = """\
| engine | path | mean KL | p99 KL | top-1 agreement | perplexity | float32 |
| --- | --- | --: | --: | --: | --: | --: |"""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("text", type=Path, metavar="TEXT", help="a text file")
    add("--model", default="demo", help=f"one of {', '.join(NAMES)}; default %(default)s")
    add("--engines", default=",".join(ENGINES), help="with commas between; default %(default)s")
    add("--paths", default="prefill,decode", help="default %(default)s")
    add("--windows", type=int, default=4, help="default %(default)s")
    add("--length", type=int, default=512, help="tokens of a window; default %(default)s")
    add("--threads", type=int, default=available_threads(), help="default %(default)s")
    add("--dtype", help="of our engine")
    add("--quantization", help="of our engine")
    add("--kv-dtype", help="of our engine")
    add("--peer-root", type=Path, help=f"where peers are installed; default {PEERS_VARIABLE}")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def main() -> int:
    """Print the table."""
    arguments = parse()
    named = os.environ.get(PEERS_VARIABLE)
    root = arguments.peer_root or (Path(named) if named else None)
    setting = Setting(threads=arguments.threads, root=root.absolute() if root else None)
    try:
        model = find_model(arguments.model, find_tools(setting))
    except MissingModel as error:
        print(error, file=sys.stderr)
        return 1
    windows = read_windows(model, arguments.text, arguments.windows, arguments.length)
    exact = torch_logits(model.ours, windows, "float32", arguments.threads)
    print(f"{model.name}, {windows.size:,} tokens of {arguments.text.name} in {len(windows)} windows\n\n{HEAD}")
    figures: dict[str, dict[str, Distance]] = {}
    for name, path, run in candidates(arguments, model, windows, find_folder(setting.root)):
        started = time.perf_counter()
        found = figures.setdefault(name, {})[path] = distance(exact, run(), windows)
        print(row(name, path, found), flush=True)
        print(f"  {time.perf_counter() - started:.1f} s", file=sys.stderr)
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode({model.name: figures})) + b"\n")
    return 0


def candidates(
    arguments: argparse.Namespace, model: Model, windows: Ids, folder: Path | None
) -> list[tuple[str, str, Callable[[], Logits]]]:
    """What is asked for and is there: name, path, and how to compute its logits."""
    wanted = arguments.engines.split(",")
    if unknown := sorted(set(wanted) - set(ENGINES)):
        raise SystemExit(f"--engines: expected some of {', '.join(ENGINES)}, got {', '.join(unknown)}")
    if "llama.cpp" in wanted and folder is None:
        print("without llama.cpp: it is not installed", file=sys.stderr)
    options, threads = our_options(arguments, model), arguments.threads
    ours = " ".join(["streamgen", *(f"{key}={value}" for key, value in options.items() if key != "threads")])
    found: list[tuple[str, str, Callable[[], Logits]]] = []
    for path in arguments.paths.split(","):
        rows = PATHS[path]
        if "ours" in wanted:
            found.append((ours, path, partial(our_logits, model.ours, windows, options, rows=rows)))
        if "llama.cpp" in wanted and folder is not None:
            fields = {"rows": rows, "threads": threads, "vocab": model.vocab}
            run = partial(llama_cpp_logits, model.gguf, windows, folder, **fields)
            found.append((f"llama.cpp {model.gguf.name}", path, run))
    if "torch" in wanted:
        found.append(("torch bfloat16", "prefill", partial(torch_logits, model.ours, windows, "bfloat16", threads)))
    return found


def our_options(arguments: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Of our engine: what the model says, and what the command line says."""
    asked = {name: getattr(arguments, name) for name in ("dtype", "quantization", "kv_dtype")}
    chosen = {name: value for name, value in asked.items() if value is not None}
    return {**model.options, **chosen, "threads": arguments.threads}


def read_windows(model: Model, text: Path, count: int, length: int) -> Ids:
    """The first tokens of a text, int32 [count, length]."""
    checkpoint = open_checkpoint(model.ours)
    try:
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    finally:
        checkpoint.close()
    characters = text.read_text(encoding="utf-8")[: 16 * count * length]
    ids = np.array(tokenizer.encode(characters), np.int32)
    if len(ids) < count * length:
        raise SystemExit(f"{text}: expected {count * length} tokens or more, got {len(ids)}")
    return ids[: count * length].reshape(count, length)


def row(name: str, path: str, found: Distance) -> str:
    """A line of the table."""
    return (
        f"| {name} | {path} | {found.mean_kl:.6f} | {found.p99_kl:.5f} | {found.agreement:.2%} "
        f"| {found.perplexity:.3f} | {found.exact_perplexity:.3f} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
