"""The positions of a pattern and which may follow which (Glushkov's construction), built from the inside out.

Counted repeats are written out, so that the size of what a pattern asks for is known before an automaton is built. Each
part also carries its text for a Rust engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct, field

from streamgen.errors import SchemaTooComplex
from streamgen.grammar import charsets

if TYPE_CHECKING:
    from streamgen.grammar.bounds import CompileLimits
    from streamgen.grammar.charsets import Ranges

ALTERNATION, SEQUENCE, ATOM = range(3)  # how tightly a text holds together

_ESCAPES = str.maketrans(
    {chr(code): f"\\x{{{code:X}}}" for code in (*range(32), 127)}
    | {char: f"\\{char}" for char in r"\.+*?()|[]{}^$#&-~"}
)


def too_complex(bound: str, limit: float, unit: str, found: int | str) -> SchemaTooComplex:
    """The refusal that names a bound."""
    count = f"{found:,}" if isinstance(found, int) else found
    message = f"{bound}: expected at most {limit:,} {unit}, got {count}; make the grammar smaller or allow more"
    return SchemaTooComplex(message, bound=bound)


class Charset(Struct, frozen=True):
    r"""What one position takes.

    ranges    the characters; all there are where `text` names properties (`\p{L}`) that only the engine knows
    text      as Rust reads it
    is_exact  whether `ranges` is all of the truth
    """

    ranges: Ranges
    text: str
    is_exact: bool = True


def charset(ranges: Ranges) -> Charset:
    """That of some characters: those that an output may hold."""
    ranges = charsets.writable(ranges)
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return Charset(ranges, escape(chr(ranges[0][0])))
    return Charset(ranges, f"[{''.join(_range_text(low, high) for low, high in ranges)}]")


def _range_text(low: int, high: int) -> str:
    return f"\\x{{{low:X}}}" if low == high else f"\\x{{{low:X}}}-\\x{{{high:X}}}"


def escape(text: str) -> str:
    """Exactly this text, as Rust reads it."""
    return text.translate(_ESCAPES)


class Part(Struct):
    """A piece of the pattern: the positions [begin, end), whose edges stay inside until it is joined to another.

    repeats      product of the counted repeats inside each other
    is_nothing   no text matches
    begins       it holds a ^
    ends_at      where in the pattern it holds a $
    """

    begin: int
    end: int
    text: str = ""
    binding: int = SEQUENCE
    is_nullable: bool = True
    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    repeats: int = 1
    is_nothing: bool = False
    begins: bool = False
    ends_at: int | None = None

    def bound(self, binding: int) -> str:
        """Its text, in a group if it would fall apart."""
        return self.text if self.binding >= binding else f"(?:{self.text})"


class Positions:
    """Every position so far. The newest part is always the last of the arrays.

    charsets   the kinds of position
    symbols    which kind each is, [num_positions]
    follow     the positions that may come after each
    """

    def __init__(self, limits: CompileLimits) -> None:
        self.charsets: list[Charset] = []
        self.symbols: list[int] = []
        self.follow: list[list[int]] = []
        self._limits = limits
        self._ids: dict[Charset, int] = {}
        self._char_ids: dict[str, int] = {}
        self._edges = 0

    def empty(self) -> Part:
        """Matches "" only."""
        here = len(self.symbols)
        return Part(here, here)

    def literal(self, text: str) -> Part:
        """Exactly this text, of at least one character."""
        begin, end = len(self.symbols), len(self.symbols) + len(text)
        self._check_size(end)
        self.symbols.extend(map(self._char_id, text))
        self.follow.extend([position] for position in range(begin + 1, end))
        self.follow.append([])
        binding = ATOM if len(text) == 1 else SEQUENCE
        return Part(begin, end, escape(text), binding, False, [begin], [end - 1])

    def one(self, kind: Charset) -> Part:
        """One character of a set."""
        begin = len(self.symbols)
        if not kind.ranges:
            return Part(begin, begin, is_nullable=False, is_nothing=True)
        self._check_size(begin + 1)
        self.symbols.append(self._id(kind))
        self.follow.append([])
        return Part(begin, begin + 1, kind.text, ATOM, False, [begin], [begin])

    def join(self, left: Part, right: Part) -> Part:
        """One after the other; both are used up. It has no text yet."""
        self._link(left.last, right.first)
        return Part(
            left.begin,
            right.end,
            "",
            SEQUENCE,
            left.is_nullable and right.is_nullable,
            left.first + right.first if left.is_nullable else left.first,
            left.last + right.last if right.is_nullable else right.last,
            max(left.repeats, right.repeats),
            left.is_nothing or right.is_nothing,
            left.begins or right.begins,
            right.ends_at if left.ends_at is None else left.ends_at,
        )

    def either(self, parts: list[Part]) -> Part:
        """Any of some parts."""
        kept = [part for part in parts if not part.is_nothing]
        if len(parts) == 1:
            return parts[0]
        return Part(
            parts[0].begin,
            parts[-1].end,
            "|".join(part.text for part in kept),
            ALTERNATION,
            any(part.is_nullable for part in kept),
            [position for part in kept for position in part.first],
            [position for part in kept for position in part.last],
            max((part.repeats for part in kept), default=1),
            is_nothing=not kept,
            begins=any(part.begins for part in parts),
            ends_at=next((part.ends_at for part in parts if part.ends_at is not None), None),
        )

    def repeat(self, part: Part, low: int, high: int | None) -> Part:
        """`low` to `high` of the newest part, without end if `high` is None; the part is used up."""
        if high == 0 or (part.is_nothing and low == 0):
            return self._drop(part)
        if part.is_nothing:
            return part
        copies = max(low, 1) if high is None else high
        product = part.repeats * copies
        if product > self._limits.max_repeats:
            raise too_complex("max_repeats", self._limits.max_repeats, "repeats, nested ones multiplied", product)
        needed = 1 if part.is_nullable else max(low, 1)  # copies until a match may end
        first, lasts = part.first, [part.last]
        size = part.end - part.begin
        for copy in range(1, copies):
            self._copy(part, copy * size)
            shifted = [position + copy * size for position in part.first]
            self._link(lasts[-1], shifted)
            lasts.append([position + copy * size for position in part.last])
        if high is None:
            self._link(lasts[-1], [position + (copies - 1) * size for position in part.first])
        return Part(
            part.begin,
            part.begin + copies * size,
            part.bound(ATOM) + _quantifier(low, high),
            SEQUENCE,
            part.is_nullable or low == 0,
            first,
            [position for last in lasts[needed - 1 :] for position in last],
            product,
            begins=part.begins,
            ends_at=part.ends_at,
        )

    def _drop(self, part: Part) -> Part:
        del self.symbols[part.begin :], self.follow[part.begin :]
        return Part(part.begin, part.begin, begins=part.begins, ends_at=part.ends_at)

    def _copy(self, part: Part, shift: int) -> None:
        """The part's positions once more. NOTE: edges out of the original may lead to its second copy by now."""
        self._check_size(part.end + shift)
        self.symbols.extend(self.symbols[part.begin : part.end])
        for position in range(part.begin, part.end):
            inside = [after + shift for after in self.follow[position] if after < part.end]
            self._count(len(inside))
            self.follow.append(inside)

    def _link(self, left: list[int], right: list[int]) -> None:
        self._count(len(left) * len(right))
        for position in left:
            self.follow[position].extend(right)

    def _count(self, edges: int) -> None:
        self._edges += edges
        if self._edges > self._limits.max_regex_work:
            limit = self._limits.max_regex_work
            raise too_complex("max_regex_work", limit, "steps to estimate the regex by", "more")

    def _check_size(self, count: int) -> None:
        limit = self._limits.max_positions
        if count > limit:
            raise too_complex("max_positions", limit, "characters with counted repeats written out", "more")

    def _id(self, kind: Charset) -> int:
        known = self._ids.get(kind)
        if known is None:
            known = self._ids[kind] = len(self.charsets)
            self.charsets.append(kind)
        return known

    def _char_id(self, char: str) -> int:
        known = self._char_ids.get(char)
        if known is None:
            known = self._char_ids[char] = self._id(charset(((ord(char), ord(char)),)))
        return known


def _quantifier(low: int, high: int | None) -> str:
    match low, high:
        case 0, 1:
            return "?"
        case 0, None:
            return "*"
        case 1, None:
            return "+"
    return f"{{{low},}}" if high is None else f"{{{low},{high}}}"
