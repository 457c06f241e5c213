"""The watchdog: notices a step that takes far longer than steps do. It only tells; what to do about it is its owner's.

How long a step may take depends on its rows: a prompt's 512 rows take a hundred times what one row takes.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from streamgen.messages import StepDone

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from streamgen.actors.device import RunningStep
    from streamgen.messages import StepFailed, StepPlan

MIN_DEADLINE = 5.0  # seconds
SLACK = 10.0  # times the 99th percentile of what was measured
UNMEASURED = 60.0  # times the minimum, until a first step was measured: nothing is known of model and machine yet
WINDOW = 512  # steps


class StepDeadlines:
    """How long a step may take: `SLACK` times what steps took, or what its rows took in them, whichever is longer.

    Pure. minimum   seconds, never less than these; None is MIN_DEADLINE
    """

    def __init__(self, minimum: float | None = None) -> None:
        self.minimum = MIN_DEADLINE if minimum is None else minimum
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._per_row: deque[float] = deque(maxlen=WINDOW)

    def observe(self, seconds: float, rows: int = 1) -> None:
        """A step of so many rows took so long."""
        self._seconds.append(seconds)
        self._per_row.append(seconds / max(1, rows))

    def deadline(self, rows: int = 1) -> float:
        """Seconds that a step of so many rows may take. Sorts the window: for now and then."""
        if not self._seconds:
            return UNMEASURED * self.minimum
        return max(self.minimum, SLACK * _p99(self._seconds), SLACK * rows * _p99(self._per_row))


class Watchdog:
    """Watches a device with one timer of its loop, which is set anew only when it fires: a step costs no timer.

    It fires when the step it saw would be overdue, and at least every `minimum` seconds while there is something to do,
    since the steps that follow may be shorter.

    running     the step under way, see `Device.running`
    on_overdue  called on the loop with the step's number and the seconds it has run, once a step
    """

    def __init__(
        self,
        deadlines: StepDeadlines,
        *,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        running: Callable[[], RunningStep | None],
        on_overdue: Callable[[int, float], None],
    ) -> None:
        self._deadlines = deadlines
        self._loop = loop
        self._clock = clock
        self._running = running
        self._on_overdue = on_overdue
        self._rows: deque[int] = deque()  # of the plans at the device
        self._told: int | None = None  # newest step that was told of
        self._timer: asyncio.TimerHandle | None = None

    def sent(self, plan: StepPlan) -> None:
        """A plan goes to the device."""
        self._rows.append(sum(plan.counts))
        if self._timer is None:
            self._arm(self._deadlines.minimum)

    def ended(self, result: StepDone | StepFailed) -> None:
        """The oldest plan's result came."""
        if not self._rows:
            return  # a device that dies may say so while it has no plan
        rows = self._rows.popleft()
        if isinstance(result, StepDone):
            self._deadlines.observe(result.seconds, rows)

    def stop(self) -> None:
        """Watch no more; on the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, seconds: float) -> None:
        seconds = min(max(seconds, 0.001), self._deadlines.minimum)
        self._timer = self._loop.call_at(self._loop.time() + seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._rows:
            return  # idle: the next plan sets the timer
        running = self._running()
        if running is None:  # between two steps, or the device makes ready for one
            self._arm(self._deadlines.minimum)
            return
        allowed = self._deadlines.deadline(running.rows)
        ran = self._clock() - running.since
        if ran < allowed:
            self._arm(allowed - ran)
            return
        self._arm(allowed)
        if running.step != self._told:
            self._told = running.step
            self._on_overdue(running.step, ran)


def _p99(values: deque[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
