"""Steps that are left out leave behind what they would have: the same state at each arrival, the same report."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from streamgen.scheduling.limits import Limits
from streamgen.testing.simulator import CostModel, ReplayReport, TraceRequest, read_trace, replay
from streamgen.testing.simulator.fast_forward import FastForward
from streamgen.testing.simulator.replay import Replay

if TYPE_CHECKING:
    from pathlib import Path

SEEDS = range(60)


def random_limits(random: Random) -> Limits:
    """From cramped to roomy, so that sequences are preempted, wait, and find pages of others."""
    return Limits(
        num_pages=random.choice([30, 60, 200, 2000]),
        page_size=random.choice([1, 4, 16, 16]),
        max_running=random.choice([1, 3, 16]),
        step_tokens=random.choice([4, 16, 64, 600]),
        max_context=random.choice([100, 700, 1200]),
        max_queued=random.choice([2, 10**6]),
        prefix_cache=random.random() < 0.7,
    )


def random_trace(random: Random) -> list[TraceRequest]:
    """Some with common prefixes, some the same as another, some alone for long."""
    gap, trace, time = random.choice([0.0, 0.05, 1.0]), [], 0.0
    for _ in range(random.choice([3, 30])):
        time += random.expovariate(1.0) * gap
        prompt = random.choice([1, 15, 16, 17, 40, 512, 600])
        blocks = (random.randrange(3), random.randrange(3)) if random.random() < 0.5 else ()
        trace.append(TraceRequest(time, prompt, random.choice([0, 1, 2, 17, 60, 300]), blocks))
    return trace


class Watched(Replay):
    """Notes how everything stands whenever somebody comes."""

    def _arrive(self) -> None:
        self.states = [*getattr(self, "states", []), hash(self.state())]
        super()._arrive()

    def state(self) -> tuple[object, ...]:
        scheduler, batch = self._scheduler, self._scheduler._batch
        pool, index = scheduler._cache.pool, scheduler._cache.index
        sequences = [*batch, *batch.queue]
        return (
            self._driver.now,
            self._driver.free_at,
            self._driver.busy_seconds,
            str(scheduler.stats()),
            tuple(pool._refs),
            pool.free_pages(),
            pool.cached_pages(),
            tuple(sorted(index._pages.items())),
            tuple(batch.decoding),
            tuple([(s.request.request_id, s.slot, tuple(s.ids), tuple(s.pages), tuple(s.names)) for s in sequences]),
            tuple(
                [(s.num_scheduled, s.num_computed, s.num_pending, s.num_offered, s.share.counter) for s in sequences]
            ),
            tuple([(r.slot, r.start, r.count, r.pages, r.run) for step in scheduler._in_flight for r in step.rows]),
            str(self._driver.plans),
        )


def watch(seed: int, *, fast_forward: bool) -> tuple[list[int], ReplayReport]:
    random = Random(seed)
    limits, trace = random_limits(random), random_trace(random)
    replaying = Watched(
        iter([(0, request) for request in trace]),
        limits=limits,
        cost=CostModel(step=random.choice([0.01, 0.3]), row=1e-4, context=random.choice([0.0, 3e-7])),
        scale=1.0,
        knows_lengths=random.random() < 0.3,
    )
    if random.random() < 0.4:
        # As if memory never ran out: then it does, and sequences are preempted.
        replaying._scheduler._admission.fits = lambda *sequences, **options: True  # type: ignore[method-assign]
    report = replaying.run(fast_forward=fast_forward)
    return [*replaying.states, hash(replaying.state())], report


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_differs(seed: int) -> None:
    assert watch(seed, fast_forward=True) == watch(seed, fast_forward=False)


@pytest.mark.parametrize("name", ["azure_2023_conv_head.csv", "mooncake_conversation_head.jsonl"])
def test_nothing_differs_in_a_public_trace(name: str, shared_data: Path) -> None:
    trace = read_trace(shared_data / "traces" / name)[:150]
    limits = Limits(num_pages=20_000, max_running=32, step_tokens=2048, max_context=1 << 17, max_queued=10**6)
    cost = CostModel(step=6e-3, row=3e-5, context=1e-9)
    fast, slow = (replay(trace, limits=limits, cost=cost, scale=3.0, fast_forward=is_fast) for is_fast in (True, False))
    assert fast == slow and fast.finished == 150


def test_most_steps_are_left_out_and_some_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = []
    skip = FastForward.skip

    def counted(self: FastForward) -> int:
        skipped.append(skip(self))
        return skipped[-1]

    monkeypatch.setattr(FastForward, "skip", counted)
    report = replay(
        [TraceRequest(0.0, 40, 500), TraceRequest(2.0, 100, 50)],
        limits=Limits(num_pages=100, max_running=4, step_tokens=64, max_context=1000, max_queued=10),
        cost=CostModel(step=0.01, row=0.0, context=0.0),
    )
    assert report.steps > 500 and report.steps - 40 < sum(skipped) < report.steps


def test_a_step_that_is_left_out_wrongly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: with one page too few, one token too many, or an end overlooked."""
    steps = FastForward._steps_without_end
    monkeypatch.setattr(FastForward, "_steps_without_end", lambda self, running: steps(self, running) + 1)
    outcomes = []
    for seed in SEEDS:
        try:
            outcomes.append(watch(seed, fast_forward=True) == watch(seed, fast_forward=False))
        except (AssertionError, IndexError):
            outcomes.append(False)
    assert outcomes.count(False) > 10
