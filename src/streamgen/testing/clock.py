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


class VirtualClock:
    """Time that passes only by `advance`. Any thread may move it and wait for it.

    An engine that was given one runs its work at once; only what is about time waits: timeouts of requests, delays of
    scripted replies, `idle_sleep`.
    """

    def __init__(self, now: float = 0.0) -> None:
        self._now = now
        self.num_sleeping = 0  # devices that wait for a scripted delay to pass
        self._changed = threading.Condition()
        self._loops: weakref.WeakSet[_VirtualLoop] = weakref.WeakSet()

    def __call__(self) -> float:
        """Seconds since some moment."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass: what is due by then happens, in the engine's own thread, soon after.

        Raises:
            ValueError: time does not run backwards.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds: expected >= 0, got {seconds}")
        with self._changed:
            self._now += seconds
            self._changed.notify_all()
        for loop in tuple(self._loops):
            loop.look()

    def sleep(self, seconds: float, *, given_up: Callable[[], bool]) -> None:
        """Block until so much time has passed, or `given_up` after `wake`."""
        with self._changed:
            end = self._now + seconds
            self.num_sleeping += 1
            self._changed.wait_for(lambda: self._now >= end or given_up())
            self.num_sleeping -= 1

    def wake(self) -> None:
        """Let those that sleep look whether they are given up."""
        with self._changed:
            self._changed.notify_all()

    def add(self, loop: _VirtualLoop) -> None:
        """A loop that goes by this clock."""
        self._loops.add(loop)


class _Selector(selectors.DefaultSelector):
    """Waits for files, never for time: that stands still."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            timeout = LOOK_SECONDS
        return super().select(timeout)


class _VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time is that of a VirtualClock. Once its host has gone, real time is added: it has to end."""

    def __init__(self, clock: VirtualClock) -> None:
        self._virtual = clock
        self._host_ended: float | None = None
        super().__init__(_Selector())
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
