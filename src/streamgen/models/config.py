"""The shape of a model, in one form for every container.

Built from a safetensors checkpoint's config.json (`models/registry.py`) or from GGUF metadata; the families read only
this.
"""

from __future__ import annotations

from msgspec import Struct


class RopeConfig(Struct, frozen=True, kw_only=True):
    """Rotary position embedding.

    kind        default | linear | dynamic | llama3 | yarn | freq_factors (GGUF: the tensor rope_freqs.weight)
    theta       base of the geometric series of wavelengths
    rotary_dim  how many of a head's dimensions turn (head_dim normally)
    factor      by how much the context was stretched
    original_context   context of the pretraining (llama3, yarn, dynamic)
    """

    kind: str = "default"
    theta: float = 10000.0
    rotary_dim: int
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: what q.k is scaled by; None: 0.1 ln(factor) + 1, squared by q and k
    mscale: float | None = None  # yarn, deepseek style
    mscale_all_dim: float | None = None
    truncate: bool = True  # yarn: whether the correction range is rounded to whole dimensions


class ModelConfig(Struct, frozen=True, kw_only=True):
    """Sizes and switches of a decoder-only transformer."""

    family: str  # key of the registry: llama, mistral, qwen2
    architecture: str  # as the checkpoint says it: LlamaForCausalLM, qwen2 ...
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    norm_eps: float
    max_context: int
    rope: RopeConfig
    activation: str = "silu"
    tied_head: bool = False
    attention_bias: bool = False  # on q, k, v (and on o where attention_out_bias)
    attention_out_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None  # a token sees itself and window - 1 before it
    window_layers: tuple[int, ...] | None = None  # which layers have the window; None: all
