"""Predicted starts, against what happens then."""

from __future__ import annotations

import pytest

from streamgen.scheduling.forecast import Forecast, StartTimes
from tests.scheduling.hash_model import make_request
from tests.scheduling.small import make_harness, planned, prompt_of
from tests.scheduling.virtual_time import Timeline, stream


def test_with_free_slots_a_request_starts_at_once() -> None:
    timeline = Timeline(max_running=4)
    assert timeline.scheduler.forecast().start_in() == 0.0
    timeline.run(stream(1, "", num=3, every=0.0), until=0.2)
    forecast = timeline.scheduler.forecast()
    assert forecast.num_free == 1
    assert forecast.start_in() == 0.0


@pytest.mark.parametrize(("prompt", "max_tokens"), [(40, 20), (8, 200)])
@pytest.mark.parametrize("num_turns", [1.25, 5, 10])
@pytest.mark.parametrize("num_slots", [4, 16, 64])
def test_the_wait_behind_a_queue_is_predicted(num_slots: int, num_turns: float, prompt: int, max_tokens: int) -> None:
    """Equal sequences, so that they start in bursts."""
    timeline, num_waiting = Timeline(max_running=num_slots), int(num_slots * num_turns)
    num = 8 * num_slots + num_waiting
    timeline.run(stream(1, "", num=num, every=0.0, prompt=prompt, max_tokens=max_tokens), until=0.01)
    while timeline.scheduler.stats().waiting > num_waiting:
        timeline.run([], until=timeline.now + 0.01)
    predicted, now = timeline.scheduler.forecast().start_in(), timeline.now
    timeline.run(stream(10_000, "", num=1, every=0.0, start=now, prompt=40, max_tokens=20))
    happened = timeline.seen[10_000].wait
    assert happened / 2 <= predicted <= 2 * happened


def test_unknown_is_no_wait() -> None:
    forecast = Forecast(num_waiting=3)
    assert forecast.start_in() == 0.0
    assert forecast.retry_after() == 1.0


def test_places_count() -> None:
    forecast = Forecast(num_waiting=3, num_free=1, seconds_per_start=2.0)
    assert forecast.start_in() == 6.0
    assert forecast.start_in(2) == 10.0
    assert forecast.retry_after() == 2.0


def test_time_without_a_queue_is_not_counted() -> None:
    times = StartTimes()
    for now, num_left in ((0.0, 1), (2.0, 0), (100.0, 1), (102.0, 0)):
        times.started(now, num_left=num_left)
    assert times.seconds_per_start == 2.0


def test_those_that_found_free_slots_are_not_counted() -> None:
    times = StartTimes(num_slots=1000)
    for now in (0.0, 1.0, 2.0):
        for num_left in (10, 9, 8, 7):
            times.started(now, num_left=num_left)
    assert times.seconds_per_start == pytest.approx(0.25, rel=0.01)


def test_starts_without_a_queue_and_starts_after_a_preemption_say_nothing() -> None:
    timeline = Timeline(max_running=4)
    timeline.run(stream(1, "", num=20, every=1.0))
    assert timeline.scheduler.forecast().seconds_per_start is None
    harness = make_harness(max_running=1)
    for request_id in (1, 2):
        harness.admit(make_request(request_id, prompt_of(5), max_tokens=8))
    for _ in range(4):
        planned(harness)
        harness.fail("error")
        harness.now += 1.0
        harness.step()
        harness.now += 1.0
    assert harness.scheduler.forecast().seconds_per_start is None


def test_slots_are_of_no_use_to_a_queue_whose_head_does_not_fit() -> None:
    harness = make_harness(num_pages=8)
    harness.admit(make_request(1, prompt_of(9), max_tokens=20))
    harness.admit(make_request(2, prompt_of(15, 30), max_tokens=4))
    assert harness.scheduler.forecast().num_free == 8
    planned(harness)
    planned(harness)
    assert harness.scheduler.forecast().num_free == 0
    harness.run()
    assert harness.scheduler.forecast().num_free == 8
