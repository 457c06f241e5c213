"""Plans as arrays: rows, head rows, bans, biases and scores, seen through a model that records what it is given."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from streamgen.execution.runner import Runner
from streamgen.messages import Begin, StepDone, StepPlan
from streamgen.sampling import ResolvedSampling

if TYPE_CHECKING:
    from streamgen.backends.base import Float32Array, Int32Array, StepInputs, StepOutputs


class Recorder:
    """Answers each head row with 100 + its position, and keeps the inputs."""

    vocab_size = 512

    def __init__(self) -> None:
        self.inputs: list[StepInputs] = []
        self.copies: list[list[list[int]]] = []

    def step(self, inputs: StepInputs, outputs: StepOutputs, wake_fd: int | None = None) -> None:
        self.inputs.append(inputs)
        for i, row in enumerate(inputs.samples):
            token = row["target"] if row["target"] >= 0 else 100 + row["position"]
            outputs.token[i] = token
            outputs.logprob[i] = -float(row["position"])
            outputs.rank[i] = 1
            outputs.top_ids[i, : max(0, row["num_top"])] = 7
            if row["write"]:
                inputs.tokens[row["slot"], row["position"] + 1] = token

    def copy_pages(self, pairs: Int32Array) -> None:
        self.copies.append(pairs.tolist())

    def sample(self, inputs: StepInputs, outputs: StepOutputs, changed: Float32Array) -> None:
        raise AssertionError("no sequence here has logits processors")

    def drop_pages(self) -> None:
        pass

    def resident_bytes(self) -> int:
        return 0

    def close(self) -> None:
        pass


def begin(slot: int, num_prompt: int, **fields: object) -> Begin:
    sampling = fields.pop("sampling", ResolvedSampling())
    return Begin(slot=slot, ids=tuple(range(num_prompt)), num_prompt=num_prompt, sampling=sampling, **fields)  # type: ignore[arg-type]


def one(
    slot: int, start: int, count: int, *, samples: int = 1, pages: tuple[int, ...] = (), **fields: object
) -> StepPlan:
    return StepPlan(
        step=0,
        slots=(slot,),
        starts=(start,),
        counts=(count,),
        samples=(samples,),
        pages=(pages,),
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def runner(recorder: Recorder) -> Runner:
    return Runner(recorder, num_slots=4, max_context=64, page_size=16)


def run(runner: Runner, plan: StepPlan) -> StepDone:
    return runner.execute(plan)


def test_prompt_then_decode_feeds_the_sampled_token(runner: Runner, recorder: Recorder) -> None:
    done = run(runner, one(2, 0, 5, pages=(9,), begins=(begin(2, 5),)))
    assert done.tokens == ((104,),)
    run(runner, one(2, 5, 1))
    inputs = recorder.inputs[1]
    assert inputs.tokens[2, :7].tolist() == [0, 1, 2, 3, 4, 104, 105]
    assert inputs.page_tables[2, 0] == 9


def test_chunk_without_sampling_has_no_head_row(runner: Runner, recorder: Recorder) -> None:
    done = run(runner, one(0, 0, 3, samples=0, begins=(begin(0, 8),)))
    assert done.tokens == ((),)
    assert len(recorder.inputs[0].samples) == 0


def test_rows_of_several_sequences_are_counted_through(runner: Runner, recorder: Recorder) -> None:
    plan = StepPlan(
        step=3,
        begins=(begin(0, 4), begin(1, 6), begin(3, 2)),
        slots=(1, 0, 3),
        starts=(0, 0, 0),
        counts=(6, 3, 2),
        samples=(1, 0, 1),
        pages=((), (), ()),
    )
    done = run(runner, plan)
    assert recorder.inputs[0].samples["row"].tolist() == [5, 10]
    assert recorder.inputs[0].samples["slot"].tolist() == [1, 3]
    assert done.tokens == ((105,), (), (101,))
    assert done.step == 3


@pytest.mark.parametrize(
    ("drafts", "after"),
    [((50, 51), [103, 104, 51]), ((104, 51), [103, 104, 105]), ((104, 105), [103, 104, 105, 106])],
    ids=str,
)
def test_verification_samples_every_draft_and_writes_the_token_that_goes_on(
    runner: Runner, recorder: Recorder, drafts: tuple[int, ...], after: list[int]
) -> None:
    run(runner, one(0, 0, 4, begins=(begin(0, 4),)))
    done = run(runner, one(0, 4, 3, samples=3, drafts=(drafts,)))
    rows = recorder.inputs[1].samples
    assert rows["position"].tolist() == [4, 5, 6]
    assert not rows["write"].any()
    assert done.tokens == ((104, 105, 106),)
    assert recorder.inputs[1].tokens[0, 4 : 4 + len(after)].tolist() == after


def test_scores_come_once_per_prompt_position_across_chunks(runner: Runner, recorder: Recorder) -> None:
    sampling = ResolvedSampling(prompt_logprobs=2)
    first = run(runner, one(0, 0, 4, samples=0, begins=(begin(0, 7, score_from=2, sampling=sampling),)))
    second = run(runner, one(0, 4, 3))
    assert recorder.inputs[0].samples["target"].tolist() == [2, 3, 4]
    assert recorder.inputs[1].samples["target"].tolist() == [5, 6, -1]
    assert [len(first.scores[0]), len(second.scores[0])] == [3, 2]
    assert first.scores[0][0].top_ids == (7, 7)
    assert second.tokens == ((106,),)
    third = run(runner, one(0, 7, 1))
    assert third.scores == ()


def test_bans_last_until_the_minimum_length(runner: Runner, recorder: Recorder) -> None:
    run(runner, one(0, 0, 4, begins=(begin(0, 4, stop_ids=(2, 9), min_length=6),)))
    run(runner, one(0, 4, 1))
    run(runner, one(0, 5, 1))
    counts = [int(i.samples["ban_count"][0]) for i in recorder.inputs]
    assert counts == [2, 2, 0]
    assert recorder.inputs[0].ban_ids.tolist() == [2, 9]


def test_biases_are_sliced_per_row(runner: Runner, recorder: Recorder) -> None:
    biased = ResolvedSampling(logit_bias={5: 1.5, 6: -2.0})
    plan = StepPlan(
        step=0,
        begins=(begin(0, 2), begin(1, 2, sampling=biased)),
        slots=(0, 1),
        starts=(0, 0),
        counts=(2, 2),
        samples=(1, 1),
        pages=((), ()),
    )
    run(runner, plan)
    inputs = recorder.inputs[0]
    assert inputs.samples["bias_count"].tolist() == [0, 2]
    assert inputs.bias_ids.tolist() == [5, 6]
    assert np.allclose(inputs.bias_values, [1.5, -2.0])


def test_a_slot_forgets_its_last_sequence(runner: Runner, recorder: Recorder) -> None:
    special = ResolvedSampling(logit_bias={5: 1.0}, logprobs=3, temperature=0.0)
    run(
        runner,
        one(0, 0, 2, pages=(4,), begins=(begin(0, 2, sampling=special, stop_ids=(1,), min_length=9, score_from=0),)),
    )
    run(runner, one(0, 0, 2, pages=(8,), begins=(begin(0, 2),)))
    row = recorder.inputs[1].samples[0]
    assert (row["bias_count"], row["ban_count"], row["num_top"], row["temperature"]) == (0, 0, -1, 1.0)
    assert recorder.inputs[1].page_tables[0, 0] == 8


def test_copies_come_before_the_step(runner: Runner, recorder: Recorder) -> None:
    run(runner, one(0, 0, 2, begins=(begin(0, 2),), copies=((3, 5), (5, 6))))
    assert recorder.copies == [[[3, 5], [5, 6]]]


def decode(slots: tuple[int, ...], starts: tuple[int, ...], **fields: Any) -> StepPlan:
    """One row each."""
    ones = (1,) * len(slots)
    fields = {"pages": ((),) * len(slots), "samples": ones, **fields}
    return StepPlan(step=0, slots=slots, starts=starts, counts=ones, **fields)


def test_decodes_of_the_same_sequences_share_their_arrays(runner: Runner, recorder: Recorder) -> None:
    run(runner, one(0, 0, 3, begins=(begin(0, 3),)))
    run(runner, one(2, 0, 2, begins=(begin(2, 2),)))
    assert run(runner, decode((2, 0), (2, 3))).tokens == ((102,), (103,))
    assert run(runner, decode((2, 0), (3, 4), pages=((), (7,)))).tokens == ((103,), (104,))
    first, second = recorder.inputs[2:]
    assert first is second
    assert (second.starts.tolist(), second.samples["position"].tolist()) == ([3, 4], [3, 4])
    assert second.tokens[0, :6].tolist() == [0, 1, 2, 102, 103, 104] and second.page_tables[0, 0] == 7


def test_a_newcomer_in_a_slot_gets_arrays_of_its_own(runner: Runner, recorder: Recorder) -> None:
    run(runner, one(1, 0, 1, begins=(begin(1, 1),)))
    run(runner, decode((1,), (1,)))
    greedy = ResolvedSampling(temperature=0.0)
    assert run(runner, decode((1,), (0,), begins=(begin(1, 1, sampling=greedy),))).tokens == ((100,),)
    assert recorder.inputs[2].samples["temperature"].tolist() == [0.0]


def test_what_a_step_gets_does_not_depend_on_the_steps_before() -> None:
    """Steps of all kinds, once as they come, and once each as the first of its kind."""
    num_inputs = [0, 0]
    for seed in range(20):
        models = Copies(), Copies()
        usual, anew = (Runner(model, num_slots=4, max_context=512, page_size=16) for model in models)
        for plan in random_plans(Random(seed), count=60):
            anew._decode = None
            assert usual.execute(plan).tokens == anew.execute(plan).tokens
        assert models[0].seen == models[1].seen
        num_inputs = [n + len(set(map(id, model.inputs))) for n, model in zip(num_inputs, models, strict=True)]
    assert num_inputs[0] < 0.9 * num_inputs[1], "nothing was used again: this tested nothing"


class Copies(Recorder):
    """Keeps what the inputs held, too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def step(self, inputs: StepInputs, outputs: StepOutputs, wake_fd: int | None = None) -> None:
        super().step(inputs, outputs, wake_fd)
        self.seen.append(
            {name: value.tolist() for name, value in msgspec.structs.asdict(inputs).items() if name != "grammars"}
        )


def test_rows_behind_a_draft_that_did_not_come_true_draw_nothing(runner: Runner, recorder: Recorder) -> None:
    run(runner, one(0, 0, 3, begins=(begin(0, 3),)))
    run(runner, one(0, 3, 3, samples=3, drafts=((103, 9),)))  # 103 is what comes after position 3
    run(runner, one(0, 6, 1))  # planned before that was known
    assert recorder.inputs[2].samples["target"].tolist() == [0]
    assert run(runner, one(0, 5, 1)).tokens == ((105,),)
    assert recorder.inputs[3].samples["target"].tolist() == [-1]
    assert recorder.inputs[3].tokens[0, 3:7].tolist() == [102, 103, 104, 105]


def random_plans(rng: Random, *, count: int) -> list[StepPlan]:
    """Mostly decodes; now and then a sequence is replaced, left out, or draws twice."""
    kinds: list[dict[str, Any]] = [
        {},
        {"sampling": ResolvedSampling(temperature=0.0)},
        {"sampling": ResolvedSampling(logit_bias={3: 1.0})},
        {"sampling": ResolvedSampling(logprobs=2)},
        {"stop_ids": (5,), "min_length": 40},
    ]
    ends: dict[int, int] = {}
    plans = []
    for step in range(count):
        begins, drafts, rows = [], [], []
        for slot in range(4):
            if slot not in ends or rng.random() < 0.03:
                ends[slot] = 0
                begins.append(begin(slot, 3, **rng.choice(kinds if rng.random() < 0.3 else kinds[:2])))
            elif rng.random() < 0.03:
                continue  # paused for a step
            size = 3 if ends[slot] == 0 else 2 if rng.random() < 0.02 else 1
            drafts.append((9,) if ends[slot] and size == 2 else ())
            rows.append((slot, ends[slot], size, size if drafts[-1] else 1))
            ends[slot] += 1 if drafts[-1] else size  # no draft comes true
        slots, starts, counts, samples = zip(*rows, strict=True)
        pages = tuple((step + slot,) if rng.random() < 0.1 else () for slot in slots)
        plans.append(
            StepPlan(
                step=step,
                begins=tuple(begins),
                slots=slots,
                starts=starts,
                counts=counts,
                samples=samples,
                pages=pages,
                drafts=tuple(drafts) if any(drafts) else (),
            )
        )
    return plans
