"""Qwen2 and Qwen2.5 (https://arxiv.org/abs/2407.10671): Llama with biases on q, k and v.

Some releases give their upper layers a sliding window; most declare one and leave it off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.models.llama import decoder

if TYPE_CHECKING:
    from streamgen.models.config import ModelConfig
    from streamgen.models.program import Builder, View


def qwen2(b: Builder, c: ModelConfig, rope: int) -> View:
    """q, k and v always have biases; `window_layers` says which layers have the window."""
    return decoder(b, c, rope, qkv_bias=True, window=c.sliding_window, window_layers=c.window_layers)
