"""What single calls do: plans row by row, prefix hits, forks, preemption, refusals, ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamgen.messages import Admit, StepDone, StepPlan, StopFound
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.sequence import Sequence
from streamgen.scheduling.step import Step
from tests.scheduling.harness import Harness
from tests.scheduling.hash_model import VOCABULARY, make_request, solo_output
from tests.scheduling.simulation import OracleDrafter, WrongDrafter

if TYPE_CHECKING:
    from collections.abc import Iterable


PAGE = 4


def make_harness(drafter: OracleDrafter | WrongDrafter | None = None, **fields: object) -> Harness:
    sizes = {"num_pages": 64, "page_size": PAGE, "step_tokens": 16, "max_context": 64, "max_running": 8, **fields}
    return Harness(Limits(**sizes), drafter=drafter)  # type: ignore[arg-type]  # sizes of the tests below


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + i) % VOCABULARY for i in range(length)]


def planned(harness: Harness) -> StepPlan:
    plan = harness.plan()
    assert plan is not None
    return plan


# ---- budget and order -----------------------------------------------------------------------------------------------


def test_a_long_prompt_is_cut_and_only_its_last_chunk_samples() -> None:
    harness = make_harness(step_tokens=16)
    harness.admit(make_request(1, prompt_of(40), max_tokens=2))
    plans = [planned(harness) for _ in range(4)]
    assert [plan.counts for plan in plans] == [(16,), (16,), (8,), (1,)]
    assert [plan.starts for plan in plans] == [(0,), (16,), (32,), (40,)]
    assert [plan.samples for plan in plans] == [(0,), (0,), (1,), (1,)]
    assert [len(plan.pages[0]) for plan in plans] == [4, 4, 2, 1]
    assert harness.plan() is None
    for _ in plans:
        harness.complete()
    harness.run()


def test_short_prompts_are_packed_and_decodes_come_first() -> None:
    harness = make_harness(step_tokens=16)
    for request_id, length in enumerate([10, 4, 9], 1):
        harness.admit(make_request(request_id, prompt_of(length, 20 * request_id)))
    first, second = planned(harness), planned(harness)
    assert first.counts == (10, 4, 2)
    assert first.samples == (1, 1, 0)
    assert second.counts == (1, 1, 7)
    assert second.starts == (10, 4, 2)
    harness.complete()
    harness.run()


def test_a_prompt_under_way_goes_on_before_new_ones() -> None:
    harness = make_harness(step_tokens=8)
    harness.admit(make_request(1, prompt_of(20)))
    planned(harness)
    harness.admit(make_request(2, prompt_of(3), priority=5))
    assert planned(harness).counts == (8,)
    assert planned(harness).counts == (4, 3)


def test_more_important_requests_start_first_then_earlier_ones() -> None:
    harness = make_harness(step_tokens=4, prefix_cache=False)
    for request_id, priority in enumerate([0, 1, 0, 1], 1):
        harness.admit(make_request(request_id, [request_id] * 4, priority=priority, max_tokens=1))
    started = [planned(harness).begins[0].ids[0] for _ in range(4)]
    assert started == [2, 4, 1, 3]


def test_decodes_that_a_full_step_leaves_out_go_first_in_the_next() -> None:
    """Wrong drafts fill the steps; all three advance alike nevertheless."""
    harness = make_harness(drafter=WrongDrafter(), step_tokens=4)
    for request_id in range(3):
        harness.admit(make_request(request_id, [request_id], max_tokens=30))
    for _ in range(40):
        harness.step()
        lengths = [len(harness.outcomes[request_id, 0].ids) for request_id in range(3)]
        assert max(lengths) - min(lengths) <= 2
    assert min(lengths) > 10
    harness.run()


def test_a_late_request_starts_before_earlier_ones_end() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(5), max_tokens=30))
    harness.step()
    harness.step()
    harness.admit(make_request(2, prompt_of(5, 9), max_tokens=2))
    harness.step()
    harness.step()
    assert harness.outcomes[2, 0].finish == "length"
    assert harness.outcomes[1, 0].finish is None


def test_a_plan_never_passes_max_tokens() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(3), max_tokens=3))
    assert [planned(harness).samples for _ in range(3)] == [(1,)] * 3
    assert harness.plan() is None


def test_the_last_token_of_the_context_is_used() -> None:
    harness = make_harness(max_context=12)
    harness.admit(make_request(1, prompt_of(7), max_tokens=50))
    harness.run(depth=2)
    assert len(harness.outcomes[1, 0].ids) == 5
    assert harness.outcomes[1, 0].finish == "length"


def test_the_same_calls_give_the_same_plans() -> None:
    def plans() -> list[StepPlan]:
        harness = make_harness(num_pages=14)
        for request_id in range(6):
            harness.admit(make_request(request_id, prompt_of(9, request_id // 2), max_tokens=9, num_sequences=2))
        found = []
        while harness.plan() is not None:
            found.append(harness.plans[-1][0])
            harness.complete()
        return found

    assert plans() == plans()


# ---- ends -----------------------------------------------------------------------------------------------------------


def test_a_stop_id_ends_and_is_included() -> None:
    harness = make_harness()
    output = solo_output(make_request(1, prompt_of(5)), 0, 8)
    harness.admit(make_request(1, prompt_of(5), stop_ids=(output[3],)))
    harness.run(depth=2)
    outcome = harness.outcomes[1, 0]
    assert outcome.finish == "stop"
    assert outcome.ids == output[: output.index(output[3]) + 1]


def test_a_prompt_that_ends_in_a_stop_id_goes_on() -> None:
    harness = make_harness()
    harness.admit(make_request(1, [5, 6, 7], stop_ids=(7,), min_tokens=2, max_tokens=2))
    harness.run()
    assert len(harness.outcomes[1, 0].ids) == 2


def test_nothing_is_sampled_where_only_scores_are_wanted() -> None:
    harness = make_harness(step_tokens=4)
    harness.admit(make_request(1, prompt_of(10), max_tokens=0, score_from=6))
    plans = [planned(harness) for _ in range(3)]
    assert [plan.samples for plan in plans] == [(0,)] * 3
    for _ in plans:
        harness.complete()
    assert len(harness.outcomes[1, 0].scores) == 4
    assert harness.outcomes[1, 0].finish == "length"
    harness.run()


def test_cancel_frees_at_once_and_ends_every_continuation() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(20), num_sequences=3))
    harness.plan()
    harness.plan()
    harness.cancel(1, "deadline")
    assert harness.scheduler.stats().pages_used == 0
    assert [harness.outcomes[1, i].finish for i in range(3)] == ["deadline"] * 3
    assert [harness.outcomes[1, i].cached_tokens for i in range(3)] == [0] * 3
    harness.run()


def test_what_is_unknown_or_ended_is_ignored() -> None:
    harness = make_harness()
    harness.cancel(77)
    harness.scheduler.stop_found(StopFound(request_id=77))
    harness.admit(make_request(1, prompt_of(3)))
    harness.run()
    harness.cancel(1)
    harness.stop_found(1)
    assert harness.outcomes[1, 0].finish == "length"


def test_a_waiting_request_is_cancelled() -> None:
    harness = make_harness(max_running=1)
    harness.admit(make_request(1, prompt_of(3)))
    harness.admit(make_request(2, prompt_of(3)))
    harness.step()
    harness.cancel(2)
    assert harness.scheduler.stats().waiting == 0
    assert harness.outcomes[2, 0].finish == "cancelled"
    harness.run()


def test_rows_under_way_of_a_cancelled_request_are_dropped() -> None:
    """Its slot and pages are given away in the next plan, and its late results reach nobody."""
    harness = make_harness(max_running=1, num_pages=4)
    harness.admit(make_request(1, prompt_of(6)))
    harness.admit(make_request(2, prompt_of(6, 30)))
    harness.plan()
    harness.plan()
    harness.cancel(1)
    assert planned(harness).begins[0].slot == 0
    for _ in range(3):
        harness.complete()
    harness.run(depth=2)
    assert harness.outcomes[1, 0].ids == []


def test_a_stop_string_ends_one_continuation_without_progress() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(6), num_sequences=2, max_tokens=10))
    while not harness.outcomes[1, 1].ids:
        harness.step()
    harness.stop_found(1, 0)
    harness.run()
    assert harness.outcomes[1, 0].finish is None
    assert harness.outcomes[1, 1].finish == "length"


def test_followers_of_a_leader_that_ends_early_run_nevertheless() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(30), num_sequences=3))
    harness.plan()
    harness.stop_found(1, 0)
    harness.run()
    assert [harness.outcomes[1, i].finish for i in range(3)] == [None, "length", "length"]


def test_a_full_queue_refuses_and_forgets() -> None:
    harness = make_harness(max_running=1, max_queued=1)
    assert harness.admit(make_request(1, prompt_of(3))) is None
    assert harness.admit(make_request(2, prompt_of(3))) is None
    refused = harness.admit(make_request(3, prompt_of(3)))
    assert refused is not None
    assert refused.code == "engine_overloaded"
    harness.run()
    assert harness.admit(make_request(3, prompt_of(3))) is None


# ---- prefix cache ---------------------------------------------------------------------------------------------------


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


# ---- several continuations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "num_shared", "num_copies"), [(9, 2, 0), (10, 2, 2), (12, 2, 2), (1, 0, 0)])
def test_followers_share_the_prompt_and_copy_its_last_page(length: int, num_shared: int, num_copies: int) -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(length), num_sequences=3))
    harness.plan()
    harness.complete()
    leader = harness.scheduler._decoding[0]
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


# ---- preemption -----------------------------------------------------------------------------------------------------


def always_fits(running: Iterable[Sequence], candidate: Sequence, *, with_followers: bool = True) -> bool:
    return True


def trust_everyone(harness: Harness) -> None:
    """Start whatever can start, as if memory never ran out."""
    harness.scheduler._admission.fits = always_fits  # type: ignore[method-assign]  # a wrong prediction


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

    def fits(running: Iterable[Sequence], candidate: Sequence, *, with_followers: bool = True) -> bool:
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


# ---- drafts ---------------------------------------------------------------------------------------------------------


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
    second = planned(harness)  # the bonus token is not in the executor: it comes as the first draft
    assert (second.starts, second.counts, second.samples) == ((8,), (5,), (4,))
    assert second.drafts == (tuple(output[4:8]),)
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


def test_a_correction_costs_one_row_once() -> None:
    harness = make_harness(drafter=OnceDrafter())  # type: ignore[arg-type]  # a third kind
    harness.admit(make_request(1, prompt_of(5), max_tokens=6))
    counts = []
    while (plan := harness.plan()) is not None:
        counts.append(plan.counts[0])
        harness.complete()
    assert counts == [5, 3, 2, 1, 1, 1]
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


# ---- contract -------------------------------------------------------------------------------------------------------


def test_results_out_of_order_are_an_error() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(3)))
    planned(harness)
    with pytest.raises(AssertionError, match="results of step 5 came, step 0 is the oldest"):
        harness.scheduler.complete(StepDone(step=5, tokens=((1,),)))


def test_nothing_grows_with_requests_ever_seen() -> None:
    harness = make_harness()
    for request_id in range(600):
        harness.admit(make_request(request_id, [request_id % VOCABULARY] * 9, max_tokens=2))
        harness.step()
    harness.run()
    scheduler = harness.scheduler
    assert not scheduler._requests
    assert not scheduler._queue
    assert not scheduler._in_flight
    assert len(scheduler._index) <= 64
    assert len(scheduler._admission.lengths._recent) == 512
