"""Pages kept for sessions: until when, how many, and that they cost those that run nothing."""

from __future__ import annotations

import pytest

from tests.scheduling.hash_model import make_request
from tests.scheduling.simulation import trust_everyone
from tests.scheduling.small import PAGE, make_harness, planned, prompt_of


def test_pages_of_a_pinned_sequence_outlive_what_would_evict_them() -> None:
    for pin, found in (("session", 16), ("", 0)):
        harness = make_harness(num_pages=12)
        harness.admit(make_request(1, prompt_of(16), max_tokens=2, pin=pin))
        harness.run()
        assert harness.scheduler.stats().pages_pinned == (4 if pin else 0)
        for request_id in range(2, 9):
            harness.admit(make_request(request_id, prompt_of(20, 7 * request_id), max_tokens=8))
            harness.run()
        said = [*prompt_of(16), *harness.outcomes[1, 0].ids]
        harness.admit(make_request(9, said, max_tokens=1, pin=pin))
        harness.run()
        assert harness.outcomes[9, 0].cached_tokens == found


@pytest.mark.parametrize("ending", ["cancelled", "error"])
def test_who_ends_badly_pins_nothing(ending: str) -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(16), max_tokens=9, pin="session"))
    harness.step()
    if ending == "error":
        harness.faults[1, 0] = "processor_error"
        harness.step()
    else:
        harness.cancel(1)
    assert harness.outcomes[1, 0].finish == ending
    assert harness.scheduler.stats().pages_pinned == 0


def test_a_stop_string_pins() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(16), max_tokens=9, pin="session"))
    harness.step()
    harness.stop_found(1)
    assert harness.scheduler.stats().pages_pinned == 4


def test_a_key_holds_the_pages_of_its_last_sequence() -> None:
    harness = make_harness()
    for request_id, length in enumerate([20, 40, 8], 1):
        harness.admit(make_request(request_id, prompt_of(length, request_id), max_tokens=1, pin="session"))
        harness.run()
        assert harness.scheduler.stats().pages_pinned == length // PAGE
    harness.unpin("session")
    harness.unpin("session")
    assert harness.scheduler.stats().pages_pinned == 0
    assert harness.scheduler.stats().pages_cached > 0


def test_pins_hold_at_most_half_of_the_pages_and_the_oldest_goes() -> None:
    harness = make_harness(num_pages=12)
    for request_id, key in enumerate("abc", 1):
        harness.admit(make_request(request_id, prompt_of(12, 20 * request_id), max_tokens=1, pin=key))
        harness.run()
    assert list(harness.scheduler._cache.pins._pages) == ["b", "c"]
    assert harness.scheduler.stats().pages_pinned == 6


def test_what_is_larger_than_that_is_not_kept_and_drives_nobody_out() -> None:
    harness = make_harness(num_pages=12)
    harness.admit(make_request(1, prompt_of(12), max_tokens=1, pin="small"))
    harness.run()
    harness.admit(make_request(2, prompt_of(32, 20), max_tokens=1, pin="large"))
    harness.run()
    assert list(harness.scheduler._cache.pins._pages) == ["small"]


def test_pins_go_before_anybody_is_preempted() -> None:
    harness = make_harness(num_pages=8)
    trust_everyone(harness)
    harness.admit(make_request(1, prompt_of(16), max_tokens=1, pin="session"))
    harness.run()
    for request_id in (2, 3):
        harness.admit(make_request(request_id, prompt_of(6, 9 * request_id), max_tokens=11))
    harness.run()
    stats = harness.scheduler.stats()
    assert (stats.preemptions, stats.pages_pinned) == (0, 0)


def test_a_request_that_needs_the_pinned_pages_starts_nevertheless() -> None:
    harness = make_harness(num_pages=8)
    harness.admit(make_request(1, prompt_of(16), max_tokens=1, pin="session"))
    harness.run()
    harness.admit(make_request(2, prompt_of(8, 20), max_tokens=4))
    planned(harness)
    harness.admit(make_request(3, prompt_of(8, 40), max_tokens=8))
    assert planned(harness).begins[0].ids == tuple(prompt_of(8, 40))
    harness.run()


def test_the_next_turn_of_a_session_does_not_count_its_own_pages_twice() -> None:
    """Another session's pin stays, since both turns and it fit."""
    harness = make_harness(num_pages=12)
    for request_id, key in ((1, "mine"), (2, "other")):
        harness.admit(make_request(request_id, prompt_of(12, 20 * request_id), max_tokens=1, pin=key))
        harness.run()
    harness.admit(make_request(3, prompt_of(3), max_tokens=8))
    planned(harness)
    harness.admit(make_request(4, [*prompt_of(12, 20), 1], max_tokens=4, pin="mine"))
    assert len(planned(harness).begins[0].pages) == 3
    assert set(harness.scheduler._cache.pins._pages) == {"mine", "other"}
    harness.run()


def test_sleep_forgets_everything() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(16), max_tokens=1, pin="session"))
    harness.run()
    harness.scheduler.forget_prefixes()
    stats = harness.scheduler.stats()
    assert (stats.pages_cached, stats.pages_pinned) == (0, 0)
    harness.admit(make_request(2, prompt_of(16), max_tokens=1))
    harness.run()
    assert harness.outcomes[2, 0].cached_tokens == 0
