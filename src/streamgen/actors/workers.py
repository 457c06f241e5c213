"""Threads for what must not run on a loop: the device's steps, rendering and tokenizing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

Done: TypeAlias = Callable[[T | None, BaseException | None], None]
"""Called on the loop with a result or an error."""


class EngineOwnedThread(threading.Thread):
    """A thread of an engine.

    NOTE: not a daemon. Python lets daemons run on while it takes itself down, and a kernel that comes back from a step
    then ends the whole process with an abort. Instead the engine closes itself when `host_has_ended`.
    """

    def __init__(self, target: Callable[[], None], *, name: str) -> None:
        super().__init__(target=target, name=name, daemon=False)


def host_has_ended() -> bool:
    """Whether nothing is left of the host: its main thread is over, and every other one that Python waits for."""
    if threading.main_thread().is_alive():
        return False
    return all(t.daemon or isinstance(t, EngineOwnedThread) or not t.is_alive() for t in threading.enumerate())


class Workers:
    """Threads that run calls in the order they were given, and hand the outcomes to one loop."""

    def __init__(self, count: int, *, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._stopping = False
        self._threads = [EngineOwnedThread(self._run, name=name) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T], done: Done[T]) -> None:
        """Run `call` in a thread, then `done` on the loop."""
        self._calls.put(lambda: self._do(call, done))

    def stop(self) -> None:
        """Drop the calls that wait, and return when the one that runs is over. Blocks; never on a host's loop."""
        self._stopping = True
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if not self._stopping:
                call()
            del call  # a thread that waits must not keep the last request alive

    def _do(self, call: Callable[[], T], done: Done[T]) -> None:
        result, error = None, None
        try:
            result = call()
        except BaseException as e:
            error = e
        try:
            self._loop.call_soon_threadsafe(done, result, error)
        except RuntimeError:  # the loop was closed while the call ran
            return
