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


_TOKEN = re.compile(
    r"""(?P<run>[^\\.\[(){}*+?|^$\s\#]+)
      | (?P<space>[\s\#])
      | (?P<class>\[\^?\]?(?:\\.|[^\]\\])*\])
      | (?P<escape>\\(?:x\{[0-9A-Fa-f]{1,6}\}|u\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}
                      |U[0-9A-Fa-f]{8}|[pP](?:\{\^?[^{}]*\}|[A-Za-z])|0[0-7]{0,2}|[1-3][0-7]{2}|.))
      | (?P<repeat>(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d*)\}))
      | (?P<open>\((?:\?(?:P?<[A-Za-z_]\w*>|:|[a-zA-Z]*(?:-[a-zA-Z]+)?[:)])|(?!\?)))
      | (?P<comment>\(\?\#[^)]*\))
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_IN_CLASS = re.compile(_TOKEN.pattern.split("(?P<escape>")[1].split("(?P<repeat>")[0].rsplit("|", 1)[0].rsplit(")", 1)[0], re.VERBOSE | re.DOTALL)
