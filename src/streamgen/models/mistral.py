"""Mistral 7B and its descendants (https://arxiv.org/abs/2310.06825): Llama without biases, with a sliding window.

Later releases drop the window (`sliding_window` is null) and choose `head_dim` freely.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.models.llama import decoder

if TYPE_CHECKING:
    from streamgen.models.config import ModelConfig
    from streamgen.models.program import Builder, View


def mistral(b: Builder, c: ModelConfig, rope: int) -> View:
    """Every layer sees the same window."""
    return decoder(b, c, rope, window=c.sliding_window)
