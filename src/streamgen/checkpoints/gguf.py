"""GGUF files as checkpoints: one memory-mapped file holds the configuration, the tokenizer and the weights.

The header is parsed by `gguf_header`; here its tensors get their Hugging Face names and its metadata is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streamgen.checkpoints.base import RawTensor, TensorInfo, TokenizerSource
from streamgen.checkpoints.generation_config import read_generation_config, sampling_defaults, token_ids
from streamgen.checkpoints.gguf_header import GgufHeader, GgufStrings, GgufTensor, parse_header
from streamgen.checkpoints.gguf_names import hugging_face_name
from streamgen.checkpoints.mapped import MappedFile
from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.models.config import ModelConfig
from streamgen.sampling import Sampling

# Families whose query and key rows the converter put into interleaved rope order.
INTERLEAVED_ARCHITECTURES = frozenset({"llama"})


class GgufCheckpoint:
    """An open GGUF file; implements `checkpoints.base.Checkpoint`.

    Raises:
        ModelNotFound: the file cannot be opened.
        CorruptWeights: the file contradicts the format.
        UnsupportedModel: it is well formed, but holds something that this version does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_name = path.stem
        self._file = MappedFile(path)
        try:
            header = parse_header(self._file.buffer, str(path))
            self._stored = _by_hugging_face_name(header, path)
            self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata)
            _refuse_split_files(self.metadata, path)
        except BaseException:
            self._file.close()
            raise

    @cached_property
    def config(self) -> ModelConfig:
        """The model's shape, from the metadata."""
        from streamgen.models.registry import config_from_gguf

        return config_from_gguf(self.metadata, self.tensors)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its Hugging Face name."""
        return MappingProxyType(
            {
                name: TensorInfo(name=name, type=stored.type, shape=stored.shape, num_bytes=stored.num_bytes)
                for name, stored in self._stored.items()
            }
        )

    @cached_property
    def tokenizer_source(self) -> TokenizerSource:
        """The `tokenizer.*` metadata."""
        metadata = {key: value for key, value in self.metadata.items() if key.startswith("tokenizer.")}
        return TokenizerSource(
            gguf=MappingProxyType(metadata),
            chat_templates=_chat_templates(metadata),
            eos_ids=_eos_ids(metadata),
            bos_id=next(iter(_special_ids(metadata, "bos")), None),
        )

    @cached_property
    def sampling_defaults(self) -> Sampling:
        """What a generation_config.json beside the file says."""
        return sampling_defaults(read_generation_config(self.path.parent), str(self.path.parent))

    def read(self, name: str) -> RawTensor:
        """The bytes of a tensor. Raises CorruptWeights where it is missing."""
        stored = self._stored.get(name)
        if stored is None:
            raise CorruptWeights(f"{self.path}: tensor {name!r} is missing")
        data = self._file.view(stored.offset, stored.num_bytes)
        return RawTensor(info=self.tensors[name], data=data, rope_heads=self._rope_heads(name, stored.shape[0]))

    def release(self, name: str) -> None:
        """Tell the system that the tensor's mapped bytes are not needed any more."""
        stored = self._stored[name]
        self._file.release(stored.offset, stored.num_bytes)

    def close(self) -> None:
        """Unmap the file; idempotent."""
        self._file.close()

    def _rope_heads(self, name: str, rows: int) -> int | None:
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in INTERLEAVED_ARCHITECTURES:
            return None
        heads = self.metadata.get(f"{architecture}.attention.head_count")
        if ".self_attn.k_proj." in name:
            heads = self.metadata.get(f"{architecture}.attention.head_count_kv", heads)
        elif ".self_attn.q_proj." not in name:
            return None
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise CorruptWeights(
                f"{self.path}: tensor {name!r} has {rows} rows, which {heads} heads of even size cannot have"
            )
        return heads


def _by_hugging_face_name(header: GgufHeader, path: Path) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for stored in header.tensors:
        name = hugging_face_name(stored.name)
        if name in tensors:
            raise CorruptWeights(f"{path}: tensors {tensors[name].name!r} and {stored.name!r} are both {name!r}")
        tensors[name] = stored
    return tensors


def _refuse_split_files(metadata: Mapping[str, Any], path: Path) -> None:
    count = metadata.get("split.count", 1)
    if count not in (0, 1):
        raise UnsupportedModel(f"{path}: one of {count} parts of a model; join them first (llama-gguf-split --merge)")


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    templates = {}
    for key, value in metadata.items():
        if isinstance(value, str) and (key == prefix or key.startswith(prefix + ".")):
            templates[key.removeprefix(prefix).removeprefix(".") or "default"] = value
    return templates


def _eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The declared ones; `text.gguf_tokenizer` adds control tokens that end a turn by their text."""
    return _special_ids(metadata, "eos", "eot", "eom")


def _special_ids(metadata: Mapping[str, Any], *kinds: str) -> tuple[int, ...]:
    """The declared ids; one outside the vocabulary is how converters say "none"."""
    num_tokens = len(_tokens(metadata) or ())
    declared = token_ids(*(metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in kinds))
    return tuple(id for id in declared if id < num_tokens)


def _tokens(metadata: Mapping[str, Any]) -> GgufStrings | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, GgufStrings) else None
