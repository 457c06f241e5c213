"""Drafted tokens: verified together, rolled back, never in the way of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.scheduling.hash_model import make_request, solo_output
from tests.scheduling.simulation import OracleDrafter, WrongDrafter, trust_everyone
from tests.scheduling.small import make_harness, planned, prompt_of

if TYPE_CHECKING:
    from streamgen.scheduling.sequence import Sequence


def test_right_drafts_are_verified_in_one_step() -> None:
    harness = make_harness(drafter=OracleDrafter(3))
    harness.admit(make_request(1, prompt_of(5), max_tokens=9))
    harness.step()
    output = solo_output(harness.requests[1], 0, 9)
    first = planned(harness)
    assert (first.starts, first.counts, first.samples) == ((5,), (4,), (4,))
    assert first.drafts == (tuple(output[1:4]),)
    assert harness.plan() is None
    harness.complete()
    second = planned(harness)  # the executor knows the token after the last draft that came true
    assert (second.starts, second.counts, second.samples) == ((9,), (4,), (4,))
    assert second.drafts == (tuple(output[5:8]),)
    harness.complete()
    assert len(harness.outcomes[1, 0].ids) == 9
    stats = harness.scheduler.stats()
    assert (stats.drafted_tokens, stats.accepted_tokens) == (6, 6)
    harness.run()


def test_wrong_drafts_are_rolled_back() -> None:
    harness = make_harness(drafter=WrongDrafter())
    harness.admit(make_request(1, prompt_of(5), max_tokens=6))
    harness.step()
    harness.step()
    assert harness.outcomes[1, 0].ids == solo_output(harness.requests[1], 0, 2)
    harness.run()
    stats = harness.scheduler.stats()
    assert stats.drafted_tokens > 0
    assert stats.accepted_tokens == 0


class OnceDrafter:
    """Drafts for the second token only."""

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        return (0, 0) if sequence.num_outputs == 1 else ()


def test_a_correction_costs_no_row() -> None:
    harness = make_harness(drafter=OnceDrafter())
    harness.admit(make_request(1, prompt_of(5), max_tokens=6))
    counts = []
    while (plan := harness.plan()) is not None:
        counts.append(plan.counts[0])
        harness.complete()
    assert counts == [5, 3, 1, 1, 1, 1]
    harness.run()


def test_a_start_waits_for_pages_that_drafts_hold() -> None:
    harness = make_harness(drafter=OracleDrafter(12), num_pages=4)
    trust_everyone(harness)
    harness.admit(make_request(1, prompt_of(3), max_tokens=14))
    harness.step()
    planned(harness)
    assert harness.scheduler.stats().pages_used == 4
    harness.admit(make_request(2, prompt_of(3, 20), max_tokens=3))
    assert harness.plan() is None
    harness.run(depth=2)
    assert harness.scheduler.stats().preemptions == 0


def test_drafts_are_cut_to_the_pages_that_are_left() -> None:
    harness = make_harness(drafter=OracleDrafter(9), num_pages=6, prefix_cache=False)
    trust_everyone(harness)
    harness.admit(make_request(1, prompt_of(11), max_tokens=2))
    harness.admit(make_request(2, prompt_of(3, 20), max_tokens=20))
    harness.step()
    plan = planned(harness)
    assert plan.counts == (1, 9)  # the first is at its end; the second has three of six pages, and two more tokens fit
    harness.run()
