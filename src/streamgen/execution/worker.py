"""The executor's process: loads the weights and runs plans that come over a socket, for as long as its host lives.

Started by `RemoteRunner` as `python -m streamgen.execution.worker FD HOST_PID`. It has no other way in or out, and it
ends within milliseconds when the host does, whatever it is doing then.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from streamgen.child_process import end_with_host
from streamgen.errors import StreamgenError
from streamgen.execution.model import load_runner
from streamgen.execution.remote_grammars import GrammarReceiver
from streamgen.execution.wire import (
    AddGrammar,
    Connection,
    ConnectionEnded,
    DropGrammar,
    DropPages,
    Dropped,
    Load,
    Loaded,
    LoadFailed,
    Loading,
    SetVocabulary,
    StepError,
    ToChild,
)
from streamgen.messages import StepPlan

if TYPE_CHECKING:
    from streamgen.config import LoadProgress
    from streamgen.execution.runner import Runner
    from streamgen.messages import StepDone

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; other systems have no such call, or refuse it

PROGRESS_BYTES = 1 << 24  # a word to the host for every so many


def main(arguments: list[str]) -> None:
    """Serve the host on the other side of the descriptor until it goes."""
    fd, host = int(arguments[0]), int(arguments[1])
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    _die_with_host()
    end_with_host(host, fd)
    connection: Connection[ToChild] = Connection(sock, ToChild)
    try:
        _serve(connection)
    except ConnectionEnded:
        return


def _die_with_host() -> None:
    """On Linux the system ends this process with the thread that started it, even while it is stopped.

    NOTE: that thread, the runner's keeper, lives until this process has ended, or with its own.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _serve(connection: Connection[ToChild]) -> None:
    load = connection.receive()
    assert isinstance(load, Load), f"expected Load, got {type(load).__name__}"
    grammars = GrammarReceiver()
    try:
        runner = load_runner(
            load.options, load.plan, _Reporter(connection).report, lambda: False, grammars=grammars.table
        )
    except BaseException as error:
        connection.send(_load_failed(error))
        return
    connection.send(Loaded())
    while True:
        message = connection.receive()
        if isinstance(message, StepPlan):
            connection.send(_run(runner, message))
        elif isinstance(message, DropPages):
            runner.sleep(keep_weights=True)
            connection.send(Dropped())
        elif isinstance(message, SetVocabulary | AddGrammar | DropGrammar):
            grammars.take(message)


def _run(runner: Runner, plan: StepPlan) -> StepDone | StepError:
    try:
        return runner.execute(plan)
    except Exception as error:  # the host has to hear of it; anything worse ends the process, which it hears too
        return StepError(message=f"{type(error).__name__}: {error}")


def _load_failed(error: BaseException) -> LoadFailed:
    if isinstance(error, StreamgenError):
        return LoadFailed(code=error.code, message=error.message)
    return LoadFailed(code="load_error", message=f"{type(error).__name__}: {error}")


class _Reporter:
    """Tells the host how far loading is, now and then: tensors may be small and many."""

    def __init__(self, connection: Connection[ToChild]) -> None:
        self._connection = connection
        self._told = -PROGRESS_BYTES

    def report(self, progress: LoadProgress) -> None:
        if progress.done - self._told >= PROGRESS_BYTES or progress.done == progress.total:
            self._told = progress.done
            self._connection.send(Loading(progress=progress))


if __name__ == "__main__":
    main(sys.argv[1:])
