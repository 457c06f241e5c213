"""Regular languages of characters as immutable values: the algebra behind patterns, formats and property names.

Unlike a pattern in text these know intersection and complement, can be asked whether a string is in them and whether
anything is, and can be rewritten character by character. Derivatives do the asking: `derive(L, c)` is what may follow
c in a word of L.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LAST_CHAR = 0x10FFFF
Ranges: TypeAlias = tuple[tuple[int, int], ...]


class Chars(Struct, frozen=True, cache_hash=True):
    """One character out of sorted, disjoint, inclusive ranges of code points."""

    ranges: Ranges


class Words(Struct, frozen=True, cache_hash=True):
    """Finitely many strings, in an order that has no meaning but is kept."""

    words: tuple[str, ...]


class Cat(Struct, frozen=True, cache_hash=True):
    """One part after the other; without parts, the empty string."""

    parts: tuple[Language, ...]


class Or(Struct, frozen=True, cache_hash=True):
    """Any of the parts; without parts, nothing."""

    parts: tuple[Language, ...]


class And(Struct, frozen=True, cache_hash=True):
    """All of the parts at once."""

    parts: tuple[Language, ...]


class Not(Struct, frozen=True, cache_hash=True):
    """Every string that is not in the part."""

    part: Language


class Repeat(Struct, frozen=True, cache_hash=True):
    """`part` low to high times; high None is without end."""

    part: Language
    low: int
    high: int | None


Language: TypeAlias = Chars | Words | Cat | Or | And | Not | Repeat

# Surrogates are no characters: no UTF-8 text holds one.
ANY_CHAR = Chars(((0, 0xD7FF), (0xE000, LAST_CHAR)))
ANY = Repeat(ANY_CHAR, 0, None)
EMPTY = Cat(())
NEVER = Or(())


def chars(ranges: Iterable[tuple[int, int]]) -> Language:
    """One character of any of the ranges, which may overlap."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        elif low <= high:
            merged.append((low, high))
    return Chars(tuple(merged)) if merged else NEVER


def one_of(text: str) -> Language:
    """One of the characters of a text."""
    return chars((ord(c), ord(c)) for c in text)


def literal(text: str) -> Language:
    """Exactly this text."""
    return Cat(tuple(Chars(((ord(c), ord(c)),)) for c in text)) if len(text) != 1 else one_of(text)


def words(texts: Iterable[str]) -> Language:
    """Exactly these texts."""
    unique = tuple(dict.fromkeys(texts))
    return Words(unique) if unique else NEVER


def complement_of(ranges: Ranges) -> Ranges:
    """The characters that the ranges leave out."""
    edges = [(-1, -1), *ranges, (LAST_CHAR + 1, LAST_CHAR + 1)]
    gaps = tuple((a[1] + 1, b[0] - 1) for a, b in pairwise(edges) if a[1] + 1 <= b[0] - 1)
    return _common(gaps, ANY_CHAR.ranges)


def _common(left: Ranges, right: Ranges) -> Ranges:
    return tuple((max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) <= min(b, d))


def cat(*parts: Language) -> Language:
    """One after the other."""
    flat: list[Language] = []
    for part in parts:
        if part == NEVER:
            return NEVER
        flat.extend(part.parts if isinstance(part, Cat) else (part,))
    if ANY in flat and len(flat) > 1:
        flat = _beside_any(_beside_any(flat)[::-1])[::-1]
    return flat[0] if len(flat) == 1 else Cat(tuple(flat))


def _beside_any(parts: list[Language]) -> list[Language]:
    """The parts without repetition that a following ANY allows anyway: large counts cost automata a lot."""
    kept: list[Language] = []
    for part in parts:
        if part == ANY:
            while kept and kept[-1] != (fewer := _least(kept[-1])):
                kept[-1:] = [] if fewer == EMPTY else [fewer]
            if kept and kept[-1] == ANY:
                continue
        kept.append(part)
    return kept


def _least(part: Language) -> Language:
    """A repetition without the times that are not needed."""
    return repeat(part.part, part.low, part.low) if isinstance(part, Repeat) and part != ANY else part


def repeat(part: Language, low: int = 0, high: int | None = None) -> Language:
    """A part several times."""
    if high == 0 or part == EMPTY:
        return EMPTY
    if part == NEVER:
        return EMPTY if low == 0 else NEVER
    if (low, high) == (1, 1):
        return part
    if isinstance(part, Repeat) and part.low <= 1 and part.high is None and high is None:
        return Repeat(part.part, min(low, part.low), None)
    return Repeat(part, low, high)


def union(*parts: Language) -> Language:
    """Any of them."""
    flat = dict.fromkeys(_flat(parts, Or))
    if ANY in flat:
        return ANY
    finite = [word for part in flat if isinstance(part, Words) for word in part.words]
    single = [span for part in flat if isinstance(part, Chars) for span in part.ranges]
    rest = [part for part in flat if not isinstance(part, Words | Chars)]
    kept = [part for part in (words(finite), chars(single), *rest) if part != NEVER]
    return kept[0] if len(kept) == 1 else Or(tuple(kept))


def _flat(parts: Iterable[Language], kind: type[Or] | type[And]) -> Iterator[Language]:
    for part in parts:
        if isinstance(part, kind):
            yield from part.parts
        else:
            yield part


def both(*parts: Language) -> Language:
    """All of them at once, simplified where that is easy."""
    flat = [part for part in dict.fromkeys(_flat(parts, And)) if part != ANY]
    if NEVER in flat or any(isinstance(part, Not) and part.part in flat for part in flat):
        return NEVER
    finite = next((part for part in flat if isinstance(part, Words)), None)
    if finite is not None:
        tests = [_member_test(part) for part in flat if part is not finite]
        return words(word for word in finite.words if all(test(word) for test in tests))
    return _both_infinite(flat)


def _member_test(part: Language) -> Callable[[str], bool]:
    """`matches` for many texts."""
    if isinstance(part, Words):
        return frozenset(part.words).__contains__
    if isinstance(part, Not) and isinstance(part.part, Words):
        excluded = frozenset(part.part.words)
        return lambda text: text not in excluded
    return lambda text: matches(part, text)


def _both_infinite(flat: list[Language]) -> Language:
    lengths = [part for part in flat if isinstance(part, Repeat) and part.part == ANY_CHAR]
    excluded = [
        word for part in flat if isinstance(part, Not) and isinstance(part.part, Words) for word in part.part.words
    ]
    rest = [_without(part, frozenset(excluded)) for part in flat if part not in lengths and not _excluded_words(part)]
    low = max((part.low for part in lengths), default=0)
    high = min((part.high for part in lengths if part.high is not None), default=None)
    if (high is not None and low > high) or NEVER in rest:
        return NEVER
    excluded = [word for word in excluded if low <= len(word) and (high is None or len(word) <= high)]
    if any(isinstance(part, Words) for part in rest):
        return both(*rest, *lengths, negate(words(excluded)))
    rest = _drop_lengths(rest, low, high)
    rest.extend([Not(words(excluded))] if excluded else [])
    return rest[0] if len(rest) == 1 else And(tuple(rest)) if rest else ANY


def _excluded_words(part: Language) -> tuple[str, ...]:
    return part.part.words if isinstance(part, Not) and isinstance(part.part, Words) else ()


def _without(part: Language, excluded: frozenset[str]) -> Language:
    """What the union's own words leave once these are excluded anyway."""
    if not isinstance(part, Or) or not excluded:
        return part
    return union(*(words(w for w in p.words if w not in excluded) if isinstance(p, Words) else p for p in part.parts))


def _drop_lengths(rest: list[Language], low: int, high: int | None) -> list[Language]:
    """The parts with a length of low to high, which is left out where one of them implies it."""
    if not low and high is None:
        return rest
    for part in rest:
        shortest, longest = length_range(part)
        low = 0 if shortest >= low else low
        high = None if high is not None and longest is not None and longest <= high else high
    return [*rest, Repeat(ANY_CHAR, low, high)] if low or high is not None else rest


def negate(part: Language) -> Language:
    """Every other string."""
    if isinstance(part, Not):
        return part.part
    if isinstance(part, Or):
        return both(*map(negate, part.parts))
    if isinstance(part, And):
        return union(*map(negate, part.parts))
    if isinstance(part, Repeat) and part.part == ANY_CHAR:
        shorter = [Repeat(ANY_CHAR, 0, part.low - 1)] if part.low else []
        longer = [] if part.high is None else [Repeat(ANY_CHAR, part.high + 1, None)]
        return union(*(EMPTY if p.high == 0 else p for p in (*shorter, *longer)))
    return Not(Words(("",)) if part == EMPTY else part)


@lru_cache(maxsize=20_000)
def length_range(part: Language) -> tuple[int, int | None]:
    """Bounds on the number of characters of its words; None is no bound."""
    match part:
        case Chars():
            return 1, 1
        case Words():
            return min(map(len, part.words)), max(map(len, part.words))
        case Cat():
            ranges = [length_range(p) for p in part.parts]
            return sum(low for low, _ in ranges), _sum_or_none(high for _, high in ranges)
        case Or():
            ranges = [length_range(p) for p in part.parts]
            highs = [high for _, high in ranges]
            return min((low for low, _ in ranges), default=0), None if None in highs else max(highs, default=0)  # type: ignore[type-var]  # None is excluded
        case And():
            ranges = [length_range(p) for p in part.parts]
            finite = [high for _, high in ranges if high is not None]
            return max(low for low, _ in ranges), min(finite, default=None)
        case Not():
            return 0, None
        case Repeat():
            low, high = length_range(part.part)
            return low * part.low, None if high is None or part.high is None else high * part.high


def max_repeats(part: Language) -> int:
    """The largest product of counts that stand inside of each other."""
    match part:
        case Repeat():
            return max(part.low, part.high or 1, 1) * max_repeats(part.part)
        case Cat() | Or() | And():
            return max(map(max_repeats, part.parts), default=1)
        case Not():
            return max_repeats(part.part)
        case _:
            return 1


def _sum_or_none(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def accepts_empty(part: Language) -> bool:
    """Whether the empty string is one of its words."""
    match part:
        case Chars():
            return False
        case Words():
            return "" in part.words
        case Cat() | And():
            return all(map(accepts_empty, part.parts))
        case Or():
            return any(map(accepts_empty, part.parts))
        case Not():
            return not accepts_empty(part.part)
        case Repeat():
            return part.low == 0 or accepts_empty(part.part)


@lru_cache(maxsize=20_000)
def derive(part: Language, char: int) -> Language:
    """What may follow a character."""
    match part:
        case Chars():
            return EMPTY if any(low <= char <= high for low, high in part.ranges) else NEVER
        case Words():
            first = chr(char)
            return words(word[1:] for word in part.words if word.startswith(first))
        case Cat():
            return _derive_cat(part, char)
        case Or():
            return union(*(derive(p, char) for p in part.parts))
        case And():
            return both(*(derive(p, char) for p in part.parts))
        case Not():
            return negate(derive(part.part, char))
        case Repeat():
            again = repeat(part.part, max(part.low - 1, 0), None if part.high is None else part.high - 1)
            return cat(derive(part.part, char), again)


def _derive_cat(part: Cat, char: int) -> Language:
    options: list[Language] = []
    for index, first in enumerate(part.parts):
        options.append(cat(derive(first, char), *part.parts[index + 1 :]))
        if not accepts_empty(first):
            break
    return union(*options)


def matches(part: Language, text: str) -> bool:
    """Whether a text is one of its words."""
    for char in text:
        part = derive(part, ord(char))
        if part == NEVER:
            return False
    return accepts_empty(part)


@lru_cache(maxsize=20_000)
def has_operators(part: Language) -> bool:
    """Whether it needs intersection or complement."""
    match part:
        case And() | Not():
            return True
        case Cat() | Or():
            return any(map(has_operators, part.parts))
        case Repeat():
            return has_operators(part.part)
        case _:
            return False


@lru_cache(maxsize=2_000)
def is_empty(part: Language, *, max_steps: int = 3_000) -> bool:
    """Whether it is certain that it has no words: False where looking for one took too long."""
    if not has_operators(part):
        return part == NEVER
    seen = {part}
    pending = [part]
    while pending:
        state = pending.pop()
        if accepts_empty(state):
            return False
        samples = _samples(state)
        following = {derive(state, char) for char in samples} - seen - {NEVER}
        seen |= following
        pending.extend(following)
        max_steps -= len(samples)
        if max_steps < 0:
            return False
    return True


def _samples(part: Language) -> list[int]:
    """One character of every set of characters that a word's first one is never told apart in."""
    cuts = {0, 0xE000}
    for low, high in _first_spans(part):
        cuts |= {low, high + 1}
    return [cut for cut in sorted(cuts) if cut <= LAST_CHAR and not 0xD800 <= cut <= 0xDFFF]


def _first_spans(part: Language) -> Iterator[tuple[int, int]]:
    match part:
        case Chars():
            yield from part.ranges
        case Words():
            yield from ((ord(c), ord(c)) for c in {word[0] for word in part.words if word})
        case Cat():
            for p in part.parts:
                yield from _first_spans(p)
                if not accepts_empty(p):
                    break
        case Or() | And():
            for p in part.parts:
                yield from _first_spans(p)
        case Not() | Repeat():
            yield from _first_spans(part.part)
