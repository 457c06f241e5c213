"""Tenants: who is next, what each is charged, and that nobody's flood is felt much by others (in virtual time)."""

from __future__ import annotations

from itertools import chain
from statistics import mean
from typing import TYPE_CHECKING

import pytest

from streamgen.config import Tenant
from streamgen.scheduling.planner import MIN_GUEST_ROWS
from streamgen.scheduling.tenants import MAX_CREDIT, MAX_IDLE
from tests.scheduling.hash_model import make_request
from tests.scheduling.small import make_harness, planned, prompt_of
from tests.scheduling.virtual_time import ROW_SECONDS, STEP_SECONDS, Timeline, stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.scheduling.harness import Harness

STARTING = 5.0  # seconds of the flood before anybody else comes

FLOODS = {"alike": (64, 32), "long answers": (8, 200), "long prompts": (400, 4), "both": (100, 100)}


def waits(*, prompt: int, max_tokens: int, flood: tuple[int, int] | None, **sizes: int) -> list[float]:
    """Seconds to the first token of a quiet tenant's requests, beside a flood of prompts and outputs of these sizes."""
    timeline = Timeline(**sizes)
    mine = stream(1, "mine", num=30, every=1.0, start=STARTING, prompt=prompt, max_tokens=max_tokens)
    others = []
    if flood is not None:
        others = stream(10_000, "flood", num=4000, every=0.01, prompt=flood[0], max_tokens=flood[1])
    timeline.run([*mine, *others], until=STARTING + 40.0)
    found = timeline.waits("mine")
    assert len(found) == 30
    return found


@pytest.mark.parametrize("num_pages", [4000, 100])
@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("prompt", [300, 500])
def test_a_flood_leaves_anothers_first_tokens_within_twice(prompt: int, flood: tuple[int, int], num_pages: int) -> None:
    sizes = {"prompt": prompt, "max_tokens": 16, "num_pages": num_pages}
    assert mean(waits(flood=flood, **sizes)) <= 2 * mean(waits(flood=None, **sizes))


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
@pytest.mark.parametrize("prompt", [8, 64, 128])
def test_a_short_prompt_waits_for_the_steps_under_way_besides(prompt: int, flood: tuple[int, int]) -> None:
    alone = waits(prompt=prompt, max_tokens=8, flood=None)
    beside = waits(prompt=prompt, max_tokens=8, flood=flood)
    full_step = STEP_SECONDS + 128 * ROW_SECONDS
    assert beside[-1] <= 2 * alone[-1] + 2 * full_step


def shares(tenants: Mapping[str, Tenant], shapes: Mapping[str, tuple[int, int]], seconds: float) -> dict[str, float]:
    """Rows that each tenant was given, where each alone asks for more than there is."""
    timeline = Timeline(tenants)
    requests = [
        stream(10_000 * i, name, num=3000, every=0.02, prompt=prompt, max_tokens=max_tokens)
        for i, (name, (prompt, max_tokens)) in enumerate(shapes.items(), 1)
    ]
    timeline.run(chain.from_iterable(requests), until=seconds)
    given = dict.fromkeys(shapes, 0.0)
    for seen in timeline.seen.values():
        if seen.first_token is not None:
            given[seen.request.tenant] += len(seen.request.prompt_ids)
    return {name: rows + 2 * timeline.tokens[name] for name, rows in given.items()}


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def test_equal_tenants_have_equal_shares_under_overload() -> None:
    shapes = {"a": (64, 32), "b": (8, 100), "c": (300, 4), "d": (100, 100)}
    given = shares({}, shapes, 60.0)
    assert jain([*given.values()]) >= 0.95
    assert max(given.values()) <= 1.15 * min(given.values())


def test_weights_are_shares() -> None:
    given = shares({"heavy": Tenant(weight=3.0)}, {"heavy": (64, 32), "light": (64, 32)}, 60.0)
    assert 2.7 <= given["heavy"] / given["light"] <= 3.3


def test_who_was_alone_owes_nothing_to_those_that_come_later() -> None:
    """The old tenant had the machine for long; a new one comes while it is away. Then they share."""
    timeline = Timeline()
    timeline.run(stream(1, "old", num=300, every=0.0))
    start = timeline.now + 1.0
    both = [stream(10_000 * i, name, num=300, every=0.0, start=start) for i, name in enumerate(["new", "old"], 1)]
    timeline.tokens.clear()
    timeline.run([*both[0], *both[1]], until=start + 6.0)
    assert timeline.tokens["old"] > 0.7 * timeline.tokens["new"] > 100


def test_leaving_and_coming_back_erases_no_debt() -> None:
    harness = make_harness(max_running=1, max_queued=100)
    queue = harness.scheduler._queue
    for request_id in range(4):
        harness.admit(make_request(request_id, prompt_of(8, request_id), tenant="greedy", max_tokens=20))
    harness.run()
    debt = queue._idle["greedy"]
    assert debt == 4 * (8 + 2 * 20)
    harness.admit(make_request(9, prompt_of(8), tenant="greedy"))
    assert queue._open["greedy"].counter >= debt


def test_what_was_not_used_cannot_be_saved_up() -> None:
    harness = make_harness(max_running=1, max_queued=1000, max_context=60)
    for request_id in range(60):
        harness.admit(make_request(request_id, prompt_of(8, request_id), tenant="busy", max_tokens=40))
    for _ in range(1500):
        harness.step()
    harness.admit(make_request(100, prompt_of(3), tenant="late"))
    counters = {name: share.counter for name, share in harness.scheduler._queue._open.items()}
    assert counters["busy"] > 2 * MAX_CREDIT
    assert counters["late"] == counters["busy"] - MAX_CREDIT


def test_what_a_tenants_own_limit_kept_from_it_cannot_be_saved_up_by_others() -> None:
    """One tenant always waits for its own limit, so its counter lags; a new one must not start from there."""
    timeline = Timeline({"limited": Tenant(max_running=1)})
    start = 20.0
    busy = stream(1, "busy", num=4000, every=0.01)
    limited = stream(10_000, "limited", num=1500, every=0.03, prompt=8, max_tokens=100)
    late = stream(20_000, "late", num=2000, every=0.01, start=start)
    timeline.run([*busy[:2000], *limited[:600]], until=start)
    timeline.tokens.clear()
    timeline.run([*busy[2000:], *limited[600:], *late], until=start + 5.0)
    assert timeline.tokens["busy"] > 0.8 * timeline.tokens["late"] > 100


def test_a_tenant_at_its_limit_saves_nothing_up_itself() -> None:
    tenants = {"limited": Tenant(max_running=1)}
    harness = make_harness(tenants=tenants, max_running=6, max_queued=1000, max_context=400, num_pages=1000)
    for request_id in (1, 2):
        harness.admit(make_request(request_id, prompt_of(8), tenant="limited", max_tokens=350))
    for request_id in range(3, 60):
        harness.admit(make_request(request_id, prompt_of(8, request_id), tenant="busy", max_tokens=40))
    for _ in range(250):
        harness.step()
    shares = harness.scheduler._queue._open
    assert shares["limited"].counter < shares["busy"].counter - 1.5 * MAX_CREDIT
    harness.cancel(1)
    assert shares["limited"].counter == shares["busy"].counter - MAX_CREDIT
    harness.run()


def test_who_was_parked_for_long_saved_nothing_up() -> None:
    harness = make_harness(max_running=1, max_queued=1000, max_context=60)
    harness.admit(make_request(0, prompt_of(3), tenant="slow", max_tokens=20))
    harness.step()
    harness.pause(0)
    for request_id in range(1, 60):
        harness.admit(make_request(request_id, prompt_of(8, request_id), tenant="busy", max_tokens=40))
    for _ in range(1500):
        harness.step()
    harness.resume(0)
    counters = {name: share.counter for name, share in harness.scheduler._queue._open.items()}
    assert counters["slow"] == counters["busy"] - MAX_CREDIT > MAX_CREDIT
    harness.run()


def test_a_prompt_costs_the_same_whether_it_was_cached_or_not() -> None:
    def cost(others_prompt: list[int]) -> tuple[float, int | None]:
        harness = make_harness()
        harness.admit(make_request(1, others_prompt, tenant="other", scope="public"))
        harness.run()
        harness.admit(make_request(2, prompt_of(20), tenant="mine", scope="public"))
        harness.run()
        return harness.scheduler._queue._idle["mine"], harness.outcomes[2, 0].cached_tokens

    (hit, found), (miss, nothing) = cost(prompt_of(20)), cost(prompt_of(20, 30))
    assert (found, nothing) == (16, 0)
    assert hit == miss == 20 + 2 * 8


def started(harness: Harness) -> list[int]:
    """The requests that start in the next step, by their first id."""
    return [begin.ids[0] for begin in planned(harness).begins]


def test_the_least_served_tenant_is_next() -> None:
    harness = make_harness(max_running=1, step_tokens=64, max_queued=100)
    for request_id in range(1, 4):
        harness.admit(make_request(request_id, [request_id] * 9, tenant="a", max_tokens=1))
    harness.admit(make_request(11, [11] * 9, tenant="b", max_tokens=1))
    order = []
    while harness.outcomes[3, 0].finish is None:
        order += started(harness)
        harness.complete()
    assert order == [1, 11, 2, 3]
    harness.run()


def test_a_tenants_own_limit_leaves_the_slots_to_others() -> None:
    harness = make_harness(tenants={"small": Tenant(max_running=2)}, max_running=6)
    for request_id in range(1, 6):
        harness.admit(make_request(request_id, [request_id], tenant="small", max_tokens=20))
    harness.admit(make_request(8, [8], tenant="small", num_sequences=4))
    for request_id in range(11, 15):
        harness.admit(make_request(request_id, [request_id], tenant="big", max_tokens=20))
    assert sorted(started(harness)) == [1, 2, 11, 12, 13, 14]
    harness.run(depth=2)


def test_slots_that_a_tenants_limit_leaves_unused_are_not_kept_for_its_followers() -> None:
    harness = make_harness(tenants={"small": Tenant(max_running=1)}, max_running=4)
    harness.admit(make_request(1, [1] * 9, tenant="small", num_sequences=4))
    for request_id in (11, 12, 13):
        harness.admit(make_request(request_id, [request_id], tenant="big"))
    assert sorted(started(harness)) == [1, 11, 12, 13]
    harness.run()


def test_a_tenant_with_too_much_open_is_refused_and_others_are_not() -> None:
    harness = make_harness(tenants={"small": Tenant(max_running=1, max_queued=1)})
    assert harness.admit(make_request(1, [1], tenant="small")) is None
    assert harness.admit(make_request(2, [2], tenant="small")) is None
    refused = harness.admit(make_request(3, [3], tenant="small"))
    assert refused is not None
    assert refused.code == "rate_limited"
    assert "'small'" in refused.message
    assert harness.admit(make_request(4, [4], tenant="other")) is None
    harness.run()
    assert harness.admit(make_request(5, [5], tenant="small", num_sequences=3)) is None
    harness.run()


def test_no_structure_grows_with_tenants_ever_seen() -> None:
    harness = make_harness()
    for request_id in range(MAX_IDLE + 50):
        harness.admit(make_request(request_id, [1], tenant=f"tenant {request_id}", max_tokens=1))
        harness.step()
    queue = harness.scheduler._queue
    assert not queue._open
    assert len(queue._idle) == MAX_IDLE


def test_slots_are_taken_back_from_who_has_most() -> None:
    """Four long answers of one tenant fill the slots; another's requests start at once, and all end well."""
    harness = make_harness(max_running=4)
    for request_id in range(1, 5):
        harness.admit(make_request(request_id, [request_id] * 5, tenant="greedy", max_tokens=40))
    harness.step()
    harness.step()
    for request_id in range(11, 14):
        harness.admit(make_request(request_id, [request_id] * 5, tenant="other", max_tokens=4))
    assert started(harness) == [11, 12]  # two of four places are its fair part
    assert harness.scheduler.stats().preemptions == 2
    harness.run(depth=2)


def test_nobody_loses_the_last_sequence_that_runs_for_him() -> None:
    harness = make_harness(max_running=2)
    for name in "ab":
        harness.admit(make_request(ord(name), [ord(name) % 61] * 5, tenant=name, max_tokens=30))
    harness.step()
    harness.admit(make_request(3, [3], tenant="c", max_tokens=1))
    harness.run()
    assert harness.scheduler.stats().preemptions == 0


def test_nobody_loses_the_slot_in_the_step_in_which_he_took_it() -> None:
    """The other tenant is the less served one only once the fourth request has started and is paid for."""
    harness = make_harness(max_running=4, step_tokens=64)
    harness.admit(make_request(9, prompt_of(30, 30), tenant="b", max_tokens=1))
    harness.run()
    for request_id, length in enumerate([3, 3, 3, 40], 1):
        harness.admit(make_request(request_id, [request_id] * length, tenant="a", max_tokens=20))
    harness.admit(make_request(11, [11], tenant="b"))
    assert started(harness) == [1, 2, 3, 4]
    assert started(harness) == [11]
    harness.run(depth=2)


def test_who_is_limited_for_somebody_that_cannot_start_runs_after_all() -> None:
    harness = make_harness(step_tokens=1, num_pages=8)
    harness.admit(make_request(1, prompt_of(4), tenant="a", max_tokens=20))
    for _ in range(6):
        harness.step()
    harness.admit(make_request(2, prompt_of(20, 30), tenant="b"))
    assert planned(harness).begins == ()
    harness.run()


def test_further_continuations_pay_for_their_outputs_alone() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(20), tenant="mine", num_sequences=4, max_tokens=5))
    harness.run()
    assert harness.scheduler._queue._idle["mine"] == 20 + 4 * 2 * 5


def test_guests_stay_guests_when_the_favoured_ones_start_is_paid_for() -> None:
    harness = make_harness(max_running=4, step_tokens=64)
    harness.admit(make_request(1, prompt_of(5), tenant="a", max_tokens=1))
    harness.run()
    harness.admit(make_request(2, prompt_of(40, 20), tenant="a"))
    harness.admit(make_request(3, prompt_of(20, 30), tenant="b"))
    assert planned(harness).counts == (20, MIN_GUEST_ROWS)
    harness.run()


def test_steps_are_shorter_while_several_tenants_are_there() -> None:
    for others, rows in (("a", 512), ("b", 128)):
        harness = make_harness(step_tokens=512, max_context=600, num_pages=400)
        for request_id, tenant in enumerate(["a", others], 1):
            harness.admit(make_request(request_id, [request_id] * 500, tenant=tenant, max_tokens=1))
        assert sum(planned(harness).counts) == rows
