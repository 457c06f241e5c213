"""Preemption: who loses its pages, who waits for whom, and that all end nevertheless."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamgen.scheduling.sequence import Sequence
from streamgen.scheduling.step import Step
from tests.scheduling.hash_model import make_request
from tests.scheduling.simulation import trust_everyone
from tests.scheduling.small import PAGE, make_harness, planned, prompt_of

if TYPE_CHECKING:
    from collections.abc import Iterable


def test_the_newest_is_preempted_and_runs_again_first() -> None:
    harness = make_harness(num_pages=6)
    trust_everyone(harness)
    for request_id in range(3):
        harness.admit(make_request(request_id, prompt_of(6, 9 * request_id), max_tokens=12))
    while not harness.scheduler.stats().preemptions:
        assert harness.step()
    assert [s.request.request_id for s in harness.scheduler._queue] == [2]
    harness.admit(make_request(9, prompt_of(2), max_tokens=1))
    harness.run()
    assert harness.scheduler.stats().preemptions >= 1


def test_the_least_important_is_preempted() -> None:
    harness = make_harness(num_pages=6)
    trust_everyone(harness)
    for request_id, priority in enumerate([0, 1, 1]):
        harness.admit(make_request(request_id, prompt_of(6, 9 * request_id), max_tokens=12, priority=priority))
    while not harness.scheduler.stats().preemptions:
        assert harness.step()
    assert [s.request.request_id for s in harness.scheduler._queue] == [0]
    harness.run()


def test_who_did_not_fit_is_asked_again_when_a_prompt_is_done() -> None:
    harness = make_harness(step_tokens=8)
    answers = [False, True]

    def fits(running: Iterable[Sequence], candidate: Sequence, **options: object) -> bool:
        return answers.pop(0)

    harness.scheduler._admission.fits = fits  # type: ignore[method-assign]  # a prediction that changes
    harness.admit(make_request(1, prompt_of(12), max_tokens=9))
    harness.admit(make_request(2, prompt_of(2, 30), max_tokens=2))
    assert [planned(harness).counts for _ in range(3)] == [(8,), (4,), (1,)]
    assert answers == [True]
    harness.admit(make_request(3, prompt_of(1, 50), max_tokens=1, priority=1))
    del answers[:]
    answers += [True, True]
    assert planned(harness).counts == (1, 1, 2)
    harness.run(depth=2)


def test_rows_already_planned_of_a_preempted_sequence_leave_the_step() -> None:
    """The less important one started first, so that it is planned first; then its page is needed."""
    harness = make_harness(num_pages=4, step_tokens=3)
    trust_everyone(harness)
    harness.admit(make_request(0, prompt_of(2), max_tokens=14))
    harness.plan()
    harness.admit(make_request(1, prompt_of(2, 30), max_tokens=14, priority=1))
    while not harness.scheduler.stats().preemptions:
        plan = planned(harness)
        if len(harness.plans) > 1:
            harness.complete()
    assert len(plan.slots) == 1
    assert [s.request.request_id for s in harness.scheduler._queue] == [0]
    harness.run(depth=2)


def test_a_dropped_row_gives_its_budget_back() -> None:
    sequence = Sequence(make_request(1, prompt_of(8)), index=0, arrival=0, max_tokens=8, root=b"")
    sequence.start(0, [3, 4], num_computed=0, num_shared=0)
    step = Step(0, budget=10)
    step.add(sequence.plan_chunk(6, ()))
    assert (step.budget, len(step)) == (4, 1)
    step.drop(sequence)
    assert (step.budget, len(step)) == (10, 0)


def test_a_preempted_sequence_waits_until_somebody_ends() -> None:
    harness = make_harness(num_pages=6)
    trust_everyone(harness)
    harness.admit(make_request(0, prompt_of(9), max_tokens=14))
    harness.admit(make_request(1, prompt_of(9, 20), max_tokens=14))
    while not harness.scheduler.stats().preemptions:
        assert harness.step()
    while harness.outcomes[0, 0].finish is None:
        assert harness.scheduler.stats().running == 1
        assert harness.step()
    harness.run()
    assert harness.scheduler.stats().preemptions == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_scores_come_once_although_the_prompt_runs_twice(depth: int) -> None:
    harness = make_harness(num_pages=8, step_tokens=4, prefix_cache=False)
    trust_everyone(harness)
    harness.admit(make_request(0, prompt_of(3), max_tokens=20))
    harness.step(depth=depth)
    harness.admit(make_request(1, prompt_of(28, 9), max_tokens=2, score_from=1))
    harness.run(depth=depth)
    assert harness.scheduler.stats().preemptions
    assert len(harness.outcomes[1, 0].scores) == 27


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_pages", [3, 4, 5, 7])
def test_everyone_ends_with_few_pages(num_pages: int, depth: int) -> None:
    """Every request alone needs nearly all pages, and all are started as if they needed none."""
    harness = make_harness(num_pages=num_pages, max_queued=100)
    trust_everyone(harness)
    most = num_pages * PAGE
    for request_id in range(12):
        prompt = prompt_of(1 + request_id % (most - 2), request_id)
        harness.admit(make_request(request_id, prompt, max_tokens=most, num_sequences=1 + request_id % 2))
    harness.run(depth=depth, max_steps=18 * 2 * most)


def test_alone_a_sequence_uses_every_page_and_ends_with_length() -> None:
    harness = make_harness(num_pages=3)
    harness.admit(make_request(1, prompt_of(5), max_tokens=50))
    harness.run(depth=2)
    assert len(harness.outcomes[1, 0].ids) == 3 * PAGE + 1 - 5
    assert harness.outcomes[1, 0].finish == "length"
    assert harness.scheduler.stats().preemptions == 0
