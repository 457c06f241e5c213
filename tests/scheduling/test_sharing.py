"""Prefix hits and forks: which pages are shared, which are copied, which are found again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.scheduling.hash_model import make_request
from tests.scheduling.small import make_harness, planned, prompt_of

if TYPE_CHECKING:
    from streamgen.messages import Admit
    from tests.scheduling.harness import Harness

# ---- prefix cache --------------------------------------------------------------------------------------------------


def cached_tokens(harness: Harness, request: Admit) -> int | None:
    harness.admit(request)
    harness.run()
    return harness.outcomes[request.request_id, 0].cached_tokens


def test_full_pages_are_found_and_one_token_is_left_to_run() -> None:
    harness = make_harness()
    assert cached_tokens(harness, make_request(1, prompt_of(8), max_tokens=1)) == 0
    assert cached_tokens(harness, make_request(2, prompt_of(8), max_tokens=1)) == 4
    assert cached_tokens(harness, make_request(3, prompt_of(9), max_tokens=1)) == 8
    assert cached_tokens(harness, make_request(4, [*prompt_of(5), 50, 51, 52, 53], max_tokens=1)) == 4


def test_the_next_turn_finds_what_was_said() -> None:
    harness = make_harness()
    first = make_request(1, prompt_of(6), max_tokens=10)
    cached_tokens(harness, first)
    said = [*prompt_of(6), *harness.outcomes[1, 0].ids]
    assert cached_tokens(harness, make_request(2, [*said, 1, 2, 3])) == 12  # the last of the 16 tokens was never a row


def test_scopes_do_not_share() -> None:
    harness = make_harness()
    cached_tokens(harness, make_request(1, prompt_of(20), scope="a"))
    assert cached_tokens(harness, make_request(2, prompt_of(20), scope="b")) == 0
    assert cached_tokens(harness, make_request(3, prompt_of(20), scope="a")) == 16


def test_without_the_cache_nothing_is_kept() -> None:
    harness = make_harness(prefix_cache=False)
    cached_tokens(harness, make_request(1, prompt_of(20)))
    assert harness.scheduler.stats().pages_cached == 0
    assert cached_tokens(harness, make_request(2, prompt_of(20))) == 0


def test_positions_to_be_scored_are_computed() -> None:
    harness = make_harness()
    cached_tokens(harness, make_request(1, prompt_of(24)))
    assert cached_tokens(harness, make_request(2, prompt_of(24), score_from=10)) == 8
    assert cached_tokens(harness, make_request(3, prompt_of(24), score_from=9)) == 8
    assert cached_tokens(harness, make_request(4, prompt_of(24), score_from=8)) == 4
    assert cached_tokens(harness, make_request(5, prompt_of(24), score_from=0)) == 0


def test_a_page_that_is_only_planned_is_not_found() -> None:
    harness = make_harness(step_tokens=64)
    harness.admit(make_request(1, prompt_of(20)))
    harness.plan()
    harness.admit(make_request(2, prompt_of(20)))
    assert planned(harness).begins[0].pages == ()
    harness.run(depth=2)


def test_a_request_that_is_cancelled_leaves_only_what_was_computed() -> None:
    harness = make_harness(step_tokens=6)
    harness.admit(make_request(1, prompt_of(20)))
    harness.plan()
    harness.plan()
    harness.complete()  # six rows: one page is full, the next has two
    harness.cancel(1)
    assert harness.scheduler.stats().pages_cached == 1
    harness.complete()
    assert harness.scheduler.stats().pages_cached == 1
    assert cached_tokens(harness, make_request(2, prompt_of(20))) == 4


def test_sharers_hold_one_page_together() -> None:
    harness = make_harness()
    cached_tokens(harness, make_request(1, prompt_of(13)))
    harness.admit(make_request(2, [*prompt_of(12), 40], max_tokens=3))
    harness.admit(make_request(3, [*prompt_of(12), 50], max_tokens=3))
    begins = planned(harness).begins
    assert begins[0].pages == begins[1].pages
    assert len(begins[0].pages) == 3
    assert harness.scheduler.stats().pages_used == 5
    harness.run(depth=2)


# ---- several continuations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "num_shared", "num_copies"), [(9, 2, 0), (10, 2, 2), (12, 2, 2), (1, 0, 0)])
def test_followers_share_the_prompt_and_copy_its_last_page(length: int, num_shared: int, num_copies: int) -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(length), num_sequences=3))
    harness.plan()
    harness.complete()
    leader = harness.scheduler._batch.decoding[0]
    plan = planned(harness)
    assert [begin.sample_index for begin in plan.begins] == [1, 2]
    assert plan.counts == (1, 1, 1)
    assert plan.starts == (length, length - 1, length - 1)
    for begin in plan.begins:
        assert begin.pages[:num_shared] == tuple(leader.pages[:num_shared])
        assert len(begin.pages) == num_shared + 1
    assert len(plan.copies) == num_copies
    assert {source for source, _ in plan.copies} <= {leader.pages[num_shared]}
    harness.run()
    assert [harness.outcomes[1, i].cached_tokens for i in range(3)] == [0, length - 1, length - 1]


def test_slots_are_kept_for_followers() -> None:
    harness = make_harness(max_running=3, step_tokens=8)
    harness.admit(make_request(1, prompt_of(12), num_sequences=3))
    harness.admit(make_request(2, prompt_of(3, 40), max_tokens=1))
    harness.plan()
    assert planned(harness).counts == (4,)  # room in the step, but no slot for the second request
    harness.run()


@pytest.mark.parametrize("max_running", [1, 2])
def test_more_continuations_than_slots(max_running: int) -> None:
    harness = make_harness(max_running=max_running)
    harness.admit(make_request(1, prompt_of(7), num_sequences=4))
    harness.run(depth=2)


def test_continuations_wait_for_a_leader_that_computes_again() -> None:
    harness = make_harness(step_tokens=16, prefix_cache=False)
    harness.admit(make_request(1, prompt_of(20), num_sequences=3, max_tokens=4))
    harness.step()
    planned(harness)  # the rest of the prompt
    planned(harness)
    harness.complete()
    harness.fail("lost")
    assert [planned(harness).counts for _ in range(2)] == [(16,), (5,)]
    harness.run()
    assert harness.scheduler.stats().computed_tokens == 20 + (21 + 2) + 2 * (1 + 3)
