"""What single calls do: who runs in a step, how sequences end, what is refused."""

from __future__ import annotations

import pytest

from streamgen.messages import StepDone, StepPlan, StopFound
from tests.scheduling.hash_model import VOCABULARY, make_request, solo_output
from tests.scheduling.simulation import WrongDrafter
from tests.scheduling.small import make_harness, planned, prompt_of

# ---- budget and order ----------------------------------------------------------------------------------------------


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


# ---- ends ----------------------------------------------------------------------------------------------------------


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


def test_a_stop_string_ends_one_continuation() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(6), num_sequences=2, max_tokens=10))
    while not harness.outcomes[1, 1].ids:
        harness.step()
    harness.stop_found(1, 0)
    harness.run()
    assert harness.outcomes[1, 0].finish == "stopped"
    assert harness.outcomes[1, 1].finish == "length"


def test_followers_of_a_leader_that_ends_early_run_nevertheless() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(30), num_sequences=3))
    harness.plan()
    harness.stop_found(1, 0)
    harness.run()
    assert [harness.outcomes[1, i].finish for i in range(3)] == ["stopped", "length", "length"]


def test_a_full_queue_refuses_and_forgets() -> None:
    harness = make_harness(max_running=1, max_queued=1)
    assert harness.admit(make_request(1, prompt_of(3))) is None
    assert harness.admit(make_request(2, prompt_of(3))) is None
    refused = harness.admit(make_request(3, prompt_of(3)))
    assert refused is not None
    assert refused.code == "engine_overloaded"
    harness.run()
    assert harness.admit(make_request(3, prompt_of(3))) is None


# ---- contract ------------------------------------------------------------------------------------------------------


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
    assert len(scheduler._cache.index) <= 64
    assert len(scheduler._admission.lengths._recent) == 512
