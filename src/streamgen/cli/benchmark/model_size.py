"""The sizes of a checkpoint that figures are measured against, from its headers."""

from __future__ import annotations

import math
from pathlib import Path

from msgspec import Struct


class ModelSize(Struct, frozen=True, kw_only=True):
    """How many weights a step reads, and how many ids there are.

    layer_weights   of the linears of all layers: what prefill multiplies with
    head_weights    of the head: read once per step, and multiplied only with rows that sample
    """

    vocab: int
    layer_weights: int
    head_weights: int

    def step_bytes(self, dtype: str) -> int:
        """Bytes of weights that one decode step reads; a row of the embedding is nothing beside them."""
        return (self.layer_weights + self.head_weights) * (4 if dtype == "float32" else 2)


def read_model_size(model: str) -> ModelSize:
    """Count the weights of a checkpoint from its headers."""
    from streamgen.checkpoints.open import open_checkpoint
    from streamgen.hub import resolve_model

    checkpoint = open_checkpoint(Path(resolve_model(model)))
    try:
        config = checkpoint.config
        matrices = {name: math.prod(t.shape) for name, t in checkpoint.tensors.items() if len(t.shape) == 2}
    finally:
        checkpoint.close()
    return ModelSize(
        vocab=config.vocab_size,
        layer_weights=sum(count for name, count in matrices.items() if name.startswith("model.layers.")),
        head_weights=config.vocab_size * config.hidden_size,
    )
