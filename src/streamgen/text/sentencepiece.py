"""Sentencepiece models: a strict reader of `tokenizer.model`, and an encoder that gives the same ids.

`tokenizer.model` is a protobuf message. Only the fields that decide ids are read, by a small wire reader that checks
every length: the file comes from strangers. GGUF files of model "llama" hold the same pieces and are built by the same
code.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import tokenizers
from msgspec import Struct
from tokenizers import models, normalizers, pre_tokenizers

from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.text.vocabulary import (
    SPECIAL_TYPES,
    TokenType,
    Vocabulary,
    add_tokens,
    check_byte_pieces,
    config_token_names,
    library_errors,
    spaced_piece_bytes,
    unique_ids,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from streamgen.checkpoints.base import TokenizerSource

UNIGRAM, BPE = 1, 2
_MODEL_NAMES = {3: "word", 4: "char"}
_MAX_BYTES = 64 * 2**20
_RESERVED = (*SPECIAL_TYPES, TokenType.BYTE)  # never found in text


class Pieces(Struct, kw_only=True):
    """What a sentencepiece model says.

    texts, scores, types   parallel, indexed by id
    add_dummy_prefix       text gets a space in front, so that its first word looks like any other
    prefix_every_part      also the parts of a text that follow a special token; else only its beginning
    """

    texts: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    whitespace_is_suffix: bool = False
    unk_id: int | None = 0
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = None
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    prefix_every_part: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True


def read_sentencepiece(source: TokenizerSource) -> Vocabulary:
    """Read `source.sentencepiece_path`."""
    assert source.sentencepiece_path is not None, "the caller checked the path"
    pieces = parse_model(source.sentencepiece_path)
    # transformers' name for this: "legacy" (its default) puts a space before every part between special tokens.
    pieces.prefix_every_part = source.config.get("legacy") is not False
    bos_id = source.bos_id if source.bos_id is not None else pieces.bos_id
    own_eos = (pieces.eos_id,) if pieces.eos_id is not None else ()
    return build_vocabulary(
        pieces,
        where=source.sentencepiece_path.name,
        bos_id=bos_id,
        eos_ids=source.eos_ids or own_eos,
        add_bos=bool(source.config.get("add_bos_token", True)) and bos_id is not None,
        token_names={**_own_token_names(pieces), **config_token_names(source.config)},
    )


def _own_token_names(pieces: Pieces) -> dict[str, str]:
    ids = {
        "bos_token": pieces.bos_id,
        "eos_token": pieces.eos_id,
        "unk_token": pieces.unk_id,
        "pad_token": pieces.pad_id,
    }
    return {name: pieces.texts[token_id] for name, token_id in ids.items() if token_id is not None}


def build_vocabulary(
    pieces: Pieces,
    *,
    where: str,
    bos_id: int | None,
    eos_ids: tuple[int, ...],
    add_bos: bool,
    token_names: Mapping[str, str],
    silent_ids: frozenset[int] = frozenset(),
) -> Vocabulary:
    """Turn checked pieces into a `Vocabulary`. `where` names the file or field in errors."""
    byte_texts = {i: pieces.texts[i] for i, kind in enumerate(pieces.types) if kind == TokenType.BYTE}
    if byte_texts or pieces.byte_fallback:
        check_byte_pieces(byte_texts, where)
        pieces.byte_fallback = True
    ids = unique_ids(pieces.texts, where)
    with library_errors(where):
        core = tokenizers.Tokenizer(_make_model(pieces, ids))
        core.normalizer = _make_normalizer(pieces)
        core.pre_tokenizer = _make_pre_tokenizer(pieces)
    add_tokens(core, zip(pieces.texts, pieces.types, strict=True))
    return Vocabulary(
        core=core,
        size=len(pieces.texts),
        piece_bytes=spaced_piece_bytes,
        special_ids=frozenset(i for i, kind in enumerate(pieces.types) if kind in SPECIAL_TYPES),
        silent_ids=silent_ids,
        bos_id=bos_id,
        eos_ids=eos_ids,
        token_names=token_names,
        add_bos=add_bos,
        drops_leading_space=pieces.add_dummy_prefix,
    )


def _make_model(pieces: Pieces, ids: dict[str, int]) -> models.Model:
    unk = pieces.texts[pieces.unk_id] if pieces.unk_id is not None else None
    if pieces.model_type == BPE:
        merges = _merges_by_score(pieces, ids)
        return models.BPE(vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=pieces.byte_fallback)
    scored = list(zip(pieces.texts, pieces.scores, strict=True))
    return models.Unigram(scored, unk_id=pieces.unk_id, byte_fallback=pieces.byte_fallback)


def _make_pre_tokenizer(pieces: Pieces) -> pre_tokenizers.PreTokenizer | None:
    """What must happen to text between normalization and the model."""
    steps: list[pre_tokenizers.PreTokenizer] = []
    if pieces.add_dummy_prefix and not pieces.prefix_every_part:
        steps.append(pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False))
    if pieces.model_type == UNIGRAM:
        # The library would find control and byte pieces in text, where they are only letters: cut off their first one.
        reserved = {text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind in _RESERVED}
        cuts = [f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in sorted(reserved)]
        steps.append(pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated"))
    return pre_tokenizers.Sequence(steps) if steps else None


def _merges_by_score(pieces: Pieces, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that sentencepiece finds by itself: any two neighbours whose join is a piece, best score first."""
    usable = {text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind not in _RESERVED}
    by_score = sorted(usable, key=lambda text: (-pieces.scores[ids[text]], ids[text]))
    return [
        (text[:cut], text[cut:])
        for text in by_score
        for cut in range(1, len(text))
        if text[:cut] in usable and text[cut:] in usable
    ]


def _make_normalizer(pieces: Pieces) -> normalizers.Normalizer:
    """The model's own normalization, in sentencepiece's order."""
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        steps.append(normalizers.Precompiled(pieces.charsmap))
    if pieces.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if pieces.add_dummy_prefix and pieces.prefix_every_part:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    if pieces.remove_extra_whitespaces:
        steps.append(normalizers.Replace(tokenizers.Regex(r"▁+\z"), ""))
    return normalizers.Sequence(steps)


# ---- the protobuf file ----------------------------------------------------------------------------------------------


def parse_model(path: Path) -> Pieces:
    """Read a `tokenizer.model` file.

    Raises:
        CorruptWeights: it is no sentencepiece model, or contradicts itself.
        UnsupportedModel: it uses a feature that changes ids and is not implemented.
    """
    data = path.read_bytes()
    if len(data) > _MAX_BYTES:
        raise CorruptWeights(f"{path.name}: expected at most {_MAX_BYTES} bytes, got {len(data)}")
    pieces = Pieces()
    for field, value in _fields(data, path.name):
        if field == 1:
            _parse_piece(_as_bytes(value, path.name, "pieces"), pieces, path.name)
        elif field == 2:
            _parse_trainer_spec(_as_bytes(value, path.name, "trainer_spec"), pieces, path.name)
        elif field == 3:
            _parse_normalizer_spec(_as_bytes(value, path.name, "normalizer_spec"), pieces, path.name)
    _check(pieces, path.name)
    return pieces


def _parse_piece(data: bytes, pieces: Pieces, where: str) -> None:
    text, score, kind = None, 0.0, int(TokenType.NORMAL)
    name = f"pieces[{len(pieces.texts)}]"
    for field, value in _fields(data, where):
        if field == 1:
            text = _as_text(value, where, name)
        elif field == 2:
            score = _as_float(value, where, f"{name}.score")
        elif field == 3:
            kind = _as_int(value, where, f"{name}.type")
    if not text:
        raise CorruptWeights(f"{where}: {name}: expected a piece, got an empty one")
    if kind not in TokenType.__members__.values():
        raise CorruptWeights(f"{where}: {name}.type: expected 1 to 6, got {kind}")
    pieces.texts.append(text)
    pieces.scores.append(score)
    pieces.types.append(kind)


def _parse_trainer_spec(data: bytes, pieces: Pieces, where: str) -> None:
    for field, value in _fields(data, where):
        if field == 3:
            pieces.model_type = _as_int(value, where, "trainer_spec.model_type")
        elif field == 24:
            pieces.whitespace_is_suffix = bool(_as_int(value, where, "trainer_spec.treat_whitespace_as_suffix"))
        elif field == 35:
            pieces.byte_fallback = bool(_as_int(value, where, "trainer_spec.byte_fallback"))
        elif field == 40:
            pieces.unk_id = _as_id(value, where, "trainer_spec.unk_id")
        elif field == 41:
            pieces.bos_id = _as_id(value, where, "trainer_spec.bos_id")
        elif field == 42:
            pieces.eos_id = _as_id(value, where, "trainer_spec.eos_id")
        elif field == 43:
            pieces.pad_id = _as_id(value, where, "trainer_spec.pad_id")


def _parse_normalizer_spec(data: bytes, pieces: Pieces, where: str) -> None:
    for field, value in _fields(data, where):
        if field == 2:
            pieces.charsmap = _as_bytes(value, where, "normalizer_spec.precompiled_charsmap")
        elif field == 3:
            pieces.add_dummy_prefix = bool(_as_int(value, where, "normalizer_spec.add_dummy_prefix"))
        elif field == 4:
            pieces.remove_extra_whitespaces = bool(_as_int(value, where, "normalizer_spec.remove_extra_whitespaces"))
        elif field == 5:
            pieces.escape_whitespaces = bool(_as_int(value, where, "normalizer_spec.escape_whitespaces"))


def _check(pieces: Pieces, where: str) -> None:
    if pieces.model_type not in (UNIGRAM, BPE):
        name = _MODEL_NAMES.get(pieces.model_type, str(pieces.model_type))
        raise UnsupportedModel(f"{where}: sentencepiece model type {name!r} is not supported; known are bpe, unigram")
    if not pieces.texts:
        raise CorruptWeights(f"{where}: expected a sentencepiece model, got no pieces")
    if pieces.whitespace_is_suffix or not pieces.escape_whitespaces:
        raise UnsupportedModel(f"{where}: a sentencepiece model that writes spaces otherwise than as a U+2581 prefix")
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        token_id = getattr(pieces, name)
        if token_id is not None and token_id >= len(pieces.texts):
            raise CorruptWeights(f"{where}: {name}: expected < {len(pieces.texts)}, got {token_id}")


def _fields(data: bytes, where: str) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: (number, int of a varint | raw bytes of everything else)."""
    pos = 0
    while pos < len(data):
        key, pos = _varint(data, pos, where)
        field, wire = key >> 3, key & 7
        if wire == 0:
            number, pos = _varint(data, pos, where)
            yield field, number
            continue
        if wire == 2:
            size, pos = _varint(data, pos, where)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise CorruptWeights(f"{where}: expected a protobuf message, got wire type {wire} at byte {pos}")
        if field == 0 or size > len(data) - pos:
            raise CorruptWeights(f"{where}: expected a protobuf message, a field ends past byte {len(data)}")
        yield field, data[pos : pos + size]
        pos += size


def _varint(data: bytes, pos: int, where: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if pos >= len(data):
            break
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), pos
    raise CorruptWeights(f"{where}: expected a protobuf message, a number is broken at byte {pos}")


def _as_bytes(value: int | bytes, where: str, name: str) -> bytes:
    if isinstance(value, int):
        raise CorruptWeights(f"{where}: {name}: expected bytes, got a number")
    return value


def _as_text(value: int | bytes, where: str, name: str) -> str:
    try:
        return _as_bytes(value, where, name).decode("utf-8")
    except UnicodeDecodeError:
        raise CorruptWeights(f"{where}: {name}: expected UTF-8 text") from None


def _as_int(value: int | bytes, where: str, name: str) -> int:
    if not isinstance(value, int):
        raise CorruptWeights(f"{where}: {name}: expected a number, got bytes")
    return value


def _as_id(value: int | bytes, where: str, name: str) -> int | None:
    """An id; sentencepiece writes "none" as -1, which is a varint of 64 bits."""
    number = _as_int(value, where, name)
    return None if number >= 2**31 else number


def _as_float(value: int | bytes, where: str, name: str) -> float:
    data = _as_bytes(value, where, name)
    if len(data) != 4:
        raise CorruptWeights(f"{where}: {name}: expected a float32")
    score = struct.unpack("<f", data)[0]
    if score != score:
        raise CorruptWeights(f"{where}: {name}: expected a number, got NaN")
    return float(score)
