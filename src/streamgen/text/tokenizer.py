"""Tokenizer: text to ids and ids to exact bytes, whichever container the vocabulary came in.

Encoding is the `tokenizers` library's; it runs in the tokenizer actor's worker threads. Decoding is ours: what a token
adds to a text is a fixed string of bytes, looked up per id, so that text can be made exactly one token at a time.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING

import tokenizers

from streamgen.errors import CorruptWeights, InvalidRequest, UnsupportedModel
from streamgen.text.gguf_tokenizer import read_gguf
from streamgen.text.json_tokenizer import read_json
from streamgen.text.sentencepiece import read_sentencepiece
from streamgen.text.vocabulary import is_panic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from streamgen.checkpoints.base import TokenizerSource
    from streamgen.text.vocabulary import Vocabulary


class Tokenizer:
    """Encodes text and knows what every token id stands for. Safe to share between threads.

    vocab_size       one more than the largest id; a model's head may be wider
    bos_id, eos_ids  as the checkpoint says, None or empty where it has none
    add_bos          whether raw text gets a BOS in front
    special_ids      ids that are left out of texts
    special_tokens  `bos_token`, `eos_token` ... for the chat template
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._core = vocabulary.core
        self._added = {i: token.content for i, token in self._core.get_added_tokens_decoder().items()}
        self._bytes = _ByteTable(self._find_bytes)
        self._visible_bytes = _ByteTable(self._find_visible_bytes)
        self.vocab_size = vocabulary.size
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.add_bos = vocabulary.add_bos
        self.special_ids = vocabulary.special_ids
        self.special_tokens = dict(vocabulary.token_names)
        self.drops_leading_space = vocabulary.drops_leading_space

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Turn text into ids.

        add_bos        None: as the checkpoint says. BOS is not put in front of ids that start with it already. A
                       rendered chat holds its own and is encoded with False
        parse_special  special tokens written in the text become their ids, not the ids of their letters

        Raises:
            InvalidRequest: the text holds lone surrogates, which no encoding can write.
        """
        core = self._core if parse_special else self._literal_core
        # NOTE: encode_batch, because `encode` holds the GIL throughout: 1 MB would stall every thread for a second.
        try:
            ids: list[int] = core.encode_batch([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            raise _explain(error, text) from None
        wants_bos = self.add_bos if add_bos is None else add_bos
        if wants_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, at_start: bool) -> str:
        """Turn ids into text; bytes that are no UTF-8 become U+FFFD.

        at_start   nothing (or only BOS) stands before these ids: the space that encoding put there is dropped
        """
        table = self.byte_table(skip_special=skip_special)
        data = b"".join([table[i] for i in ids])
        if at_start and self.drops_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text; the literal text for special tokens, b"" for ids that are none."""
        return self._bytes[token_id]

    def byte_table(self, *, skip_special: bool) -> dict[int, bytes]:
        """Mapping id -> bytes that fills itself as it is read; with `skip_special` special tokens are b""."""
        return self._visible_bytes if skip_special else self._bytes

    def token_text(self, token_id: int) -> str:
        """The token as text to show, for log-probabilities."""
        return self._bytes[token_id].decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of texts."""
        return token_id in self.special_ids

    def token_id(self, text: str) -> int | None:
        """The id of a special or ordinary piece by its literal text, or None."""
        found: int | None = self._core.token_to_id(text)
        return found

    @cached_property
    def digest(self) -> str:
        """Fingerprint of the vocabulary: what each id stands for, and which are special."""
        state = hashlib.sha256()
        for token_id in range(self.vocab_size):
            data = self._find_bytes(token_id)
            kind = b"s" if token_id in self.special_ids else b"t"
            state.update(b"%s%d:%s" % (kind, len(data), data))
        return state.hexdigest()

    @cached_property
    def _literal_core(self) -> tokenizers.Tokenizer:
        """A second core over the same model that reads special tokens as plain letters.

        The switch is a property of the whole object; flipping it on the shared core would race with other threads.
        """
        core = tokenizers.Tokenizer(self._core.model)
        core.normalizer = self._core.normalizer
        core.pre_tokenizer = self._core.pre_tokenizer
        added = self._core.get_added_tokens_decoder()
        for token_id in sorted(added):
            token = added[token_id]
            (core.add_special_tokens if token.special else core.add_tokens)([token])
        if core.get_added_tokens_decoder().keys() != added.keys():
            core = tokenizers.Tokenizer.from_str(self._core.to_str())
        core.encode_special_tokens = True
        return core

    def _find_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size or token_id in self._vocabulary.silent_ids:
            return b""
        added = self._added.get(token_id)
        if added is not None:
            return added.encode("utf-8", "replace")
        piece = self._core.id_to_token(token_id)
        return self._vocabulary.piece_bytes(piece) if piece is not None else b""

    def _find_visible_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self.special_ids else self._bytes[token_id]


class _ByteTable(dict[int, bytes]):
    """Bytes by id, looked up once: reading a known id is one dict access without Python code."""

    def __init__(self, find: Callable[[int], bytes]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> bytes:
        data = self._find(token_id)
        self[token_id] = data
        return data


def _explain(error: BaseException, text: object) -> BaseException:
    """The error to raise for one of the library's; any other is handed back as it is."""
    if not isinstance(text, str):
        return InvalidRequest(f"text: expected a string, got {type(text).__name__}", param="prompt")
    if isinstance(error, UnicodeEncodeError | TypeError):
        return InvalidRequest("text: expected valid Unicode, got lone surrogates", param="prompt")
    if is_panic(error):
        return CorruptWeights("the tokenizers library broke on this vocabulary")
    return error


def load_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Build the tokenizer of a checkpoint.

    Raises:
        UnsupportedModel: there is none, or it is of a kind that this version cannot run.
        CorruptWeights: it contradicts itself; the message names the field.
    """
    if source.gguf is not None:
        return Tokenizer(read_gguf(source))
    if source.json_path is not None:
        return Tokenizer(read_json(source))
    if source.sentencepiece_path is not None:
        return Tokenizer(read_sentencepiece(source))
    raise UnsupportedModel(
        "no tokenizer: expected tokenizer.json or tokenizer.model beside the weights, or tokenizer metadata in the GGUF"
    )
