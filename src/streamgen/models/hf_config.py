"""The shape of a model from the config.json of a Hugging Face checkpoint.

Defaults are those of the configuration classes in transformers, because a config.json leaves out what equals them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamgen.errors import UnsupportedModel
from streamgen.models.config import ModelConfig, RopeConfig
from streamgen.models.fields import MAX_CONTEXT, Fields

SOURCE = "config.json"

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_DEFAULT_CONTEXT = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768}


def config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Read a parsed config.json.

    Raises CorruptWeights naming the key that is missing or makes no sense, and UnsupportedModel for an architecture,
    an activation, a rope scaling or a quantization that this version cannot run.
    """
    fields = Fields(config, SOURCE)
    architecture, family = _architecture(fields)
    _refuse_quantized(fields)
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.size("num_key_value_heads", 8 if family == "mistral" else num_heads)
    hidden_size = fields.size("hidden_size")
    head_dim = _head_dim(fields, hidden_size, num_heads, num_kv_heads)
    max_context = fields.size("max_position_embeddings", _DEFAULT_CONTEXT[family], most=MAX_CONTEXT)
    rope = _rope(fields, head_dim, max_context)
    num_layers = fields.size("num_hidden_layers")
    window, window_layers = _window(fields, family, num_layers)
    is_llama = family == "llama"
    bias = is_llama and fields.flag("attention_bias", False)
    return ModelConfig(
        family=family,
        architecture=architecture,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=fields.size("intermediate_size"),
        vocab_size=fields.size("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_context=stretched_context(rope, max_context),
        rope=rope,
        activation=_activation(fields),
        tied_head=fields.flag("tie_word_embeddings", False),
        attention_bias=bias or family == "qwen2",
        attention_out_bias=bias,
        mlp_bias=is_llama and fields.flag("mlp_bias", False),
        sliding_window=window,
        window_layers=window_layers,
    )


def stretched_context(rope: RopeConfig, max_context: int) -> int:
    """The context that the model was made for. YaRN configurations often still state the pretraining's."""
    if rope.kind != "yarn":
        return max_context
    return min(max(max_context, int(rope.original_context * rope.factor)), MAX_CONTEXT)


def _architecture(fields: Fields) -> tuple[str, str]:
    names = fields.texts("architectures")
    architecture = names[0] if names else fields.text("model_type")
    family = FAMILIES.get(architecture)
    if family is None and not names and architecture in FAMILIES.values():
        family = architecture  # config files without `architectures` still name the model type
    if family is None:
        raise UnsupportedModel(f"{SOURCE}: architecture {architecture!r} is not known; known: {', '.join(FAMILIES)}")
    return architecture, family


def _refuse_quantized(fields: Fields) -> None:
    section = fields.section("quantization_config")
    if section:
        method = section.get("quant_method", "an unnamed method")
        raise UnsupportedModel(
            f"{SOURCE}: quantization_config: {method} cannot be read yet; use the unquantized checkpoint or a GGUF file"
        )


def _head_dim(fields: Fields, hidden_size: int, num_heads: int, num_kv_heads: int) -> int:
    if num_heads % num_kv_heads:
        fields.fail("num_key_value_heads", f"a divisor of num_attention_heads {num_heads}", num_kv_heads)
    if "head_dim" not in fields and hidden_size % num_heads:
        fields.fail("hidden_size", f"a multiple of num_attention_heads {num_heads}, or a head_dim", hidden_size)
    head_dim = fields.size("head_dim", hidden_size // num_heads, most=1 << 12)
    if head_dim % 2:
        fields.fail("head_dim", "an even number", head_dim)
    return head_dim


def _activation(fields: Fields) -> str:
    name = fields.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise UnsupportedModel(f"{SOURCE}: hidden_act {name!r} is not known; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _window(fields: Fields, family: str, num_layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """The sliding window and the layers that have it (None: all).

    Mistral's window is on unless it is null; Qwen2 configurations declare one and mostly leave it off.
    """
    if family == "mistral":
        has_window = not fields.is_null("sliding_window")
        return (fields.size("sliding_window", 4096, most=MAX_CONTEXT) if has_window else None), None
    if family != "qwen2" or not fields.flag("use_sliding_window", False):
        return None, None
    window = fields.size("sliding_window", 4096, most=MAX_CONTEXT)
    layers = _window_layers(fields, num_layers)
    return (window, layers) if layers else (None, None)


def _window_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    types = fields.texts("layer_types")
    if types is None:
        return tuple(range(fields.size("max_window_layers", 28, least=0), num_layers))
    if len(types) != num_layers or not set(types) <= {"full_attention", "sliding_attention"}:
        fields.fail("layer_types", f"{num_layers} of full_attention or sliding_attention", types)
    return tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")


def _rope(fields: Fields, head_dim: int, max_context: int) -> RopeConfig:
    section = fields.section("rope_parameters") or fields.section("rope_scaling")
    if any(isinstance(value, Mapping) for value in section.values()):
        raise UnsupportedModel(f"{SOURCE}: rope_parameters: a rope for each layer type cannot be run yet")
    scaling = Fields(section, f"{SOURCE}: rope_parameters")
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0), above=1.0)
    partial = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModel(f"{SOURCE}: partial_rotary_factor {partial} cannot be run yet, only 1")
    read = _SCALINGS.get(kind)
    if read is None:
        raise UnsupportedModel(f"{SOURCE}: rope type {kind!r} is not known; known: {', '.join(_SCALINGS)}")
    return RopeConfig(kind=kind, theta=theta, rotary_dim=head_dim, **read(fields, scaling, max_context))


def _original_context(fields: Fields, scaling: Fields, max_context: int) -> int:
    key = "original_max_position_embeddings"
    return (fields if key in fields else scaling).size(key, max_context, most=MAX_CONTEXT)


def _linear(fields: Fields, scaling: Fields, max_context: int) -> dict[str, Any]:
    return {"factor": scaling.number("factor")}


def _dynamic(fields: Fields, scaling: Fields, max_context: int) -> dict[str, Any]:
    return {"factor": scaling.number("factor"), "original_context": max_context}


def _llama3(fields: Fields, scaling: Fields, max_context: int) -> dict[str, Any]:
    low = scaling.number("low_freq_factor")
    return {
        "factor": scaling.number("factor"),
        "original_context": _original_context(fields, scaling, max_context),
        "low_freq_factor": low,
        "high_freq_factor": scaling.number("high_freq_factor", above=low),
    }


def _yarn(fields: Fields, scaling: Fields, max_context: int) -> dict[str, Any]:
    original = _original_context(fields, scaling, max_context)
    slow = scaling.optional_number("beta_slow") or 1.0
    fast = scaling.optional_number("beta_fast") or 32.0
    if fast < slow:
        scaling.fail("beta_fast", f"a number of at least beta_slow {slow:g}", fast)
    return {
        "factor": scaling.number("factor", max_context / original),
        "original_context": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "attention_factor": scaling.optional_number("attention_factor"),
        "mscale": scaling.optional_number("mscale"),
        "mscale_all_dim": scaling.optional_number("mscale_all_dim"),
        "truncate": scaling.flag("truncate", True),
    }


def _default(fields: Fields, scaling: Fields, max_context: int) -> dict[str, Any]:
    return {}


_SCALINGS: dict[str, Callable[[Fields, Fields, int], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
