"""Patterns of a schema -> languages: parsing regular expressions of ECMA-262, as far as languages can say them.

`pattern` finds a match anywhere in the string, so a pattern's language is that of all strings it is found in. Anchors
and look-ahead are part of that: what they say about the rest of the string becomes an intersection. Not here: back
references, look-behind, word borders, and spellings that ECMA-262 and Python read differently.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

from msgspec import Struct

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.language import ANY, EMPTY, NEVER, Language, Ranges

MAX_NESTING = 60
MAX_REPEAT = 10_000
MAX_COUNT_DIGITS = 6
MAX_UNROLLED = 16

DIGITS: Ranges = ((0x30, 0x39),)
WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
SPACE: Ranges = (
    (0x09, 0x0D),
    (0x20, 0x20),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
    (0xFEFF, 0xFEFF),
)
LINE_ENDS: Ranges = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))
CLASSES = {"d": DIGITS, "w": WORD, "s": SPACE}
CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
HEX_LENGTHS = {"x": 2, "u": 4}


class PatternError(ValueError):
    """What a pattern holds that no language here stands for, and where."""

    def __init__(self, what: str, position: int) -> None:
        super().__init__(f"{what} at character {position}")


class Start(Struct, frozen=True):
    """The beginning of the string."""


class End(Struct, frozen=True):
    """The end of the string."""


class Ahead(Struct, frozen=True):
    """What comes next matches, or must not match."""

    part: Node
    is_negative: bool


class Sequence(Struct, frozen=True):
    """One after the other; some part asserts something."""

    parts: tuple[Node, ...]


class Choice(Struct, frozen=True):
    """One of them; some part asserts something."""

    parts: tuple[Node, ...]


class Loop(Struct, frozen=True):
    """A part that asserts something, several times."""

    part: Node
    low: int
    high: int | None
    position: int


# A plain language is a node too: only what holds an assertion needs more.
Assertion: TypeAlias = Start | End | Ahead | Sequence | Choice | Loop
Node: TypeAlias = Assertion | Language


@lru_cache(maxsize=512)
def search_language(pattern: str) -> Language:
    """All strings in which a pattern is found.

    Raises:
        PatternError: it is no pattern, or says what languages cannot.
    """
    node = _Parser(pattern).parse()
    if not _asserts(node):
        return lang.cat(ANY, _plain(node), ANY)
    at_start = _followed(node, ANY, is_start=True)
    later = lang.cat(ANY, _followed(node, ANY, is_start=False))
    return lang.union(at_start, later)


@lru_cache(maxsize=256)
def full_language(pattern: str) -> Language:
    """All strings that a pattern without assertions matches as a whole."""
    return _plain(_Parser(pattern).parse())


def _asserts(node: Node) -> bool:
    return isinstance(node, Start | End | Ahead | Sequence | Choice | Loop)


def _plain(node: Node) -> Language:
    assert not isinstance(node, Start | End | Ahead | Sequence | Choice | Loop), "asserts something"
    return node


def _needs_start(node: Node) -> bool:
    match node:
        case Start():
            return True
        case Sequence() | Choice():
            return any(map(_needs_start, node.parts))
        case Loop():
            return _needs_start(node.part)
        case _:
            return False


def _followed(node: Node, rest: Language, *, is_start: bool) -> Language:
    """What the string is from here on, if the node matches here and `rest` is what may follow it."""
    match node:
        case Start():
            return rest if is_start else NEVER
        case End():
            return EMPTY if lang.accepts_empty(rest) else NEVER
        case Ahead():
            seen = _followed(node.part, ANY, is_start=is_start)
            return lang.both(rest, lang.negate(seen) if node.is_negative else seen)
        case Choice():
            return lang.union(*(_followed(part, rest, is_start=is_start) for part in node.parts))
        case Sequence():
            return _sequence_followed(node.parts, rest, is_start=is_start)
        case Loop():
            return _loop_followed(node, rest, is_start=is_start)
        case _:
            return lang.cat(node, rest)


def _sequence_followed(parts: tuple[Node, ...], rest: Language, *, is_start: bool) -> Language:
    if not parts:
        return rest
    first, others = parts[0], parts[1:]
    if isinstance(first, Start | End | Ahead):
        return _followed(first, _sequence_followed(others, rest, is_start=is_start), is_start=is_start)
    moved = _followed(first, _sequence_followed(others, rest, is_start=False), is_start=is_start)
    if is_start and any(map(_needs_start, others)) and _may_be_empty(first):
        return lang.union(moved, _sequence_followed(others, rest, is_start=True))
    return moved


def _may_be_empty(node: Node) -> bool:
    """Whether it can match without taking a character and without asserting anything."""
    match node:
        case Start() | End() | Ahead():
            raise PatternError("an anchor after something optional", 0)
        case Choice():
            return any(map(_may_be_empty, node.parts))
        case Sequence():
            return all(map(_may_be_empty, node.parts))
        case Loop():
            return node.low == 0 or _may_be_empty(node.part)
        case _:
            return lang.accepts_empty(node)


def _loop_followed(node: Loop, rest: Language, *, is_start: bool) -> Language:
    if node.high is None or node.high > MAX_UNROLLED:
        raise PatternError("an anchor or look-ahead inside an unbounded repetition", node.position)
    counts = range(node.low, node.high + 1)
    return lang.union(*(_sequence_followed((node.part,) * count, rest, is_start=is_start) for count in counts))


def _sequence(parts: list[Node]) -> Node:
    if not any(map(_asserts, parts)):
        return lang.cat(*map(_plain, parts))
    return parts[0] if len(parts) == 1 else Sequence(tuple(parts))


def _choice(parts: list[Node]) -> Node:
    if not any(map(_asserts, parts)):
        return lang.union(*map(_plain, parts))
    return parts[0] if len(parts) == 1 else Choice(tuple(parts))


class _Parser:
    """A recursive descent over one pattern."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0
        self._depth = 0
        self._ignores_case = False

    def parse(self) -> Node:
        if self._text.startswith("(?i)"):
            self._ignores_case, self._at = True, 4
        node = self._alternatives()
        if self._at < len(self._text):
            raise self._error("a closing parenthesis without an opening one")
        return node

    def _error(self, what: str) -> PatternError:
        return PatternError(what, self._at)

    def _peek(self, count: int = 1) -> str:
        return self._text[self._at : self._at + count]

    def _take(self, count: int = 1) -> str:
        taken = self._text[self._at : self._at + count]
        if len(taken) < count:
            raise self._error("an unexpected end")
        self._at += count
        return taken

    def _alternatives(self) -> Node:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise self._error(f"groups nested deeper than {MAX_NESTING}")
        options = [self._concatenation()]
        while self._peek() == "|":
            self._at += 1
            options.append(self._concatenation())
        self._depth -= 1
        return _choice(options)

    def _concatenation(self) -> Node:
        parts: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom()))
        return _sequence(parts)

    def _quantified(self, node: Node) -> Node:
        position = self._at
        bounds = self._quantifier()
        if bounds is None:
            return node
        if self._peek() == "?":  # A lazy quantifier matches the same strings.
            self._at += 1
        if self._quantifier() is not None:
            raise self._error("a quantifier after a quantifier")
        if isinstance(node, Start | End | Ahead):
            raise PatternError("a quantifier after an anchor or look-around", position)
        low, high = bounds
        if max(low, high or 0) > MAX_REPEAT or (high is not None and low > high):
            raise PatternError(f"a repetition outside of 0 <= low <= high <= {MAX_REPEAT}", position)
        return Loop(node, low, high, position) if _asserts(node) else lang.repeat(_plain(node), low, high)

    def _quantifier(self) -> tuple[int, int | None] | None:
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self._peek())
        if simple is not None:
            self._at += 1
            return simple
        if self._peek() != "{":
            return None
        end = self._text.find("}", self._at)
        low, comma, high = self._text[self._at + 1 : max(end, self._at)].partition(",")
        if end < 0 or not low.isdecimal() or not (high == "" or high.isdecimal()):
            if low == "" and comma and high.isdecimal():
                raise self._error("a repetition without a lower bound, which dialects read differently,")
            return None
        if max(len(low), len(high)) > MAX_COUNT_DIGITS:
            raise self._error(f"a repetition of more than {MAX_REPEAT} times")
        self._at = end + 1
        return int(low), (int(high) if high else None) if comma else int(low)

    def _atom(self) -> Node:
        position = self._at
        char = self._take()
        match char:
            case "^":
                return Start()
            case "$":
                return End()
            case ".":
                return lang.chars(lang.complement_of(LINE_ENDS))
            case "(":
                return self._group()
            case "[":
                return self._char_class()
            case "\\":
                return self._escape()
            case "*" | "+" | "?":
                raise PatternError("a quantifier with nothing before it", position)
            case _:
                return self._chars([(ord(char), ord(char))])

    def _chars(self, ranges: list[tuple[int, int]]) -> Language:
        if self._ignores_case:
            lower = [(max(a, 0x41) + 32, min(b, 0x5A) + 32) for a, b in ranges]
            upper = [(max(a, 0x61) - 32, min(b, 0x7A) - 32) for a, b in ranges]
            ranges = [*ranges, *lower, *upper]
        return lang.chars(span for span in ranges if span[0] <= span[1])

    def _group(self) -> Node:
        wrap = self._group_kind()
        node = self._alternatives()
        if self._peek() != ")":
            raise self._error("a group that is not closed")
        self._at += 1
        return node if wrap is None else Ahead(node, wrap)

    def _group_kind(self) -> bool | None:
        """None for a group; for a look-ahead, whether it is negative."""
        if self._peek() != "?":
            return None
        for opening, kind in (("?:", None), ("?=", False), ("?!", True)):
            if self._peek(2) == opening:
                self._at += 2
                return kind
        name = "?P<" if self._peek(3) == "?P<" else "?<"
        end = self._text.find(">", self._at)
        if not self._text.startswith(name, self._at) or self._peek(3) in ("?<=", "?<!") or end < 0:
            raise self._error(f"the group ({self._peek(3)}, which is not supported,")
        if not self._text[self._at + len(name) : end].isidentifier():
            raise self._error("a group with a bad name")
        self._at = end + 1
        return None

    def _escape(self) -> Node:
        char = self._peek()
        if char in ("A", "Z"):
            self._at += 1
            return Start() if char == "A" else End()
        return self._chars(list(self._escaped_ranges()))

    def _escaped_ranges(self) -> Ranges:
        char = self._take()
        if char.lower() in CLASSES:
            ranges = CLASSES[char.lower()]
            return ranges if char.islower() else lang.complement_of(ranges)
        if char in CONTROLS:
            return ((CONTROLS[char], CONTROLS[char]),)
        if char in HEX_LENGTHS:
            code = self._hex(HEX_LENGTHS[char])
            return ((code, code),)
        if char == "c" and self._peek().isascii() and self._peek().isalpha():
            code = ord(self._take()) % 32
            return ((code, code),)
        if char == "0" and not self._peek().isdecimal():
            return ((0, 0),)
        if char.isascii() and char.isalnum():
            self._at -= 1
            raise self._error(f"the escape \\{char}, which is not supported,")
        return ((ord(char), ord(char)),)

    def _hex(self, length: int) -> int:
        digits = self._take(length)
        if any(digit not in "0123456789abcdefABCDEF" for digit in digits):
            raise self._error("an escape with bad hexadecimal digits")
        code = int(digits, 16)
        if 0xD800 <= code <= 0xDBFF and self._peek(2) == "\\u":
            self._at += 2
            return 0x10000 + ((code - 0xD800) << 10) + (int(self._take(4), 16) - 0xDC00)
        return code

    def _char_class(self) -> Language:
        is_negated = self._peek() == "^"
        self._at += is_negated
        if self._peek() == "]":
            raise self._error("an empty character class, which dialects read differently,")
        ranges: list[tuple[int, int]] = []
        while self._peek() != "]":
            ranges.extend(self._class_item())
        self._at += 1
        found = self._chars(ranges)
        if not is_negated:
            return found
        inverse = lang.complement_of(found.ranges if isinstance(found, lang.Chars) else ())
        return lang.chars(inverse)

    def _class_item(self) -> Ranges:
        first = self._class_char()
        if self._peek() != "-" or self._peek(2) == "-]" or len(first) != 1 or first[0][0] != first[0][1]:
            return first
        self._at += 1
        last = self._class_char()
        if len(last) != 1 or last[0][0] != last[0][1]:
            return (*first, (0x2D, 0x2D), *last)
        if last[0][0] < first[0][0]:
            raise self._error("a range that ends before it begins")
        return ((first[0][0], last[0][0]),)

    def _class_char(self) -> Ranges:
        char = self._take()
        if char != "\\":
            return ((ord(char), ord(char)),)
        if self._peek() == "b":
            self._at += 1
            return ((8, 8),)
        return self._escaped_ranges()
