"""What an engine takes from outside, in virtual time and on one loop: clock, randomness, workers and a device."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from streamgen.actors.device import RunningStep
from streamgen.faults import DeviceDead, ExecutorLost
from streamgen.messages import StepDone, StepFailed

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from random import Random

    from streamgen.actors.model import RunsPlans
    from streamgen.actors.workers import Done
    from streamgen.messages import StepPlan
    from streamgen.testing.simulator.cost import CostModel
    from streamgen.testing.simulator.virtual_loop import VirtualLoop

T = TypeVar("T")

ENCODE_SECONDS = 0.004  # most that rendering and encoding a prompt takes
RESTART_SECONDS = 0.5  # until an executor that died has a successor


class InlineWorkers:
    """Runs calls on the loop, each after a moment of virtual time; so one may be overtaken by the next."""

    def __init__(self, loop: asyncio.AbstractEventLoop, random: Random) -> None:
        self._loop = loop
        self._random = random
        self._is_stopped = False

    def submit(self, call: Callable[[], T], done: Done[T]) -> None:
        """Run `call`, then `done`."""
        self._loop.call_later(self._random.random() * ENCODE_SECONDS, self._do, call, done)

    def stop(self) -> None:
        """Drop what waits."""
        self._is_stopped = True

    def _do(self, call: Callable[[], T], done: Done[T]) -> None:
        if self._is_stopped:
            return
        try:
            result = call()
        except Exception as error:
            done(None, error)
        else:
            done(result, None)


class InlineDevice:
    """Runs plans on the loop, one after the other, each when its virtual time is over.

    What the runner raises is a failed step, as at a real device: DeviceDead and what is no Exception end it, and
    ExecutorLost costs the time until there is another one.
    """

    def __init__(
        self,
        runner: RunsPlans,
        *,
        loop: asyncio.AbstractEventLoop,
        cost: CostModel,
        deliver: Callable[[StepDone | StepFailed], None],
    ) -> None:
        self._runner, self._loop, self._cost, self._deliver = runner, loop, cost, deliver
        self._plans: deque[StepPlan] = deque()
        self._running: RunningStep | None = None
        self._failed_generation: int | None = None
        self._is_over = False
        self._restart_seconds = 0.0  # until the next step can begin

    @property
    def running(self) -> RunningStep | None:
        """The step that runs now."""
        return self._running

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan."""
        self._plans.append(plan)
        if self._running is None:
            self._begin()

    def _begin(self) -> None:
        if not self._plans or self._is_over:
            self._running = None
            return
        plan = self._plans[0]
        self._running = RunningStep(plan.step, sum(plan.counts), self._loop.time())
        seconds, self._restart_seconds = self._restart_seconds + self._cost.seconds(plan), 0.0
        self._loop.call_later(seconds, self._end)

    def _end(self) -> None:
        if self._is_over:
            return
        plan = self._plans.popleft()
        result = self._execute(plan)
        self._begin()  # as at a real device, the next step is under way when results are handled
        self._deliver(result)

    def _execute(self, plan: StepPlan) -> StepDone | StepFailed:
        if plan.generation == self._failed_generation:
            return StepFailed(step=plan.step, message="a step before it failed", kind="skipped")
        try:
            return self._runner.execute(plan)
        except Exception as error:
            self._failed_generation = plan.generation
            match error:
                case DeviceDead():
                    self._is_over, kind = True, "dead"
                case ExecutorLost():
                    self._restart_seconds, kind = RESTART_SECONDS, "lost"
                case _:
                    kind = "error"
            return StepFailed(step=plan.step, message=str(error), kind=kind)

    def stop(self) -> bool:
        """Drop what waits."""
        self._is_over = True
        return True

    def abandon(self, when_over: Callable[[], None]) -> None:
        """No virtual step is ever stuck."""
        self._is_over = True


class SimulatedWorld:
    """The world of an engine on a VirtualLoop, where every figure comes from a seed and a cost model."""

    min_step_deadline = math.inf  # steps take what the cost model says

    def __init__(self, loop: VirtualLoop, random: Random, cost: CostModel) -> None:
        self._loop, self._random, self._cost = loop, random, cost

    def clock(self) -> float:
        """Virtual seconds."""
        return self._loop.time()

    def random_bytes(self, count: int) -> bytes:
        """From the seed."""
        return self._random.randbytes(count)

    def loop_factory(self) -> asyncio.AbstractEventLoop:
        """The one loop."""
        return self._loop

    def make_workers(self, count: int, *, name: str, loop: asyncio.AbstractEventLoop) -> InlineWorkers:
        """Workers on the loop."""
        return InlineWorkers(loop, self._random)

    def make_device(
        self,
        runner: RunsPlans,
        *,
        name: str,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[StepDone | StepFailed], None],
    ) -> InlineDevice:
        """A device on the loop."""
        return InlineDevice(runner, loop=loop, cost=self._cost, deliver=deliver)
