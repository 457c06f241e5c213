"""The device's own thread: runs plans strictly in order, and hands the results to the engine's loop.

The results of a step are announced only when the next step is under way, if its plan is there already: else handling
them would take the interpreter away from the thread that is just about to start that step, and the device would wait.
A step announces by writing to a pipe once it runs without the interpreter; the loop reads the pipe and takes what lies
in `_results`.

A step that raises makes void the other plans of its generation: they build on what it would have left in its pages.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from streamgen.actors.workers import EngineOwnedThread
from streamgen.faults import DeviceDead, ExecutorLost, StepRaised
from streamgen.messages import StepDone, StepFailed, StepPlan

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from streamgen.actors.model import RunsPlans

logger = logging.getLogger(__name__)


class RunningStep(NamedTuple):
    """The step under way: its number, how many rows it has, when it began in seconds of the device's clock."""

    step: int
    rows: int
    since: float


class DeviceThread(EngineOwnedThread):
    """A daemon, unlike the engine's other threads, because only this one can hang for ever in foreign code.

    NOTE: Python ends a process that a daemon re-enters late with an abort. So whoever drives a device joins this
    thread, from a thread that is no daemon, unless it is wedged; and one that is wedged does not come back.
    """

    def __init__(self, target: Callable[[], None], *, name: str) -> None:
        super().__init__(target, name=name)
        self.daemon = True


class Device:
    """One thread that runs plans. Everything but the thread's own work happens on the loop; `stop` may be anywhere.

    runner    besides `execute` it may have `prepare()`, which is called before each step and is no part of it, and
              `cancel()`, which ends either of them at once when the device is told to stop
    deliver   gets each result, on the loop, in the order of the plans
    clock     seconds
    """

    def __init__(
        self,
        runner: RunsPlans,
        *,
        name: str,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[StepDone | StepFailed], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner = runner
        self._loop = loop
        self._deliver = deliver
        self._clock = clock
        self._plans: SimpleQueue[StepPlan | None] = SimpleQueue()
        self._results: deque[StepDone | StepFailed] = deque()
        self._running: RunningStep | None = None
        self._last_step = 0
        self._is_stopping = False
        self._lock = threading.Lock()  # over the four below
        self._is_thread_over = False
        self._is_abandoned = False
        self._has_pipe = True
        self._when_over: Callable[[], None] | None = None
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        loop.add_reader(self._reader, self._take_results)
        self._thread = DeviceThread(self._run, name=name)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan."""
        self._plans.put(plan)

    @property
    def running(self) -> RunningStep | None:
        """The step that runs now; None between steps. Any thread."""
        return self._running

    @property
    def runs_since(self) -> float | None:
        """When the step that runs now began, on the device's clock; None between steps. Any thread."""
        running = self._running
        return None if running is None else running.since

    def stop(self, timeout: float | None = None) -> bool:
        """Drop the plans that wait, and return when the step that runs is over. Blocks; idempotent.

        timeout   seconds; None waits for ever
        returns   False if the step still runs: `abandon` is what is left then
        """
        self._end_soon()
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._close_pipe()
        return True

    def abandon(self, when_over: Callable[[], None]) -> None:
        """Give up a step that does not end: returns at once, and the loop hears nothing any more.

        The step goes on in the memory of its model. `when_over` is called if it ends after all, in its thread, or at
        once if it is over already.
        """
        self._end_soon()
        with self._lock:
            self._is_abandoned = True
            self._when_over = when_over
            is_over = self._is_thread_over
        self._stop_listening()
        if is_over:
            self._leave()

    # ---- the device's thread ----

    def _run(self) -> None:
        why = "the device's thread ended"
        try:
            self._run_plans()
        except BaseException as error:  # an asynchronous one, or an error of ours; the host's excepthook is not ours
            why = f"{why}: {type(error).__name__}: {error}"
        finally:
            if not self._is_stopping:  # nobody told it to end
                self._results.append(StepFailed(step=self._last_step, message=why, kind="dead"))
                self._announce()
            with self._lock:
                self._is_thread_over = True
                is_abandoned = self._is_abandoned
            if is_abandoned:
                self._leave()

    def _run_plans(self) -> None:
        """Until told to stop."""
        void = -1  # newest generation in which a step failed
        is_announced = True  # whether the loop knows of every result
        while (plan := self._plans.get()) is not None and not self._is_stopping:
            self._last_step = plan.step
            if plan.generation <= void:
                result: StepDone | StepFailed = StepFailed(
                    step=plan.step, message="a step before it failed", kind="skipped"
                )
            else:
                result = self._execute(plan, None if is_announced else self._writer)
            if isinstance(result, StepFailed):
                void = max(void, plan.generation)
            if self._is_abandoned:
                break
            self._results.append(result)
            is_announced = self._plans.empty() or isinstance(result, StepFailed)
            if is_announced:
                self._announce()

    def _execute(self, plan: StepPlan, wake_fd: int | None) -> StepDone | StepFailed:
        try:
            self._prepare()
            self._running = RunningStep(plan.step, sum(plan.counts), self._clock())
            return self._runner.execute(plan, wake_fd)
        except BaseException as error:  # whatever it is, the engine has to hear of it
            logger.debug("step %d failed", plan.step, exc_info=error)
            return _failed(plan.step, error)
        finally:
            self._running = None

    def _prepare(self) -> None:
        prepare = getattr(self._runner, "prepare", None)
        if prepare is not None:
            prepare()

    def _announce(self) -> None:
        with suppress(BlockingIOError):  # a full pipe will be read
            os.write(self._writer, b"\0")

    def _leave(self) -> None:
        """The end of a thread that nobody waits for."""
        with self._lock:
            when_over, self._when_over = self._when_over, None
        if when_over is not None:
            self._close_pipe()
            when_over()

    # ---- any thread ----

    def _end_soon(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._plans.put(None)
            cancel = getattr(self._runner, "cancel", None)
            if cancel is not None:
                cancel()

    def _stop_listening(self) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._reader)

    def _close_pipe(self) -> None:
        with self._lock:
            has_pipe, self._has_pipe = self._has_pipe, False
            is_abandoned = self._is_abandoned
        if has_pipe:
            if not is_abandoned:  # else the loop was told by who abandoned it, and may be gone
                self._stop_listening()
            os.close(self._reader)
            os.close(self._writer)

    # ---- the loop ----

    def _take_results(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)
        while self._results:
            self._deliver(self._results.popleft())


def _failed(step: int, error: BaseException) -> StepFailed:
    match error:
        case StepRaised():
            return StepFailed(step=step, message=str(error))
        case ExecutorLost():
            return StepFailed(step=step, message=str(error), kind="lost")
        case DeviceDead():
            return StepFailed(step=step, message=str(error), kind="dead")
    # SystemExit and its like say that somebody wants this thread to end: no place to try again.
    kind = "error" if isinstance(error, Exception) else "dead"
    return StepFailed(step=step, message=f"{type(error).__name__}: {error}", kind=kind)
