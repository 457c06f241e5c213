"""Whole programs over integer weights: against the reference, and the same bits whatever else runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from streamgen.backends.cpu import CpuBackend, CpuModel
from streamgen.backends.reference import ReferenceBackend
from streamgen.checkpoints.base import RawTensor, TensorInfo
from streamgen.models.config import ModelConfig, RopeConfig
from streamgen.models.program import Builder, Linear, Program
from streamgen.models.registry import build_program
from streamgen.quantization.base import Packing, TensorType
from tests.backends.toy import Chunk, ToyModel, ToyWeights, random_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamgen.backends.base import Float32Array

VOCAB = 77
CONFIG = ModelConfig(
    family="qwen2",
    architecture="Qwen2ForCausalLM",
    hidden_size=96,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=160,
    vocab_size=VOCAB,
    norm_eps=1e-5,
    max_context=96,
    rope=RopeConfig(rotary_dim=16),
)
# One type after the other through the matrices, dense ones among them, so that inputs are read in both forms.
TYPES = (TensorType.Q4_1, TensorType.Q5_0, TensorType.Q8_0, None, TensorType.Q4_0, TensorType.Q5_1, TensorType.Q8_0)


class PackedWeights(ToyWeights):
    """Weights whose matrices are stored in the types of `packings`."""

    def __init__(self, tensors: Mapping[str, Float32Array], packings: Mapping[str, Packing]) -> None:
        super().__init__(tensors)
        self._stored = {
            f"{name}.weight": (
                packing.type,
                quants.quantize(tensors[f"{name}.weight"], GGMLQuantizationType(packing.type)),
            )
            for name, packing in packings.items()
        }

    def matrix(self, name: str, rows: int, columns: int) -> RawTensor:
        key = f"{name}.weight"
        if key not in self._stored:
            return super().matrix(name, rows, columns)
        type, data = self._stored[key]
        info = TensorInfo(name=key, type=type, shape=(rows, columns), num_bytes=data.nbytes)
        return RawTensor(info=info, data=data.reshape(-1))


@pytest.fixture(scope="module")
def program() -> Program:
    return build_program(CONFIG, max_context=96)


@pytest.fixture(scope="module")
def packings(program: Program) -> dict[str, Packing]:
    types = [TYPES[i % len(TYPES)] for i, _ in enumerate(program.linear_weights())]
    pairs = zip(program.linear_weights(), types, strict=True)
    return {weight.name: Packing(type) for weight, type in pairs if type is not None}


@pytest.fixture(scope="module")
def weights(program: Program, packings: dict[str, Packing]) -> PackedWeights:
    return PackedWeights(random_weights(program).tensors, packings)


def isa_names() -> Sequence[str]:
    import streamgen._cpu as _cpu

    return _cpu.isa_names()


def ids_of(seed: int, count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, VOCAB, count)]


def test_both_forms_of_operands_are_read(program: Program, packings: dict[str, Packing]) -> None:
    mixed = [op for op in program.ops if isinstance(op, Linear) and len({w.name in packings for w in op.weights}) == 2]
    assert mixed


@pytest.mark.parametrize("isa", isa_names())
def test_integer_weights_agree_with_the_reference(
    isa: str, program: Program, weights: PackedWeights, packings: dict[str, Packing]
) -> None:
    found = []
    for backend in (ReferenceBackend(), CpuBackend(isa)):
        model = ToyModel(backend, program, weights, dtype="bfloat16", packings=packings)
        model.put(0, ids_of(1, 40))
        model.put(1, ids_of(2, 9))
        first = model.logprobs(Chunk(0, 0, 39), Chunk(1, 0, 8))
        found.append(np.concatenate([first, model.logprobs(Chunk(0, 39, 1), Chunk(1, 8, 1))]))
    # A row that sees itself alone has no rounding but of operands, where halves may go either way.
    np.testing.assert_allclose(found[0][[0, 39]], found[1][[0, 39]], atol=0.02)
    # Elsewhere probabilities are bfloat16 here and float32 there, and what is next to a border takes another code.
    np.testing.assert_allclose(found[0], found[1], atol=0.08)
    assert np.abs(found[0] - found[1]).mean() < 0.01


@pytest.mark.parametrize("isa", isa_names())
def test_a_row_has_the_same_bits_in_any_company(
    isa: str, program: Program, weights: PackedWeights, packings: dict[str, Packing]
) -> None:
    """In chunks of several sizes and beside others: on both sides of where workers make operands for themselves."""
    ids = ids_of(3, 24)
    rows: list[Float32Array] = []
    for threads in (1, 2, 3):
        for size in (1, 3, 5, 8, 24):
            model = ToyModel(CpuBackend(isa), program, weights, dtype="bfloat16", threads=threads, packings=packings)
            model.put(0, ids)
            parts = [model.logprobs(Chunk(0, at, min(size, 24 - at))) for at in range(0, 24, size)]
            rows.append(np.concatenate(parts))
            model.put(1, ids_of(4, 30))
            model.put(2, ids)
            beside = model.logprobs(Chunk(1, 0, 30), Chunk(2, 0, 24))
            rows.append(beside[30:])
    for other in rows[1:]:
        np.testing.assert_array_equal(rows[0], other)


@pytest.mark.parametrize("isa", isa_names())
def test_pages_of_8_bits(isa: str, program: Program, weights: PackedWeights, packings: dict[str, Packing]) -> None:
    found: list[Float32Array] = []
    for backend in (ReferenceBackend(), CpuBackend(isa)):
        model = ToyModel(backend, program, weights, dtype="bfloat16", packings=packings, kv_dtype="int8")
        model.put(0, ids_of(1, 40))
        found.append(np.concatenate([model.logprobs(Chunk(0, 0, 39)), model.logprobs(Chunk(0, 39, 1))]))
        assert backend.page_bytes(program, "bfloat16", 16, "int8") != backend.page_bytes(program, "bfloat16", 16)
    np.testing.assert_allclose(found[0], found[1], atol=0.1)
    assert np.abs(found[0] - found[1]).mean() < 0.012


def test_an_operand_that_shares_its_linears_output_is_made_once() -> None:
    """A linear that writes where the gated product reads: workers must not run ahead of each other."""
    b = Builder()
    b.rope_table(build_program(CONFIG, max_context=96).ropes[0])
    x = b.embed("model.embed_tokens", vocab=VOCAB, hidden=96)
    for _ in b.layers(1, "model.layers.{}"):
        h = b.rms_norm(x, "input_layernorm", eps=1e-5)
        q, k, v = b.linears(h, ("self_attn.q_proj", 96), ("self_attn.k_proj", 32), ("self_attn.v_proj", 32))
        a = b.attend(q, k, v, head_dim=16, scale=0.25)
        x = b.add(x, b.linear(a, "self_attn.o_proj", 96))
        h = b.rms_norm(x, "post_attention_layernorm", eps=1e-5)
        x = b.add(x, b.gated_mlp(h, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", size=64, act="silu"))
    h = b.rms_norm(b.sampled(x), "model.norm", eps=1e-5)
    wide = b.finish(b.head(h, "lm_head", vocab=VOCAB))
    packings = {w.name: Packing(TensorType.Q8_0) for w in wide.linear_weights()}
    weights = PackedWeights(random_weights(wide).tensors, packings)
    runs = []
    for threads in (1, 2, 4):
        model = ToyModel(CpuBackend(), wide, weights, dtype="bfloat16", threads=threads, packings=packings)
        model.put(0, ids_of(5, 8))
        runs += [np.concatenate([model.logprobs(Chunk(0, at, 1)) for at in range(8)]) for _ in range(20)]
    for run in runs[1:]:
        np.testing.assert_array_equal(runs[0], run)


def test_seconds_of_ops_add_up(program: Program, weights: PackedWeights, packings: dict[str, Packing]) -> None:
    model = ToyModel(CpuBackend(), program, weights, dtype="bfloat16", packings=packings)
    model.put(0, ids_of(6, 20))
    native = model.model
    assert isinstance(native, CpuModel)
    assert native.take_op_seconds() == []  # nothing was measured before
    model.logprobs(Chunk(0, 0, 20))
    seconds = native.take_op_seconds()
    linears = [spent for op, spent in zip(program.ops, seconds, strict=False) if isinstance(op, Linear)]
    assert all(spent > 0 for spent in linears) and seconds[-1] > 0
    assert sum(native.take_op_seconds()) == 0
