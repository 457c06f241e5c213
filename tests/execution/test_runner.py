"""Plans as arrays: rows, head rows, bans, biases and scores, seen through a model that records what it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def test_verification_samples_every_draft_and_writes_none(runner: Runner, recorder: Recorder) -> None:
    run(runner, one(0, 0, 4, begins=(begin(0, 4),)))
    done = run(runner, one(0, 4, 3, samples=3, drafts=((50, 51),)))
    rows = recorder.inputs[1].samples
    assert rows["position"].tolist() == [4, 5, 6]
    assert not rows["write"].any()
    assert recorder.inputs[1].tokens[0, 4:7].tolist() == [103, 50, 51]
    assert done.tokens == ((104, 105, 106),)


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
