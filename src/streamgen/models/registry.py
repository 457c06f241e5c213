"""Which model a checkpoint holds, and the program that runs it.

The one place where a family's name is looked up: a new family is a file beside this one, a row in `FAMILIES`, and a row
in the tables of architectures (`hf_config.py`, `gguf_config.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.models.gguf_config import ROPE_FREQS, config_from_gguf
from streamgen.models.hf_config import config_from_hf
from streamgen.models.llama import llama
from streamgen.models.mistral import mistral
from streamgen.models.program import Builder, Program, View
from streamgen.models.qwen2 import qwen2
from streamgen.models.rope import RopeTable, apply_freq_factors, rope_table
from streamgen.quantization.base import TensorType

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamgen.checkpoints.base import Checkpoint
    from streamgen.models.config import ModelConfig

__all__ = ["FAMILIES", "ROPE_FREQS", "build_program", "config_from_gguf", "config_from_hf", "read_freq_factors"]

FAMILIES: dict[str, Callable[[Builder, ModelConfig, int], View]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
}


def build_program(config: ModelConfig, *, max_context: int, freq_factors: Sequence[float] | None = None) -> Program:
    """Record the program of a model whose sequences never pass `max_context` tokens.

    freq_factors   what `read_freq_factors` found in the checkpoint

    Raises UnsupportedModel for an unknown family or scaling, CorruptWeights for factors that do not fit.
    """
    family = FAMILIES.get(config.family)
    if family is None:
        raise UnsupportedModel(f"family {config.family!r} is not known; known: {', '.join(FAMILIES)}")
    builder = Builder()
    rope = builder.rope_table(_rope_table(config, max_context, freq_factors))
    return builder.finish(family(builder, config, rope))


def read_freq_factors(checkpoint: Checkpoint) -> tuple[float, ...] | None:
    """Values of the tensor `ROPE_FREQS`, where the model's rope needs them; else None.

    Raises CorruptWeights where the tensor is not a vector of float32.
    """
    if checkpoint.config.rope.kind != "freq_factors":
        return None
    raw = checkpoint.read(ROPE_FREQS)
    if raw.info.type is not TensorType.F32 or len(raw.info.shape) != 1:
        raise CorruptWeights(f"{ROPE_FREQS}: expected a vector of F32, got {raw.info.type.name} {raw.info.shape}")
    return tuple(float(f) for f in raw.data.view("<f4"))


def _rope_table(config: ModelConfig, max_context: int, freq_factors: Sequence[float] | None) -> RopeTable:
    table = rope_table(config.rope, max_context=max_context)
    if config.rope.kind != "freq_factors":
        assert freq_factors is None, f"factors given for a rope of kind {config.rope.kind}"
        return table
    # NOTE: without the factors the model would run, and be wrong only where contexts are long.
    if freq_factors is None:
        raise UnsupportedModel(f"{ROPE_FREQS}: this model's rope needs the values of that tensor")
    return apply_freq_factors(table, freq_factors)
