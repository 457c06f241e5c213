"""Sets of characters as sorted ranges of code points, and what they become in UTF-8."""

from __future__ import annotations

import functools
import re
import sys
from array import array
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Ranges: TypeAlias = tuple[tuple[int, int], ...]  # inclusive, ascending, neither touching nor overlapping

LAST = 0x10FFFF
_NEVER = ((0, 0), (0xD800, 0xDFFF))  # see `writable`
_LENGTH_ENDS = (0x7F, 0x7FF, 0xFFFF, LAST)  # the last code point of each number of bytes
_MANY_STATES = 8  # states between the bytes of a range that crosses every boundary there is


def merge(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The union."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def invert(ranges: Ranges) -> Ranges:
    """Every other character."""
    gaps, start = [], 0
    for low, high in ranges:
        if low > start:
            gaps.append((start, low - 1))
        start = high + 1
    if start <= LAST:
        gaps.append((start, LAST))
    return tuple(gaps)


def writable(ranges: Ranges) -> Ranges:
    """Those that an output may hold: no surrogates, which UTF-8 cannot write, and no NUL, which ends a text here."""
    if not any(first <= high and last >= low for first, last in ranges for low, high in _NEVER):
        return ranges
    kept = list(ranges)
    for low, high in _NEVER:
        below = [(first, min(last, low - 1)) for first, last in kept if first < low]
        kept = below + [(max(first, high + 1), last) for first, last in kept if last > high]
    return merge(kept)


@functools.cache
def named(escape: str, *, is_ascii: bool) -> Ranges:
    r"""What `\d`, `\w` or `\s` means to Python's `re` in a `str` pattern.

    Asked of `re` itself rather than of a table: tables of other engines differ by a few hundred characters.
    """
    codes = array("I", range(0x80 if is_ascii else LAST + 1))
    text = codes.tobytes().decode(f"utf-32-{sys.byteorder[0]}e", "surrogatepass")
    return tuple((ord(found[0][0]), ord(found[0][-1])) for found in re.finditer(rf"\{escape}+", text))


_MAX_FOLDED = 2_000
_EXTRA_CASES = {"k": "\u212a", "s": "\u017f", "i": "\u0131\u0130", "å": "\u212b", "ß": "\u1e9e", "ω": "\u2126"}


def fold(ranges: Ranges) -> Ranges:
    """With the other case of each letter; a range as wide as an alphabet has both already."""
    more: list[tuple[int, int]] = list(ranges)
    for low, high in ranges:
        if high - low > _MAX_FOLDED:
            continue
        for code in range(low, high + 1):
            char = chr(code)
            cases = {char.lower(), char.upper(), *_EXTRA_CASES.get(char.lower(), "")}
            more.extend((ord(case), ord(case)) for case in cases if len(case) == 1)
    return merge(more)


def byte_cuts(ranges: Ranges) -> set[int]:
    """Every byte at which a range of bytes may begin where these characters are spelled in UTF-8."""
    cuts: set[int] = set()
    for low, high in ranges:
        for first, last in _by_length(low, high):
            for byte in (*chr(first).encode(), *chr(last).encode()):
                cuts.update((byte, byte + 1) if last > 0x7F else (first, last + 1))
    return cuts


def _by_length(low: int, high: int) -> Iterator[tuple[int, int]]:
    """A range in parts that have equally many bytes."""
    for end in _LENGTH_ENDS:
        if low <= end:
            yield low, min(high, end)
            low = end + 1
        if low > high:
            return


def utf8_states(ranges: Ranges) -> int:
    """About how many states an automaton needs between the bytes of these characters."""
    states, beyond = 0, 0
    for low, high in ranges:
        if high < 0x80:
            continue
        beyond += 1
        states += _states_between(max(low, 0x80), high)
    return min(states, _MANY_STATES + beyond // 2)


def _states_between(low: int, high: int) -> int:
    states = 0
    for first, last in _by_length(low, high):
        between = len(chr(last).encode()) - 1
        states += between if first >> 6 == last >> 6 else 2 * between
    return states
