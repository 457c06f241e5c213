"""The simulation: promises hold in every scenario, the same seed is the same run, and what is broken is noticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import structs

from streamgen.errors import ConfigError
from streamgen.scheduling.batch import Batch
from streamgen.scheduling.cache import PageCache
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.pages import PagePool
from streamgen.scheduling.prefix import PrefixIndex
from streamgen.scheduling.scheduler import Scheduler
from streamgen.scheduling.sequence import Sequence
from streamgen.testing.simulator import SCENARIOS, Scenario, SimulationFailed, simulate

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.messages import StepPlan

REPLAY = re.compile(r"streamgen simulate --seed \d+ --requests \d+ --scenario [\w-]+")


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("seed", [0, 1])
def test_promises_hold(name: str, seed: int) -> None:
    report = simulate(seed, requests=250, scenario=name, check_books_every=4)
    assert report.scenario == name
    assert sum(report.endings.values()) >= 250
    assert report.busy_seconds <= report.seconds + 1e-6


def test_the_mixed_scenario_has_everything_in_it() -> None:
    report = simulate(0, requests=2000, scenario="mixed")
    assert {"cancelled", "deadline", "slow_consumer", "stopped", "stop", "length", "error"} <= report.endings.keys()
    assert report.failures.keys() == {"error", "lost", "skipped"}
    assert report.preemptions and report.cached_tokens


def test_the_same_seed_is_the_same_run() -> None:
    first, second, other = list[str](), list[str](), list[str]()
    a = simulate(7, requests=150, log=first.append)
    b = simulate(7, requests=150, log=second.append)
    c = simulate(8, requests=150, log=other.append)
    assert (a, first) == (b, second)
    assert a.digest != c.digest and first != other
    assert simulate(7, requests=150).digest == a.digest, "a log changed the run"


def test_it_is_the_same_in_another_process() -> None:
    script = "from streamgen.testing.simulator import simulate; print(simulate(5, requests=200).digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {simulate(5, requests=200).digest}


def test_a_scenario_of_ones_own() -> None:
    limits = Limits(num_pages=4, page_size=4, max_running=2, step_tokens=3, max_context=16, max_queued=10**6)
    report = simulate(0, requests=60, scenario=Scenario(limits=limits, prompt=(1, 9), output=(1, 5)))
    assert report.endings == {"length": 60}
    assert report.scenario == "custom"


# ---- what is broken is noticed -----------------------------------------------------------------------------------


def give_held_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is freed though somebody still has it in a table."""
    release = PagePool.release

    def broken(pool: PagePool, page: int) -> None:
        release(pool, page)
        if page % 5 == 0 and pool.num_holders(page) == 1:
            pool._refs[page] = 0
            pool._free.append(page)

    monkeypatch.setattr(PagePool, "release", broken)


def find_wrong_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are found by their own ids alone, whatever came before."""

    def broken(index: PrefixIndex, names: list[bytes], ids: list[int], num_pages: int) -> None:
        names.extend(repr((i, ids[i * 16])).encode() for i in range(len(names) - 1, num_pages))

    monkeypatch.setattr(PrefixIndex, "extend_names", broken)


def leak_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    release = PageCache.release

    def broken(cache: PageCache, sequence: Sequence) -> None:
        sequence.pages[-1:] = []
        release(cache, sequence)

    monkeypatch.setattr(PageCache, "release", broken)


def forget_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Scheduler.plan

    def broken(scheduler: Scheduler) -> StepPlan | None:
        made = plan(scheduler)
        return None if made is None else structs.replace(made, copies=())

    monkeypatch.setattr(Scheduler, "plan", broken)


def end_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Scheduler.take_progress
    monkeypatch.setattr(Scheduler, "take_progress", lambda scheduler: take(scheduler) * 2)


def never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Scheduler.take_progress

    def broken(scheduler: Scheduler) -> Any:
        return tuple(entry for entry in take(scheduler) if entry.finish != "stop")

    monkeypatch.setattr(Scheduler, "take_progress", broken)


def lose_wakeups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "resume", lambda batch, sequence: None)


def trust_void_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of a run that was given up are taken for those of the next."""
    leave = Sequence.leave

    def broken(sequence: Sequence) -> None:
        leave(sequence)
        sequence.run -= 1

    monkeypatch.setattr(Sequence, "leave", broken)


def overfill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgen.scheduling.planner.Step.room", lambda step, sequence: 10_000)


@pytest.mark.parametrize(
    "breaks",
    [
        give_held_pages,
        find_wrong_pages,
        leak_pages,
        forget_copies,
        end_twice,
        never_end,
        lose_wakeups,
        trust_void_results,
        overfill,
    ],
)
def test_a_broken_scheduler_is_noticed(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(SimulationFailed) as failure:
        simulate(0, requests=600)
    what, command = str(failure.value).splitlines()
    assert REPLAY.fullmatch(command), command
    with pytest.raises(SimulationFailed) as again:
        simulate(0, requests=600)
    assert str(again.value).splitlines() == [what, command]


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_an_unknown_scenario() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mixed'"):
        simulate(0, scenario="mixd")


def test_no_requests() -> None:
    with pytest.raises(ConfigError, match="expected >= 1, got 0"):
        simulate(0, requests=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("cancels", 1.5), ("load", 0.0), ("load", float("nan")), ("prompt", (0, 4)), ("output", (5, 4))],
)
def test_a_scenario_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        structs.replace(SCENARIOS["short"], **{field: value})
