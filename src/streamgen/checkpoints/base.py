"""What every checkpoint container answers; the rest of the engine does not know which one it reads.

Tensor names are the ones of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj.weight`); a container with other
names maps them, as data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamgen.models.config import ModelConfig
from streamgen.quantization.base import TensorType
from streamgen.sampling import Sampling


class TensorInfo(Struct, frozen=True, kw_only=True):
    """A tensor as its file declares it. shape is in torch's order: (out, in) for a linear weight.

    group   of TensorType.INT4 and INT8: columns that share a scale
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    num_bytes: int
    group: int = 0


class RawTensor(Struct, frozen=True, kw_only=True):
    """The stored bytes of a tensor.

    data          uint8 [num_bytes], a view of the memory map: read-only, valid until the checkpoint closes
    rope_heads    None, or the number of heads whose rows the file holds in interleaved rope order (GGUF's llama):
                  within each head, stored row 2 i + j is row i + j * head_dim / 2 of the checkpoint
    """

    info: TensorInfo
    data: NDArray[np.uint8]
    rope_heads: int | None = None


class TokenizerSource(Struct, frozen=True, kw_only=True):
    """Where a tokenizer comes from; one of the three is set. `text.tokenizer.load_tokenizer` reads it.

    json_path       a Hugging Face tokenizer.json
    sentencepiece_path   a tokenizer.model
    gguf            the `tokenizer.*` metadata of a GGUF file
    """

    json_path: Path | None = None
    sentencepiece_path: Path | None = None
    gguf: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = {}  # tokenizer_config.json (added tokens, bos/eos, add_bos_token)
    chat_templates: Mapping[str, str] = {}  # "default" and named ones
    eos_ids: tuple[int, ...] = ()  # every id that ends a text, as config and generation config say
    bos_id: int | None = None


class Checkpoint(Protocol):
    """An open model file or folder. Opening reads headers only."""

    path: Path
    model_name: str

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its Hugging Face name."""
        ...

    @property
    def tokenizer_source(self) -> TokenizerSource:
        """Where the tokenizer and the chat templates are."""
        ...

    @property
    def sampling_defaults(self) -> Sampling:
        """What generation_config.json says; empty where there is none."""
        ...

    def read(self, name: str) -> RawTensor:
        """The bytes of a tensor. Raises CorruptWeights where it is missing."""
        ...

    def release(self, name: str) -> None:
        """Tell the system that the tensor's mapped bytes are not needed any more."""
        ...

    def close(self) -> None:
        """Unmap the files; idempotent."""
        ...
