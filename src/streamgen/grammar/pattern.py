r"""The dialect of regular expressions: read, checked, and written again for a Rust engine.

What it means is what `re.fullmatch` means to a `str`, so that a caller can check an answer with the standard library:
`\d`, `\w` and `\s` are those of Unicode, `.` is anything but a newline. Lazy quantifiers and names of groups change
nothing. `\p{..}`, `\x{..}`, `\u{..}` and `\z` of Rust are understood too. Whatever a finite automaton cannot do, or what
would mean something else in the middle of a text, is refused by name and position.

Reading is one pass without recursion that also numbers the positions of the pattern (Glushkov's construction), from
which `bounds` estimates the automaton before anybody builds it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Never

from msgspec import Struct, field

from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar import charsets

if TYPE_CHECKING:
    from streamgen.grammar.bounds import CompileLimits
    from streamgen.grammar.charsets import Ranges


class Charset(Struct, frozen=True):
    r"""One kind of position: a set of characters.

    ranges   what it holds; all there is where `text` names properties (`\p{L}`) that only the engine knows
    text     as Rust reads it
    """

    ranges: Ranges
    text: str
    is_exact: bool = True


class Pattern(Struct, frozen=True):
    """A regular expression that was read.

    rust        the same for a Rust engine; None if it matches no text at all
    symbols     which charset each position has, [num_positions]
    follow      the positions that may come after each
    first, last where a match may begin and end; is_nullable: whether "" matches
    """

    rust: str | None
    charsets: tuple[Charset, ...]
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
        raise too_complex("max_regex_chars", limits.max_regex_chars, "characters", len(text))
    return _Reader(text, limits).read()


def too_complex(bound: str, limit: int, unit: str, found: int | str) -> SchemaTooComplex:
    """The refusal that names a bound."""
    count = f"{found:,}" if isinstance(found, int) else found
    message = f"{bound}: expected at most {limit:,} {unit}, got {count}; make the grammar smaller or allow more"
    return SchemaTooComplex(message, bound=bound)


_ALTERNATION, _SEQUENCE, _ATOM = range(3)  # how tightly a text holds together


class _Part(Struct):
    """A piece of the pattern with its positions [begin, end). Its edges lead to nobody outside until it is joined.

    repeats    product of the counted repeats around its innermost position
    is_nothing no text matches
    begins, ends   it holds a ^ or a $
    """

    text: str = ""
    binding: int = _SEQUENCE
    is_nullable: bool = True
    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    begin: int = 0
    end: int = 0
    repeats: int = 1
    is_nothing: bool = False
    begins: bool = False
    ends: bool = False

    def bound_to(self, binding: int) -> str:
        return self.text if self.binding >= binding else f"(?:{self.text})"


class _Branch(Struct):
    """One alternative under way: what is joined, and its newest item, which a quantifier may still take."""

    joined: _Part
    texts: list[str] = field(default_factory=list)
    newest: _Part | None = None
    dollar: int | None = None  # where a $ stood: nothing may follow it


class _Group(Struct):
    flags: frozenset[str]
    opened_at: int
    branch: _Branch
    is_first: bool  # nothing stands before it, so that a ^ in front of it means nothing
    done: list[_Part] = field(default_factory=list)


_ESCAPE = r"""\\(?:x\{[0-9A-Fa-f]{1,6}\}|u\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}
    |[pP](?:\{\^?[^{}]*\}|[A-Za-z])|0[0-7]{0,2}|[1-3][0-7]{2}|.)"""
_TOKEN = re.compile(
    rf"""(?P<run>[^\\.\[(){{*+?|^$\s\#]+)
      | (?P<space>[\s\#])
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
_NEWLINE: Ranges = ((10, 10),)
_REFUSED = {  # what may follow "(?" and is not of the dialect
    "=": "look-ahead",
    "!": "look-ahead",
    "<=": "look-behind",
    "<!": "look-behind",
    "P=": "a back-reference",
    "(": "a conditional group",
    ">": "an atomic group",
}


class _Reader:
    """One pass over a pattern; groups under way are on an explicit stack."""

    def __init__(self, text: str, limits: CompileLimits) -> None:
        self._text = text
        self._limits = limits
        self._charsets: dict[Charset, int] = {}
        self._memo: dict[tuple[str, bool, bool], int] = {}  # of charsets as they are written
        self._symbols: list[int] = []
        self._follow: list[list[int]] = []
        self._groups: list[_Group] = [self._group(frozenset(), 0, is_first=True)]
        self._edges = 0

    def read(self) -> Pattern:
        """The whole of it."""
        at = 0
        while at < len(self._text):
            token = _TOKEN.match(self._text, at)
            assert token is not None, "the last alternative takes any character"
            assert token.lastgroup is not None
            getattr(self, f"_on_{token.lastgroup}")(token[0], at)
            at = token.end()
        if len(self._groups) > 1:
            self._refuse("expected ) for the ( here", self._groups[-1].opened_at)
        part = self._close(self._groups.pop())
        return Pattern(
            None if part.is_nothing else part.text,
            tuple(self._charsets),
            self._symbols,
            self._follow,
            part.first,
            part.last,
            part.is_nullable and not part.is_nothing,
        )

    def _refuse(self, problem: str, at: int) -> Never:
        raise SchemaError(f"regex: {problem}, at character {at}", keyword="pattern")

    # tokens, one method for each group of _TOKEN

    def _on_run(self, text: str, at: int) -> None:
        following = self._text[at + len(text) : at + len(text) + 1]
        if following and following in "*+?{" and len(text) > 1:
            self._literal(text[:-1], at)
            text, at = text[-1], at + len(text) - 1
        self._literal(text, at)

    def _on_space(self, text: str, at: int) -> None:
        self._literal(text, at)

    def _on_charset(self, text: str, at: int) -> None:
        flags = self._groups[-1].flags
        key = (text, "i" in flags, "a" in flags)
        symbol = self._memo.get(key)
        if symbol is None:
            symbol = self._memo[key] = self._symbol(self._read_class(text[1:-1], at + 1))
        self._one(symbol, at)

    def _on_escape(self, text: str, at: int) -> None:
        kind = text[1]
        if kind in "AZz":
            self._anchor(is_end=kind != "A", at=at)
        elif kind in "bB":
            self._refuse(f"a word border (\\{kind}) is not supported: no automaton of bytes has them", at)
        elif kind in "123456789" and len(text) == 2:
            self._refuse(f"a back-reference (\\{kind}) is not supported: no finite automaton has them", at)
        else:
            member = self._escaped(text, at)
            if isinstance(member, int):
                self._literal(chr(member), at)
            else:
                self._one(self._symbol(member), at)

    def _on_repeat(self, text: str, at: int) -> None:
        branch = self._groups[-1].branch
        part = branch.newest
        if part is None:
            self._refuse("expected something to repeat", at)
        if self._text[at - 1] in "*+?}" and getattr(self, "_quantified_at", -1) == at:
            self._repeated_again(text, at)
            return
        low, high = _counts(text)
        if high is not None and high < low:
            self._refuse(f"expected the lower count first, got {text}", at)
        if (part.begins or part.ends) and (high is None or high > 1):
            self._refuse("an anchor inside a repeated group is not supported", at)
        branch.newest = self._repeat(part, low, high)
        self._quantified_at = at + len(text)

    def _repeated_again(self, text: str, at: int) -> None:
        if text == "+":
            self._refuse("a possessive quantifier is not supported: no finite automaton has them", at)
        if text != "?":
            self._refuse("a quantifier after a quantifier: put a group around what is repeated twice", at)

    def _on_comment(self, _text: str, _at: int) -> None:
        pass

    def _on_open(self, text: str, at: int) -> None:
        group = self._groups[-1]
        named = text.startswith(("(?P<", "(?<"))
        flags = group.flags if named or text == "(" else self._flags(text[2:-1], group.flags, at)
        if text.endswith(")"):
            if at != 0:
                self._refuse("flags for the whole pattern stand at its beginning: write (?i:...) for a part", at)
            group.flags = flags
            return
        if len(self._groups) > self._limits.max_regex_nesting:
            limit = self._limits.max_regex_nesting
            raise too_complex("max_regex_nesting", limit, "groups inside each other", f"more at character {at}")
        self._groups.append(self._group(flags, at, is_first=self._is_at_start()))

    def _on_other(self, text: str, at: int) -> None:
        match text:
            case ".":
                flags = self._groups[-1].flags
                everything = ((0, charsets.LAST),)
                self._one(self._symbol(_charset(everything if "s" in flags else charsets.invert(_NEWLINE))), at)
            case "^" | "$":
                self._anchor(is_end=text == "$", at=at)
            case "|":
                group = self._groups[-1]
                group.done.append(self._finish(group.branch))
                group.branch = self._branch()
            case ")":
                if len(self._groups) == 1:
                    self._refuse("expected a ( before this )", at)
                self._append(self._close(self._groups.pop()), at)
            case "{":
                self._literal(text, at)
            case "[":
                self._refuse("expected ] for the [ here", at)
            case "\\":
                self._refuse("expected a character after the backslash", at)
            case _:
                self._refuse_group(at)

    def _refuse_group(self, at: int) -> Never:
        after = self._text[at + 2 : at + 4]
        for start, name in _REFUSED.items():
            if after.startswith(start):
                self._refuse(f"{name} (?{start} is not supported: no finite automaton has them", at)
        self._refuse("an unknown kind of group", at)

    def _flags(self, text: str, flags: frozenset[str], at: int) -> frozenset[str]:
        on, _, off = text.partition("-")
        unknown = sorted((set(on) | set(off)) - set("aimsu"))
        if unknown:
            self._refuse(f"the flag {unknown[0]!r} is not supported: there are a, i, m, s and u", at)
        return (flags | frozenset(on)) - frozenset(off)

    # anchors

    def _is_at_start(self) -> bool:
        group = self._groups[-1]
        return group.is_first and group.branch.newest is None and not group.branch.texts

    def _anchor(self, *, is_end: bool, at: int) -> None:
        branch = self._groups[-1].branch
        if is_end:
            branch.dollar = at if branch.dollar is None else branch.dollar
        elif not self._is_at_start():
            self._refuse("an anchor after the beginning is not supported: the whole text is matched anyway", at)
        else:
            branch.joined.begins = True

    # building

    def _group(self, flags: frozenset[str], at: int, *, is_first: bool) -> _Group:
        return _Group(flags, at, self._branch(), is_first)

    def _branch(self) -> _Branch:
        here = len(self._symbols)
        return _Branch(_Part(begin=here, end=here))

    def _literal(self, text: str, at: int) -> None:
        if "i" in self._groups[-1].flags and text.casefold() != text.swapcase().casefold() + " ":
            for offset, char in enumerate(text):
                folded = charsets.fold(((ord(char), ord(char)),))
                self._one(self._symbol(_charset(folded)), at + offset)
            return
        begin = len(self._symbols)
        self._symbols.extend(map(self._char_symbol, text))
        end = len(self._symbols)
        self._follow.extend([position] for position in range(begin + 1, end))
        self._follow.append([])
        self._check_size(end)
        binding = _ATOM if len(text) == 1 else _SEQUENCE
        self._append(_Part(_escape(text, at), binding, False, [begin], [end - 1], begin, end), at)

    def _one(self, symbol: int, at: int) -> None:
        """A position of a charset."""
        begin = len(self._symbols)
        charset = self._charset_list()[symbol]
        if not charset.ranges:
            self._append(_Part("", _ATOM, False, [], [], begin, begin, is_nothing=True), at)
            return
        self._symbols.append(symbol)
        self._follow.append([])
        self._check_size(begin + 1)
        self._append(_Part(charset.text, _ATOM, False, [begin], [begin], begin, begin + 1), at)
