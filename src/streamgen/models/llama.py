"""Llama (https://arxiv.org/abs/2302.13971, 2307.09288), and the decoder that its descendants share.

Pre-norm residual blocks: rotary grouped-query attention, then a gated MLP; root-mean-square norms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Container

    from streamgen.models.config import ModelConfig
    from streamgen.models.program import Builder, View


def llama(b: Builder, c: ModelConfig, rope: int) -> View:
    """Llama 1 to 3: no window; biases only where the configuration asks for them."""
    return decoder(b, c, rope, qkv_bias=c.attention_bias, out_bias=c.attention_out_bias, mlp_bias=c.mlp_bias)


def decoder(
    b: Builder,
    c: ModelConfig,
    rope: int,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    window: int | None = None,
    window_layers: Container[int] | None = None,
) -> View:
    """Record the decoder and return the logits.

    rope            index of the rope table
    window          how many tokens a token sees, itself included; None: all before it
    window_layers   the layers that have the window; None: every layer
    """
    head_dim, scale = c.head_dim, c.head_dim**-0.5
    q_size, kv_size = c.num_heads * head_dim, c.num_kv_heads * head_dim
    x = b.embed("model.embed_tokens", vocab=c.vocab_size, hidden=c.hidden_size)
    for i in b.layers(c.num_layers, "model.layers.{}"):
        h = b.rms_norm(x, "input_layernorm", eps=c.norm_eps)
        projections = (("self_attn.q_proj", q_size), ("self_attn.k_proj", kv_size), ("self_attn.v_proj", kv_size))
        q, k, v = b.linears(h, *projections, bias=qkv_bias)
        q = b.rope(q, num_heads=c.num_heads, head_dim=head_dim, table=rope)
        k = b.rope(k, num_heads=c.num_kv_heads, head_dim=head_dim, table=rope)
        has_window = window_layers is None or i in window_layers
        a = b.attend(q, k, v, head_dim=head_dim, scale=scale, window=window if has_window else None)
        x = b.add(x, b.linear(a, "self_attn.o_proj", c.hidden_size, bias=out_bias))
        h = b.rms_norm(x, "post_attention_layernorm", eps=c.norm_eps)
        mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        x = b.add(x, b.gated_mlp(h, *mlp, size=c.intermediate_size, act=c.activation, bias=mlp_bias))
    h = b.rms_norm(b.sampled(x), "model.norm", eps=c.norm_eps)
    return b.head(h, "lm_head", vocab=c.vocab_size, tied="model.embed_tokens" if c.tied_head else None)
