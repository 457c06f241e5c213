"""Byte automata made straight from outlines_core, and what they allow by brute force."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

import streamgen._cpu as _cpu
from streamgen.grammar.automaton import AutomatonGrammar, ByteAutomaton
from streamgen.grammar.grammar import GrammarStats
from streamgen.grammar.tokens import AutomatonTokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streamgen.grammar.vocabulary import GrammarVocabulary

_UNUSED_ID = 1 << 20

STRING = r'"(?:[^"\\\x00-\x1F\x7F-\x9F]|\\["\\/bfnrt])*"'
NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?"
REGEXES = {
    "object": rf'\{{"name":[ ]?{STRING},[ ]?"age":[ ]?{NUMBER},[ ]?"tags":[ ]?\[(?:{STRING}(?:,[ ]?{STRING})*)?\]\}}',
    "bounded": r'\{"a":"[^"\\\x00-\x1F]{2,40}","ключ":(?:true|false|null)\}',
    "choice": r"(?:foo|foobar|cat|category|наука|🙂🙃)",
    "date": r"[0-9]{4}-[0-9]{2}-[0-9]{2}(?:T[0-9]{2}:[0-9]{2})?",
    "prose": r"(?s:.)*",
    "emoji": r"[😀-😏]{1,5}!?",
    "words": r"(?:[a-z]{1,12} ){0,6}[a-z]{1,12}\.",
}


@cache
def automaton(regex: str) -> ByteAutomaton:
    """The automaton of a regular expression, with a column for every byte."""
    from outlines_core import Index, Vocabulary

    vocabulary = Vocabulary(_UNUSED_ID, {bytes([byte]): [byte] for byte in range(256)})
    index = Index(rf"(?:{regex})\x00", vocabulary)
    moves, finals = index.get_transitions(), set(index.get_final_states())
    numbers = {index.get_initial_state(): 0}
    order = list(numbers)
    for state in order:  # grows as it goes
        for byte, after in moves.get(state, {}).items():
            if byte and after not in numbers:
                numbers[after] = len(order)
                order.append(after)
    table = np.full((len(order), 256), -1, np.int32)
    for state in order:
        for byte, after in moves.get(state, {}).items():
            if byte:
                table[numbers[state], byte] = numbers[after]
    accepting = np.array([moves.get(state, {}).get(0) in finals for state in order], np.uint8)
    return ByteAutomaton(np.arange(256, dtype=np.uint8), table, accepting)


def bound(automaton: ByteAutomaton, vocabulary: GrammarVocabulary) -> AutomatonTokens:
    """The automaton as a grammar over a vocabulary."""
    return AutomatonTokens.bind(AutomatonGrammar(automaton, GrammarStats(backend="outlines")), vocabulary)


def make_table(
    automaton: ByteAutomaton, vocabulary: GrammarVocabulary, cache: _cpu.MaskCache | None = None
) -> _cpu.MaskTable:
    """Its masks over a vocabulary."""
    return _cpu.MaskTable(
        vocabulary.trie,
        automaton.classes.ctypes.data,
        automaton.transitions.ctypes.data,
        automaton.accepting.ctypes.data,
        len(automaton.accepting),
        automaton.transitions.shape[1],
        vocabulary.stop_ids,
        vocabulary.masks if cache is None else cache,
    )


def allowed_ids(words: NDArray[np.uint32], vocab_size: int) -> set[int]:
    """The ids whose bits are set."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any(), "bits behind the vocabulary"
    return {int(i) for i in np.flatnonzero(bits)}


def row_ids(table: _cpu.MaskTable, state: int) -> set[int]:
    """What a table allows in a state."""
    words = np.full(-(-table.vocab_size // 32), 0xFFFFFFFF, np.uint32)
    table.fill_row(state, words.ctypes.data)
    return allowed_ids(words, table.vocab_size)


def expected_ids(automaton: ByteAutomaton, state: int, vocabulary: GrammarVocabulary) -> set[int]:
    """The same, token by token. Every byte is a token of the vocabulary."""
    found = {i for i, text in enumerate(vocabulary.tokens) if text and automaton.walk(text, state) is not None}
    return found | set(vocabulary.stop_ids) if automaton.accepting[state] else found
