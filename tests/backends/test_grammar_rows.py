"""Rows that a grammar limits: the kernel against the reference sampler, in every way in which tokens are allowed."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from streamgen.backends.base import GRAMMAR, SAMPLE_ROW, StepInputs, StepOutputs, empty_outputs
from streamgen.backends.reference_sampler import sample_row
from streamgen.grammar.vocabulary import GrammarVocabulary
from tests.backends.test_sampler_kernel import DEFAULTS, ISAS, random_logits
from tests.grammar.automata import allowed_ids, automaton, make_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

_cpu = pytest.importorskip("streamgen._cpu")

VOCAB = 1000
STOP, OPENING = 0, 17
VOCABULARY = GrammarVocabulary([b"%03d" % i if i else b"" for i in range(VOCAB)], (STOP,), vocab_size=VOCAB)
PROMPT = 4
FEW = sorted(Random(1).sample(range(1, VOCAB), 9))
ONE_OF_FEW = "|".join(f"{i:03}" for i in FEW)

# how a sequence is limited: regex, the rest of GrammarSlots.begin
LIMITS: dict[str, tuple[str, dict[str, Any]]] = {
    "forced": ("042", {}),
    "stop": ("(?:042)?", {}),
    "few": (ONE_OF_FEW, {}),
    "few-and-stop": (f"(?:{ONE_OF_FEW})*", {}),
    "many": ("[0-57-9][0-9]{2}", {}),
    "nearly-all": ("[0-9]*", {}),
    "few-or-opening": (ONE_OF_FEW, {"begins_after": [5], "opens_with": [OPENING, 999]}),
    "many-or-opening": ("[2-8][0-9]{2}", {"begins_after": [5], "opens_with": [OPENING, 999]}),
    "beginning": ("042", {"begins_after": [600, 3, 77], "is_forced": True}),
    "free-but-held": ("042", {"begins_after": [5], "held_ids": [STOP, 8]}),
    "free": ("042", {"begins_after": [5], "repeats": True}),
}


@pytest.fixture(scope="module")
def slots() -> Any:
    """One slot for each of LIMITS, in order; the sequences have no output yet."""
    made = _cpu.GrammarSlots(len(LIMITS))
    for slot, (regex, use) in enumerate(LIMITS.values()):
        assert made.begin(slot, make_table(automaton(regex), VOCABULARY), PROMPT, [], **use)
    return made


def inputs_of(slots: Any, count: int, *, seed: int, **fields: Any) -> StepInputs:
    """Rows behind the prompt of every slot, `count` each; `bias` and `bans` are lists of ids for all."""
    rng = np.random.default_rng(seed)
    bias, bans = fields.pop("bias", []), fields.pop("bans", [])
    rows = np.zeros(len(LIMITS) * count, SAMPLE_ROW)
    for name, value in {**DEFAULTS, "position": PROMPT - 1, "num_prompt": 2, "mask": GRAMMAR, **fields}.items():
        rows[name] = value
    rows["slot"] = np.repeat(np.arange(len(LIMITS)), count)
    rows["sample_index"] = np.tile(np.arange(count), len(LIMITS))
    rows["bias_count"], rows["ban_count"] = len(bias), len(bans)
    none = np.zeros(0, np.int32)
    tokens = np.concatenate(
        [rng.choice([*FEW, 42, OPENING], (len(LIMITS), PROMPT)), np.zeros((len(LIMITS), 2))], axis=1
    )
    return StepInputs(
        tokens=np.ascontiguousarray(tokens, np.int32),
        page_tables=np.zeros((1, 1), np.int32),
        slots=none,
        starts=none,
        counts=none,
        samples=rows,
        bias_ids=np.array(bias, np.int32),
        bias_values=np.full(len(bias), 2.5, np.float32),
        ban_ids=np.array(bans, np.int32),
        masks=np.zeros((0, 0), np.uint32),
        grammars=slots,
    )


def kernel(inputs: StepInputs, logits: NDArray[np.float32], *, isa: str = ISAS[0]) -> StepOutputs:
    out = empty_outputs(len(inputs.samples), 5)
    logits = logits.copy()
    _cpu.kernel_sample(
        isa,
        inputs.samples.ctypes.data,
        len(inputs.samples),
        logits.ctypes.data,
        logits.shape[1],
        inputs.tokens.ctypes.data,
        inputs.tokens.shape[1],
        inputs.bias_ids.ctypes.data,
        inputs.bias_values.ctypes.data,
        inputs.ban_ids.ctypes.data,
        inputs.masks.ctypes.data,
        VOCAB,
        out.token.ctypes.data,
        out.logprob.ctypes.data,
        out.rank.ctypes.data,
        out.top_ids.ctypes.data,
        out.top_logprobs.ctypes.data,
        5,
        inputs.grammars,
    )
    return out


def reference(inputs: StepInputs, logits: NDArray[np.float32]) -> StepOutputs:
    out = empty_outputs(len(inputs.samples), 5)
    for index, row in enumerate(logits):
        sample_row(inputs, out, index, row)
    return out


def may_draw(slots: Any, slot: int) -> set[int]:
    words = np.full(-(-VOCAB // 32), 0xFFFFFFFF, np.uint32)
    words[-1] = (1 << VOCAB % 32) - 1
    slots.fill(slot, PROMPT - 1, words.ctypes.data)
    words[-1] &= np.uint32((1 << VOCAB % 32) - 1)
    return allowed_ids(words, VOCAB)


def test_the_limits_are_what_they_are_called(slots: Any) -> None:
    sets = {name: may_draw(slots, slot) for slot, name in enumerate(LIMITS)}
    every = set(range(VOCAB))
    assert sets["forced"] == {42} and sets["stop"] == {42, STOP}
    assert sets["few"] == set(FEW) and sets["few-and-stop"] == {*FEW, STOP}
    assert sets["many"] == {i for i in range(1, VOCAB) if not 600 <= i < 700}
    assert sets["nearly-all"] == every
    assert sets["few-or-opening"] == {*FEW, OPENING, 999}
    assert sets["many-or-opening"] == {*range(200, 900), OPENING, 999}
    assert sets["beginning"] == {600, 3, 77}
    assert sets["free-but-held"] == every - {STOP, 8} and sets["free"] == every


FIELDS: tuple[dict[str, Any], ...] = (
    {},
    {"num_top": 3},
    {"temperature": 0.8},
    {"temperature": 0.8, "num_top": 0},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2, "typical_p": 0.8},
    {"temperature": 0.9, "repetition_penalty": 1.4, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"temperature": 1.1, "bias": [FEW[0], 42, 999, 500], "bans": [FEW[1], 600, STOP]},
    {"bans": [*FEW, 42, STOP]},
    {"temperature": 1.0, "top_k": 3, "repetition_penalty": 0.8, "bias": FEW[:3], "num_top": 2, "bans": [77]},
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_the_kernel_draws_what_the_reference_does(slots: Any, isa: str, fields: dict[str, Any]) -> None:
    count = 25
    inputs = inputs_of(slots, count, seed=3, **fields)
    logits = random_logits(VOCAB, seed=11, rows=len(inputs.samples))
    got, expected = kernel(inputs, logits, isa=isa), reference(inputs, logits)
    np.testing.assert_array_equal(got.token, expected.token)
    if "num_top" in fields:
        np.testing.assert_array_equal(got.rank, expected.rank)
        np.testing.assert_array_equal(got.top_ids, expected.top_ids)
        np.testing.assert_allclose(got.logprob, expected.logprob, rtol=0, atol=1e-5)
    for slot in range(len(LIMITS)):
        assert set(got.token[slot * count : (slot + 1) * count].tolist()) <= may_draw(slots, slot)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("isa", ISAS)
def test_logits_that_are_no_numbers(slots: Any, isa: str, temperature: float) -> None:
    broken = np.full(VOCAB, np.nan, np.float32)
    some = random_logits(VOCAB, seed=2)[0]
    some[Random(1).sample(range(VOCAB), 700)] = np.nan
    some[FEW[2]] = np.inf
    for row in (broken, np.full(VOCAB, -np.inf, np.float32), some, np.where(np.isnan(some), -np.inf, 1e38)):
        inputs = inputs_of(slots, 3, seed=3, temperature=temperature)
        logits = np.repeat(row[None].astype(np.float32), len(inputs.samples), axis=0)
        np.testing.assert_array_equal(kernel(inputs, logits, isa=isa).token, reference(inputs, logits).token)


def test_bans_give_way_where_they_leave_nothing(slots: Any) -> None:
    inputs = inputs_of(slots, 1, seed=1, bans=list(range(VOCAB)))
    logits = random_logits(VOCAB, seed=4, rows=len(inputs.samples))
    tokens = kernel(inputs, logits).token
    for slot, name in enumerate(LIMITS):
        if name != "free":
            allowed = sorted(may_draw(slots, slot))
            assert tokens[slot] == allowed[int(logits[slot, allowed].argmax())]
    inputs = inputs_of(slots, 1, seed=1, bans=[STOP])
    assert STOP not in kernel(inputs, logits).token[: len(LIMITS)]


def test_a_forced_token_needs_no_logits(slots: Any) -> None:
    inputs = inputs_of(slots, 1, seed=1)
    logits = np.full((len(inputs.samples), VOCAB), np.nan, np.float32)
    assert kernel(inputs, logits).token[0] == 42


def test_rows_of_one_step_do_not_touch_each_other(slots: Any) -> None:
    inputs = inputs_of(slots, 6, seed=9, temperature=0.9, top_p=0.9)
    logits = random_logits(VOCAB, seed=13, rows=len(inputs.samples))
    together = kernel(inputs, logits).token
    order = np.random.default_rng(0).permutation(len(together))
    inputs.samples = inputs.samples[order]
    np.testing.assert_array_equal(kernel(inputs, logits[order]).token, together[order])
