"""Steps that fail: the guilty one ends, everybody else goes on with the same bits; and when to give up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamgen.messages import StepFailed
from streamgen.scheduling.scheduler import DeviceBroken
from streamgen.scheduling.suspects import MAX_GUILTY
from tests.scheduling.hash_model import make_request
from tests.scheduling.simulation import trust_everyone
from tests.scheduling.small import make_harness, planned, prompt_of

if TYPE_CHECKING:
    from tests.scheduling.harness import Harness


def crowd(num: int = 8, *, max_tokens: int = 12, max_running: int = 8) -> Harness:
    harness = make_harness(step_tokens=64, max_running=max_running, max_queued=100)
    for request_id in range(num):
        harness.admit(make_request(request_id, prompt_of(5, 7 * request_id), max_tokens=max_tokens))
    return harness


def ends(harness: Harness) -> list[str | None]:
    return [outcome.finish for outcome in harness.outcomes.values()]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("length", [0, 1, 7])
@pytest.mark.parametrize("guilty", [0, 3, 7])
def test_only_the_guilty_one_ends(guilty: int, length: int, depth: int) -> None:
    """The harness checks that all others say what they would have said alone."""
    harness = crowd()
    harness.fails = lambda s: s.request.request_id == guilty and s.num_outputs >= length
    harness.run(depth=depth)
    assert ends(harness) == ["error" if i == guilty else "length" for i in range(8)]
    outcome = harness.outcomes[guilty, 0]
    assert outcome.message == "its step failed: the step failed"
    assert len(outcome.ids) == length
    assert harness.num_failures <= 1 + 3 + 1  # the batch, halves of it, and the lone one


def test_two_guilty_ones_are_found() -> None:
    harness = crowd()
    harness.fails = lambda s: s.request.request_id in (2, 5)
    harness.run(depth=2)
    assert [i for i, end in enumerate(ends(harness)) if end == "error"] == [2, 5]


@pytest.mark.parametrize("num", [1, 8])
def test_a_step_that_fails_once_costs_nobody_his_answer(num: int) -> None:
    harness = crowd(num)
    for _ in range(4):
        harness.step()
    planned(harness)
    harness.fail("error")
    harness.run(depth=2)
    assert ends(harness) == ["length"] * num


def test_what_fails_only_together_gets_done_in_halves() -> None:
    """A step of more than three sequences fails, as if memory ran out in it."""
    harness = crowd()
    harness.most_sequences = 3
    harness.run(depth=2)
    assert ends(harness) == ["length"] * 8


def test_plans_under_way_are_skipped_and_the_generation_grows() -> None:
    harness = crowd()
    plans = [planned(harness) for _ in range(3)]
    harness.fail("error")
    assert [plan.generation for plan in plans] == [0, 0, 0]
    assert planned(harness).generation == 1
    harness.complete()  # skipped
    harness.complete()
    assert harness.scheduler.num_in_flight == 1
    harness.run()
    assert ends(harness) == ["length"] * 8


def test_suspects_run_apart_from_each_other_and_from_everybody_else() -> None:
    harness = crowd(4)
    planned(harness)
    harness.fail("error")
    harness.admit(make_request(9, prompt_of(2, 50), max_tokens=3))
    sets = []
    for _ in range(3):
        sets.append({begin.ids[0] for begin in planned(harness).begins})
        harness.complete()
    assert sets == [{0, 7}, {14, 21}, {50}]
    harness.run()


def test_who_failed_beside_one_that_has_left_is_not_guilty() -> None:
    harness = crowd(4)
    planned(harness)
    harness.fail("error")
    planned(harness)
    harness.cancel(0)
    harness.fail("error")  # of the first half
    harness.run(depth=2)
    assert ends(harness) == ["cancelled", "length", "length", "length"]


def cramped() -> Harness:
    """Two sequences, of which the second loses its pages in the second of two plans under way."""
    harness = make_harness(num_pages=3)
    trust_everyone(harness)
    for request_id in (1, 2):
        harness.admit(make_request(request_id, prompt_of(4, 7 * request_id), max_tokens=6))
    return harness


def plan_twice(harness: Harness) -> None:
    num = harness.scheduler.stats().preemptions
    assert [len(planned(harness).slots) for _ in range(2)] == [2, 1]
    assert harness.scheduler.stats().preemptions == num + 1


def test_who_was_preempted_while_its_step_failed_is_suspected_too() -> None:
    harness = cramped()
    plan_twice(harness)
    harness.fail("error")
    assert [[s.request.request_id for s in group] for group in harness.scheduler._suspects.groups] == [[1], [2]]
    harness.run(depth=2)
    assert ends(harness) == ["length", "length"]


def test_suspects_whose_readers_are_slow_hold_nobody_up() -> None:
    harness = crowd(4, max_tokens=9)
    planned(harness)
    harness.fail("error")
    harness.pause(0)
    harness.pause(1)
    while harness.step():
        pass
    assert ends(harness) == [None, None, "length", "length"]
    harness.run()
    assert ends(harness) == ["length"] * 4


def test_a_suspect_that_is_cancelled_is_forgotten() -> None:
    harness = crowd(2)
    planned(harness)
    harness.fail("error")
    harness.cancel(0)
    harness.cancel(1)
    assert not harness.scheduler._suspects
    harness.check_idle()


def test_pages_of_steps_that_went_well_are_found_again() -> None:
    harness = make_harness(step_tokens=8)
    harness.admit(make_request(1, prompt_of(20)))
    harness.step()
    planned(harness)
    harness.fail("error")
    assert len(planned(harness).begins[0].pages) == 2  # of the first eight rows
    harness.run()


def test_a_fault_ends_its_sequence_alone() -> None:
    harness = crowd(3)
    harness.step()
    harness.faults[1, 0] = "processor_error"
    harness.run(depth=2)
    assert ends(harness) == ["length", "error", "length"]
    outcome = harness.outcomes[1, 0]
    assert (outcome.code, outcome.message) == ("processor_error", "it failed alone")


def test_a_device_that_fails_whoever_runs_is_broken() -> None:
    harness = crowd(30, max_running=4)
    harness.fails = lambda s: True
    with pytest.raises(DeviceBroken, match="whoever is in them: the step failed"):
        harness.run(depth=2)
    assert ends(harness).count("error") == MAX_GUILTY - 1


@pytest.mark.parametrize("length", [0, 2])
def test_one_guilty_request_of_many_sequences_does_not_break_the_device(length: int) -> None:
    """All sixteen fail one after another, without a step that goes well in between."""
    harness = make_harness(step_tokens=64, max_running=16, num_pages=200)
    harness.admit(make_request(1, prompt_of(9), num_sequences=16, max_tokens=8))
    harness.admit(make_request(2, prompt_of(5, 30), max_tokens=9))
    harness.fails = lambda s: s.request.request_id == 1 and s.num_outputs >= length
    harness.run(depth=2)
    assert ends(harness) == ["error"] * 16 + ["length"]


def test_guilty_ones_far_apart_break_nothing() -> None:
    harness = crowd(30, max_running=4)
    harness.fails = lambda s: s.request.request_id % 2 == 0 and s.num_outputs == 3
    harness.run(depth=2)
    assert ends(harness) == ["error", "length"] * 15


def test_a_dead_device_is_said_so() -> None:
    harness = crowd(1)
    plan = planned(harness)
    with pytest.raises(DeviceBroken, match="it is gone"):
        harness.scheduler.fail(StepFailed(step=plan.step, message="it is gone", kind="dead"))


# ---- executors that die --------------------------------------------------------------------------------------------


def test_after_a_loss_all_is_computed_again_from_nothing() -> None:
    """The model forgets every page, so that a prefix found in one of them would be noticed."""
    harness = crowd(4, max_tokens=10)
    harness.admit(make_request(20, prompt_of(12), max_tokens=1, pin="session"))
    for _ in range(5):
        harness.step(depth=2)
    assert harness.scheduler.stats().pages_pinned
    planned(harness)
    harness.fail("lost")
    stats = harness.scheduler.stats()
    assert (stats.pages_cached, stats.pages_pinned, stats.pages_used, stats.waiting) == (0, 0, 0, 4)
    assert not harness.scheduler._suspects
    harness.run(depth=2)
    assert ends(harness) == ["length"] * 5


def test_who_was_in_two_steps_that_were_lost_ends() -> None:
    harness = crowd(2, max_tokens=10)
    harness.step()
    planned(harness)
    harness.fail("lost")
    harness.step()
    harness.admit(make_request(7, prompt_of(3), max_tokens=4))
    planned(harness)
    harness.fail("lost")
    harness.run()
    assert ends(harness) == ["error", "error", "length"]
    assert harness.outcomes[0, 0].message == "2 executors died while it ran"


def test_a_loss_counts_for_who_was_preempted_meanwhile() -> None:
    harness = cramped()
    for _ in range(2):
        plan_twice(harness)
        harness.fail("lost")
        harness.complete()  # skipped
    assert ends(harness) == ["error", "error"]
    harness.check_idle()


def test_plans_that_were_under_way_at_a_loss_do_not_count() -> None:
    harness = crowd(1)
    planned(harness)
    planned(harness)
    harness.fail("lost")
    harness.complete()  # skipped
    harness.run()
    assert ends(harness) == ["length"]


def test_processors_are_named_by_their_request() -> None:
    harness = make_harness()
    harness.admit(make_request(5, prompt_of(3), has_processors=True))
    harness.admit(make_request(6, prompt_of(3)))
    assert [begin.processors for begin in planned(harness).begins] == [5, None]
    harness.run()


def test_a_cancels_reason_and_message_come_back() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(3)))
    harness.cancel(1, "error", "decoding failed")
    outcome = harness.outcomes[1, 0]
    assert (outcome.finish, outcome.message) == ("error", "decoding failed")
