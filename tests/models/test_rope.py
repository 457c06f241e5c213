"""Rope tables number by number against transformers."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.models.config import RopeConfig
from streamgen.models.registry import config_from_hf
from streamgen.models.rope import RopeTable, apply_freq_factors, rope_table

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3-factor-32": {"rope_type": "llama3", **LLAMA3, "factor": 32.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    "yarn-betas": {"rope_type": "yarn", "factor": 40.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn-mscale-alone": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707},
    "yarn-not-truncated": {"rope_type": "yarn", "factor": 16.0, "truncate": False},
    "yarn-short": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
}


def hf_config(parameters: dict[str, Any], head_dim: int, theta: float) -> LlamaConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # factors that are not the ratio of the contexts
        return LlamaConfig(
            hidden_size=4 * head_dim,
            num_attention_heads=4,
            max_position_embeddings=8192,
            rope_parameters={"rope_theta": theta, **parameters},
        )


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128])
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name: str, head_dim: int, theta: float) -> None:
    config = hf_config(CASES[name], head_dim, theta)
    for max_context in (4096, 8192, 20000):
        if name == "default":
            inv_freq, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        else:
            inv_freq, scale = ROPE_INIT_FUNCTIONS[CASES[name]["rope_type"]](config, None, seq_len=max_context)
        table = rope_table(config_from_hf(config.to_dict()).rope, max_context=max_context)
        assert table.rotary_dim == head_dim
        assert table.scale == pytest.approx(scale, rel=1e-12)
        # torch's float32 pow is off by a bit here and there, and llama3's interpolation between f / factor and f makes
        # up to `factor` times as much of it.
        maxulp = 16 if name.startswith("llama3") else 4
        np.testing.assert_array_max_ulp(np.array(table.inv_freq, np.float32), inv_freq.numpy(), maxulp=maxulp)


def test_values_are_float32() -> None:
    table = rope_table(RopeConfig(kind="linear", rotary_dim=128, factor=3.0), max_context=64)
    assert all(float(np.float32(f)) == f for f in table.inv_freq)


def test_dynamic_is_unscaled_within_the_original_context_and_fixed_by_the_longest() -> None:
    config = RopeConfig(kind="dynamic", rotary_dim=64, factor=4.0, original_context=2048)
    plain = rope_table(RopeConfig(rotary_dim=64), max_context=2048)
    assert rope_table(config, max_context=100) == rope_table(config, max_context=2048) == plain
    assert rope_table(config, max_context=2049) != plain
    assert rope_table(config, max_context=4096).inv_freq[-1] < rope_table(config, max_context=3000).inv_freq[-1]


def test_freq_factors_divide() -> None:
    """Factors made as converters make them give the llama3 table back."""
    config = hf_config({"rope_type": "llama3", **LLAMA3}, 64, 500000.0)
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, None)
    plain = rope_table(RopeConfig(rotary_dim=64, theta=500000.0), max_context=64)
    factors = torch.tensor(plain.inv_freq) / wanted
    assert factors.max() == pytest.approx(8)
    table = apply_freq_factors(plain, factors.tolist())
    np.testing.assert_array_max_ulp(np.array(table.inv_freq, np.float32), wanted.numpy(), maxulp=2)


@pytest.mark.parametrize(
    "factors", [[1.0] * 3, [1.0, 2.0, 3.0, 0.0], [1.0, 2.0, 3.0, float("nan")], [-1.0, 1.0, 1.0, 1.0]]
)
def test_freq_factors_that_do_not_fit(factors: list[float]) -> None:
    with pytest.raises(CorruptWeights, match=r"rope_freqs\.weight"):
        apply_freq_factors(RopeTable((1.0, 0.1, 0.01, 0.001)), factors)


def test_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel, match=r"default, .*yarn, got 'longrope'"):
        rope_table(RopeConfig(kind="longrope", rotary_dim=8), max_context=64)


def test_dynamic_needs_more_than_one_pair() -> None:
    with pytest.raises(UnsupportedModel, match="head_dim over 2"):
        rope_table(RopeConfig(kind="dynamic", rotary_dim=2, factor=2.0, original_context=8), max_context=64)
