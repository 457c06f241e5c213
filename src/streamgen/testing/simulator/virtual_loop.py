"""An asyncio loop in virtual time: when nothing is ready, its clock jumps to the next timer, and tasks that are ready
together run in an order that a seed shuffles. Plain calls keep theirs, as asyncio promises. So a program with timeouts
of minutes runs in milliseconds, and the same way each time.

NOTE: this leans on private parts of asyncio: `BaseEventLoop._ready`, `_scheduled`, `_run_once` and `_clock_resolution`,
and `Handle._callback`. They have been the same for years; each loop asks `check_private_parts` about this Python.

Nothing may come from outside the loop's own thread: a thread that is waited for would take real time, and its turn
would be chance. A loop that waits for nothing that could ever happen raises `Deadlock` instead of hanging.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import threading
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


CLOCK_RESOLUTION = 1e-9
MAX_TURNS = 50_000  # of the loop, in one moment


class Deadlock(RuntimeError):
    """Every task waits, and no timer will ever wake one; or they keep each other busy and time stands still."""


class _JumpingSelector(selectors.DefaultSelector):
    """Looks for files, and instead of waiting lets the loop's time jump."""

    def __init__(self) -> None:
        super().__init__()
        self.jump: Callable[[float | None], None] = lambda seconds: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found and (timeout is None or timeout > 0):
            self.jump(timeout)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time is virtual. `seed=None` keeps asyncio's own order.

    seed   shuffles the tasks that are ready together
    """

    def __init__(self, seed: int | None = None) -> None:
        self._virtual_now = 0.0
        self._num_turns = 0  # since time passed
        self._random = None if seed is None else Random(seed)
        self._own_thread = threading.get_ident()
        selector = _JumpingSelector()
        selector.jump = self._jump
        super().__init__(selector)
        # A timer is due when it is as near as the clock can tell; jumps are exact, so it may be very near.
        self._clock_resolution = CLOCK_RESOLUTION
        check_private_parts(self)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._virtual_now

    def _jump(self, seconds: float | None) -> None:
        if seconds is None:
            raise Deadlock("nothing is ready, and no timer is set: the program waits for what cannot come")
        # From the timer itself, not from the difference, which is rounded.
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]  # see NOTE
        self._num_turns = 0
        self._virtual_now = now = max(self._virtual_now, scheduled[0].when())
        self._clock_resolution = max(CLOCK_RESOLUTION, 2 * math.ulp(now))

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]  # all of them
        """As usual from the loop's own thread, without a wake-up; other threads must not call it.

        Raises:
            RuntimeError: from another thread.
        """
        if threading.get_ident() != self._own_thread:
            raise RuntimeError("a VirtualLoop takes calls of its own thread only: others would come by chance")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]  # likewise
        """Threads take real time.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a VirtualLoop has no threads: run the call at once, or after a virtual delay")

    def _run_once(self) -> None:
        self._num_turns += 1
        if self._num_turns > MAX_TURNS:
            self._num_turns = 0
            raise Deadlock(f"the loop turned {MAX_TURNS} times and no time passed: tasks keep each other busy")
        if self._random is not None:
            self._shuffle(self._random)
        super()._run_once()  # type: ignore[misc]  # see NOTE

    def _shuffle(self, random: Random) -> None:
        """Tasks that are ready change places with each other."""
        ready: deque[asyncio.Handle] = self._ready  # type: ignore[attr-defined]  # see NOTE
        if len(ready) < 2:
            return
        handles = list(ready)
        places = [i for i, handle in enumerate(handles) if _is_of_task(handle)]
        moved = [handles[i] for i in places]
        random.shuffle(moved)
        for i, handle in zip(places, moved, strict=True):
            ready[i] = handle


def _is_of_task(handle: asyncio.Handle) -> bool:
    callback = handle._callback  # type: ignore[attr-defined]  # see NOTE
    return isinstance(getattr(callback, "__self__", None), asyncio.Task)


def check_private_parts(loop: asyncio.AbstractEventLoop) -> None:
    """Whether this Python's asyncio has what a VirtualLoop leans on.

    Raises:
        RuntimeError: it has not; the text says what is missing.
    """
    ready, scheduled = getattr(loop, "_ready", None), getattr(loop, "_scheduled", None)
    missing = [
        name
        for name, is_there in (
            ("_ready", isinstance(ready, deque)),
            ("_scheduled", isinstance(scheduled, list)),
            ("_run_once", callable(getattr(loop, "_run_once", None))),
            ("_clock_resolution", hasattr(loop, "_clock_resolution")),
            ("Handle._callback", "_callback" in asyncio.Handle.__slots__),
        )
        if not is_there
    ]
    if missing:
        raise RuntimeError(f"asyncio's loop has no {', '.join(missing)} in this Python: VirtualLoop has to be adapted")
