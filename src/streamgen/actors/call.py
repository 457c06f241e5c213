"""A call that another thread of the engine makes for a host: its outcome, waited for on any loop or thread."""

from __future__ import annotations

from typing import Generic, TypeVar

from streamgen.mailbox import Signal

T = TypeVar("T")


class Call(Generic[T]):
    """What a host waits for; `done` is set when `result` can be had."""

    def __init__(self) -> None:
        self.done = Signal()
        self._result: T | None = None
        self._error: BaseException | None = None

    def finish(self, result: T | None, error: BaseException | None) -> None:
        """The outcome; only the first one counts."""
        if not self.done.is_set():
            self._result, self._error = result, error
            self.done.set()

    def result(self) -> T:
        """What the call returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # set by finish
