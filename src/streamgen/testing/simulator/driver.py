"""Virtual time: a scheduler, a device that runs its plans in order, and happenings at given moments.

As in an engine, two plans are at the device at most, the next one is made when a step's results have come, and whatever
happens in between is told to the scheduler at once.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from streamgen.actors.scheduler import PLANS_IN_FLIGHT
from streamgen.messages import StepFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.messages import StepDone, StepPlan
    from streamgen.scheduling.scheduler import Scheduler
    from streamgen.testing.simulator.cost import CostModel


class Driver:
    """Lets time pass.

    cost       how long a step takes
    execute    runs a plan when it is over, and says what came of it
    heard      is called whenever the scheduler was told something, with the plan that was just completed, if one was
    """

    def __init__(
        self,
        *,
        cost: CostModel,
        execute: Callable[[StepPlan], StepDone | StepFailed],
        heard: Callable[[StepPlan | None], None],
    ) -> None:
        self.now = 0.0
        self.busy_seconds = 0.0
        self.cost = cost
        self._execute = execute
        self._heard = heard
        self._coming: list[tuple[float, int, Callable[[], None]]] = []
        self._num_coming = 0
        self.plans: deque[tuple[StepPlan, float]] = deque()  # with when each is over
        self.free_at = 0.0  # when the device is through with all of them

    def clock(self) -> float:
        """Virtual seconds."""
        return self.now

    @property
    def has_plans(self) -> bool:
        """Whether anything is at the device."""
        return bool(self.plans)

    @property
    def next_time(self) -> float:
        """When the next thing happens that is not the end of a step."""
        return self._coming[0][0] if self._coming else math.inf

    def charge(self, seconds: float) -> None:
        """One more step waits at the device, which takes so long."""
        self.free_at = max(self.free_at, self.now) + seconds
        self.busy_seconds += seconds

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Something happens at that time; of those at one time, what was said first."""
        self._num_coming += 1
        heappush(self._coming, (time, self._num_coming, call))

    def forget_coming(self) -> None:
        """Nothing of what was said happens any more."""
        self._coming.clear()

    def stall(self, seconds: float) -> None:
        """The device has to be put in order before it runs another step."""
        self.free_at = max(self.free_at, self.now) + seconds

    def turn(self, scheduler: Scheduler) -> bool:
        """Give the device plans, then go on to the next thing that happens; False if nothing ever will."""
        while len(self.plans) < PLANS_IN_FLIGHT:
            plan = scheduler.plan()
            if plan is None:
                break
            self.charge(self.cost.seconds(plan))
            self.plans.append((plan, self.free_at))
        end = self.plans[0][1] if self.plans else math.inf
        if self._coming and self._coming[0][0] <= end:
            time, _, call = heappop(self._coming)
            self.now = max(self.now, time)
            call()
            self._heard(None)
            return True
        if not self.plans:
            return False
        self._complete(scheduler)
        return True

    def _complete(self, scheduler: Scheduler) -> None:
        plan, self.now = self.plans.popleft()
        result = self._execute(plan)
        if isinstance(result, StepFailed):
            scheduler.fail(result)
        else:
            scheduler.complete(result)
        self._heard(plan)
