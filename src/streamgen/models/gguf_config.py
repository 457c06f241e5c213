"""The shape of a model from the metadata of a GGUF file.

The keys are those of ggml's `docs/gguf.md`; sizes that the metadata leaves out are taken from the tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.models.config import ModelConfig, RopeConfig
from streamgen.models.fields import MAX_CONTEXT, Fields
from streamgen.models.hf_config import stretched_context

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamgen.checkpoints.base import TensorInfo

SOURCE = "GGUF metadata"

FAMILIES = {"llama": "llama", "qwen2": "qwen2"}  # Mistral 7B is written as llama

ROPE_FREQS = "rope_freqs.weight"


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    """Read a GGUF file's metadata.

    tensors   what the file holds, by Hugging Face name and in torch's order of dimensions

    Raises CorruptWeights naming the key that is missing or makes no sense, and UnsupportedModel for an architecture, a
    rope scaling or experts that this version cannot run.
    """
    fields = Fields(metadata, SOURCE)
    architecture = fields.text("general.architecture")
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModel(f"{SOURCE}: architecture {architecture!r} is not known; known: {', '.join(FAMILIES)}")
    _refuse_other_shapes(fields, architecture)
    hidden_size = fields.size(f"{architecture}.embedding_length")
    num_heads = fields.size(f"{architecture}.attention.head_count")
    num_kv_heads = fields.size(f"{architecture}.attention.head_count_kv", num_heads)
    head_dim = _head_dim(fields, architecture, hidden_size, num_heads, num_kv_heads)
    max_context = fields.size(f"{architecture}.context_length", most=MAX_CONTEXT)
    rope = _rope(fields, architecture, head_dim, max_context, has_factors=ROPE_FREQS in tensors)
    window = _window(fields, architecture)
    return ModelConfig(
        family="mistral" if window else family,
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=fields.size(f"{architecture}.block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.size(f"{architecture}.feed_forward_length"),
        vocab_size=_vocab_size(tensors, hidden_size),
        norm_eps=fields.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        max_context=stretched_context(rope, max_context),
        rope=rope,
        tied_head="lm_head.weight" not in tensors,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
        attention_out_bias="model.layers.0.self_attn.o_proj.bias" in tensors,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in tensors,
        sliding_window=window,
    )


def _refuse_other_shapes(fields: Fields, architecture: str) -> None:
    """Files of a known architecture name whose model is another one."""
    experts = fields.size(f"{architecture}.expert_count", 0, least=0)
    if experts:  # Mixtral is written as llama
        raise UnsupportedModel(f"{SOURCE}: {architecture}.expert_count {experts}: experts cannot be run yet")
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if fields.is_list(f"{architecture}.{key}"):
            raise UnsupportedModel(f"{SOURCE}: {architecture}.{key}: sizes that differ by layer cannot be run yet")


def _head_dim(fields: Fields, architecture: str, hidden_size: int, num_heads: int, num_kv_heads: int) -> int:
    if num_heads % num_kv_heads:
        fields.fail(f"{architecture}.attention.head_count_kv", f"a divisor of head_count {num_heads}", num_kv_heads)
    key = f"{architecture}.attention.key_length"
    if key not in fields and hidden_size % num_heads:
        fields.fail(f"{architecture}.embedding_length", f"a multiple of head_count {num_heads}", hidden_size)
    head_dim = fields.size(key, hidden_size // num_heads, most=1 << 12)
    if head_dim % 2:
        fields.fail(key, "an even number", head_dim)
    value_key = f"{architecture}.attention.value_length"
    value_dim = fields.size(value_key, head_dim)
    if value_dim != head_dim:
        raise UnsupportedModel(f"{SOURCE}: {value_key} {value_dim} other than key_length {head_dim} cannot be run yet")
    return head_dim


def _vocab_size(tensors: Mapping[str, TensorInfo], hidden_size: int) -> int:
    name = "model.embed_tokens.weight"
    if name not in tensors:
        raise CorruptWeights(f"GGUF file: the embedding {name} (token_embd.weight) is missing")
    shape = tensors[name].shape
    if len(shape) != 2 or shape[1] != hidden_size:
        raise CorruptWeights(f"{name}: expected shape (vocabulary, {hidden_size}), got {shape}")
    return shape[0]


def _window(fields: Fields, architecture: str) -> int | None:
    key = f"{architecture}.attention.sliding_window"
    window = fields.size(key, 0, least=0, most=MAX_CONTEXT)
    if window and architecture != "llama":
        raise UnsupportedModel(f"{SOURCE}: {key} {window}: which layers have the window is not said in the file")
    return window or None


def _rope(fields: Fields, architecture: str, head_dim: int, max_context: int, *, has_factors: bool) -> RopeConfig:
    prefix = f"{architecture}.rope"
    rotary_dim = fields.size(f"{prefix}.dimension_count", head_dim)
    if rotary_dim != head_dim:
        raise UnsupportedModel(f"{SOURCE}: {prefix}.dimension_count {rotary_dim} of {head_dim} cannot be run yet")
    theta = fields.number(f"{prefix}.freq_base", 10000.0, above=1.0)
    factor = fields.optional_number(f"{prefix}.scaling.factor")
    factor = factor or fields.optional_number(f"{prefix}.scale_linear") or 1.0  # the older key
    kind = _rope_kind(fields, prefix, factor, has_factors=has_factors)
    if kind != "yarn":
        factor = factor if kind == "linear" else 1.0
        return RopeConfig(kind=kind, theta=theta, rotary_dim=head_dim, factor=factor)
    _refuse_other_yarn(fields, prefix)
    return RopeConfig(
        kind=kind,
        theta=theta,
        rotary_dim=head_dim,
        factor=factor,
        original_context=fields.size(f"{prefix}.scaling.original_context_length", max_context, most=MAX_CONTEXT),
        beta_fast=fields.optional_number(f"{prefix}.scaling.yarn_beta_fast") or 32.0,
        beta_slow=fields.optional_number(f"{prefix}.scaling.yarn_beta_slow") or 1.0,
    )


def _rope_kind(fields: Fields, prefix: str, factor: float, *, has_factors: bool) -> str:
    """The scaling. Llama 3's is not named in the metadata: the file holds its factors as a tensor instead."""
    kind = fields.text(f"{prefix}.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModel(f"{SOURCE}: {prefix}.scaling.type {kind!r} is not known; known: none, linear, yarn")
    if kind == "linear" and factor == 1.0:  # also where nothing is said
        kind = "none"
    if kind != "none" and has_factors:
        raise UnsupportedModel(f"{SOURCE}: {prefix}.scaling.type {kind!r} together with {ROPE_FREQS} cannot be run yet")
    if kind == "none":
        return "freq_factors" if has_factors else "default"
    return kind


def _refuse_other_yarn(fields: Fields, prefix: str) -> None:
    """Variations of YaRN that no file of these architectures has been seen with."""
    for name, neutral in (
        ("attn_factor", 1.0),
        ("yarn_attn_factor", 1.0),
        ("yarn_ext_factor", 1.0),
        ("yarn_log_multiplier", 0.0),
    ):
        key = f"{prefix}.scaling.{name}"
        value = fields.number(key, neutral, above=-1e9)
        if value != neutral:
            raise UnsupportedModel(f"{SOURCE}: {key} {value:g} cannot be run yet, only {neutral:g}")
