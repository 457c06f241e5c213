"""Incremental decoding: token ids in, exact text out, a token at a time.

The text so far is always `Tokenizer.decode` of the ids so far, less at most the first bytes of one unfinished
character. Nothing is decoded twice but those bytes, of which there are at most three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamgen.text.tokenizer import Tokenizer

# Second bytes that may follow a first byte, where they are fewer than 0x80..0xBF: others would be too long a spelling,
# half a surrogate pair, or past U+10FFFF (RFC 3629).
_SECOND_BYTES = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


class TextDecoder:
    """Decodes one sequence. Owned by whoever feeds it; not shared.

    at_start      nothing (or only BOS) stands before the first id: the space that encoding put there is dropped
    skip_special  leave special tokens out of the text
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool, skip_special: bool = True) -> None:
        self._table = tokenizer.byte_table(skip_special=skip_special)
        self._may_drop_space = at_start and tokenizer.drops_leading_space
        self._held = b""

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids add; the first bytes of an unfinished character are held back."""
        table = self._table
        data = b"".join([table[i] for i in ids])
        if not data:
            return ""
        if self._may_drop_space:
            self._may_drop_space = False
            data = data.removeprefix(b" ")
        data = self._held + data
        shown = len(data) - count_unfinished(data)
        self._held = data[shown:]
        return data[:shown].decode("utf-8", "replace")

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that was never finished, else nothing."""
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


def count_unfinished(data: bytes) -> int:
    """How many bytes at the end of `data` are the beginning of a character that further bytes could complete.

    Python's own incremental decoder would also hold back halves of surrogate pairs, which nothing can complete.
    """
    for count in (1, 2, 3):
        if count > len(data):
            return 0
        first = data[-count]
        if first < 0x80:
            return 0
        if first >= 0xC0:
            return count if _size_of(first) > count and _may_follow(first, data[len(data) - count + 1 :]) else 0
    return 0


def _size_of(first: int) -> int:
    """Length of the character that a first byte announces; 0 for bytes that are none."""
    if 0xC2 <= first < 0xE0:
        return 2
    if 0xE0 <= first < 0xF0:
        return 3
    return 4 if 0xF0 <= first < 0xF5 else 0


def _may_follow(first: int, rest: bytes) -> bool:
    low, high = _SECOND_BYTES.get(first, (0x80, 0xBF))
    return not rest or low <= rest[0] <= high
