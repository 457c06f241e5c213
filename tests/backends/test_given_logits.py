"""A step that writes logits out, and the second half that draws from them: every backend, every instruction set."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import pytest

from streamgen.backends.base import SAMPLE_ROW, Backend, StepInputs, StepOutputs, empty_outputs
from streamgen.models.config import ModelConfig, RopeConfig
from streamgen.models.registry import build_program
from tests.backends.toy import Chunk, ToyModel, ToyWeights, available_backends, random_weights, sample_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from streamgen.checkpoints.base import RawTensor

VOCAB = 211
CHUNKS = (Chunk(0, 0, 7), Chunk(1, 0, 12), Chunk(2, 0, 3))
CONFIG = ModelConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=96,
    norm_eps=1e-5,
    rope=RopeConfig(rotary_dim=16),
)


@pytest.fixture(scope="module", params=available_backends(), ids=str)
def toy(request: pytest.FixtureRequest) -> Iterator[ToyModel]:
    backend: Backend = request.param
    program = build_program(CONFIG, max_context=96)
    model = ToyModel(backend, program, random_weights(program))
    for chunk in CHUNKS:
        model.put(chunk.slot, [(7 * i + chunk.slot) % VOCAB for i in range(chunk.count)])
    yield model
    model.model.close()


def last_rows(**fields: object) -> NDArray[np.void]:
    """One drawing row per chunk: its last."""
    rows = sample_rows(CHUNKS)
    rows = rows[[chunk_end - 1 for chunk_end in np.cumsum([chunk.count for chunk in CHUNKS])]]
    rows["num_prompt"] = [chunk.count for chunk in CHUNKS]
    rows["temperature"], rows["seed"], rows["num_top"] = [0.0, 0.9, 1.4], 9, 5
    rows["top_k"], rows["top_p"], rows["repetition_penalty"] = [0, 0, 40], [1, 1, 0.9], [1, 1.3, 1]
    rows["write"] = 1
    for name, value in fields.items():
        rows[name] = value
    return rows


def inputs_of(toy: ToyModel, rows: NDArray[np.void]) -> StepInputs:
    return StepInputs(
        tokens=toy.tokens,
        page_tables=toy.page_tables,
        slots=np.array([c.slot for c in CHUNKS], np.int32),
        starts=np.array([c.start for c in CHUNKS], np.int32),
        counts=np.array([c.count for c in CHUNKS], np.int32),
        samples=rows,
        bias_ids=np.zeros(0, np.int32),
        bias_values=np.zeros(0, np.float32),
        ban_ids=np.zeros(0, np.int32),
        masks=np.zeros((0, -(-VOCAB // 32)), np.uint32),
    )


def fused(toy: ToyModel) -> StepOutputs:
    outputs = empty_outputs(3, 8)
    toy.model.step(inputs_of(toy, last_rows()), outputs)
    return outputs


def first_half(toy: ToyModel, places: list[int], num_logits: int) -> tuple[StepInputs, StepOutputs]:
    inputs = inputs_of(toy, last_rows(logits=places))
    outputs = empty_outputs(3, 8, num_logits=num_logits, vocab=VOCAB)
    for chunk in CHUNKS:
        toy.tokens[chunk.slot, chunk.count] = 0
    toy.model.step(inputs, outputs)
    return inputs, outputs


@pytest.mark.parametrize("places", [[0, 1, 2], [2, 0, 1], [-1, 0, -1], [1, -1, 0], [-1, -1, -1]], ids=str)
def test_both_halves_are_the_whole(toy: ToyModel, places: list[int]) -> None:
    expected = fused(toy)
    inputs, outputs = first_half(toy, places, max(places) + 1)
    for i, place in enumerate(places):
        assert (outputs.token[i] == -1) == (place >= 0)
        assert (toy.tokens[CHUNKS[i].slot, CHUNKS[i].count] == 0) == (place >= 0)
    kept = outputs.logits.copy()
    toy.model.sample(inputs, outputs, outputs.logits.copy())
    np.testing.assert_array_equal(outputs.logits, kept)
    for name in ("token", "logprob", "rank", "top_ids", "top_logprobs"):
        np.testing.assert_array_equal(getattr(outputs, name), getattr(expected, name), err_msg=name)
    assert [toy.tokens[c.slot, c.count] for c in CHUNKS] == expected.token.tolist()


def test_what_is_written_out_are_the_logits(toy: ToyModel) -> None:
    _, outputs = first_half(toy, [0, 1, 2], 3)
    x = outputs.logits.astype(np.float64)
    wanted = x - np.log(np.exp(x).sum(1, keepdims=True))
    ends = np.cumsum([chunk.count for chunk in CHUNKS]) - 1
    np.testing.assert_allclose(wanted, toy.logprobs(*CHUNKS)[ends], atol=2e-5)


def test_changed_logits_decide_and_logprobs_are_the_models_own(toy: ToyModel) -> None:
    expected = fused(toy)
    inputs, outputs = first_half(toy, [0, 1, 2], 3)
    changed = np.full_like(outputs.logits, -np.inf)
    changed[[0, 1, 2], [5, 6, 7]] = [np.inf, 0.0, -3.0]
    toy.model.sample(inputs, outputs, changed)
    assert outputs.token.tolist() == [5, 6, 7]
    np.testing.assert_array_equal(outputs.top_ids, expected.top_ids)
    np.testing.assert_array_equal(outputs.top_logprobs, expected.top_logprobs)
    x = outputs.logits.astype(np.float64)
    wanted = x - np.log(np.exp(x).sum(1, keepdims=True))
    np.testing.assert_allclose(outputs.logprob, wanted[[0, 1, 2], [5, 6, 7]], atol=1e-5)


def test_a_row_of_logits_that_is_not_there(toy: ToyModel) -> None:
    inputs = inputs_of(toy, last_rows(logits=[0, 2, 1]))
    with pytest.raises((ValueError, IndexError)):
        toy.model.step(inputs, empty_outputs(3, 8, num_logits=2, vocab=VOCAB))


def test_dropped_pages_read_as_zero_and_come_back(toy: ToyModel) -> None:
    before = fused(toy)
    late = np.zeros(1, SAMPLE_ROW)

    def decode() -> float:
        """The next token of chunk 1 over whatever its pages hold."""
        late[:] = last_rows(num_top=0)[1]
        late["row"], late["position"], late["temperature"], late["write"] = 0, 11, 0.0, 0
        inputs = inputs_of(toy, late)
        inputs.slots, inputs.starts, inputs.counts = (np.array([n], np.int32) for n in (1, 11, 1))
        outputs = empty_outputs(1, 1)
        toy.model.step(inputs, outputs)
        return float(outputs.logprob[0])

    full = decode()
    assert toy.model.resident_bytes() > 0
    toy.model.drop_pages()
    empty = decode()
    assert empty != full
    toy.model.drop_pages()
    assert decode() == empty
    after = fused(toy)
    np.testing.assert_array_equal(after.top_logprobs, before.top_logprobs)
    assert decode() == full


def test_memory_that_was_dropped_is_not_resident() -> None:
    _cpu = pytest.importorskip("streamgen._cpu")
    memory = _cpu.Memory(16 << 20, False)
    assert memory.resident == 0
    view = np.frombuffer((ctypes.c_uint8 * memory.size).from_address(memory.address), np.uint8)
    view[: 5 << 20] = 3
    assert 5 << 20 <= memory.resident <= 6 << 20
    memory.drop()
    assert memory.resident == 0
    assert not view[: 5 << 20].any()
    assert _cpu.Memory(0, False).resident == 0


def test_slices_of_a_matrix_in_rope_order_are_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing slice by slice, down to one head at a time, gives what packing in one go gives."""
    pytest.importorskip("streamgen._cpu")
    from msgspec.structs import replace

    from streamgen.backends import cpu

    program = build_program(CONFIG, max_context=96)

    class Interleaved(ToyWeights):
        def matrix(self, name: str, rows: int, columns: int) -> RawTensor:
            heads = {"q_proj": CONFIG.num_heads, "k_proj": CONFIG.num_kv_heads}.get(name.rpartition(".")[2])
            return replace(super().matrix(name, rows, columns), rope_heads=heads)

    results = []
    for size in (1 << 30, 1, 9000):
        monkeypatch.setattr(cpu, "_SLICE_BYTES", size)
        weights = Interleaved(random_weights(program).tensors)
        model = ToyModel(cpu.CpuBackend(), program, weights)
        model.put(0, [3, 1, 4, 1, 5])
        results.append((model.logprobs(Chunk(0, 0, 5)), len(model.bytes_seen)))
        model.model.close()
    assert results[0][1] < results[2][1] < results[1][1]
    for values, _ in results[1:]:
        np.testing.assert_array_equal(values, results[0][0])
