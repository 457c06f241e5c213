"""Grammars as values, between the sets of JSON values and the text that a back end reads.

A token is a regular language of JSON text; productions put tokens together. A grammar is printed as a Lark grammar
for llguidance, or, where no production leads to itself, as one regular expression.

NOTE: llguidance reads tokens greedily, so no token may be continued by what can follow it: strings end at their quote,
numbers are followed by none of their own characters, and the space after a comma or colon belongs to that token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.printing import lark_text, num_states, regex_text

if TYPE_CHECKING:
    from streamgen.grammar.schema.language import Language

# More bytes than this of a printed grammar are too many, whatever the bound on states says.
MAX_REGEX = 200_000


class NotRegular(Exception):
    """Why a grammar is not printed as a regular expression."""


class Token(Struct, frozen=True):
    """Text of a regular language."""

    language: Language


class JsonRule(Struct, frozen=True):
    """Text that llguidance's own reading of a schema allows; `schema` is JSON text."""

    schema: str


class Sequence(Struct, frozen=True):
    """One part after the other."""

    parts: tuple[Node, ...]


class Options(Struct, frozen=True):
    """One of the parts."""

    parts: tuple[Node, ...]


class Times(Struct, frozen=True):
    """A part low to high times; high None is without end."""

    part: Node
    low: int
    high: int | None


class Call(Struct, frozen=True):
    """Another production; `argument` says what becomes of the number that it counts with."""

    name: str
    argument: str | None = None


Node: TypeAlias = Token | JsonRule | Sequence | Options | Times | Call


class Guarded(Struct, frozen=True):
    """One way to go on, if the number that its production counts with meets a condition."""

    node: Node
    condition: str | None = None


class Production(Struct, frozen=True):
    """The ways that one name stands for. `counts`: whether it is called with a number."""

    options: tuple[Guarded, ...]
    counts: bool = False


class Grammar(Struct, frozen=True):
    """Productions by name, and the one where JSON text starts."""

    productions: dict[str, Production]
    start: str


NOTHING: Node = Sequence(())
COMMA = Token(lang.cat(lang.literal(","), lang.repeat(lang.literal(" "), 0, 1)))


def text(exactly: str) -> Token:
    """A token that is always the same."""
    return Token(lang.words([exactly]))


def sequence(*parts: Node) -> Node:
    """Parts in a row."""
    flat: list[Node] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Sequence) else (part,))
    return flat[0] if len(flat) == 1 else Sequence(tuple(flat))


def options(*parts: Node) -> Node:
    """One of several."""
    unique = tuple(dict.fromkeys(parts))
    return unique[0] if len(unique) == 1 else Options(unique)


def times(part: Node, low: int, high: int | None) -> Node:
    """A part several times."""
    return NOTHING if high == 0 else part if (low, high) == (1, 1) else Times(part, low, high)


def optional(part: Node) -> Node:
    """A part or nothing."""
    return part if part == NOTHING else Times(part, 0, 1)


# --- as a regular expression ---------------------------------------------------------------------------------------


class RegexPrinter:
    """Prints a grammar as one expression while its automaton stays below a number of states."""

    def __init__(self, grammar: Grammar, max_states: int) -> None:
        self._grammar = grammar
        self._max_states = max_states
        self._printed: dict[str, tuple[str, int]] = {}
        self._open: set[str] = set()

    def print(self) -> str:
        """The expression.

        Raises:
            NotRegular: there is none, or it would be too large.
        """
        try:
            return self._call(self._grammar.start)[0]
        except RecursionError:
            raise NotRegular("its parts stand too deep inside of each other") from None

    def _call(self, name: str) -> tuple[str, int]:
        if name in self._open:
            raise NotRegular("it is recursive")
        if name not in self._printed:
            production = self._grammar.productions[name]
            if production.counts:
                raise NotRegular("it counts")
            self._open.add(name)
            self._printed[name] = self._any([option.node for option in production.options])
            self._open.discard(name)
        return self._printed[name]

    def _node(self, node: Node) -> tuple[str, int]:
        match node:
            case Token():
                return self._checked(*self._token(node))
            case JsonRule():
                raise NotRegular("it needs multiples of a number")
            case Sequence():
                parts = [self._node(part) for part in node.parts]
                return self._checked("".join(part for part, _ in parts), sum(size for _, size in parts))
            case Options():
                return self._any(list(node.parts))
            case Times():
                return self._times(node)
            case Call():
                return self._call(node.name)

    def _token(self, node: Token) -> tuple[str, int]:
        if lang.has_operators(node.language):
            raise NotRegular("it needs intersections of patterns")
        return regex_text(node.language), num_states(node.language)

    def _times(self, node: Times) -> tuple[str, int]:
        part, size = self._node(node.part)
        count = max(node.low + 1 if node.high is None else node.high, 1)
        high = "" if node.high is None else node.high
        mark = "?" if (node.low, node.high) == (0, 1) else f"{{{node.low},{high}}}"
        return self._checked(f"(?:{part}){mark}", size * count)

    def _any(self, nodes: list[Node]) -> tuple[str, int]:
        parts = [self._node(node) for node in nodes]
        joined = parts[0][0] if len(parts) == 1 else "(?:" + "|".join(part for part, _ in parts) + ")"
        return self._checked(joined, sum(size for _, size in parts))

    def _checked(self, printed: str, size: int) -> tuple[str, int]:
        if size > self._max_states or len(printed) > MAX_REGEX:
            raise NotRegular("its automaton would be too large")
        return printed, size


# --- as a Lark grammar -----------------------------------------------------------------------------------------------


class LarkPrinter:
    """Prints a grammar as rules, of which the first is `json`."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._tokens: dict[Language, str] = {}
        self._schemas: dict[str, str] = {}

    def print(self) -> str:
        """The grammar's text, without a `start` rule."""
        lines = [f"json: {self._grammar.start}"]
        for name, production in self._grammar.productions.items():
            lines.append(self._rule(name, production))
        lines.extend(f"{name}: {lark_text(language)}" for language, name in self._tokens.items())
        lines.extend(f"{name}: %json {schema}" for schema, name in self._schemas.items())
        return "\n".join(lines) + "\n"

    def _rule(self, name: str, production: Production) -> str:
        printed = []
        for option in production.options:
            condition = option.condition
            if production.counts and len(production.options) == 1 and condition is None:
                # A production with one way and no condition is replaced by that way, with the number not counted on.
                condition = "ge(_, 0)"
            guard = f" %if {condition}" if condition else ""
            printed.append(f"{self._node(option.node, counts=production.counts)}{guard}")
        return f"{name}{'::_' if production.counts else ''}: " + "\n  | ".join(printed)

    def _node(self, node: Node, *, counts: bool) -> str:
        match node:
            case Token():
                return self._tokens.setdefault(node.language, f"T{len(self._tokens)}")
            case JsonRule():
                return self._schemas.setdefault(node.schema, f"json_{len(self._schemas)}")
            case Sequence():
                return " ".join(self._grouped(part, counts=counts) for part in node.parts) or '""'
            case Options():
                return " | ".join(self._grouped(part, counts=counts) for part in node.parts)
            case Times():
                high = "" if node.high is None else node.high
                mark = "?" if (node.low, node.high) == (0, 1) else f"{{{node.low},{high}}}"
                return f"({self._node(node.part, counts=counts)}){mark}"
            case Call():
                return node.name if node.argument is None else f"{node.name}::{node.argument}"

    def _grouped(self, node: Node, *, counts: bool) -> str:
        printed = self._node(node, counts=counts)
        return f"({printed})" if isinstance(node, Options) or node == NOTHING else printed
