"""The device's own thread: runs plans strictly in order, and hands the results to the engine's loop.

The results of a step are announced only when the next step is under way, if its plan is there already: else handling
them would take the interpreter away from the thread that is just about to start that step, and the device would wait.
A step announces by writing to a pipe once it runs without the interpreter; the loop reads the pipe and takes what lies
in `_results`.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING

from streamgen.actors.workers import EngineOwnedThread
from streamgen.messages import StepDone, StepFailed, StepPlan

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from streamgen.actors.model import RunsPlans

logger = logging.getLogger(__name__)


class Device:
    """One thread that runs plans. Everything but the thread's own work happens on the loop; `stop` may be anywhere.

    deliver   gets each result, on the loop, in the order of the plans
    """

    def __init__(
        self,
        runner: RunsPlans,
        *,
        name: str,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[StepDone | StepFailed], None],
    ) -> None:
        self._runner = runner
        self._loop = loop
        self._deliver = deliver
        self._plans: SimpleQueue[StepPlan | None] = SimpleQueue()
        self._results: deque[StepDone | StepFailed] = deque()
        self._is_stopping = False
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        loop.add_reader(self._reader, self._take_results)
        self._thread = EngineOwnedThread(self._run, name=name)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan."""
        self._plans.put(plan)

    def stop(self) -> None:
        """Drop the plans that wait, and return when the step that runs is over. Blocks; idempotent."""
        if self._is_stopping:
            return
        self._is_stopping = True
        self._plans.put(None)
        self._thread.join()
        if not self._loop.is_closed():
            self._loop.remove_reader(self._reader)
        os.close(self._reader)
        os.close(self._writer)

    def _run(self) -> None:
        is_announced = True  # whether the loop knows of every result
        while (plan := self._plans.get()) is not None and not self._is_stopping:
            result = self._execute(plan, None if is_announced else self._writer)
            self._results.append(result)
            is_announced = self._plans.empty() or isinstance(result, StepFailed)
            if is_announced:
                self._announce()

    def _execute(self, plan: StepPlan, wake_fd: int | None) -> StepDone | StepFailed:
        try:
            return self._runner.execute(plan, wake_fd)
        except BaseException as error:  # whatever it is, the engine has to hear of it
            logger.debug("step %d failed", plan.step, exc_info=error)
            return StepFailed(step=plan.step, message=f"{type(error).__name__}: {error}")

    def _announce(self) -> None:
        with suppress(BlockingIOError):  # a full pipe will be read
            os.write(self._writer, b"\0")

    def _take_results(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)
        while self._results:
            self._deliver(self._results.popleft())
