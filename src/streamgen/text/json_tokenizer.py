"""Hugging Face `tokenizer.json`: the library's own format, plus what `tokenizer_config.json` says beside it.

The library runs the file as it is; here is found out what its decoder does to a single piece, whether its
post-processor puts BOS in front, and which added tokens are special.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import tokenizers
from msgspec import Struct

from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.text.byte_level import byte_level_piece_bytes
from streamgen.text.vocabulary import Vocabulary, config_token_names, library_errors, spaced_piece_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamgen.checkpoints.base import TokenizerSource


class _Added(Struct):
    id: int
    content: str
    special: bool = False


class _Model(Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    type: str | None = None
    byte_fallback: bool = False
    unk_token: str | None = None


class _File(Struct):
    model: _Model
    added_tokens: list[_Added] = []
    decoder: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None


def read_json(source: TokenizerSource) -> Vocabulary:
    """Read `source.json_path`."""
    assert source.json_path is not None, "the caller checked the path"
    name, data = source.json_path.name, source.json_path.read_bytes()
    try:
        file = msgspec.json.decode(data, type=_File)
    except msgspec.DecodeError as error:
        raise CorruptWeights(f"{name}: {error}") from None
    ids = _check_ids(file, name)
    with library_errors(name):
        core = tokenizers.Tokenizer.from_buffer(data)
    # Settings of some training run are often left in the file; they would cut prompts without a word.
    core.no_truncation()
    core.no_padding()
    names = config_token_names(source.config)
    bos_id = source.bos_id if source.bos_id is not None else ids.get(names.get("bos_token", ""))
    eos_id = ids.get(names.get("eos_token", ""))
    return Vocabulary(
        core=core,
        size=max(ids.values()) + 1,
        piece_bytes=_find_piece_bytes(file, name),
        special_ids=frozenset(token.id for token in file.added_tokens if token.special),
        bos_id=bos_id,
        eos_ids=source.eos_ids or ((eos_id,) if eos_id is not None else ()),
        token_names=names,
        add_bos=_adds_bos(file, source.config, ids, bos_id),
        drops_leading_space=_drops_leading_space(file),
    )


def _check_ids(file: _File, name: str) -> dict[str, int]:
    """Every piece's id; added tokens count too and may name an ordinary piece."""
    vocab = file.model.vocab
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    if len(set(ids.values())) != len(ids) or len(ids) != len(vocab):
        raise CorruptWeights(f"{name}: model.vocab: two pieces have the same id, or two ids the same piece")
    taken = {token_id: piece for piece, token_id in ids.items()}
    for token in file.added_tokens:
        if taken.setdefault(token.id, token.content) != token.content or ids.get(token.content, token.id) != token.id:
            raise CorruptWeights(f"{name}: added_tokens: id {token.id} is taken by another piece")
        ids[token.content] = token.id
    if not ids or min(ids.values()) < 0 or max(ids.values()) >= 2 * len(ids) + 1024:
        raise CorruptWeights(f"{name}: model.vocab: expected ids from 0 to about {len(ids)}")
    return ids


def _find_piece_bytes(file: _File, name: str) -> Callable[[str], bytes]:
    """How the decoder turns one piece into bytes.

    Raises:
        UnsupportedModel: it joins pieces in a way that depends on their neighbours, as WordPiece does.
    """
    kinds = {step.get("type") for step in _decoder_steps(file)}
    if "ByteLevel" in kinds:
        return byte_level_piece_bytes
    if kinds & {"Metaspace", "ByteFallback"} or (kinds == {"Replace", "Fuse"} or kinds == {"Replace", "Fuse", "Strip"}):
        return spaced_piece_bytes
    found = ", ".join(sorted(map(str, kinds))) or "none"
    raise UnsupportedModel(f"{name}: decoder {found} is not supported; known are ByteLevel, Metaspace, ByteFallback")


def _drops_leading_space(file: _File) -> bool:
    for step in _decoder_steps(file):
        if step.get("type") == "Strip" and step.get("content") == " " and step.get("start", 0) > 0:
            return True
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space") is not False
    return False


def _decoder_steps(file: _File) -> list[Mapping[str, Any]]:
    decoder = file.decoder or {}
    return decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder] if decoder else []


def _adds_bos(file: _File, config: Mapping[str, Any], ids: Mapping[str, int], bos_id: int | None) -> bool:
    """Whether raw text gets a BOS: `add_bos_token` where the config says, else what the post-processor would do."""
    if bos_id is None:
        return False
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    processor = file.post_processor or {}
    steps = processor.get("processors", []) if processor.get("type") == "Sequence" else [processor]
    for step in steps:
        single = step.get("single") if step.get("type") == "TemplateProcessing" else None
        if single and "SpecialToken" in single[0]:
            return ids.get(single[0]["SpecialToken"].get("id")) == bos_id
    return False
