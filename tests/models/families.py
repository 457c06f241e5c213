"""The model families against transformers: tiny random models, one case per feature that changes the numbers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec import Struct
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.backends.toy import ToyWeights

if TYPE_CHECKING:
    from streamgen.backends.base import Float32Array

VOCAB = 97  # no multiple of anything

_CLASSES: dict[str, tuple[Any, Any]] = {  # Any: transformers' classes are untyped
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}


class FamilyCase(Struct, frozen=True):
    """One tiny model: `changes` to the common sizes, and how long its sequences may be."""

    name: str
    family: str
    changes: dict[str, Any]
    max_context: int = 64


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

CASES = [
    FamilyCase("llama", "llama", {}),
    FamilyCase("llama-one-kv-head-each", "llama", {"num_key_value_heads": 4}),
    FamilyCase("llama-groups-of-3", "llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}),
    FamilyCase("llama-groups-of-4", "llama", {"num_attention_heads": 8}),
    FamilyCase("llama-groups-of-8", "llama", {"num_attention_heads": 8, "num_key_value_heads": 1}),
    FamilyCase("llama-tied", "llama", {"tie_word_embeddings": True}),
    FamilyCase("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    FamilyCase("llama-gelu", "llama", {"hidden_act": "gelu"}),
    FamilyCase("llama-gelu-tanh", "llama", {"hidden_act": "gelu_pytorch_tanh"}),
    FamilyCase("llama-head-dim", "llama", {"head_dim": 24}),
    FamilyCase("llama-theta", "llama", {"rope_theta": 500000.0}),
    FamilyCase("llama-linear", "llama", _rope("linear", factor=3.0)),
    FamilyCase("llama-dynamic-unscaled", "llama", _rope("dynamic", factor=2.0)),
    FamilyCase("llama-dynamic", "llama", _rope("dynamic", factor=2.0) | {"max_position_embeddings": 20}),
    FamilyCase("llama-llama3", "llama", _rope("llama3", **_LLAMA3)),
    FamilyCase("llama-yarn", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    FamilyCase("mistral", "mistral", {"sliding_window": None}),
    FamilyCase("mistral-window", "mistral", {"sliding_window": 7}),
    FamilyCase("mistral-head-dim", "mistral", {"sliding_window": None, "head_dim": 32}),
    FamilyCase("qwen2", "qwen2", {}),
    FamilyCase("qwen2-tied", "qwen2", {"tie_word_embeddings": True, "num_attention_heads": 8}),
    FamilyCase("qwen2-window", "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
]


def reference_model(case: FamilyCase, seed: int = 0) -> PreTrainedModel:
    """The case's model in transformers, with random weights that make every part matter."""
    config_class, model_class = _CLASSES[case.family]
    with warnings.catch_warnings():
        # YaRN: the tiny contexts of these cases are not the ratio that the factor states.
        warnings.simplefilter("ignore")
        model: PreTrainedModel = model_class(config_class(**(_SIZES | case.changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.3
            offset = 1.0 if "norm" in name else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=generator))
    model.eval()  # type: ignore[no-untyped-call]  # torch's
    return model


def weights_of(model: PreTrainedModel) -> ToyWeights:
    """The model's tensors by name; a tied head is stored once, as in a checkpoint."""
    tensors = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return ToyWeights(tensors)


def reference_logprobs(model: PreTrainedModel, ids: list[int]) -> Float32Array:
    """log_softmax of the model's logits at every position: [len(ids), vocab]."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    logprobs: Float32Array = logits.double().log_softmax(-1).numpy().astype(np.float32)
    return logprobs
