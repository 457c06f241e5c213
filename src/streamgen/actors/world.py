"""What an engine takes from outside: time, randomness, threads and its loop; tests put another world in place.

Nothing else in `actors/` and `scheduling/` asks the system for any of it, so a run under a virtual world is the same
every time.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Protocol, TypeVar

from streamgen.actors.device import Device
from streamgen.actors.watchdog import MIN_DEADLINE
from streamgen.actors.workers import Workers

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from streamgen.actors.device import RunningStep
    from streamgen.actors.model import RunsPlans
    from streamgen.actors.workers import Done
    from streamgen.messages import StepDone, StepFailed, StepPlan

T = TypeVar("T")


class RunsCalls(Protocol):
    """Runs blocking calls off the loop: `Workers`."""

    def submit(self, call: Callable[[], T], done: Done[T]) -> None:
        """Run `call`, then `done` on the loop."""
        ...

    def stop(self) -> None:
        """Drop what waits; return when what runs is over."""
        ...


class RunsSteps(Protocol):
    """Runs plans in order: `Device`."""

    @property
    def running(self) -> RunningStep | None:
        """The step that runs now."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan."""
        ...

    def stop(self) -> bool:
        """Drop what waits; return when the step that runs is over."""
        ...

    def abandon(self, when_over: Callable[[], None]) -> None:
        """Give up a step that does not end. `when_over` is called if it ends after all, in its thread."""
        ...


class World(Protocol):
    """Everything that an engine needs and does not make itself.

    min_step_deadline   seconds that a step may take in any case; see `watchdog.py`
    """

    min_step_deadline: float

    def clock(self) -> float:
        """Seconds, monotonic; any thread."""
        ...

    def random_bytes(self, count: int) -> bytes:
        """Bytes that nobody can guess."""
        ...

    def loop_factory(self) -> asyncio.AbstractEventLoop:
        """The loop of an engine thread."""
        ...

    def make_workers(self, count: int, *, name: str, loop: asyncio.AbstractEventLoop) -> RunsCalls:
        """Threads for rendering and tokenizing."""
        ...

    def make_device(
        self,
        runner: RunsPlans,
        *,
        name: str,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[StepDone | StepFailed], None],
    ) -> RunsSteps:
        """The thread of a device."""
        ...


class RealWorld:
    """The system's clock, randomness and threads."""

    min_step_deadline = MIN_DEADLINE

    def clock(self) -> float:
        """Seconds since some moment, monotonic."""
        return time.perf_counter()

    def random_bytes(self, count: int) -> bytes:
        """From the system."""
        return os.urandom(count)

    def loop_factory(self) -> asyncio.AbstractEventLoop:
        """A plain selector loop, whatever the host's policy is: the engine adds readers, and needs no subprocesses."""
        import asyncio

        return asyncio.SelectorEventLoop()

    def make_workers(self, count: int, *, name: str, loop: asyncio.AbstractEventLoop) -> RunsCalls:
        """Threads of the engine."""
        return Workers(count, name=name, loop=loop)

    def make_device(
        self,
        runner: RunsPlans,
        *,
        name: str,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[StepDone | StepFailed], None],
    ) -> RunsSteps:
        """A thread of the engine."""
        return Device(runner, name=name, loop=loop, deliver=deliver)
