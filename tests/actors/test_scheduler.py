"""The scheduler's shell: what it asks the core, in which order, and how many plans it keeps under way."""

from __future__ import annotations

from typing import Any

import pytest

from streamgen.actors.scheduler import STATS_SECONDS, DeviceFailed, SchedulerActor
from streamgen.messages import (
    Admit,
    Advance,
    Cancel,
    Pause,
    Progress,
    Refused,
    Resume,
    StepDone,
    StepFailed,
    StepPlan,
    StopFound,
    Unpin,
)
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.forecast import Forecast
from streamgen.scheduling.suspects import DeviceBroken

CANCEL = Cancel(request_id=1)
STOP = StopFound(request_id=1)
ADMIT = Admit(request_id=1, prompt_ids=(1,), sampling=ResolvedSampling(), max_tokens=3)


class Core:
    """A scheduler with a script: so many plans, and then this progress."""

    def __init__(self, *, plans: int = 0) -> None:
        self.calls: list[Any] = []
        self.plans = plans
        self.step = 0
        self.refusal: Refused | None = None
        self.progress: tuple[Progress, ...] = ()
        self.num_stats = 0

    def admit(self, message: Admit) -> Refused | None:
        self.calls.append(message)
        return self.refusal

    def cancel(self, message: Cancel) -> None:
        self.calls.append(message)

    def stop_found(self, message: StopFound) -> None:
        self.calls.append(message)

    def complete(self, done: StepDone) -> None:
        self.calls.append(done)

    def plan(self) -> StepPlan | None:
        if self.plans == 0:
            return None
        self.plans -= 1
        self.step += 1
        return StepPlan(step=self.step, slots=(0,), starts=(0,), counts=(1,), samples=(1,), pages=((),))

    def take_progress(self) -> tuple[Progress, ...]:
        progress, self.progress = self.progress, ()
        return progress

    def pause(self, message: Pause) -> None:
        self.calls.append(message)

    def resume(self, message: Resume) -> None:
        self.calls.append(message)

    def unpin(self, message: Unpin) -> None:
        self.calls.append(message)

    def fail(self, failed: StepFailed) -> None:
        self.calls.append(failed)
        if failed.kind == "dead":
            raise DeviceBroken(failed.message)

    def forecast(self) -> Forecast:
        return Forecast()

    def stats(self) -> int:
        self.num_stats += 1
        return self.num_stats


class Shell:
    def __init__(self, core: Core) -> None:
        self.sent: list[Any] = []
        self.now = 0.0
        scheduler: Any = core
        self.actor = SchedulerActor(
            scheduler,
            to_executor=self.sent.append,
            to_detokenizer=self.sent.append,
            clock=lambda: self.now,
            capacity=1,
        )

    def turn(self, *messages: Any) -> list[Any]:
        """Handle these as one turn; what was sent."""
        self.sent.clear()
        for message in messages:
            self.actor.handle(message)
        self.actor.settle()
        return list(self.sent)


@pytest.fixture
def core() -> Core:
    return Core()


@pytest.fixture
def shell(core: Core) -> Shell:
    return Shell(core)


def test_two_plans_are_under_way(core: Core, shell: Shell) -> None:
    core.plans = 5
    assert [plan.step for plan in shell.turn(ADMIT)] == [1, 2]
    assert shell.turn(CANCEL) == [], "the device has enough to do"
    assert [plan.step for plan in shell.turn(StepDone(step=1, tokens=()))] == [3]
    both = (StepDone(step=2, tokens=()), StepDone(step=3, tokens=()))
    assert [plan.step for plan in shell.turn(*both)] == [4, 5]


def test_the_device_gets_its_plan_before_anybody_hears_of_the_last(core: Core, shell: Shell) -> None:
    core.plans = 3
    shell.turn(ADMIT)
    core.progress = (Progress(request_id=1, ids=(5,)),)
    sent = shell.turn(StepDone(step=1, tokens=((5,),)))
    assert [type(m) for m in sent] == [StepPlan, Advance]
    assert sent[1].entries == (Progress(request_id=1, ids=(5,)),)


def test_everything_goes_to_the_core_in_order(core: Core, shell: Shell) -> None:
    core.plans = 1
    done = StepDone(step=1, tokens=())
    shell.turn(ADMIT)
    shell.turn(CANCEL, STOP, done)
    assert core.calls == [ADMIT, CANCEL, STOP, done]


def test_a_step_lasts_from_the_later_of_its_sending_and_the_end_of_the_one_before(core: Core, shell: Shell) -> None:
    core.plans = 3
    shell.turn(ADMIT)  # two plans leave at 0
    shell.now = 2.0
    shell.turn(StepDone(step=1, tokens=(), seconds=1.5))
    shell.now = 5.0
    shell.turn(StepDone(step=2, tokens=(), seconds=2.5))
    assert (shell.actor.times.step_seconds, shell.actor.times.forward_seconds) == (5.0, 4.0)


def test_a_refusal_goes_to_the_detokenizer(core: Core, shell: Shell) -> None:
    core.refusal = Refused(request_id=1, code="engine_overloaded")
    assert shell.turn(ADMIT) == [core.refusal]


def test_a_failed_step_is_the_cores_and_a_dead_device_ends_the_actor(core: Core, shell: Shell) -> None:
    core.plans = 2
    shell.turn(ADMIT)
    failed = StepFailed(step=1, message="hiccup")
    shell.turn(failed)
    assert core.calls[-1] == failed and shell.actor.times.num_in_flight == 1
    with pytest.raises(DeviceFailed, match="smoke"):
        shell.turn(StepFailed(step=2, message="smoke", kind="dead"))


def test_pauses_and_pins_go_to_the_core(core: Core, shell: Shell) -> None:
    messages = [Pause(request_id=1), Resume(request_id=1), Unpin(key="k")]
    shell.turn(*messages)
    assert core.calls == messages


def test_stats_are_fresh_when_idle_and_not_counted_every_step(core: Core, shell: Shell) -> None:
    core.plans = 100
    shell.turn(ADMIT)
    before = core.num_stats
    for step in range(1, 20):
        shell.turn(StepDone(step=step, tokens=()))
    assert core.num_stats == before
    shell.now += 2 * STATS_SECONDS
    shell.turn(StepDone(step=20, tokens=()))
    assert core.num_stats == before + 1
    core.plans = 0
    shell.turn(StepDone(step=21, tokens=()), StepDone(step=22, tokens=()))
    latest: Any = shell.actor.stats
    assert core.num_stats == before + 2 == latest
