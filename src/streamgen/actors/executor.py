"""Executor: takes step plans, has them run on the device's own thread, and hands the results to the scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.actors.actor import Actor
from streamgen.messages import ExecutorInbox

if TYPE_CHECKING:
    from streamgen.actors.world import RunsSteps


class ExecutorActor(Actor[ExecutorInbox]):
    """One device. Its thread runs plans strictly in the order in which they came, and reports by itself."""

    name = "executor"

    def __init__(self, device: RunsSteps, *, capacity: int) -> None:
        super().__init__(capacity=capacity)
        self._device = device

    def post(self, message: ExecutorInbox) -> None:
        """Queue a plan at the device now: a plan that waited here for its turn would keep an idle device waiting."""
        if not self._has_ended:
            self.handle(message)

    def handle(self, message: ExecutorInbox) -> None:
        """Queue a plan at the device."""
        self._device.submit(message)
