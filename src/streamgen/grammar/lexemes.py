"""A recursive grammar for llguidance: rules over lexemes, cut so that its lexer never takes more than it may.

The lexer is greedy: as long as any lexeme that may stand here can take the next byte, those that are complete already
are forgotten. So a lexeme X may be used beside a lexeme Y only if no byte that can follow X makes a complete X the
beginning of a Y, or of a longer X. Lexemes are as long as possible at first, since each costs a step of the parser;
where one breaks this rule it is cut into its parts, and these again, at worst into single characters, which never do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from streamgen.grammar.gbnf import Chars, Choice, Ref, Regexes, Repeat, Sequence, Text
from streamgen.grammar.pattern import Pattern, read_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamgen.grammar.charsets import Ranges
    from streamgen.grammar.gbnf import Expression, Rules

_MAX_STEPS = 200_000  # of looking for what is too greedy; past that everything is cut

Bytes: TypeAlias = int  # a set of bytes: bit b for byte b


class Lexeme(Struct, frozen=True):
    """What the lexer takes in one piece: never an empty text."""

    name: str
    regex: str
    pattern: Pattern
    first: Bytes

    @property
    def is_long(self) -> bool:
        """Whether it may be cut: it is more than one character of one set."""
        return len(self.pattern.symbols) > 1 or self.pattern.follow != [[]]


class Row(Struct, frozen=True):
    """One node after the other; nothing at all if there are none."""

    items: tuple[Node, ...]


class Either(Struct, frozen=True):
    """One of the nodes."""

    items: tuple[Node, ...]


class Times(Struct, frozen=True):
    """A node again and again."""

    item: Node
    low: int
    high: int | None


Node: TypeAlias = Lexeme | Ref | Row | Either | Times


def write_lark(grammar: Rules) -> str:
    """The grammar in llguidance's syntax, with the same texts.

    Raises:
        SchemaTooComplex: it passes a limit.
    """
    cut: set[str] = set()
    patterns: dict[str, Pattern] = {}
    while True:
        cutting = Cutting(grammar, cut, patterns)
        greedy = Lookahead(cutting).greedy()
        if not greedy:
            return _lark(cutting)
        cut |= greedy


class Cutting:
    """The rules over lexemes, none of which has a regular expression that is among `cut`."""

    def __init__(self, grammar: Rules, cut: set[str], patterns: dict[str, Pattern]) -> None:
        self.lexemes: dict[str, Lexeme] = {}
        self.rules: dict[str, Node] = {}
        self._grammar = grammar
        self._cut = cut
        self._patterns = patterns
        self._regexes = Regexes(grammar)
        todo = ["root"]
        while todo:
            name = todo.pop()
            if name not in self.rules:
                self.rules[name] = self._node(grammar.rules[name])
                todo.extend(_rules_in(self.rules[name]))

    def _node(self, expression: Expression) -> Node:
        regex = self._regexes.of(expression)
        if regex is not None and regex not in self._cut:
            return self._lexeme(regex)
        match expression:
            case Text(text):
                return Row(tuple(self._node(Text(char)) for char in text))
            case Sequence(items):
                return Row(tuple(map(self._node, items if regex is not None else self._runs(items))))
            case Choice(items):
                return Either(tuple(map(self._node, items if regex is not None else self._regular_ones(items))))
            case Repeat(item, low, high):
                return Times(self._node(item), low, high)
            case Ref():
                return expression
            case Chars():
                raise AssertionError("a single character is never cut")

    def _lexeme(self, regex: str) -> Node:
        pattern = self._patterns.get(regex)
        if pattern is None:
            pattern = self._patterns[regex] = read_pattern(regex, self._grammar.limits)
        if pattern.rust is None:
            return Either(())
        if not pattern.first:
            return Row(())
        lexeme = self.lexemes.get(regex)
        if lexeme is None:
            first = _leads(pattern, pattern.first)
            lexeme = self.lexemes[regex] = Lexeme(f"T{len(self.lexemes)}", regex, pattern, first)
        return Times(lexeme, 0, 1) if pattern.is_nullable else lexeme

    def _runs(self, items: tuple[Expression, ...]) -> Iterator[Expression]:
        """With neighbours that are regular together as one."""
        run: list[Expression] = []
        for item in items:
            if self._regexes.of(item) is not None:
                run.append(item)
                continue
            yield from self._together(Sequence(tuple(run)))
            yield item
            run = []
        yield from self._together(Sequence(tuple(run)))

    def _regular_ones(self, items: tuple[Expression, ...]) -> Iterator[Expression]:
        """With those that are regular as one."""
        yield from self._together(Choice(tuple(item for item in items if self._regexes.of(item) is not None)))
        yield from (item for item in items if self._regexes.of(item) is None)

    def _together(self, whole: Sequence | Choice) -> Iterator[Expression]:
        """The whole, unless it is empty, or too large for one regular expression."""
        if self._regexes.of(whole) is None:
            yield from whole.items
        elif whole.items:
            yield whole


def _rules_in(node: Node) -> Iterator[str]:
    match node:
        case Ref(name):
            yield name
        case Row(items) | Either(items):
            for item in items:
                yield from _rules_in(item)
        case Times(item):
            yield from _rules_in(item)


class Lookahead:
    """What may follow what, in bytes; and which lexemes are too greedy for it."""

    def __init__(self, cutting: Cutting) -> None:
        self._rules = cutting.rules
        self._lexemes = list(cutting.lexemes.values())
        self._first: dict[str, Bytes] = dict.fromkeys(cutting.rules, 0)
        self._nullable: dict[str, bool] = dict.fromkeys(cutting.rules, False)
        self._rule_follow: dict[str, Bytes] = dict.fromkeys(cutting.rules, 0)
        self._follow: dict[str, Bytes] = dict.fromkeys((lexeme.name for lexeme in self._lexemes), 0)
        self._overlaps: dict[tuple[Ranges, Ranges], bool] = {}
        self._steps = 0
        self._find_first()
        self._find_follow()

    def greedy(self) -> set[str]:
        """Regular expressions of the lexemes that have to be cut."""
        found: set[str] = set()
        for shorter in self._lexemes:
            for longer in self._lexemes:
                if longer.is_long and longer.regex not in found and self._takes_too_much(shorter, longer):
                    found.add(longer.regex)
                if self._steps > _MAX_STEPS:
                    return {lexeme.regex for lexeme in self._lexemes if lexeme.is_long}
        return found

    def _takes_too_much(self, shorter: Lexeme, longer: Lexeme) -> bool:
        """Whether a byte that may follow a complete `shorter` makes it the beginning of a `longer`."""
        follow = self._follow[shorter.name]
        if not follow:
            return False
        left, right = shorter.pattern, longer.pattern
        last = frozenset(left.last)
        todo = [(p, q) for p in left.first for q in right.first]
        seen = set(todo)
        while todo:
            p, q = todo.pop()
            self._steps += 1
            if self._steps > _MAX_STEPS or not self._overlap(left, p, right, q):
                continue
            if p in last and _leads(right, right.follow[q]) & follow:
                return True
            new = {(after, then) for after in left.follow[p] for then in right.follow[q]} - seen
            seen |= new
            todo.extend(new)
        return False

    def _overlap(self, left: Pattern, p: int, right: Pattern, q: int) -> bool:
        key = left.charsets[left.symbols[p]].ranges, right.charsets[right.symbols[q]].ranges
        known = self._overlaps.get(key)
        if known is None:
            known = any(low <= last and first <= high for low, high in key[0] for first, last in key[1])
            self._overlaps[key] = known
        return known

    def _find_first(self) -> None:
        is_new = True
        while is_new:
            is_new = False
            for name, node in self._rules.items():
                state = self._first_of(node), self._nullable_of(node)
                if state != (self._first[name], self._nullable[name]):
                    self._first[name], self._nullable[name] = state
                    is_new = True

    def _find_follow(self) -> None:
        before = None
        while before != self._rule_follow:
            before = dict(self._rule_follow)
            for name, node in self._rules.items():
                self._visit(node, self._rule_follow[name])

    def _visit(self, node: Node, follow: Bytes) -> None:
        match node:
            case Lexeme(name):
                self._follow[name] |= follow
            case Ref(name):
                self._rule_follow[name] |= follow
            case Row(items):
                for item in reversed(items):
                    self._visit(item, follow)
                    follow = self._first_of(item) | (follow if self._nullable_of(item) else 0)
            case Either(items):
                for item in items:
                    self._visit(item, follow)
            case Times(item, _, high):
                self._visit(item, follow if high == 1 else follow | self._first_of(item))

    def _first_of(self, node: Node) -> Bytes:
        match node:
            case Lexeme():
                return node.first
            case Ref(name):
                return self._first[name]
            case Either(items):
                return _union(map(self._first_of, items))
            case Times(item):
                return self._first_of(item)
            case Row(items):
                first = 0
                for item in items:
                    first |= self._first_of(item)
                    if not self._nullable_of(item):
                        break
                return first

    def _nullable_of(self, node: Node) -> bool:
        match node:
            case Lexeme():
                return False
            case Ref(name):
                return self._nullable[name]
            case Row(items):
                return all(map(self._nullable_of, items))
            case Either(items):
                return any(map(self._nullable_of, items))
            case Times(item, low):
                return low == 0 or self._nullable_of(item)


def _union(sets: Iterator[Bytes]) -> Bytes:
    union = 0
    for one in sets:
        union |= one
    return union


def _leads(pattern: Pattern, positions: list[int]) -> Bytes:
    """The bytes that the characters of these positions begin with."""
    return _union(_lead_bytes(pattern.charsets[pattern.symbols[position]].ranges) for position in positions)


def _lead_bytes(ranges: Ranges) -> Bytes:
    return _union((2 << chr(high).encode()[0]) - (1 << chr(low).encode()[0]) for low, high in ranges)


def _lark(cutting: Cutting) -> str:
    names = {name: f"r{number}" for number, name in enumerate(cutting.rules)}
    lines = [f"start: {names['root']}"]
    lines += [f"{names[name]}: {_text(node, names)}" for name, node in cutting.rules.items()]
    for lexeme in cutting.lexemes.values():
        assert lexeme.pattern.rust is not None, "a lexeme has texts"
        regex = lexeme.pattern.rust.replace("/", "\\/")
        not_empty = " & /(?s:.+)/" if lexeme.pattern.is_nullable else ""
        lines.append(f"{lexeme.name}: /{regex}/{not_empty}")
    return "\n".join(lines)


def _text(node: Node, names: dict[str, str]) -> str:
    match node:
        case Lexeme(name):
            return name
        case Ref(name):
            return names[name]
        case Row(()):
            return '""'
        case Row(items):
            return f"({' '.join(_text(item, names) for item in items)})"
        case Either(()):
            return r"/[^\s\S]/"
        case Either(items):
            return f"({' | '.join(_text(item, names) for item in items)})"
        case Times(item, low, high):
            inner = f"({_text(item, names)})" if isinstance(item, Times) else _text(item, names)
            return f"{inner}{{{low},{'' if high is None else high}}}"
