"""Scheduler actor: feeds `scheduling.Scheduler` with what happens, keeps the device busy, reports progress."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, assert_never

from streamgen.actors.actor import Actor
from streamgen.messages import (
    Admit,
    Advance,
    Cancel,
    DetokenizerInbox,
    Pause,
    Resume,
    SchedulerInbox,
    StepDone,
    StepFailed,
    StepPlan,
    StopFound,
    Unpin,
)
from streamgen.scheduling.scheduler import DeviceBroken

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.scheduling.forecast import Forecast
    from streamgen.scheduling.scheduler import Scheduler
    from streamgen.scheduling.stats import SchedulerStats

PLANS_IN_FLIGHT = 2  # one runs, one waits at the device: it never idles for a plan

STATS_SECONDS = 0.05  # age of a snapshot that is replaced while steps run


class DeviceFailed(Exception):
    """A step could not be run; the engine ends with this text."""


class StepTimes:
    """Where the time of steps goes: in the one call, and in all that happens around it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sent: deque[float] = deque()
        self._last_done = clock()
        self.forward_seconds = 0.0
        self.step_seconds = 0.0

    @property
    def num_in_flight(self) -> int:
        """Plans whose results have not come."""
        return len(self._sent)

    def plan_sent(self) -> None:
        """A plan went to the executor."""
        self._sent.append(self._clock())

    def step_failed(self) -> None:
        """The oldest plan, if there is one, has no results."""
        now = self._clock()
        if not self._sent:
            return
        self.step_seconds += now - max(self._sent.popleft(), self._last_done)
        self._last_done = now

    def step_done(self, forward_seconds: float) -> None:
        """The oldest plan's results came. A step lasts from when it was sent, or the one before it ended."""
        now = self._clock()
        self.step_seconds += now - max(self._sent.popleft(), self._last_done)
        self.forward_seconds += forward_seconds
        self._last_done = now


class SchedulerActor(Actor[SchedulerInbox]):
    """Owns the scheduler, and with it every sequence and every page."""

    name = "scheduler"

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        to_executor: Callable[[StepPlan], None],
        to_detokenizer: Callable[[DetokenizerInbox], None],
        clock: Callable[[], float],
        capacity: int,
    ) -> None:
        super().__init__(capacity=capacity)
        self._clock = clock
        self._scheduler = scheduler
        self._to_executor = to_executor
        self._to_detokenizer = to_detokenizer
        self.times = StepTimes(clock)  # any thread may read its sums
        self.stats: SchedulerStats = scheduler.stats()  # replaced whole; any thread may read it
        self.forecast: Forecast = scheduler.forecast()  # likewise
        self._is_stats_old = False  # whether requests came or went since
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._stats_time = clock()

    def handle(self, message: SchedulerInbox) -> None:
        """Tell the scheduler what happened."""
        self._is_stats_old |= not isinstance(message, StepDone)
        match message:
            case StepDone():
                self.times.step_done(message.seconds)
                self._scheduler.complete(message)
            case Admit():
                refused = self._scheduler.admit(message)
                if refused is not None:
                    self._to_detokenizer(refused)
            case Cancel():
                self._scheduler.cancel(message)
            case StopFound():
                self._scheduler.stop_found(message)
            case StepFailed():
                self._fail(message)
            case Pause():
                self._scheduler.pause(message)
            case Resume():
                self._scheduler.resume(message)
            case Unpin():
                self._scheduler.unpin(message)
            case _:
                assert_never(message)

    def forget_prefixes(self) -> None:
        """The pages are about to go; nothing runs."""
        self._scheduler.forget_prefixes()
        self.stats = self._scheduler.stats()

    async def quiet(self) -> None:
        """Until no plan is at the device."""
        await self._quiet.wait()

    def _fail(self, failed: StepFailed) -> None:
        self.times.step_failed()
        try:
            self._scheduler.fail(failed)
        except DeviceBroken as error:
            raise DeviceFailed(str(error)) from error

    def settle(self) -> None:
        """Give the device its next steps first, then report."""
        while self.times.num_in_flight < PLANS_IN_FLIGHT:
            plan = self._scheduler.plan()
            if plan is None:
                break
            self.times.plan_sent()
            self._to_executor(plan)
        entries = self._scheduler.take_progress()
        if entries:
            self._to_detokenizer(Advance(entries=entries))
            # Who sees an end may look whether everything is free.
            self._is_stats_old |= any(entry.finish is not None for entry in entries)
        if self.times.num_in_flight:
            self._quiet.clear()
        else:
            self._quiet.set()
        self._refresh_stats()

    def _refresh_stats(self) -> None:
        # Counting costs time linear in what runs, and nobody reads a snapshot per step.
        now = self._clock()
        if self._is_stats_old or self.times.num_in_flight == 0 or now - self._stats_time > STATS_SECONDS:
            self._is_stats_old = False
            self.stats, self._stats_time = self._scheduler.stats(), now
            self.forecast = self._scheduler.forecast()
