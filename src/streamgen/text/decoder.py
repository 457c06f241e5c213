"""Incremental decoding: token ids in, exact text out, a token at a time.

The text so far is always `Tokenizer.decode` of the ids so far, less at most the first bytes of one unfinished
character. Nothing is decoded twice: each token's bytes go through one incremental UTF-8 decoder.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamgen.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class TextDecoder:
    """Decodes one sequence. Owned by whoever feeds it; not shared.

    at_start      nothing (or only BOS) stands before the first id: the space that encoding put there is dropped
    skip_special  leave special tokens out of the text
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool, skip_special: bool = True) -> None:
        self._table = tokenizer.byte_table(skip_special=skip_special)
        self._utf8 = _Utf8Decoder("replace")
        self._may_drop_space = at_start and tokenizer.drops_leading_space

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these ids add; the first bytes of an unfinished character are held back."""
        table = self._table
        data = b"".join([table[i] for i in ids])
        if self._may_drop_space and data:
            data = data.removeprefix(b" ")
            self._may_drop_space = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that was never finished, else nothing."""
        return self._utf8.decode(b"", final=True)
