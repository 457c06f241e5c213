"""A clock that stands still until a test moves it, for an engine's timeouts, delays and queues."""

from __future__ import annotations

import asyncio
import math
import os
import selectors
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from streamgen.actors.device import Device
from streamgen.actors.workers import Workers, host_has_ended

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamgen.actors.model import RunsPlans
    from streamgen.messages import StepDone, StepFailed

LOOK_SECONDS = 0.25  # of real time, after which a loop that waits looks whether its host has gone
GRACE_SECONDS = 0.001  # of real time, in which a host may answer what it heard before an automatic clock goes on


class VirtualClock:
    """Time that passes when a test says so. Any thread may move it and wait for it.

    An engine that was given one runs its work at once; only what is about time waits: timeouts of requests, delays of
    scripted replies, `idle_sleep`.

    auto    time also passes by itself: while a scripted delay holds the model up, and nothing else is to be done, it
            jumps to the next moment at which something is due. For tests that ask how it ends, not what was when
    """

    def __init__(self, now: float = 0.0, *, auto: bool = False) -> None:
        self._now = now
        self.is_auto = auto
        self._changed = threading.Condition()
        self._ends: list[float] = []  # of those that sleep
        self._loops: weakref.WeakSet[_VirtualLoop] = weakref.WeakSet()
        self._next: dict[_Selector, float] = {}  # when loops that have nothing to do have something to do

    def __call__(self) -> float:
        """Seconds since some moment."""
        return self._now

    @property
    def num_sleeping(self) -> int:
        """How many devices wait for a scripted delay to pass."""
        return len(self._ends)

    def advance(self, seconds: float) -> None:
        """Let time pass: what is due by then happens, in the engine's own thread, soon after.

        Raises:
            ValueError: time does not run backwards.
        """
        if not 0 <= seconds < math.inf:
            raise ValueError(f"seconds: expected >= 0 and finite, got {seconds}")
        with self._changed:
            self._move_to(self._now + seconds)
        self._look()

    def sleep_until(self, end: float, *, given_up: Callable[[], bool]) -> None:
        """Block until then, or until `given_up` after `wake`."""
        with self._changed:
            self._ends.append(end)
        if self.is_auto:
            self._look()  # a loop may have waited for this
        with self._changed:
            self._changed.wait_for(lambda: self._now >= end or given_up())
            self._ends.remove(end)

    def wake(self) -> None:
        """Let those that sleep look whether they are given up."""
        with self._changed:
            self._changed.notify_all()

    def add(self, loop: _VirtualLoop) -> None:
        """A loop that goes by this clock."""
        with self._changed:
            self._loops.add(loop)

    def remove(self, loop: _VirtualLoop, selector: _Selector) -> None:
        """A loop is closed."""
        with self._changed:
            self._loops.discard(loop)
            self._next.pop(selector, None)

    def is_busy(self, selector: _Selector) -> None:
        """A loop has something to do."""
        with self._changed:
            self._next.pop(selector, None)

    def jump(self, selector: _Selector, timeout: float | None) -> bool:
        """A loop has nothing to do for so long: go on to what comes next, if the same is true of every other loop."""
        with self._changed:
            self._next[selector] = math.inf if timeout is None else self._now + timeout
            target = min([*self._next.values(), *self._ends])
            is_idle = len(self._next) >= len(self._loops)
            # Who should have woken by now is about to; and where nothing sleeps, nothing waits for time.
            if not is_idle or not self._ends or min(self._ends) <= self._now or target == math.inf:
                return False
            self._move_to(target)
        self._look()
        return True

    def _move_to(self, now: float) -> None:
        self._now = now
        self._next.clear()
        self._changed.notify_all()

    def _look(self) -> None:
        for loop in tuple(self._loops):
            loop.look()


class RealClock:
    """Time as it is, with what a VirtualClock offers to a scripted model."""

    def __init__(self) -> None:
        self._changed = threading.Condition()

    def __call__(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter()

    def sleep_until(self, end: float, *, given_up: Callable[[], bool]) -> None:
        """Block until then, or until `given_up` after `wake`."""
        with self._changed:
            while not given_up() and (left := end - self()) > 0:
                self._changed.wait(min(left, threading.TIMEOUT_MAX))

    def wake(self) -> None:
        """Let those that sleep look whether they are given up."""
        with self._changed:
            self._changed.notify_all()


class _Selector(selectors.DefaultSelector):
    """Waits for files, never for time: that is the clock's."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._clock.is_busy(self)
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        if self._clock.is_auto:
            ready = super().select(GRACE_SECONDS)
            if ready or self._clock.jump(self, timeout):
                return ready
        return super().select(LOOK_SECONDS)


class _VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time is that of a VirtualClock. Once its host has gone, real time is added: it has to end."""

    def __init__(self, clock: VirtualClock) -> None:
        self._virtual = clock
        self._host_ended: float | None = None
        self._files = _Selector(clock)
        super().__init__(self._files)
        clock.add(self)

    def time(self) -> float:
        """Virtual seconds."""
        if self._host_ended is None and host_has_ended():
            self._host_ended = time.monotonic()
        return self._virtual() + (0.0 if self._host_ended is None else time.monotonic() - self._host_ended)

    def look(self) -> None:
        """Time has passed; any thread."""
        try:
            self.call_soon_threadsafe(lambda: None)
        except RuntimeError:
            return  # closed

    def close(self) -> None:
        """Close, and no longer hold the clock up."""
        self._virtual.remove(self, self._files)
        super().close()


class VirtualWorld:
    """The world of an engine that goes by a VirtualClock; its threads are real."""

    min_step_deadline = math.inf  # a scripted delay is no hang

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def clock(self) -> float:
        """Virtual seconds."""
        return self._clock()

    def random_bytes(self, count: int) -> bytes:
        """From the system."""
        return os.urandom(count)

    def loop_factory(self) -> asyncio.AbstractEventLoop:
        """A loop that goes by the clock."""
        return _VirtualLoop(self._clock)

    def make_workers(self, count: int, *, name: str, loop: asyncio.AbstractEventLoop) -> Workers:
        """Threads for rendering and tokenizing."""
        return Workers(count, name=name, loop=loop)

    def make_device(
        self,
        runner: RunsPlans,
        *,
        name: str,
        loop: asyncio.AbstractEventLoop,
        deliver: Callable[[StepDone | StepFailed], None],
    ) -> Device:
        """The thread of the device."""
        return Device(runner, name=name, loop=loop, deliver=deliver, clock=self._clock)


def world_options(clock: VirtualClock | None) -> Mapping[str, Any]:
    """How an engine is told to go by a clock."""
    return {} if clock is None else {"_world": VirtualWorld(clock)}
