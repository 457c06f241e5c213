"""Reading a checkpoint's shape: real and tiny configurations, defaults, and what a stranger's file may get wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from streamgen.checkpoints.base import RawTensor, TensorInfo
from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.models.config import ModelConfig, RopeConfig
from streamgen.models.program import Attend, Linear
from streamgen.models.registry import (
    FAMILIES,
    ROPE_FREQS,
    build_program,
    config_from_gguf,
    config_from_hf,
    read_freq_factors,
)
from streamgen.quantization.base import TensorType

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}

GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 8,
}


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    """Tensors by name, dots written as two underscores, besides the embedding."""
    named = {"model.embed_tokens.weight": (100, 64)} | {k.replace("__", "."): v for k, v in shapes.items()}
    return {n: TensorInfo(name=n, type=TensorType.F32, shape=shape, num_bytes=4) for n, shape in named.items()}


def test_llama() -> None:
    assert config_from_hf(LLAMA) == ModelConfig(
        family="llama",
        architecture="LlamaForCausalLM",
        hidden_size=64,
        num_layers=2,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=96,
        vocab_size=100,
        norm_eps=1e-5,
        max_context=512,
        rope=RopeConfig(rotary_dim=8),
    )


def test_both_containers_give_one_shape() -> None:
    gguf = config_from_gguf(GGUF, infos(lm_head__weight=(100, 64)))
    assert replace(gguf, architecture="LlamaForCausalLM") == config_from_hf(LLAMA)


def test_real_config(shared_data: Path) -> None:
    config = config_from_hf(json.loads((shared_data / "models/stories260K/config.json").read_text()))
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (5, 8, 4, 8)
    assert config.tied_head and config.vocab_size == 512


def test_defaults_are_those_of_transformers() -> None:
    few = {
        k: LLAMA[k] for k in ("architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    }
    few["num_attention_heads"] = 8
    llama = config_from_hf(few)
    assert (llama.num_kv_heads, llama.max_context, llama.norm_eps) == (8, 2048, 1e-6)
    mistral = config_from_hf(few | {"architectures": ["MistralForCausalLM"]})
    assert (mistral.num_kv_heads, mistral.max_context, mistral.sliding_window) == (8, 131072, 4096)
    assert config_from_hf(few | {"architectures": None, "model_type": "qwen2"}).family == "qwen2"


def test_biases() -> None:
    llama = config_from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert llama.attention_bias and llama.attention_out_bias and llama.mlp_bias
    qwen2 = config_from_hf(QWEN2)
    assert qwen2.attention_bias and not qwen2.attention_out_bias
    ops = [op for op in build_program(qwen2, max_context=64).ops if isinstance(op, Linear)]
    assert [w.bias for w in ops[0].weights] == [f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkv"]
    assert [w.bias for w in ops[1].weights] == [None]


def test_windows() -> None:
    assert config_from_hf(MISTRAL | {"sliding_window": 128}).sliding_window == 128
    assert config_from_hf(MISTRAL | {"sliding_window": None}).sliding_window is None
    window = {"sliding_window": 128, "max_window_layers": 1}
    assert config_from_hf(QWEN2 | window).sliding_window is None
    on = config_from_hf(QWEN2 | window | {"use_sliding_window": True})
    assert (on.sliding_window, on.window_layers) == (128, (1,))
    assert config_from_hf(QWEN2 | window | {"use_sliding_window": True, "max_window_layers": 2}).sliding_window is None
    types = config_from_hf(
        QWEN2 | window | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    )
    attends = [op for op in build_program(types, max_context=64).ops if isinstance(op, Attend)]
    assert [op.window for op in attends] == [128, None]


def test_rope_of_both_generations_of_config() -> None:
    old = config_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}})
    new = config_from_hf(LLAMA | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}})
    assert old.rope == new.rope == RopeConfig(kind="linear", theta=5e5, rotary_dim=8, factor=2.0)


def test_yarn_says_how_far_the_context_reaches() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = config_from_hf(LLAMA | {"rope_scaling": yarn})
    assert config.max_context == 2048 and config.rope.original_context == 512
    assert config_from_hf(LLAMA | {"rope_scaling": {**yarn, "factor": None}}).rope.factor == 1.0


def test_the_older_place_of_the_original_context_goes_first() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}
    config = config_from_hf(LLAMA | {"rope_scaling": scaling, "original_max_position_embeddings": 128})
    assert config.rope.original_context == 128


BAD_HF: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": None}, r"config\.json: hidden_size: expected an integer in 1 \.\. \d+, got nothing"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -64}, "hidden_size"),
    ({"hidden_size": 64.0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": 1 << 40}, "hidden_size"),
    ({"hidden_size": 65}, "hidden_size: expected a multiple of num_attention_heads 8"),
    ({"hidden_size": 72}, "head_dim: expected an even number, got 9"),
    ({"head_dim": 7}, "head_dim"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads 8, got 3"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"vocab_size": None}, "vocab_size"),
    ({"intermediate_size": []}, "intermediate_size"),
    ({"max_position_embeddings": 1 << 31}, "max_position_embeddings"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    ({"rope_theta": 1.0}, "rope_theta"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ({"attention_bias": "yes"}, "attention_bias"),
    ({"hidden_act": 3}, "hidden_act"),
    ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ({"architectures": []}, "model_type"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor: expected a finite number over 0, got nothing"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        "high_freq_factor: expected a finite number over 4",
    ),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 2.0}}, "beta_fast"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate"),
]


@pytest.mark.parametrize(("change", "message"), BAD_HF, ids=str)
def test_corrupt_config_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptWeights, match=message):
        config_from_hf(LLAMA | change)


UNSUPPORTED_HF: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not known; known: LlamaForCausalLM, Mistral"),
    ({"architectures": ["llama"]}, "'llama' is not known"),
    ({"hidden_act": "relu"}, "hidden_act 'relu' is not known; known: silu"),
    ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
]


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED_HF, ids=str)
def test_unsupported_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        config_from_hf(LLAMA | change)


@pytest.mark.parametrize("types", [["full_attention"], ["full_attention", "linear_attention"], "full_attention"])
def test_corrupt_layer_types(types: object) -> None:
    with pytest.raises(CorruptWeights, match="layer_types"):
        config_from_hf(QWEN2 | {"use_sliding_window": True, "layer_types": types})


def test_gguf_is_read_from_its_tensors_where_the_metadata_is_silent() -> None:
    tied = config_from_gguf(GGUF, infos())
    assert tied.tied_head and tied.vocab_size == 100 and not tied.attention_bias
    biased = config_from_gguf(GGUF, infos(lm_head__weight=(100, 64), model__layers__0__self_attn__q_proj__bias=(64,)))
    assert not biased.tied_head and biased.attention_bias and not biased.attention_out_bias


def test_gguf_llama_with_a_window_is_mistral() -> None:
    config = config_from_gguf(GGUF | {"llama.attention.sliding_window": 16}, infos())
    assert (config.family, config.sliding_window) == ("mistral", 16)


def test_gguf_rope() -> None:
    def rope(change: dict[str, Any], **tensors: tuple[int, ...]) -> RopeConfig:
        return config_from_gguf(GGUF | change, infos(**tensors)).rope

    plain = RopeConfig(rotary_dim=8)
    assert rope({}) == plain
    assert rope({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 3.0}) == plain
    assert rope({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}) == replace(
        plain, kind="linear", factor=2.0
    )
    assert rope({"llama.rope.scale_linear": 2.0}) == replace(plain, kind="linear", factor=2.0)
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    assert rope(yarn | {"llama.rope.scaling.original_context_length": 128}) == replace(
        plain, kind="yarn", factor=4.0, original_context=128
    )
    assert rope({}, rope_freqs__weight=(4,)) == replace(plain, kind="freq_factors")


BAD_GGUF: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": None}, r"general\.architecture: expected a string, got nothing"),
    ({"llama.block_count": None}, r"llama\.block_count"),
    ({"llama.embedding_length": 65}, r"llama\.embedding_length"),
    (
        {"llama.embedding_length": 128, "llama.attention.key_length": 8},
        r"model\.embed_tokens\.weight: expected shape \(vocabulary, 128\), got \(100, 64\)",
    ),
    ({"llama.attention.head_count_kv": 5}, "head_count_kv"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
    ({"llama.attention.layer_norm_rms_epsilon": float("inf")}, "layer_norm_rms_epsilon"),
    ({"llama.context_length": 1 << 31}, "context_length"),
    ({"llama.rope.freq_base": 0.0}, "freq_base"),
    ({"llama.attention.key_length": 9}, "key_length"),
]


@pytest.mark.parametrize(("change", "message"), BAD_GGUF, ids=str)
def test_corrupt_gguf_names_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptWeights, match=message):
        config_from_gguf(GGUF | change, infos())


def test_gguf_without_embedding() -> None:
    with pytest.raises(CorruptWeights, match="token_embd"):
        config_from_gguf(GGUF, {})


UNSUPPORTED_GGUF: list[tuple[dict[str, Any], str]] = [
    ({"general.architecture": "gemma3"}, "'gemma3' is not known; known: llama, qwen2"),
    ({"llama.expert_count": 8}, "experts"),
    ({"llama.attention.head_count_kv": [4, 2]}, "differ by layer"),
    ({"llama.rope.dimension_count": 4}, "dimension_count 4 of 8"),
    ({"llama.rope.scaling.type": "longrope"}, "longrope"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
    ({"llama.attention.value_length": 4}, "value_length 4"),
]


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED_GGUF, ids=str)
def test_unsupported_gguf(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        config_from_gguf(GGUF | change, infos())


def test_gguf_scaling_beside_factors() -> None:
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        config_from_gguf(GGUF | {"llama.rope.scale_linear": 2.0}, infos(rope_freqs__weight=(4,)))


_rope_keys, _rope_values = st.sampled_from(["rope_type", "type", "factor"]), ["yarn", "linear", 2, None, 1e400]
_junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(_rope_keys, st.sampled_from(_rope_values)),
)
_EXTRA_KEYS = (
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "head_dim",
    "use_sliding_window",
    "layer_types",
    "model_type",
)


@settings(deadline=None)
@given(st.sampled_from([LLAMA, MISTRAL, QWEN2]), st.sampled_from([*LLAMA, *_EXTRA_KEYS]), _junk)
def test_any_value_is_read_or_refused(config: dict[str, Any], key: str, value: object) -> None:
    try:
        shape = config_from_hf(config | {key: value})
    except (CorruptWeights, UnsupportedModel) as error:
        assert len(str(error)) < 400
    else:
        assert shape.head_dim % 2 == 0 and shape.num_heads % shape.num_kv_heads == 0 and shape.vocab_size > 0


@settings(deadline=None)
@given(
    st.sampled_from([*GGUF, "llama.attention.sliding_window", "llama.rope.scaling.factor", "llama.expert_count"]), _junk
)
def test_any_metadata_is_read_or_refused(key: str, value: object) -> None:
    try:
        shape = config_from_gguf(GGUF | {key: value}, infos())
    except (CorruptWeights, UnsupportedModel) as error:
        assert len(str(error)) < 400
    else:
        assert shape.head_dim % 2 == 0 and shape.num_heads % shape.num_kv_heads == 0


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match="'falcon' is not known; known: llama, mistral, qwen2"):
        build_program(replace(config_from_hf(LLAMA), family="falcon"), max_context=64)


def test_factors_are_needed_where_the_file_has_them() -> None:
    config = config_from_gguf(GGUF, infos(rope_freqs__weight=(4,)))
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        build_program(config, max_context=64)
    program = build_program(config, max_context=64, freq_factors=(1.0, 2.0, 4.0, 8.0))
    plain = build_program(config_from_gguf(GGUF, infos()), max_context=64)
    assert program.ropes[0].inv_freq[0] == plain.ropes[0].inv_freq[0]
    assert program.ropes[0].inv_freq[3] == pytest.approx(plain.ropes[0].inv_freq[3] / 8)


class FactorsFile:
    """As much of a checkpoint as `read_freq_factors` asks for."""

    def __init__(self, config: ModelConfig, values: NDArray[Any], type: TensorType = TensorType.F32) -> None:
        self.config = config
        self._raw = RawTensor(
            info=TensorInfo(name=ROPE_FREQS, type=type, shape=values.shape, num_bytes=values.nbytes),
            data=values.reshape(-1).view(np.uint8),
        )

    def read(self, name: str) -> RawTensor:
        assert name == ROPE_FREQS
        return self._raw


def test_factors_are_read_where_the_rope_needs_them() -> None:
    factors = np.array([1, 2, 4, 8], np.float32)
    needing, plain = config_from_gguf(GGUF, infos(rope_freqs__weight=(4,))), config_from_gguf(GGUF, infos())

    def read(*args: Any) -> tuple[float, ...] | None:
        checkpoint: Any = FactorsFile(*args)  # Any: only as much of a Checkpoint as is asked for
        return read_freq_factors(checkpoint)

    assert read(needing, factors) == (1.0, 2.0, 4.0, 8.0)
    assert read(plain, factors) is None
    for values, type in ((factors.reshape(2, 2), TensorType.F32), (factors.astype(np.float16), TensorType.F16)):
        with pytest.raises(CorruptWeights, match=r"rope_freqs\.weight: expected a vector of F32"):
            read(needing, values, type)


@pytest.mark.parametrize("config", [LLAMA, MISTRAL, QWEN2], ids=list(FAMILIES))
def test_program_names_every_tensor_of_the_checkpoint_once(config: dict[str, Any]) -> None:
    program = build_program(config_from_hf(config), max_context=64)
    matrices = [w.name for w in program.linear_weights()]
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    layers = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    assert matrices == ["model.embed_tokens", *layers, "lm_head"]
    norms = [name for name, _ in program.vector_names() if "norm" in name]
    assert len(norms) == 5 and norms[-1] == "model.norm.weight"


def test_shared_buffers_are_few_whatever_the_depth() -> None:
    shallow = build_program(config_from_hf(LLAMA), max_context=64)
    deep = build_program(config_from_hf(LLAMA | {"num_hidden_layers": 40}), max_context=64)
    assert len(deep.buffers) == len(shallow.buffers) <= 8
