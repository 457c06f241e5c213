"""Executor: takes step plans, runs them on the device's own thread, and hands the results to the scheduler."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from streamgen.actors.actor import Actor
from streamgen.messages import ExecutorInbox, SchedulerInbox, StepDone, StepFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.actors.model import RunsPlans
    from streamgen.actors.workers import Workers

logger = logging.getLogger(__name__)


class ExecutorActor(Actor[ExecutorInbox]):
    """One device. Its thread runs plans strictly in the order in which they came."""

    name = "executor"

    def __init__(
        self, runner: RunsPlans, device: Workers, *, to_scheduler: Callable[[SchedulerInbox], None], capacity: int
    ) -> None:
        super().__init__(capacity=capacity)
        self._runner = runner
        self._device = device
        self._to_scheduler = to_scheduler

    def handle(self, message: ExecutorInbox) -> None:
        """Queue a plan at the device."""
        self._device.submit(partial(self._runner.execute, message), partial(self._done, message.step))

    def _done(self, step: int, done: StepDone | None, error: BaseException | None) -> None:
        if done is not None:
            self._to_scheduler(done)
            return
        logger.debug("step %d failed", step, exc_info=error)
        self._to_scheduler(StepFailed(step=step, message=f"{type(error).__name__}: {error}"))
