"""The tokenizer inside a GGUF file: vocabulary, merges or scores, and token types from its `tokenizer.ggml.*` metadata.

llama.cpp's tokenizer is the reference for these files; where transformers' conversion of the same metadata gives other
ids, this follows llama.cpp.
"""

from __future__ import annotations

from itertools import repeat
from operator import contains
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import models, pre_tokenizers

from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.text import sentencepiece
from streamgen.text.byte_level import byte_level_piece_bytes, find_pre_tokenizer
from streamgen.text.vocabulary import SPECIAL_TYPES, TokenType, Vocabulary, add_tokens, library_errors, unique_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streamgen.checkpoints.base import TokenizerSource

_PREFIX = "tokenizer.ggml."

# Control tokens that end a turn, by their text: most files name only one end-of-text id, chat models need all.
_END_TEXTS = frozenset(
    """<|im_end|> <|endoftext|> <|eot_id|> <|eom_id|> <|end_of_text|> <|end|> <|return|> <|call|> <end_of_turn>
    </s> <eos> <EOT> [EOT] [EOS] <end_of_utterance> <｜end▁of▁sentence｜>""".split()
)


def read_gguf(source: TokenizerSource) -> Vocabulary:
    """Build the vocabulary from `source.gguf`."""
    assert source.gguf is not None, "the caller checked the metadata"
    metadata = _Metadata(source.gguf)
    model = metadata.text("model")
    if model is None:
        raise UnsupportedModel("no tokenizer: the GGUF file has no tokenizer.ggml.model")
    build = _BUILDERS.get(model)
    if build is None:
        known = ", ".join(_BUILDERS)
        raise UnsupportedModel(f"tokenizer.ggml.model: tokenizer {model!r} is not supported; known are {known}")
    return build(metadata, source)


class _Metadata:
    """Checked access to the `tokenizer.ggml.*` keys."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens = _strings(self._array("tokens"), "tokens")
        self.types = self._token_types()
        normal = int(TokenType.NORMAL)  # nearly all are, and comparing with a member of an enumeration is slow
        self.unusual = [(i, kind) for i, kind in enumerate(self.types) if kind != normal]

    def text(self, key: str) -> str | None:
        value: str | None = self._scalar(key, str)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._scalar(key, bool)
        return default if value is None else value

    def token_id(self, key: str) -> int | None:
        """An id, checked against the vocabulary; None where the file has none."""
        value: int | None = self._scalar(key, int)
        if value is None or value == 2**32 - 1:  # some converters write "none" as -1
            return None
        if not 0 <= value < len(self.tokens):
            raise CorruptWeights(f"{_PREFIX}{key}: expected an id < {len(self.tokens)}, got {value}")
        return value

    def merges(self) -> list[tuple[str, str]]:
        """The merges, best first. Of a merge that is there twice the first counts, as in llama.cpp."""
        texts = _strings(self._array("merges"), "merges")
        if len(set(texts)) != len(texts):
            texts = list(dict.fromkeys(texts))
        pieces = " ".join(texts).split(" ")  # byte-level pieces hold no plain space
        # One space each: so many in all, and none without any.
        if len(pieces) != 2 * len(texts) or not all(map(contains, texts, repeat(" "))) or "" in pieces:
            wrong = next(text for text in texts if text.count(" ") != 1 or "" in text.split(" "))
            raise CorruptWeights(f"{_PREFIX}merges: expected two pieces and a space between, got {wrong[:32]!r}")
        return list(zip(pieces[::2], pieces[1::2], strict=True))

    def scores(self) -> list[float]:
        """One score per token."""
        scores = list(map(float, self._numbers("scores", int, float)))
        if len(scores) != len(self.tokens):
            raise CorruptWeights(f"{_PREFIX}scores: expected {len(self.tokens)} (one per token), got {len(scores)}")
        if any(score != score for score in scores):
            raise CorruptWeights(f"{_PREFIX}scores: expected numbers, got NaN")
        return scores

    def end_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: the one the file names first, then the end-of-turn tokens it knows."""
        named = [self.token_id(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id")]
        by_text = [i for i in self.ids_of_type(TokenType.CONTROL) if self.tokens[i] in _END_TEXTS]
        return tuple(dict.fromkeys(i for i in (*named, *by_text) if i is not None))

    def token_names(self, bos_id: int | None) -> dict[str, str]:
        """The texts of the special tokens, as chat templates name them."""
        keys = {"eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
        ids = {"bos_token": bos_id, **{name: self.token_id(key) for name, key in keys.items()}}
        return {name: self.tokens[token_id] for name, token_id in ids.items() if token_id is not None}

    def ids_of_type(self, *kinds: TokenType) -> list[int]:
        """Ids of these kinds, of which none is NORMAL."""
        return [i for i, kind in self.unusual if kind in kinds]

    def _token_types(self) -> list[int]:
        if f"{_PREFIX}token_type" not in self._metadata:
            return [int(TokenType.NORMAL)] * len(self.tokens)
        types = self._numbers("token_type", int)
        if len(types) != len(self.tokens):
            raise CorruptWeights(f"{_PREFIX}token_type: expected {len(self.tokens)} (one per token), got {len(types)}")
        return types

    def _array(self, key: str) -> Sequence[Any]:
        values = self._metadata.get(_PREFIX + key)
        if values is None or isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise CorruptWeights(f"{_PREFIX}{key}: expected an array, got {type(values).__name__}")
        if len(values) == 0:
            raise CorruptWeights(f"{_PREFIX}{key}: expected an array, got an empty one")
        found: Sequence[Any] = values
        return found

    def _numbers(self, key: str, *kinds: type[int] | type[float]) -> list[Any]:
        values = list(self._array(key))
        if not set(map(type, values)) <= set(kinds):
            raise CorruptWeights(f"{_PREFIX}{key}: expected numbers ({', '.join(kind.__name__ for kind in kinds)})")
        return values

    def _scalar(self, key: str, kind: type[Any]) -> Any:
        value = self._metadata.get(_PREFIX + key)
        if value is None:
            return None
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CorruptWeights(f"{_PREFIX}{key}: expected {kind.__name__}, got {type(value).__name__}")
        return value


def _strings(values: Sequence[Any], key: str) -> list[str]:
    texts = list(values)
    if set(map(type, texts)) != {str}:
        raise CorruptWeights(f"{_PREFIX}{key}: expected strings")
    return texts


def _build_byte_level(metadata: _Metadata, source: TokenizerSource) -> Vocabulary:
    """Model "gpt2": byte-level BPE with explicit merges."""
    pre = find_pre_tokenizer(metadata.text("pre") or "default")
    ids = unique_ids(metadata.tokens, f"{_PREFIX}tokens")
    merges = metadata.merges()
    with library_errors(f"{_PREFIX}merges"):
        core = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges))
    splits = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    add_tokens(core, ((metadata.tokens[i], kind) for i, kind in metadata.unusual))
    bos_id = source.bos_id if source.bos_id is not None else metadata.token_id("bos_token_id")
    return Vocabulary(
        core=core,
        size=len(metadata.tokens),
        piece_bytes=byte_level_piece_bytes,
        special_ids=frozenset(metadata.ids_of_type(*SPECIAL_TYPES)),
        silent_ids=frozenset(metadata.ids_of_type(TokenType.UNUSED)),
        bos_id=bos_id,
        eos_ids=_join(source.eos_ids, metadata.end_ids()),
        token_names=metadata.token_names(bos_id),
        add_bos=metadata.flag("add_bos_token", pre.add_bos) and bos_id is not None,
    )


def _build_sentencepiece(metadata: _Metadata, source: TokenizerSource) -> Vocabulary:
    """Model "llama": sentencepiece BPE, merged by score."""
    bos_id = source.bos_id if source.bos_id is not None else metadata.token_id("bos_token_id")
    pieces = sentencepiece.Pieces(
        texts=metadata.tokens,
        scores=metadata.scores(),
        types=metadata.types,
        model_type=sentencepiece.BPE,
        unk_id=metadata.token_id("unknown_token_id"),
        add_dummy_prefix=metadata.flag("add_space_prefix", default=True),
        remove_extra_whitespaces=metadata.flag("remove_extra_whitespaces", default=False),
    )
    return sentencepiece.build_vocabulary(
        pieces,
        where=f"{_PREFIX}tokens",
        bos_id=bos_id,
        eos_ids=_join(source.eos_ids, metadata.end_ids()),
        add_bos=metadata.flag("add_bos_token", default=True) and bos_id is not None,
        token_names=metadata.token_names(bos_id),
        silent_ids=frozenset(metadata.ids_of_type(TokenType.UNUSED)),
    )


def _join(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*first, *second)))


_BUILDERS: dict[str, Callable[[_Metadata, TokenizerSource], Vocabulary]] = {
    "gpt2": _build_byte_level,
    "llama": _build_sentencepiece,
}
