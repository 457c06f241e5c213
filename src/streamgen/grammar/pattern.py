r"""The dialect of regular expressions: read, checked, and written again for a Rust engine.

A pattern means what `re.fullmatch` means by it, so that an answer can be checked with the standard library: `\d`, `\w`
and `\s` are those of Unicode, `.` is anything but a newline. Lazy quantifiers and names of groups change nothing.
`\p{..}`, `\x{..}`, `\u{..}` and `\z` of Rust are understood too. No text holds the character NUL. What a finite
automaton cannot do, and what would mean something else in the middle of a text, is refused by name and position.
Reading is one pass without recursion.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Never

from msgspec import Struct, field

from streamgen.errors import SchemaError
from streamgen.grammar import charsets
from streamgen.grammar.positions import SEQUENCE, Charset, Part, Positions, charset, too_complex

if TYPE_CHECKING:
    from streamgen.grammar.bounds import CompileLimits
    from streamgen.grammar.charsets import Ranges


class Pattern(Struct, frozen=True):
    """A regular expression that was read.

    rust        the same for a Rust engine; None if no text matches
    charsets    the kinds of position that there are
    symbols     which of them each position is, [num_positions]
    follow      the positions that may come after each
    first, last where a match may begin and end; "" matches too if it `is_nullable`
    """

    rust: str | None
    charsets: list[Charset]
    symbols: list[int]
    follow: list[list[int]]
    first: list[int]
    last: list[int]
    is_nullable: bool


def read_pattern(text: str, limits: CompileLimits) -> Pattern:
    """Parse it.

    Raises:
        SchemaError: it is no regular expression of the dialect. SchemaTooComplex: it passes a limit.
    """
    if len(text) > limits.max_regex_chars:
        raise too_complex("max_regex_chars", limits.max_regex_chars, "characters of regex", len(text))
    return _Reader(text, limits).read()


class _Branch(Struct):
    """One alternative under way: what is joined, and its newest part, which a quantifier may still take."""

    joined: Part
    texts: list[str] = field(default_factory=list)
    binding: int = SEQUENCE
    newest: Part | None = None
    is_quantified: bool = False  # the newest part is
    dollar: int | None = None  # where a $ stood: nothing may follow it

    @property
    def is_fresh(self) -> bool:
        return self.newest is None and not self.texts


class _Group(Struct):
    """A parenthesis under way. `is_first`: nothing stands before it, so that a ^ at its beginning means nothing."""

    flags: frozenset[str]
    opened_at: int
    is_first: bool
    branch: _Branch
    done: list[Part] = field(default_factory=list)


_ESCAPE = r"""\\(?:x\{[0-9A-Fa-f]{1,6}\}|u\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}
    |[pP](?:\{\^?[^{}]*\}|[A-Za-z])|0[0-7]{0,2}|[1-3][0-7]{2}|.)"""
_TOKEN = re.compile(
    rf"""(?P<run>[^\\.\[(){{*+?|^$]+)
      | (?P<charset>\[\^?\]?(?:\\.|[^\]\\])*\])
      | (?P<escape>{_ESCAPE})
      | (?P<repeat>[*+?]|\{{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\}})
      | (?P<comment>\(\?\#[^)]*\))
      | (?P<open>\((?:\?(?:P?<[A-Za-z_]\w*>|[a-zA-Z]*(?:-[a-zA-Z]+)?[:)])|(?!\?)))
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_MEMBER = re.compile(rf"(?P<escape>{_ESCAPE})|(?P<char>.)", re.VERBOSE | re.DOTALL)
_CONTROLS = {"n": 10, "t": 9, "r": 13, "f": 12, "v": 11, "a": 7}
_EVERYTHING: Ranges = ((0, charsets.LAST),)
_NO_NEWLINE = charsets.invert(((10, 10),))
_NOT_REGULAR = {  # by what follows "(?"
    "=": "look-ahead",
    "!": "look-ahead",
    "<=": "look-behind",
    "<!": "look-behind",
    "P=": "a back-reference",
    "(": "a conditional group",
    ">": "an atomic group",
}


class _Reader:
    """One pass over a pattern; the groups under way are on a stack of its own."""

    def __init__(self, text: str, limits: CompileLimits) -> None:
        self._text = text
        self._limits = limits
        self._positions = Positions(limits)
        self._classes: dict[tuple[str, frozenset[str]], Charset] = {}  # as they are written
        self._groups = [_Group(frozenset(), 0, True, self._branch())]

    def read(self) -> Pattern:
        """The whole of it."""
        text, at, match = self._text, 0, _TOKEN.match
        while at < len(text):
            token = match(text, at)
            assert token is not None, "the last alternative takes any character"
            self._take(token.lastgroup, token[0], at)
            at = token.end()
        if len(self._groups) > 1:
            self._refuse("expected a ) for the ( here", self._groups[-1].opened_at)
        part = self._close()
        positions = self._positions
        return Pattern(
            None if part.is_nothing else part.text,
            positions.charsets,
            positions.symbols,
            positions.follow,
            part.first,
            part.last,
            part.is_nullable,
        )

    def _take(self, kind: str | None, text: str, at: int) -> None:
        match kind:
            case "run":
                self._run(text, at)
            case "charset":
                self._add(self._positions.one(self._class(text, at)))
            case "escape":
                self._escape(text, at)
            case "repeat":
                self._repeat(text, at)
            case "open":
                self._open(text, at)
            case "other":
                self._other(text, at)

    def _refuse(self, problem: str, at: int) -> Never:
        raise SchemaError(f"regex: {problem}, at character {at}", keyword="pattern")

    # literals and sets

    def _run(self, text: str, at: int) -> None:
        """Characters that stand for themselves; a quantifier after them takes the last one alone."""
        if len(text) > 1 and self._text[at + len(text) : at + len(text) + 1] in ("*", "+", "?", "{"):
            self._literal(text[:-1], at)
            text, at = text[-1], at + len(text) - 1
        self._literal(text, at)

    def _literal(self, text: str, at: int) -> None:
        if "i" in self._groups[-1].flags:
            for char in text:
                folded = charset(charsets.fold(((ord(char), ord(char)),)))
                self._add(self._positions.one(folded))
        else:
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                self._refuse("a lone surrogate is no character that UTF-8 can write", at)
            if "\0" in text:
                self._refuse("the character NUL is never written", at)
            self._add(self._positions.literal(text))

    def _escape(self, text: str, at: int) -> None:
        kind = text[1]
        if kind in "AZz":
            self._anchor(is_end=kind != "A", at=at)
        elif kind in "bB":
            self._refuse(f"a word border (\\{kind}) is not supported: write what may stand there", at)
        elif kind in "123456789" and len(text) == 2:
            self._refuse(f"a back-reference (\\{kind}) is not supported: no finite automaton has them", at)
        else:
            found = self._escaped(text, at)
            if isinstance(found, int):
                self._literal(chr(found), at)
            else:
                self._add(self._positions.one(found))

    def _escaped(self, text: str, at: int) -> int | Charset:
        """The character or the set that an escape stands for, inside a class and outside."""
        kind, rest = text[1], text[2:]
        if kind in "xuU" and rest:
            code = int(rest.strip("{}"), 16)
            if code > charsets.LAST:
                self._refuse(f"{text} is past the last character there is", at)
            return code
        if kind in "pP" and rest:
            return Charset(_EVERYTHING, f"[{text}--\\x00]", is_exact=False)
        if kind in "01234567" and text[1:].isdigit():
            return int(text[1:], 8)
        if kind in "dwsDWS":
            return self._named(kind)
        if kind in _CONTROLS:
            return _CONTROLS[kind]
        if kind.isascii() and kind.isalnum():
            self._refuse(f"the escape \\{kind} is not known", at)
        return ord(kind)

    def _named(self, kind: str) -> Charset:
        ranges = charsets.named(kind.lower(), is_ascii="a" in self._groups[-1].flags)
        return charset(ranges if kind.islower() else charsets.invert(ranges))

    def _class(self, text: str, at: int) -> Charset:
        key = text, self._groups[-1].flags
        known = self._classes.get(key)
        if known is None:
            known = self._classes[key] = self._read_class(text, at)
        return known

    def _read_class(self, text: str, at: int) -> Charset:
        is_inverted = text.startswith("[^")
        ranges, properties = self._members(text, 2 if is_inverted else 1, at)
        if "i" in self._groups[-1].flags:
            ranges = charsets.fold(ranges)
        if properties:
            exact = f"[{'^' if is_inverted else ''}{properties}{charset(ranges).text if ranges else ''}]"
            return Charset(_EVERYTHING, f"[{exact}--\\x00]", is_exact=False)
        return charset(charsets.invert(ranges) if is_inverted else ranges)

    def _members(self, text: str, start: int, at: int) -> tuple[Ranges, str]:
        """What is listed from `start` on, and the properties among it as text."""
        ranges: list[tuple[int, int]] = []
        properties, low = "", None
        tokens = [(found[0], at + found.start()) for found in _MEMBER.finditer(text, start, len(text) - 1)]
        index = 0
        while index < len(tokens):
            token, where = tokens[index]
            if token == "[" and tokens[index + 1 : index + 2] and tokens[index + 1][0] == ":":
                self._refuse("classes of POSIX ([:alpha:]) are not supported: write the characters", where)
            low = self._member(token, where)
            is_range = index + 2 < len(tokens) and tokens[index + 1][0] == "-"
            if is_range:
                high = self._member(*tokens[index + 2])
                if not isinstance(low, int) or not isinstance(high, int) or high < low:
                    self._refuse("expected a range from a character to one that is not before it", where)
                ranges.append((low, high))
            elif isinstance(low, int):
                ranges.append((low, low))
            elif low.is_exact:
                ranges.extend(low.ranges)
            else:
                properties += low.text
            index += 3 if is_range else 1
        return charsets.merge(ranges), properties

    def _member(self, token: str, at: int) -> int | Charset:
        if len(token) == 1:
            return ord(token)
        if token == "\\b":
            return 8
        return self._escaped(token, at)

    # structure

    def _other(self, text: str, at: int) -> None:
        match text:
            case ".":
                any_char = _EVERYTHING if "s" in self._groups[-1].flags else _NO_NEWLINE
                self._add(self._positions.one(charset(any_char)))
            case "^" | "$":
                self._anchor(is_end=text == "$", at=at)
            case "|":
                group = self._groups[-1]
                group.done.append(self._finish(group.branch))
                group.branch = self._branch()
            case ")":
                if len(self._groups) == 1:
                    self._refuse("expected a ( before this )", at)
                part = self._close()
                self._add(part)
                self._groups[-1].branch.dollar = part.ends_at
            case "{":
                self._literal(text, at)
            case "[":
                self._refuse("expected a ] for the [ here", at)
            case "\\":
                self._refuse("expected a character after the backslash", at)
            case _:
                self._refuse_group(at)

    def _refuse_group(self, at: int) -> Never:
        after = self._text[at + 2 : at + 4]
        for start, name in _NOT_REGULAR.items():
            if after.startswith(start):
                self._refuse(f"{name}, (?{start}, is not supported: no finite automaton has them", at)
        self._refuse("a group of an unknown kind", at)

    def _open(self, text: str, at: int) -> None:
        group = self._groups[-1]
        is_named = text == "(" or text.startswith(("(?P<", "(?<"))
        flags = group.flags if is_named else self._flags(text[2:-1], group.flags, at)
        if text.endswith(")"):
            if at != 0:
                self._refuse("flags of the whole pattern stand at its beginning: write (?i:...) for a part", at)
            group.flags = flags
            return
        limit = self._limits.max_regex_nesting
        if len(self._groups) > limit:
            raise too_complex("max_regex_nesting", limit, "groups inside each other", f"one more at character {at}")
        is_first = group.is_first and group.branch.is_fresh
        self._groups.append(_Group(flags, at, is_first, self._branch()))

    def _flags(self, text: str, flags: frozenset[str], at: int) -> frozenset[str]:
        on, _, off = text.partition("-")
        unknown = sorted({*on, *off} - {*"aimsu"})
        if unknown:
            self._refuse(f"the flag {unknown[0]!r} is not supported: there are a, i, m, s and u", at)
        return (flags | {*on}) - {*off}

    def _anchor(self, *, is_end: bool, at: int) -> None:
        group = self._groups[-1]
        if is_end:
            group.branch.joined.ends_at = group.branch.dollar = at
        elif group.is_first and group.branch.is_fresh:
            group.branch.joined.begins = True
        else:
            self._refuse("an anchor in the middle is not supported: the whole text is matched in any case", at)

    def _repeat(self, text: str, at: int) -> None:
        branch = self._groups[-1].branch
        part = branch.newest
        if part is None:
            self._refuse("expected something to repeat", at)
        if branch.is_quantified:
            if text == "?":  # shortest first: the same texts match
                branch.is_quantified = False
                return
            kind = "a possessive quantifier" if text == "+" else "a quantifier of a quantifier"
            self._refuse(f"{kind} is not supported: put a group around what is repeated twice", at)
        low, high = _counts(text)
        if high is not None and high < low:
            self._refuse("expected the lower count first", at)
        if (part.begins or part.ends_at is not None) and (high is None or high > 1):
            self._refuse("an anchor in a repeated group is not supported", at)
        branch.newest = self._positions.repeat(part, low, high)
        branch.is_quantified = True

    # building

    def _branch(self) -> _Branch:
        return _Branch(self._positions.empty())

    def _add(self, part: Part) -> None:
        branch = self._groups[-1].branch
        if branch.dollar is not None:
            self._refuse(
                "an anchor in the middle is not supported: the whole text is matched in any case", branch.dollar
            )
        self._settle(branch)
        branch.newest = part
        branch.is_quantified = False

    def _settle(self, branch: _Branch) -> None:
        """Join the newest part to those before it."""
        if branch.newest is not None:
            branch.binding = SEQUENCE if branch.texts else branch.newest.binding
            branch.texts.append(branch.newest.bound(SEQUENCE))
            branch.joined = self._positions.join(branch.joined, branch.newest)
            branch.newest = None

    def _finish(self, branch: _Branch) -> Part:
        self._settle(branch)
        branch.joined.text = branch.texts[0] if len(branch.texts) == 1 else "".join(branch.texts)
        branch.joined.binding = branch.binding
        return branch.joined

    def _close(self) -> Part:
        """The innermost group as one part."""
        group = self._groups.pop()
        group.done.append(self._finish(group.branch))
        return self._positions.either(group.done)


def _counts(text: str) -> tuple[int, int | None]:
    match text:
        case "*":
            return 0, None
        case "+":
            return 1, None
        case "?":
            return 0, 1
    low, comma, high = text[1:-1].partition(",")
    if not comma:
        return int(low), int(low)
    return int(low or 0), int(high) if high else None
