"""Limits of compiling, and the refusal of what would pass them before anything is built.

Building an automaton can neither be interrupted nor bounded once it runs, and ends the process when memory does. So its
size is estimated first: its states are walked as sets of positions, which is what building does too, but with a count
of states and of steps at which the walk gives up. It takes a few microseconds a state, and no memory to speak of.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.errors import SchemaError
from streamgen.grammar import charsets
from streamgen.grammar.pattern import read_pattern
from streamgen.grammar.positions import too_complex
from streamgen.grammar.schema.limits import SchemaLimits

if TYPE_CHECKING:
    from streamgen.grammar.pattern import Pattern


class CompileLimits(Struct, frozen=True, kw_only=True):
    """What one grammar may cost; each is a `bound` of SchemaTooComplex.

    schema               those of a schema itself
    max_cfg_bytes        of a grammar's text
    max_cfg_lines        of a grammar's text
    max_cfg_depth        brackets inside each other in a grammar
    max_regex_chars      of a regular expression
    max_regex_nesting    groups inside each other
    max_repeats          product of the counted repeats inside each other, {2}{3} being 6
    max_positions        characters of a regular expression with its counted repeats written out
    max_regex_work       steps to estimate an automaton by: what is ambiguous takes many for each of its states
    max_states           of an automaton
    max_seconds          of compiling in a process of its own; processor time and time on the clock
    max_child_bytes      of memory that compiling takes there
    """

    schema: SchemaLimits = SchemaLimits()
    max_cfg_bytes: int = 1 << 16
    max_cfg_lines: int = 2_000
    max_cfg_depth: int = 64
    max_regex_chars: int = 200_000
    max_regex_nesting: int = 200
    max_repeats: int = 5_000
    max_positions: int = 30_000
    max_regex_work: int = 75_000
    max_states: int = 20_000
    max_seconds: float = 5.0
    max_child_bytes: int = 1 << 30


DEFAULT_LIMITS = CompileLimits()


class Estimate(Struct, frozen=True):
    """What an automaton is going to need; `states` is of characters, with what UTF-8 adds between its bytes."""

    states: int
    work: int


def check_regex(pattern: str, limits: CompileLimits = DEFAULT_LIMITS) -> Estimate:
    """Whether a regular expression may be built.

    Raises:
        SchemaError: it is none of the dialect. SchemaTooComplex: it passes a limit.
    """
    return estimate_states(read_pattern(pattern, limits), limits)


def estimate_states(pattern: Pattern, limits: CompileLimits) -> Estimate:
    """Walk the automaton without building it.

    Raises:
        SchemaTooComplex: it has more states, or takes more steps, than it may.
    """
    return _Walk(pattern, limits).run()


class _Walk:
    """Subset construction that remembers sets of positions and nothing else. A set of one is its position alone."""

    def __init__(self, pattern: Pattern, limits: CompileLimits) -> None:
        self._pattern = pattern
        self._limits = limits
        self._weights = [charsets.utf8_states(kind.ranges) for kind in pattern.charsets]
        self._overlaps: dict[frozenset[int], list[frozenset[int]]] = {}
        self._seen: set[int | frozenset[int]] = set()
        self._todo: list[int | frozenset[int]] = []
        self._states = 1
        self._work = 0

    def run(self) -> Estimate:
        self._leave(self._pattern.first)
        while self._todo:
            state = self._todo.pop()
            if isinstance(state, int):
                self._run_along(state)
            else:
                after: set[int] = set()
                for position in state:
                    after.update(self._pattern.follow[position])
                    self._spend(len(self._pattern.follow[position]))
                self._leave(after)
            self._check()
        return Estimate(self._states, self._work)

    def _run_along(self, position: int) -> None:
        """From one position on, as far as there is no choice: most of a schema's regex is such runs."""
        follow, symbols, weights, seen = self._pattern.follow, self._pattern.symbols, self._weights, self._seen
        steps = 0
        while len(follow[position]) == 1:
            position = follow[position][0]
            steps += 1
            self._states += weights[symbols[position]]
            if position in seen:
                return
            seen.add(position)
            self._states += 1
        self._spend(steps // 8 + len(follow[position]))
        self._leave(follow[position])

    def _leave(self, positions: list[int] | set[int]) -> None:
        """The states that come after one in which any of `positions` may be next."""
        by_symbol: dict[int, list[int]] = {}
        for position in positions:
            by_symbol.setdefault(self._pattern.symbols[position], []).append(position)
        for symbols in self._split(frozenset(by_symbol)):
            self._states += max(self._weights[symbol] for symbol in symbols)
            self._enter([position for symbol in symbols for position in by_symbol[symbol]])

    def _enter(self, positions: list[int]) -> None:
        state = positions[0] if len(positions) == 1 else frozenset(positions)
        if state not in self._seen:
            self._spend(len(positions))
            self._seen.add(state)
            self._todo.append(state)
            self._states += 1

    def _split(self, symbols: frozenset[int]) -> list[frozenset[int]]:
        """The sets of symbols that some character has in common, each once."""
        if len(symbols) == 1:
            return [symbols]
        known = self._overlaps.get(symbols)
        if known is None:
            known = self._overlaps[symbols] = self._sweep(symbols)
        return known

    def _sweep(self, symbols: frozenset[int]) -> list[frozenset[int]]:
        edges: list[tuple[int, bool, int]] = []
        for symbol in symbols:
            for low, high in self._pattern.charsets[symbol].ranges:
                edges += ((low, True, symbol), (high + 1, False, symbol))
        edges.sort()
        self._spend(len(edges))
        found: set[frozenset[int]] = set()
        open_symbols: set[int] = set()
        before = -1
        for at, opens, symbol in edges:
            if at != before and open_symbols:
                found.add(frozenset(open_symbols))
            before = at
            if opens:
                open_symbols.add(symbol)
            else:
                open_symbols.discard(symbol)
        return sorted(found, key=sorted)

    def _spend(self, steps: int) -> None:
        self._work += steps
        if self._work > self._limits.max_regex_work:
            limit = self._limits.max_regex_work
            raise too_complex("max_regex_work", limit, "steps to estimate the regex by", "more")

    def _check(self) -> None:
        if self._states > self._limits.max_states:
            raise too_complex("max_states", self._limits.max_states, "states", "more")


_LARK_TOKENS = re.compile(
    r'"(?:[^"\\\n]|\\.)*"|/(?!/)(?:[^/\\\n]|\\.)+/|(?://|\#)[^\n]*|[\[({]|[\])}]|<[^>\n]*>?', re.DOTALL
)


def check_cfg_text(text: str, limits: CompileLimits = DEFAULT_LIMITS) -> None:
    """Size of a grammar of rules, before anything parses it.

    Raises:
        SchemaTooComplex: it passes a limit.
    """
    size = len(text.encode(errors="surrogatepass"))
    if size > limits.max_cfg_bytes:
        raise too_complex("max_cfg_bytes", limits.max_cfg_bytes, "bytes of grammar", size)
    lines = text.count("\n") + 1
    if lines > limits.max_cfg_lines:
        raise too_complex("max_cfg_lines", limits.max_cfg_lines, "lines of grammar", lines)


def check_lark_text(text: str, limits: CompileLimits = DEFAULT_LIMITS) -> None:
    """Depth of a grammar in Lark's syntax, and what it may not speak of.

    Raises:
        SchemaTooComplex: it passes a limit. SchemaError: it names special tokens.
    """
    depth = 0
    for found in _LARK_TOKENS.finditer(text):
        token = found[0]
        if token[0] == "<":
            line = text.count("\n", 0, found.start()) + 1
            raise SchemaError(f"grammar: expected text alone, got a special token (<...>), at line {line}")
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(token, 0)
        if depth > limits.max_cfg_depth:
            raise too_complex("max_cfg_depth", limits.max_cfg_depth, "brackets inside each other", "more")
