"""From a regular expression to a table over bytes.

Outlines builds the automaton. It is asked for one over bytes, which takes milliseconds, rather than over the tokens of
a vocabulary, which takes seconds and hundreds of megabytes where strings are long; which tokens a state allows is found
out later, for the states that are reached. Bytes that a pattern never tells apart are one column of the table.

A pattern R is built between two zero bytes, which no text holds. Without the second, the engine drops what may follow a
text that matches already (`foo|foobar` would lose `foobar`). Without the first, its other automaton, which finds R
anywhere and which nobody asked for, has a set of states for each way in which matches may overlap: a string of at most
20 characters with escapes takes a minute, one of 200 does not end.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from msgspec import Struct

from streamgen.errors import SchemaError
from streamgen.grammar import charsets
from streamgen.grammar.bounds import DEFAULT_LIMITS, estimate_states
from streamgen.grammar.grammar import GrammarStats
from streamgen.grammar.pattern import read_pattern
from streamgen.grammar.positions import too_complex

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streamgen.grammar.bounds import CompileLimits
    from streamgen.grammar.grammar import TokenGrammar
    from streamgen.grammar.pattern import Pattern
    from streamgen.grammar.vocabulary import GrammarVocabulary

_UNUSED_EOS = 1 << 20  # an id that is no byte, for an engine that wants one


class ByteAutomaton(Struct, frozen=True):
    """A deterministic automaton; state 0 is where it starts, and from each state an accepting one can be reached.

    classes       [256] uint8                         the column of each byte
    transitions   [num_states, num_classes] int32     the next state, -1 where there is none
    accepting     [num_states] uint8                  whether a text may end there
    """

    classes: NDArray[np.uint8]
    transitions: NDArray[np.int32]
    accepting: NDArray[np.uint8]

    @property
    def num_states(self) -> int:
        """How many."""
        return len(self.accepting)

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self.classes.nbytes + self.transitions.nbytes + self.accepting.nbytes

    def walk(self, text: bytes, state: int = 0) -> int | None:
        """The state after some bytes; None if they are not allowed."""
        classes, transitions = self.classes, self.transitions
        for byte in text:
            state = int(transitions[state, classes[byte]])
            if state < 0:
                return None
        return state


def build_automaton(pattern: str, limits: CompileLimits = DEFAULT_LIMITS) -> ByteAutomaton:
    """The automaton of the texts that a regular expression matches whole.

    Raises:
        SchemaError: it is none of the dialect, or no text matches. SchemaTooComplex: it passes a limit.
    """
    parsed = read_pattern(pattern, limits)
    if parsed.rust is None:
        raise SchemaError("regex: expected one that some text matches, got one that none does", keyword="pattern")
    estimate_states(parsed, limits)
    symbols = _representatives(parsed)
    index = _index(parsed.rust, symbols)
    return _table(index, symbols, limits)


def _representatives(pattern: Pattern) -> NDArray[np.int64]:
    """The column of each byte, [256]: bytes that begin no range of any set are like the byte before them."""
    cuts = {0, 1, 0x80, 0xC0}  # NUL; where the bytes that continue a character begin and end
    for kind in pattern.charsets:
        cuts |= charsets.byte_cuts(kind.ranges) if kind.is_exact else set(range(256))
    return np.searchsorted(np.array(sorted(cuts)), np.arange(256), side="right") - 1


def _index(rust: str, columns: NDArray[np.int64]) -> Any:
    from outlines_core import Index, Vocabulary

    first_bytes = np.unique(columns, return_index=True)[1]
    vocabulary = Vocabulary(_UNUSED_EOS, {bytes([byte]): [column] for column, byte in enumerate(first_bytes)})
    try:
        return Index(rf"\x00(?:{rust})\x00", vocabulary)
    except Exception as error:  # its only word for a pattern that Rust does not read
        raise SchemaError(f"regex: {_first_line(error)}", keyword="pattern") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[-1][:200]


def _table(index: Any, columns: NDArray[np.int64], limits: CompileLimits) -> ByteAutomaton:
    """Renumber the states between the zero bytes, which are column 0, in the order of a search."""
    transitions: dict[int, dict[int, int]] = index.get_transitions()
    finals: set[int] = set(index.get_final_states())
    start = transitions[index.get_initial_state()][0]
    numbers = {start: 0}
    order = [start]
    for state in order:  # grows as it goes
        for column, after in transitions.get(state, {}).items():
            if column and after not in numbers:
                numbers[after] = len(order)
                order.append(after)
    if len(order) > limits.max_states:
        raise too_complex("max_states", limits.max_states, "states", len(order))
    accepting = np.fromiter((transitions.get(s, {}).get(0) in finals for s in order), np.uint8, len(order))
    table = np.full((len(order), int(columns[-1]) + 1), -1, np.int32)
    for row, state in zip(table, order, strict=True):
        moves = transitions.get(state, {})
        row[list(moves)] = [numbers.get(after, -1) for after in moves.values()]
    table[:, 0] = -1
    return _merged(columns, table, accepting)


def _merged(columns: NDArray[np.int64], table: NDArray[np.int32], accepting: NDArray[np.uint8]) -> ByteAutomaton:
    """With equal columns made one."""
    merged: dict[bytes, int] = {}
    kept: list[int] = []
    renamed = np.empty(table.shape[1], np.uint8)
    for number, column in enumerate(np.ascontiguousarray(table.T)):
        key = column.tobytes()
        if key not in merged:
            merged[key] = len(kept)
            kept.append(number)
        renamed[number] = merged[key]
    return ByteAutomaton(renamed[columns], np.ascontiguousarray(table[:, kept]), accepting)


class AutomatonDump(Struct, frozen=True, tag="automaton"):
    """An automaton as plain data; the table is `num_classes` wide."""

    stats: GrammarStats
    num_classes: int
    classes: bytes
    transitions: bytes
    accepting: bytes


class AutomatonGrammar:
    """An automaton as a `Grammar`."""

    def __init__(self, automaton: ByteAutomaton, stats: GrammarStats) -> None:
        self.automaton = automaton
        self.stats = stats

    @classmethod
    def compile(
        cls, pattern: str, limits: CompileLimits = DEFAULT_LIMITS, *, warnings: tuple[str, ...] = ()
    ) -> AutomatonGrammar:
        """That of a regular expression; raises as `build_automaton` does."""
        start = time.perf_counter()
        automaton = build_automaton(pattern, limits)
        stats = GrammarStats(
            backend="outlines",
            states=automaton.num_states,
            bytes=automaton.nbytes,
            seconds=time.perf_counter() - start,
            warnings=warnings,
        )
        return cls(automaton, stats)

    @classmethod
    def load(cls, dump: AutomatonDump) -> AutomatonGrammar:
        """What was dumped."""
        transitions = np.frombuffer(dump.transitions, np.int32).reshape(-1, dump.num_classes)
        classes, accepting = (np.frombuffer(data, np.uint8) for data in (dump.classes, dump.accepting))
        return cls(ByteAutomaton(classes, transitions, accepting), dump.stats)

    def accepts(self, text: bytes) -> bool:
        """Whether exactly this may be the whole output."""
        state = self.automaton.walk(text)
        return state is not None and bool(self.automaton.accepting[state])

    def prefix_ok(self, text: bytes) -> bool:
        """Whether some output begins with this."""
        return self.automaton.walk(text) is not None

    def dump(self) -> bytes:
        """Everything about it."""
        table = self.automaton
        return msgspec.msgpack.encode(
            AutomatonDump(
                self.stats,
                table.transitions.shape[1],
                table.classes.tobytes(),
                table.transitions.tobytes(),
                table.accepting.tobytes(),
            )
        )

    def bind(self, vocabulary: GrammarVocabulary) -> TokenGrammar:
        """The grammar over the tokens of a vocabulary.

        Raises:
            SchemaError: the vocabulary cannot spell it.
        """
        from streamgen.grammar.tokens import AutomatonTokens

        return AutomatonTokens.bind(self, vocabulary)
