"""Slow readers: what a paused sequence keeps, what it gets, and that nobody waits for it."""

from __future__ import annotations

import pytest

from streamgen.config import Tenant
from streamgen.messages import Pause, Resume
from tests.scheduling.hash_model import make_request
from tests.scheduling.simulation import trust_everyone
from tests.scheduling.small import make_harness, planned, prompt_of


def test_a_paused_sequence_keeps_its_pages_and_gets_no_rows() -> None:
    harness = make_harness(step_tokens=64)
    harness.admit(make_request(1, prompt_of(9), max_tokens=12))
    harness.admit(make_request(2, prompt_of(9, 20), max_tokens=12))
    harness.step()
    planned(harness)
    harness.pause(1)
    harness.complete()  # the token under way still comes
    assert [len(harness.outcomes[i, 0].ids) for i in (1, 2)] == [2, 2]
    held = harness.scheduler._batch.decoding[0].pages[:]
    while harness.outcomes[2, 0].finish is None:
        assert harness.step()
    assert not harness.step()
    stats = harness.scheduler.stats()
    assert (stats.running, stats.paused, stats.pages_used) == (1, 1, len(held))
    assert len(harness.outcomes[1, 0].ids) == 2
    harness.resume(1)
    assert planned(harness).begins == ()  # it goes on where it was
    harness.run()
    assert harness.scheduler.stats().preemptions == 0


def test_a_paused_one_gives_its_slot_to_who_waits_and_comes_back_only_when_resumed() -> None:
    harness = make_harness(max_running=1)
    harness.admit(make_request(1, prompt_of(5), max_tokens=12))
    harness.step()
    harness.pause(1)
    harness.admit(make_request(2, prompt_of(5, 20), max_tokens=3))
    assert planned(harness).begins[0].ids == tuple(prompt_of(5, 20))
    while harness.step():
        pass
    stats = harness.scheduler.stats()
    assert (stats.running, stats.waiting, stats.paused, stats.pages_used) == (0, 0, 1, 0)
    assert harness.outcomes[2, 0].finish == "length"
    harness.resume(1)
    harness.run()
    assert harness.outcomes[1, 0].finish == "length"


def test_a_paused_one_does_not_hold_up_its_tenant_at_its_limit() -> None:
    harness = make_harness(tenants={"small": Tenant(max_running=2)})
    for request_id in range(1, 5):
        harness.admit(make_request(request_id, [request_id] * 5, tenant="small", max_tokens=5))
    harness.admit(make_request(9, [9] * 5, max_tokens=30))
    harness.step()
    harness.pause(1)
    harness.pause(9)
    while harness.step():
        pass
    assert [harness.outcomes[i, 0].finish for i in (1, 2, 3, 4, 9)] == [None, "length", "length", "length", None]
    assert harness.scheduler.stats().preemptions == 1  # nobody else's slot would have helped
    harness.run()


def test_memory_comes_from_paused_ones_first() -> None:
    """The paused one is the oldest and most important, and loses its pages all the same."""
    harness = make_harness(num_pages=6)
    trust_everyone(harness)
    harness.admit(make_request(1, prompt_of(9), max_tokens=14, priority=2))
    harness.admit(make_request(2, prompt_of(9, 20), max_tokens=14))
    harness.step()
    harness.pause(1)
    while harness.outcomes[2, 0].finish is None:
        assert harness.step()
    assert harness.scheduler.stats().preemptions == 1
    assert len(harness.outcomes[2, 0].ids) == 14
    harness.run()


def test_who_waits_does_not_start_while_paused() -> None:
    harness = make_harness(max_running=1)
    for request_id in (1, 2, 3):
        harness.admit(make_request(request_id, [request_id], max_tokens=2))
    harness.pause(2)
    order = []
    while (plan := harness.plan()) is not None:
        order += [begin.ids[0] for begin in plan.begins]
        harness.complete()
    assert order == [1, 3]
    harness.run()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_continuations_go_on_without_the_one_that_is_paused(index: int) -> None:
    harness = make_harness(max_running=3, step_tokens=4)
    harness.admit(make_request(1, prompt_of(10), num_sequences=3))
    planned(harness)
    harness.pause(1, index)
    while harness.step():
        pass
    ends = [harness.outcomes[1, i].finish for i in range(3)]
    assert ends == [None if i == index else "length" for i in range(3)]
    harness.run()


def test_followers_do_not_wait_for_a_leader_that_is_paused_while_it_computes_again() -> None:
    harness = make_harness(num_pages=5, step_tokens=4, prefix_cache=False, max_running=2)
    harness.admit(make_request(1, prompt_of(12), num_sequences=3, max_tokens=4))
    while not harness.outcomes[1, 0].ids:
        harness.step()
    planned(harness)
    harness.fail("error")
    planned(harness)
    harness.pause(1, 0)
    for _ in range(60):
        harness.step()
    assert [harness.outcomes[1, i].finish for i in range(3)] == [None, "length", "length"]
    harness.run()


def test_what_is_unknown_ended_or_not_paused_is_ignored() -> None:
    harness = make_harness()
    harness.scheduler.pause(Pause(request_id=7))
    harness.scheduler.resume(Resume(request_id=7))
    harness.admit(make_request(1, prompt_of(3)))
    harness.resume(1)
    harness.pause(1, 5)
    harness.pause(1)
    harness.pause(1)
    assert harness.scheduler.stats().paused == 1
    harness.run()
    harness.pause(1)
    harness.resume(1)
    assert harness.scheduler.stats().paused == 0


def test_paused_ones_are_cancelled_and_stopped_like_others() -> None:
    harness = make_harness(max_running=2)
    for request_id in (1, 2):
        harness.admit(make_request(request_id, prompt_of(6), max_tokens=20))
    harness.step()
    harness.pause(1)
    harness.pause(2)
    harness.cancel(1, "slow_consumer")
    harness.stop_found(2)
    assert [harness.outcomes[i, 0].finish for i in (1, 2)] == ["slow_consumer", "stopped"]
    harness.check_idle()


def test_who_did_not_fit_starts_when_another_pauses() -> None:
    harness = make_harness(num_pages=8)
    harness.admit(make_request(1, prompt_of(9), max_tokens=20))
    harness.step()
    harness.admit(make_request(2, prompt_of(15, 30), max_tokens=4))
    assert planned(harness).begins == ()
    harness.pause(1)
    assert planned(harness).begins[0].ids == tuple(prompt_of(15, 30))
    harness.run()


def test_no_slot_is_kept_for_a_continuation_that_is_paused() -> None:
    harness = make_harness(max_running=3, step_tokens=8)
    harness.admit(make_request(1, prompt_of(12), num_sequences=3))
    harness.admit(make_request(2, prompt_of(3, 40)))
    planned(harness)
    harness.pause(1, 1)
    assert planned(harness).begins[0].ids == tuple(prompt_of(3, 40))
    harness.run()
