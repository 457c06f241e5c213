"""The sampler against transformers' logits processors and torch's log_softmax.

A draw is checked exactly: the reference walks the same uniform number through its own cumulative distribution, so a
kept set that differs by one token, or a renormalization that is off, gives other tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from streamgen.backends.base import SAMPLE_ROW, StepOutputs, empty_outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

_cpu = pytest.importorskip("streamgen._cpu")

ISAS = _cpu.isa_names()
SEED = 0x1234_5678_9ABC_DEF0
DEFAULTS = {
    "target": -1,
    "num_top": -1,
    "num_prompt": 1,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "mask": -1,
    "logits": -1,
    "seed": SEED,
}


def sample(
    logits: NDArray[np.floating[Any]],
    *,
    isa: str = ISAS[0],
    tokens: NDArray[np.int32] | None = None,
    bias: dict[int, float] | None = None,
    bans: list[int] | None = None,
    masks: NDArray[np.uint32] | None = None,
    width: int = 8,
    **fields: Any,
) -> StepOutputs:
    """Sample each row of logits [n, vocab]; a field is one value for all rows or an array of n."""
    logits = np.array(logits, np.float32)
    num_rows, vocab = logits.shape
    rows = np.zeros(num_rows, SAMPLE_ROW)
    for name, value in {**DEFAULTS, **fields}.items():
        rows[name] = value
    if tokens is None:
        tokens = np.zeros((1, int(rows["position"].max()) + 2), np.int32)
    bias_ids, bias_values = np.array(list(bias or {}), np.int32), np.array(list((bias or {}).values()), np.float32)
    ban_ids = np.array(bans or [], np.int32)
    rows["bias_count"], rows["ban_count"] = len(bias_ids), len(ban_ids)
    masks = np.zeros((1, 1), np.uint32) if masks is None else masks
    out = empty_outputs(num_rows, width)
    _cpu.kernel_sample(
        isa,
        rows.ctypes.data,
        num_rows,
        logits.ctypes.data,
        logits.shape[1],
        tokens.ctypes.data,
        tokens.shape[1],
        bias_ids.ctypes.data,
        bias_values.ctypes.data,
        ban_ids.ctypes.data,
        masks.ctypes.data,
        vocab,
        out.token.ctypes.data,
        out.logprob.ctypes.data,
        out.rank.ctypes.data,
        out.top_ids.ctypes.data,
        out.top_logprobs.ctypes.data,
        width,
    )
    return out


def random_logits(vocab: int, *, seed: int, spread: float = 3.0, rows: int = 1) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * spread).astype(np.float32)


def uniform(position: int, *, sample_index: int = 0, seed: int = SEED) -> float:
    words = _cpu.philox(seed, [position + 1, sample_index, 0, 0])
    return float(((words[0] << 32 | words[1]) >> 11) * 2.0**-53)


def processors(options: dict[str, float]) -> list[LogitsProcessor]:
    """Transformers' own, in the sampler's order; temperature is applied before."""
    made: list[LogitsProcessor] = []
    if options.get("top_k"):
        made.append(TopKLogitsWarper(top_k=int(options["top_k"])))
    if options.get("top_p", 1) < 1:
        made.append(TopPLogitsWarper(top_p=options["top_p"]))
    if options.get("min_p"):
        made.append(MinPLogitsWarper(min_p=options["min_p"]))
    if options.get("typical_p", 1) < 1:
        made.append(TypicalLogitsWarper(mass=options["typical_p"]))
    return made


def distribution(logits: NDArray[Any], options: dict[str, float]) -> NDArray[np.float64]:
    """Probabilities of one row [vocab] after temperature and truncation."""
    scores = torch.from_numpy(logits[None].astype(np.float64)) / options.get("temperature", 1.0)
    for processor in processors(options):
        scores = processor(torch.zeros((1, 1), dtype=torch.long), scores)
    return np.asarray(scores.softmax(-1)[0].numpy())


def check_draws(
    logits: NDArray[np.float32], p: NDArray[np.float64], options: dict[str, Any], *, isa: str = ISAS[0]
) -> None:
    """Many draws from one row of logits, at positions 0, 1, ..., against the inverse of p's cumulative sum."""
    count = 200
    fields: dict[str, Any] = {"temperature": 1.0, "position": np.arange(count), **options}
    got = sample(np.repeat(logits, count, axis=0), isa=isa, **fields)
    cumulative = np.cumsum(p)
    u = np.array([uniform(position) for position in range(count)])
    clear = np.abs(cumulative[None, :] - u[:, None]).min(axis=1) > 2e-6  # not on an edge, where rounding decides
    assert clear.sum() > count * 0.9
    np.testing.assert_array_equal(got.token[clear], np.searchsorted(cumulative, u[clear], side="right"))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123's known answers
        (0, [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [2**32 - 1] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0_A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(key: int, counter: list[int], expected: list[int]) -> None:
    assert list(_cpu.philox(key, counter)) == expected


OPTIONS: list[dict[str, float]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 40},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 0.5},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.8},
    {"temperature": 1.7, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 50, "typical_p": 0.7},
    {"temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [5, 64, 65, 1000, 20011])
def test_draws_follow_transformers(options: dict[str, float], vocab: int) -> None:
    for seed, spread in ((vocab, 3.0), (vocab + 1, 0.3)):
        logits = random_logits(vocab, seed=seed, spread=spread)
        check_draws(logits, distribution(logits[0], {**options, "top_k": min(options.get("top_k", 0), vocab)}), options)


@pytest.mark.parametrize("isa", ISAS)
def test_draws_on_every_instruction_set(isa: str) -> None:
    logits = random_logits(3001, seed=1)
    for options in (OPTIONS[0], OPTIONS[8], OPTIONS[-1]):
        check_draws(logits, distribution(logits[0], options), options, isa=isa)


def test_top_k_keeps_equals_of_the_last() -> None:
    logits = np.repeat(random_logits(40, seed=3), 3, axis=1)  # each logit three times
    check_draws(logits, distribution(logits[0], {"top_k": 10}), {"top_k": 10})


def test_top_p_takes_equals_by_lower_id() -> None:
    logits = np.zeros((1, 100), np.float32)
    p = np.where(np.arange(100) < 25, 1 / 25, 0.0)
    check_draws(logits, p, {"top_p": 0.2499})


@pytest.mark.parametrize("options", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}, {"typical_p": 1e-6}], ids=str)
def test_at_least_one_token_is_kept(options: dict[str, float]) -> None:
    logits = random_logits(300, seed=9)
    check_draws(logits, distribution(logits[0], options), options)


def test_draws_have_the_right_frequencies() -> None:
    """Chi-square over 16 tokens, for draws at many positions and for draws of many samples at one position."""
    logits, count = random_logits(16, seed=4, spread=1.0), 20000
    p = distribution(logits[0], {})
    many = np.repeat(logits, count, axis=0)
    for field in ("position", "sample_index", "seed"):
        fields: dict[str, Any] = {field: np.arange(count), "temperature": 1.0}
        observed = np.bincount(sample(many, **fields).token, minlength=16)
        chi_square = float((((observed - count * p) ** 2) / (count * p)).sum())
        assert chi_square < 44.3, field  # 15 degrees of freedom: 1 in 10,000


def test_a_draw_depends_on_seed_sample_and_position_alone() -> None:
    logits = np.repeat(random_logits(500, seed=5, spread=0.5), 64, axis=0)
    first = sample(logits, temperature=1.0, position=np.arange(64)).token
    order = np.random.default_rng(0).permutation(64)
    again = sample(logits, temperature=1.0, position=np.arange(64)[order]).token
    np.testing.assert_array_equal(first[order], again)
    for name, value in (("sample_index", 1), ("seed", SEED + 1), ("seed", SEED + (1 << 32))):
        other: dict[str, Any] = {name: value, "temperature": 1.0, "position": np.arange(64)}
        assert (sample(logits, **other).token != first).mean() > 0.8


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 15, 64, 65, 512, 4099, 152064])
def test_greedy_takes_the_lowest_of_the_largest(isa: str, vocab: int) -> None:
    logits = np.round(random_logits(vocab, seed=vocab, rows=5))  # many equal
    np.testing.assert_array_equal(sample(logits, isa=isa).token, logits.argmax(axis=1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [6, 65, 4099, 49152])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.7, "top_p": 0.9}, {"target": 3}], ids=str)
def test_logprobs_are_of_the_raw_logits(isa: str, vocab: int, fields: dict[str, Any]) -> None:
    logits = np.round(random_logits(vocab, seed=vocab, rows=4) * 4) / 4
    got = sample(logits, isa=isa, num_top=6, bans=[1], **fields)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    for row, token in enumerate(got.token):
        order = np.lexsort((np.arange(vocab), -logits[row]))
        assert got.rank[row] == int(np.flatnonzero(order == token)[0]) + 1
        np.testing.assert_array_equal(got.top_ids[row, :6], order[:6])
        np.testing.assert_allclose(got.logprob[row], expected[row, token], rtol=0, atol=1e-5)
        np.testing.assert_allclose(got.top_logprobs[row, :6], expected[row, order[:6]], rtol=0, atol=1e-5)
    if "target" in fields:
        assert (got.token == 3).all()
    assert (got.top_ids[:, 6:] == 0).all(), "wrote more than asked for"


def test_no_logprobs_unless_asked() -> None:
    got = sample(random_logits(100, seed=1))
    assert got.logprob[0] == 0 and got.rank[0] == 0 and not got.top_ids.any()
    got = sample(random_logits(100, seed=1), num_top=0)
    assert got.logprob[0] < 0 and got.rank[0] == 1 and not got.top_ids.any()


def test_penalties() -> None:
    rng = np.random.default_rng(7)
    vocab, num_prompt, position = 50, 30, 59
    tokens = rng.integers(0, vocab - 10, (3, position + 2)).astype(np.int32)  # ten ids never occur
    logits = random_logits(vocab, seed=8)
    history = tokens[1, : position + 1]
    counts = np.bincount(history[num_prompt:], minlength=vocab)
    repeat = RepetitionPenaltyLogitsProcessor(1.3)
    scores = repeat(torch.from_numpy(history[None].astype(np.int64)), torch.from_numpy(logits.copy()))[0].numpy()
    scores = scores - 0.4 * (counts > 0) - 0.2 * counts
    fields: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "num_prompt": num_prompt,
    }
    common: dict[str, Any] = {"slot": 1, "position": position, "tokens": tokens, **fields}
    assert sample(logits, **common).token[0] == scores.argmax()
    seeds = np.arange(300)
    got = sample(np.repeat(logits, 300, axis=0), temperature=0.8, seed=seeds, **common).token
    cumulative = np.cumsum(distribution(scores, {"temperature": 0.8}))
    expected = [np.searchsorted(cumulative, uniform(position, seed=int(s)), side="right") for s in seeds]
    assert (got == expected).mean() > 0.99


def test_frequency_counts_output_only() -> None:
    logits = np.array([[1.0, 0.9, 0.0]], np.float32)
    tokens = np.array([[0, 0, 0, 2, 9]], np.int32)
    fields: dict[str, Any] = {"tokens": tokens, "position": 3, "frequency_penalty": 0.5}
    assert sample(logits, num_prompt=3, **fields).token[0] == 0
    assert sample(logits, num_prompt=2, **fields).token[0] == 1


def mask_of(allowed: list[int], vocab: int) -> NDArray[np.uint32]:
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[allowed] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)[None]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_bans_and_masks(temperature: float) -> None:
    vocab = 77
    logits = random_logits(vocab, seed=11, spread=1.0)
    bias, bans, allowed = {3: 2.5, 70: 4.0, 12: -np.inf}, [70, 5], [2, 3, 5, 12, 31, 32, 64, 70, 76]
    scores = logits[0].astype(np.float64)
    for token, value in bias.items():
        scores[token] += value
    scores[bans] = -np.inf
    scores[[t for t in range(vocab) if t not in allowed]] = -np.inf
    common: dict[str, Any] = {"bias": bias, "bans": bans, "masks": mask_of(allowed, vocab), "mask": 0}
    if temperature:
        check_draws(logits, distribution(scores, {}), common)
    else:
        assert sample(logits, **common).token[0] == scores.argmax()


def test_mask_of_the_row_is_used() -> None:
    masks = np.concatenate([mask_of([1], 40), mask_of([39], 40), mask_of([7], 40)])
    got = sample(np.zeros((3, 40), np.float32), masks=masks, mask=np.array([2, 0, 1]), temperature=1.0)
    assert got.token.tolist() == [7, 1, 39]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.5}, {"typical_p": 0.5, "min_p": 0.1}], ids=str)
def test_logits_that_are_no_numbers(temperature: float, truncation: dict[str, float]) -> None:
    vocab = 100
    common: dict[str, Any] = {"temperature": temperature, **truncation}
    nothing = np.full((1, vocab), np.nan, np.float32)
    assert sample(nothing, **common).token[0] == 0
    assert sample(nothing, bans=[0, 1], **common).token[0] == 2
    assert sample(nothing, bans=[40], masks=mask_of([40, 44], vocab), mask=0, **common).token[0] == 44
    assert sample(nothing, masks=mask_of([], vocab), mask=0, **common).token[0] == 0
    got = sample(nothing, num_top=2, **common)
    assert got.logprob[0] == -np.inf and got.rank[0] == 1 and got.top_logprobs[0, 0] == -np.inf
    one = nothing.copy()
    one[0, 61] = -5
    assert sample(one, **common).token[0] == 61
    infinite = random_logits(vocab, seed=2)
    infinite[0, 17] = np.inf
    got = sample(infinite, num_top=1, **common)
    assert got.token[0] == 17 and got.logprob[0] == 0
    assert np.isfinite(sample(infinite, temperature=1e-38, num_top=0).logprob[0])


def test_tiny_temperature_is_greedy() -> None:
    logits = random_logits(1000, seed=3)
    for temperature in (1e-3, 1e-30, 1e-44):
        assert sample(logits, temperature=temperature).token[0] == logits.argmax()


def _awkward_logits(vocab: int) -> NDArray[np.float32]:
    """Rows in which rounding, ties and what is no number decide."""
    rng = np.random.default_rng(vocab)
    plain = random_logits(vocab, seed=vocab, rows=8)
    tied = np.round(plain, 1)
    near = (rng.integers(0, 4, (8, vocab)) * np.float32(2**-23) + 1).astype(np.float32)  # neighbours, once tempered
    far = (rng.integers(0, 8, (8, vocab)) * np.float32(2**-24)).astype(np.float32)  # equal, less the largest
    far[:, 0] = 10
    broken = plain.copy()
    broken[:, rng.integers(0, vocab, vocab // 3)] = np.nan
    broken[0, -1], broken[1, 0], broken[2], broken[3, 0] = np.inf, -np.inf, -np.inf, np.nan
    return np.concatenate([plain, tied, near, near * np.float32(1e-30), far, plain * np.float32(1e37), broken])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 65, 4099, 30000])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 3},
        {"temperature": 1e-2, "top_k": 50, "min_p": 0.05},
        {"temperature": 1e-6, "top_k": 5},
        {"temperature": 1e9, "top_k": 5},
        {"temperature": 0.9, "top_k": 40, "typical_p": 0.9},
        {"temperature": 1.0, "top_p": 0.9},
    ],
    ids=str,
)
def test_the_short_way_draws_as_the_long_one(isa: str, vocab: int, fields: dict[str, Any]) -> None:
    logits = _awkward_logits(vocab)
    fields = {**fields, "position": np.arange(len(logits))}
    short = sample(logits, isa=isa, **fields).token
    long = sample(logits, isa=isa, num_top=0, **fields).token  # with log-probabilities a row is always read whole
    np.testing.assert_array_equal(short, long)


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    logits = random_logits(50, seed=1)
    tokens = np.array([[-1, 50, 2**31 - 1, 7, 0]], np.int32)
    got = sample(
        logits,
        tokens=tokens,
        position=3,
        repetition_penalty=1.5,
        frequency_penalty=0.1,
        bias={-1: 5.0, 50: 5.0},
        bans=[-7, 50, 10**9],
    )
    scores = logits[0].copy()
    scores[7] = (scores[7] / 1.5 if scores[7] > 0 else scores[7] * 1.5) - 0.1
    assert got.token[0] == scores.argmax()


def test_the_token_is_written_where_the_row_says() -> None:
    logits = random_logits(30, seed=1, rows=3)
    tokens = np.full((4, 6), 29, np.int32)
    slots, positions = np.array([2, 0, 3]), np.array([1, 4, 2])
    got = sample(logits, tokens=tokens, slot=slots, position=positions, write=np.array([1, 1, 0]))
    expected = np.full((4, 6), 29, np.int32)
    expected[2, 2], expected[0, 5] = got.token[0], got.token[1]
    np.testing.assert_array_equal(tokens, expected)
