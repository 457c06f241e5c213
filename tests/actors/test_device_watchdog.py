"""The watchdog, under a clock and a loop's timer that the test moves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from streamgen.actors.device import RunningStep
from streamgen.actors.watchdog import MIN_DEADLINE, SLACK, UNMEASURED, StepDeadlines, Watchdog
from streamgen.messages import StepDone, StepFailed, StepPlan


def plan(step: int, rows: int = 1) -> StepPlan:
    return StepPlan(step=step, slots=(0,), starts=(0,), counts=(rows,), samples=(1,), pages=((),))


def test_a_deadline_follows_what_steps_take() -> None:
    deadlines = StepDeadlines()
    assert deadlines.deadline() == UNMEASURED * MIN_DEADLINE, "nothing is known yet"
    deadlines.observe(0.01)
    assert deadlines.deadline() == MIN_DEADLINE
    for _ in range(200):
        deadlines.observe(2.0)
    assert deadlines.deadline() == SLACK * 2.0
    for _ in range(2000):
        deadlines.observe(0.01)
    assert deadlines.deadline() == MIN_DEADLINE, "what was long ago is forgotten"


def test_one_odd_step_does_not_make_the_watchdog_deaf() -> None:
    deadlines = StepDeadlines(0.05)
    for i in range(400):
        deadlines.observe(3600.0 if i == 200 else 0.001)
    assert deadlines.deadline() == 0.05


def test_a_prompt_may_take_longer_than_a_token() -> None:
    deadlines = StepDeadlines()
    for _ in range(50):
        deadlines.observe(0.2, rows=4)
    assert deadlines.deadline(4) == MIN_DEADLINE
    assert deadlines.deadline(512) == pytest.approx(SLACK * 512 * 0.05)


class Timers(asyncio.SelectorEventLoop):
    """Only its clock and timers are used; `advance` fires what is due."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.timers: list[tuple[float, Any, Any]] = []
        self.num_armed = 0

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:  # type: ignore[override]  # one caller
        self.num_armed += 1
        handle = asyncio.TimerHandle(when, callback, args, self)
        self.timers.append((when, callback, handle))
        return handle

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [t for t in self.timers if t[0] <= end and not t[2].cancelled()]:
            timer = min(due, key=lambda t: t[0])
            self.timers.remove(timer)
            self.now = timer[0]
            timer[1]()
        self.now = end


class Case:
    """A device that is where the test says, and its watchdog."""

    def __init__(self, minimum: float = 5.0) -> None:
        self.loop = Timers()
        self.running: RunningStep | None = None
        self.overdue: list[tuple[int, float]] = []
        self.watchdog = Watchdog(
            StepDeadlines(minimum),
            loop=self.loop,
            clock=self.loop.time,
            running=lambda: self.running,
            on_overdue=lambda step, seconds: self.overdue.append((step, seconds)),
        )

    def begin(self, step: int, rows: int = 1) -> None:
        self.watchdog.sent(plan(step, rows))
        self.running = RunningStep(step, rows, self.loop.now)

    def end(self, step: int, seconds: float = 0.01) -> None:
        self.running = None
        self.watchdog.ended(StepDone(step=step, tokens=((1,),), seconds=seconds))


@pytest.fixture
def case() -> Any:
    case = Case()
    yield case
    case.watchdog.stop()
    case.loop.close()


def test_a_step_over_its_deadline_is_told_once(case: Case) -> None:
    case.begin(0)
    case.loop.advance(0.01)
    case.end(0)
    case.begin(1)
    case.loop.advance(4.9)
    assert case.overdue == []
    case.loop.advance(5.0)
    assert [step for step, _ in case.overdue] == [1] and 5.0 <= case.overdue[0][1] <= 10.0
    case.loop.advance(100.0)
    assert len(case.overdue) == 1
    case.end(1)
    case.begin(2)
    case.loop.advance(11.0)
    assert [step for step, _ in case.overdue] == [1, 2], "the next one is watched too"


def test_the_first_step_has_longer(case: Case) -> None:
    case.begin(0, rows=512)
    case.loop.advance(UNMEASURED * MIN_DEADLINE - 1)
    assert case.overdue == []
    case.loop.advance(2.0)
    assert [step for step, _ in case.overdue] == [0]


def test_steps_cost_no_timers_and_idle_has_none(case: Case) -> None:
    for step in range(1000):
        case.begin(step)
        case.loop.advance(0.01)
        case.end(step)
    assert case.loop.num_armed <= 4, "ten seconds of steps"
    case.loop.advance(60.0)
    assert case.loop.timers == [] and case.overdue == []
    case.begin(1000)
    case.loop.advance(10.1)
    assert [step for step, _ in case.overdue] == [1000]


def test_a_plan_that_waits_is_watched_once_it_runs(case: Case) -> None:
    case.begin(0)
    case.watchdog.sent(plan(1))
    case.end(0)
    case.loop.advance(30.0)  # the device makes ready: no step runs
    assert case.overdue == []
    case.running = RunningStep(1, 1, case.loop.now)
    case.loop.advance(10.1)
    assert [step for step, _ in case.overdue] == [1]
    case.running = None
    case.watchdog.ended(StepFailed(step=1, message="", kind="lost"))
    case.watchdog.ended(StepFailed(step=1, message="the thread ended", kind="dead"))
    case.loop.advance(30.0)
    assert case.loop.timers == []
