"""The reference sampler against transformers' logits processors, known vectors and plain statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from streamgen.backends.base import SAMPLE_ROW, Float32Array, StepInputs, StepOutputs, empty_outputs
from streamgen.backends.reference_sampler import philox, sample_row, uniform
from streamgen.models.config import ModelConfig, RopeConfig
from streamgen.models.registry import build_program
from tests.backends.toy import Chunk, ToyModel, available_backends, random_weights, sample_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCAB = 70
NEUTRAL = {
    "target": -1,
    "num_top": -1,
    "mask": -1,
    "logits": -1,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}


def make_inputs(history: list[int] | None = None, **fields: Any) -> StepInputs:
    """One sample row that follows `history`; `fields` are of SAMPLE_ROW, or the arrays of StepInputs."""
    history = [5] if history is None else history
    tokens = np.full((1, len(history) + 1), -7, np.int32)
    tokens[0, : len(history)] = history
    arrays: dict[str, Any] = {
        "bias_ids": np.zeros(0, np.int32),
        "bias_values": np.zeros(0, np.float32),
        "ban_ids": np.zeros(0, np.int32),
        "masks": np.zeros((0, -(-VOCAB // 32)), np.uint32),
    }
    for name in arrays:
        if name in fields:
            arrays[name] = np.asarray(fields.pop(name), arrays[name].dtype)
    row = np.zeros(1, SAMPLE_ROW)
    fields = NEUTRAL | {"position": len(history) - 1, "num_prompt": len(history)} | fields
    fields |= {"bias_count": len(arrays["bias_ids"]), "ban_count": len(arrays["ban_ids"])}
    for name, value in fields.items():
        row[name] = value
    none = np.zeros(0, np.int32)
    return StepInputs(
        tokens=tokens,
        page_tables=np.zeros((1, 1), np.int32),
        slots=none,
        starts=none,
        counts=none,
        samples=row,
        **arrays,
    )


def sample(logits: Float32Array, history: list[int] | None = None, **fields: Any) -> int:
    outputs = empty_outputs(1, 4)
    sample_row(make_inputs(history, **fields), outputs, 0, logits)
    return int(outputs.token[0])


def report(logits: Float32Array, **fields: Any) -> StepOutputs:
    outputs = empty_outputs(1, 8)
    sample_row(make_inputs(None, **fields), outputs, 0, logits)
    return outputs


def drawn(logits: Float32Array, count: int, **fields: Any) -> NDArray[np.int64]:
    """How often each token is drawn, over `count` sample indices: [vocab]."""
    fields = {"temperature": 1.0} | fields
    tokens = [sample(logits, sample_index=index, **fields) for index in range(count)]
    return np.bincount(tokens, minlength=VOCAB)


def random_logits(seed: int, scale: float = 2.0) -> Float32Array:
    return (scale * np.random.default_rng(seed).standard_normal(VOCAB)).astype(np.float32)


def test_philox_vectors() -> None:
    """From Random123's kat_vectors."""
    assert philox((0, 0), (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox((ones, ones), (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0xA4093822, 0x299F31D0), pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_depends_on_each_of_its_arguments() -> None:
    values = {uniform(s, p, i) for s in (0, 1, 1 << 32) for p in (0, 1) for i in (0, 1)}
    assert len(values) == 12 and all(0 <= u < 1 for u in values)


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = random_logits(0)
    logits[[9, 30, 31]] = 50
    assert sample(logits) == 9
    assert sample(logits, ban_ids=[9]) == 30


NO_IDS: Any = torch.zeros(1, 1, dtype=torch.long)  # Any: transformers annotates it with a class that is never made

WARPERS: dict[str, tuple[dict[str, Any], Any]] = {
    "top_k": ({"top_k": 5}, TopKLogitsWarper(5)),
    "top_p": ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
    "top_p-one": ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
    "min_p": ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    "typical": ({"typical_p": 0.5}, TypicalLogitsWarper(0.5)),
    "temperature": ({"temperature": 0.6, "top_k": 40}, [TemperatureLogitsWarper(0.6), TopKLogitsWarper(40)]),
    "all": (
        {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.8},
        [TemperatureLogitsWarper(1.5), TopKLogitsWarper(30), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05),
         TypicalLogitsWarper(0.8)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WARPERS)
def test_draws_follow_transformers_distribution(name: str, seed: int) -> None:
    """The inverse CDF of transformers' own distribution, at this row's random number, is the token drawn."""
    fields, warpers = WARPERS[name]
    logits = random_logits(seed)
    processors = LogitsProcessorList(warpers if isinstance(warpers, list) else [warpers])
    scores = processors(NO_IDS, torch.from_numpy(logits)[None].double())[0]
    cumulative = scores.softmax(-1).cumsum(-1).numpy()
    for index in range(300):
        u = uniform(3, 0, index)
        wanted = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
        assert sample(logits, **({"temperature": 1.0} | fields), seed=3, sample_index=index) == wanted


def test_chi_square() -> None:
    logits = random_logits(4, scale=1.0)
    counts = drawn(logits, 4000)
    expected = 4000 * torch.from_numpy(logits).double().softmax(-1).numpy()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert 30 < statistic < 130  # 69 degrees of freedom: five standard deviations are 59


def test_tiny_temperature_is_nearly_greedy() -> None:
    logits = random_logits(5, scale=1e30)
    assert drawn(logits, 20, temperature=1e-30)[int(logits.argmax())] == 20


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(6)
    history = [3, 3, 8, 60]
    scores = RepetitionPenaltyLogitsProcessor(3.0)(torch.tensor([history]), torch.from_numpy(logits)[None].clone())
    order = scores[0].argsort(descending=True).tolist()
    for banned in range(10):  # the whole order, seen through bans
        assert sample(logits, history, repetition_penalty=3.0, ban_ids=order[:banned]) == order[banned]


def test_presence_and_frequency_count_output_only() -> None:
    logits = np.zeros(VOCAB, np.float32)
    logits[[10, 11, 12]] = [5.0, 4.9, 4.0]
    prompt, output = [10] * 5, [10, 10]
    assert sample(logits, prompt, presence_penalty=2.0, frequency_penalty=2.0) == 10
    assert sample(logits, prompt + output, num_prompt=5, presence_penalty=0.2) == 11
    assert sample(logits, prompt + output[:1], num_prompt=5, frequency_penalty=0.09) == 10
    assert sample(logits, prompt + output, num_prompt=5, frequency_penalty=0.09) == 11


def test_bias_bans_and_mask() -> None:
    logits = random_logits(7)
    best = int(logits.argmax())
    assert sample(logits, bias_ids=[69], bias_values=[100.0]) == 69
    assert sample(logits, bias_ids=[69, 0], bias_values=[100.0, 200.0]) == 0
    assert sample(logits, bias_ids=[69], bias_values=[100.0], ban_ids=[69]) == best
    mask = np.zeros((2, 3), np.uint32)
    mask[1, 2], mask[1, 0] = 1 << 3, 1 << 31  # ids 67 and 31
    wanted = 67 if logits[67] > logits[31] else 31
    assert sample(logits, masks=mask, mask=1) == wanted
    counts = drawn(logits, 200, masks=mask, mask=1)
    assert set(np.flatnonzero(counts)) == {31, 67}


def test_nothing_allowed_gives_a_defined_token() -> None:
    logits = np.full(VOCAB, -np.inf, np.float32)
    assert sample(logits) == 0
    assert sample(logits, ban_ids=[0, 1], temperature=1.0) == 2
    assert sample(logits, masks=np.zeros((1, 3), np.uint32), mask=0) == 0


def test_broken_logits_give_defined_results() -> None:
    logits = random_logits(8)
    logits[3], logits[9] = np.nan, np.inf
    assert sample(logits) == 9
    assert sample(logits, ban_ids=[9], temperature=1.0) != 3
    outputs = report(logits, num_top=2)
    assert outputs.token[0] == 9 and outputs.rank[0] == 1 and outputs.logprob[0] == 0
    assert 0 <= sample(np.full(VOCAB, np.nan, np.float32), temperature=1.0) < VOCAB


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(9)
    logits[[20, 21]] = logits.max() + 1
    wanted = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    outputs = report(logits, num_top=3, ban_ids=[20], temperature=0.0, bias_ids=[40], bias_values=[5.0])
    assert outputs.token[0] == 21 or outputs.token[0] == 40
    assert outputs.logprob[0] == pytest.approx(wanted[outputs.token[0]], abs=1e-6)
    assert outputs.top_ids[0, :2].tolist() == [20, 21] and (outputs.top_ids[0, 3:] == 0).all()
    assert outputs.top_logprobs[0, 0] == pytest.approx(wanted.max(), abs=1e-6)
    assert [int(report(logits, num_top=0, target=t).rank[0]) for t in (20, 21)] == [1, 2]


def test_target_draws_nothing() -> None:
    logits = random_logits(10)
    outputs = report(logits, num_top=0, target=33, temperature=1.0)
    order = np.argsort(-logits)
    assert outputs.token[0] == 33 and outputs.rank[0] == 1 + int(np.flatnonzero(order == 33)[0])


def test_the_token_is_written_after_its_row() -> None:
    inputs = make_inputs([1, 2, 3], write=1)
    logits = random_logits(11)
    sample_row(inputs, empty_outputs(1, 0), 0, logits)
    assert inputs.tokens[0].tolist() == [1, 2, 3, int(logits.argmax())]
    inputs = make_inputs([1, 2, 3])
    sample_row(inputs, empty_outputs(1, 0), 0, logits)
    assert inputs.tokens[0, 3] == -7


def test_backends_draw_the_same_tokens() -> None:
    """Rows of every kind in one step: backends agree on each token, and on log-probability, rank and the likeliest."""
    first, *others = available_backends()
    if not others:
        pytest.skip("only the reference backend is built")
    config = ModelConfig(
        family="llama", architecture="llama", hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=48, vocab_size=VOCAB, norm_eps=1e-5, max_context=96, rope=RopeConfig(rotary_dim=8),
    )  # fmt: skip
    program = build_program(config, max_context=96)
    rng = np.random.default_rng(12)
    ids = rng.integers(0, VOCAB, 90).tolist()
    chunk = Chunk(0, 0, 90)
    samples = sample_rows([chunk])
    samples["num_top"] = rng.integers(-1, 6, 90)
    samples["temperature"] = rng.choice([0, 0.3, 1, 2], 90)
    samples["top_k"] = rng.choice([0, 0, 3, 20, 200], 90)
    samples["top_p"] = rng.choice([1, 1, 0.5, 0.9], 90)
    samples["min_p"] = rng.choice([0, 0, 0.1], 90)
    samples["typical_p"] = rng.choice([1, 1, 0.7], 90)
    samples["repetition_penalty"] = rng.choice([1, 1, 1.3], 90)
    samples["presence_penalty"] = rng.choice([0, 0, 0.5], 90)
    samples["frequency_penalty"] = rng.choice([0, 0, 0.2], 90)
    samples["num_prompt"] = np.minimum(samples["position"] + 1, rng.integers(1, 60, 90))
    samples["seed"] = rng.integers(0, 1 << 63, 90)
    samples["sample_index"] = rng.integers(0, 5, 90)
    samples["mask"] = rng.integers(-1, 2, 90)
    samples["bias_count"] = samples["ban_count"] = rng.integers(0, 3, 90)
    arrays: dict[str, NDArray[Any]] = {
        "masks": rng.integers(0, 1 << 32, (2, 3), np.uint32),
        "bias_ids": np.array([5, 50], np.int32),
        "bias_values": np.array([3.0, -3.0], np.float32),
        "ban_ids": np.array([7, 8], np.int32),
    }
    found = []
    for backend in (first, *others):
        model = ToyModel(backend, program, random_weights(program))
        model.put(0, ids)
        found.append(model.run([chunk], samples, **arrays))
    for other in found[1:]:
        np.testing.assert_array_equal(other.token, found[0].token)
        np.testing.assert_array_equal(other.rank, found[0].rank)
        np.testing.assert_array_equal(other.top_ids, found[0].top_ids)
        np.testing.assert_allclose(other.logprob, found[0].logprob, atol=1e-5)
        np.testing.assert_allclose(other.top_logprobs, found[0].top_logprobs, atol=1e-5)
