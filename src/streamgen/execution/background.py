"""Work that is waited for, or given up: a function in a thread of its own, beside what loads a model."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from streamgen.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_POLL_SECONDS = 0.02


class LoadCancelled(LoadError):
    """Opening was given up by who asked for it."""

    code = "load_cancelled"


def check_cancelled(is_cancelled: Callable[[], bool]) -> None:
    """Raise LoadCancelled where it says so."""
    if is_cancelled():
        raise LoadCancelled("opening the model was cancelled")


class Background(Generic[T]):
    """Runs one function in a thread of its own, at once.

    daemon   for what may take for ever, as a download. Anything else is not: a daemon that is inside native code when
             the interpreter goes away aborts the process
    """

    def __init__(self, function: Callable[[], T], *, daemon: bool) -> None:
        self._function = function
        self._outcome: T | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streamgen-loading", daemon=daemon)
        self._thread.start()

    def join(self) -> None:
        """Wait until it is over, whatever came of it."""
        self._thread.join()

    def result(self, is_cancelled: Callable[[], bool]) -> T:
        """What the function returned; raises what it raised.

        Raises:
            LoadCancelled: `is_cancelled` said so; the thread goes on by itself.
        """
        while not self._done.wait(_POLL_SECONDS):
            check_cancelled(is_cancelled)
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome  # type: ignore[return-value]  # set where there is no error

    def _run(self) -> None:
        try:
            self._outcome = self._function()
        except BaseException as error:  # re-raised by result
            self._error = error
        finally:
            self._done.set()
            del self._function  # it holds the checkpoint
