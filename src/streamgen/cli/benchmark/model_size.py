"""The sizes of a model that figures are measured against, from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.backends.cpu_layout import Layout
from streamgen.execution.model import Prepared
from streamgen.hub import resolve_model
from streamgen.models.program import Linear

if TYPE_CHECKING:
    from streamgen.config import EngineOptions


class ModelSize(Struct, frozen=True, kw_only=True):
    """How many weights a step reads, and how many ids there are.

    layer_weights   of the linears of all layers: what prefill multiplies with
    step_bytes      of packed weights that one decode step reads; a row of the embedding is nothing beside them
    """

    vocab: int
    layer_weights: int
    step_bytes: int


def read_model_size(options: EngineOptions) -> ModelSize:
    """Count the weights of a model as it would be opened. Reads headers only."""
    prepared = Prepared(options, Path(resolve_model(options.model)))
    try:
        program = prepared.program
        layout = Layout(program, prepared.dtype, prepared.packings)
    finally:
        prepared.checkpoint.close()
    body = [op for op in program.ops[: program.split] if isinstance(op, Linear)]
    linears = [op for op in program.ops if isinstance(op, Linear)]
    return ModelSize(
        vocab=program.vocab_size,
        layer_weights=sum(weight.rows * weight.columns for op in body for weight in op.weights),
        step_bytes=sum(region.num_bytes for op in linears for region in layout.regions_of(op.weights)),
    )
