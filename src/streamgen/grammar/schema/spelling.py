"""How JSON text spells strings: languages of what a string holds -> languages of the text between its quotes.

Every character has a fixed set of spellings, and no two characters share one, so that intersection and complement mean
the same before and after. A string without constraints may use every escape that JSON has. A constrained one is
spelled as encoders do: an escape where one is needed, and `\\uXXXX` instead of a character beyond ASCII.
"""

from __future__ import annotations

from functools import lru_cache

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.language import And, Cat, Chars, Language, Not, Or, Ranges, Repeat, Words
from streamgen.grammar.schema.patterns import full_language

SHORT = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
# The control characters that have no short escape.
UNNAMED_CONTROLS = ((0x00, 0x07), (0x0B, 0x0B), (0x0E, 0x1F))
FIRST_BEYOND = 0x7F

_UNICODE_ESCAPE = (
    r"\\u(?:[0-9a-ce-fA-CE-F][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}"
    r"|[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
FREE_CHAR = rf'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|{_UNICODE_ESCAPE})'
# As above from U+007F on.
_ESCAPES_BEYOND_ASCII = (
    r"\\u(?:[1-9a-ce-fA-CE-F][0-9a-fA-F]{3}|0[1-9a-fA-F][0-9a-fA-F]{2}|00[89a-fA-F][0-9a-fA-F]|007[fF]|[dD][0-7][0-9a-fA-F]{2}"
    r"|[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)


@lru_cache(maxsize=1024)
def string_text(held: Language, *, before: str = '"', after: str = '"') -> Language:
    """The JSON text of the strings of a language, quotes included."""
    return lang.cat(lang.literal(before), _inner_text(held), lang.literal(after))


def key_text(names: Language) -> Language:
    """The text of a property's name, with its colon and the space that may follow."""
    return lang.cat(string_text(names), lang.literal(":"), lang.repeat(lang.literal(" "), 0, 1))


def _inner_text(held: Language) -> Language:
    if isinstance(held, Repeat) and held.part == lang.ANY_CHAR:
        return lang.repeat(full_language(FREE_CHAR), held.low, held.high)
    return _spelled(held)


def _spelled(held: Language) -> Language:
    match held:
        case Chars():
            return _char_text(held.ranges)
        case Words():
            return lang.union(*(_word_text(word) for word in held.words))
        case Cat():
            return lang.cat(*map(_spelled, held.parts))
        case Or():
            return lang.union(*map(_spelled, held.parts))
        case And():
            return And(tuple(map(_spelled, held.parts)))
        case Not():
            # NOTE: relative to all spellings, or a second spelling of an excluded string would slip through.
            return And((_spelled(lang.ANY), Not(_spelled(held.part))))
        case Repeat():
            return lang.repeat(_spelled(held.part), held.low, held.high)


def _word_text(word: str) -> Language:
    if word.isascii() and word.isprintable() and '"' not in word and "\\" not in word:
        return lang.words([word])
    return lang.cat(*(_char_text(((ord(char), ord(char)),)) for char in word))


@lru_cache(maxsize=1024)
def _char_text(ranges: Ranges) -> Language:
    raw: list[tuple[int, int]] = []
    options: list[Language] = []
    for low, high in ranges:
        options.extend(_controls(low, min(high, 0x1F)))
        raw.extend(_without_quoted(max(low, 0x20), high))
    short = [SHORT[code] for code in SHORT if any(low <= code <= high for low, high in ranges)]
    if short:
        options.append(lang.cat(lang.literal("\\"), lang.one_of("".join(short))))
    beyond = tuple((max(low, FIRST_BEYOND), high) for low, high in ranges if high >= FIRST_BEYOND)
    return lang.union(lang.chars(raw), *options, *_escapes(beyond))


def _controls(low: int, high: int) -> list[Language]:
    parts = [(max(low, first), min(high, last)) for first, last in UNNAMED_CONTROLS]
    hexes = lang.union(*(_nibbles(first, last, 2) for first, last in parts if first <= last))
    return [] if hexes == lang.NEVER else [lang.cat(lang.literal("\\u00"), hexes)]


def _without_quoted(low: int, high: int) -> list[tuple[int, int]]:
    cuts = [(low, min(high, 0x21)), (max(low, 0x23), min(high, 0x5B)), (max(low, 0x5D), high)]
    return [cut for cut in cuts if cut[0] <= cut[1]]


def _escapes(ranges: Ranges) -> list[Language]:
    if not ranges:
        return []
    if not _common_gap(ranges):
        return [full_language(_ESCAPES_BEYOND_ASCII)]
    basic = [_nibbles(low, min(high, 0xFFFF), 4) for low, high in ranges if low <= 0xFFFF]
    pairs = [_pairs(max(low, 0x10000), high) for low, high in ranges if high > 0xFFFF]
    return [lang.cat(lang.literal("\\u"), lang.union(*basic, *pairs))]


def _common_gap(ranges: Ranges) -> bool:
    """Whether some character beyond printable ASCII is missing."""
    gaps = lang.complement_of(tuple(ranges))
    return any(high >= FIRST_BEYOND for _, high in gaps)


def _nibbles(low: int, high: int, length: int) -> Language:
    """Hexadecimal numbers of `length` digits from low to high."""
    if length == 0:
        return lang.EMPTY
    unit = 16 ** (length - 1)
    first, last = low // unit, high // unit
    if first == last:
        return lang.cat(_nibble(first, first), _nibbles(low % unit, high % unit, length - 1))
    options = []
    if low % unit:
        options.append(lang.cat(_nibble(first, first), _nibbles(low % unit, unit - 1, length - 1)))
        first += 1
    if high % unit != unit - 1:
        options.append(lang.cat(_nibble(last, last), _nibbles(0, high % unit, length - 1)))
        last -= 1
    if first <= last:
        options.append(lang.cat(_nibble(first, last), lang.repeat(_nibble(0, 15), length - 1, length - 1)))
    return lang.union(*options)


def _nibble(low: int, high: int) -> Language:
    digits = "0123456789abcdef"[low : high + 1]
    return lang.one_of(digits + digits.upper())


def _pairs(low: int, high: int) -> Language:
    """Surrogate pairs, without the first `\\u`, of the characters from low to high."""
    low, high = low - 0x10000, high - 0x10000
    first, last = low >> 10, high >> 10
    if first == last:
        return _pair(first, first, low & 0x3FF, high & 0x3FF)
    options = []
    if low & 0x3FF:
        options.append(_pair(first, first, low & 0x3FF, 0x3FF))
        first += 1
    if high & 0x3FF != 0x3FF:
        options.append(_pair(last, last, 0, high & 0x3FF))
        last -= 1
    if first <= last:
        options.append(_pair(first, last, 0, 0x3FF))
    return lang.union(*options)


def _pair(high_low: int, high_high: int, low_low: int, low_high: int) -> Language:
    leading = _nibbles(0xD800 + high_low, 0xD800 + high_high, 4)
    trailing = _nibbles(0xDC00 + low_low, 0xDC00 + low_high, 4)
    return lang.cat(leading, lang.literal("\\u"), trailing)
