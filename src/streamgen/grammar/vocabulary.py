"""The tokens of a tokenizer as grammars see them: bytes by id, and which ids end a text."""

from __future__ import annotations

import hashlib
import threading
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import streamgen._cpu as _cpu
    from streamgen.text.tokenizer import Tokenizer

MASK_BYTES = 128 << 20  # of token masks that are kept, of all grammars together


class GrammarVocabulary:
    """What a grammar has to know of a tokenizer; one for each model. Safe to share between threads.

    tokens      bytes by id, [vocab_size]; b"" for ids that stand for no text: special tokens, stop ids, padding
    stop_ids    the ids that end a text, ascending
    vocab_size  logits of the model, which may be more than the tokenizer has ids
    digest      fingerprint of the above
    """

    def __init__(
        self, tokens: Iterable[bytes], stop_ids: Iterable[int], *, vocab_size: int, mask_bytes: int = MASK_BYTES
    ) -> None:
        self.stop_ids = tuple(sorted({stop for stop in stop_ids if 0 <= stop < vocab_size}))
        self.tokens = list(tokens)[:vocab_size]
        self.tokens += [b""] * (vocab_size - len(self.tokens))
        for stop in self.stop_ids:
            self.tokens[stop] = b""
        self.vocab_size = vocab_size
        self._mask_bytes = mask_bytes
        self._lock = threading.Lock()  # building takes a while, and is done once

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, *, vocab_size: int | None = None) -> GrammarVocabulary:
        """That of a tokenizer; `vocab_size` is the model's.

        NOTE: special tokens stand for nothing here even if they have a text: a grammar speaks of text alone.
        """
        table = tokenizer.byte_table(skip_special=True)
        tokens = [table[token_id] for token_id in range(tokenizer.vocab_size)]
        size = tokenizer.vocab_size if vocab_size is None else vocab_size
        return cls(tokens, tokenizer.eos_ids, vocab_size=size)

    @cached_property
    def digest(self) -> str:
        """Fingerprint of tokens, stop ids and size."""
        state = hashlib.sha256(f"{self.vocab_size}:{self.stop_ids}".encode())
        for data in self.tokens:
            state.update(len(data).to_bytes(4, "little"))
            state.update(data)
        return state.hexdigest()

    @property
    def trie(self) -> _cpu.TokenTrie:
        """The tokens as a trie of bytes; built when it is first asked for."""
        with self._lock:
            return self._trie

    @property
    def masks(self) -> _cpu.MaskCache:
        """The token masks that are kept, of all grammars over this vocabulary."""
        with self._lock:
            return self._masks

    @cached_property
    def _trie(self) -> _cpu.TokenTrie:
        import streamgen._cpu as _cpu

        return _cpu.TokenTrie(self.tokens)

    @cached_property
    def _masks(self) -> _cpu.MaskCache:
        import streamgen._cpu as _cpu

        return _cpu.MaskCache(self._mask_bytes)
