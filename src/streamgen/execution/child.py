"""One child process that executes plans: how it is started, spoken to, and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from streamgen.errors import LoadError
from streamgen.execution.wire import Connection, ToHost

if TYPE_CHECKING:
    from collections.abc import Mapping

_EXIT_SECONDS = 1.0  # from the end of its socket until it can be asked how it ended


class Child:
    """A child that was just started. Any thread may `kill` it; one at a time may use `connection`.

    is_gone   set by who waits for its end
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = _start(theirs.fileno())
        except OSError as error:
            ours.close()
            raise LoadError(f"isolation: the executor's process cannot be started: {error}") from error
        finally:
            theirs.close()
        self.connection: Connection[ToHost] = Connection(ours, ToHost)
        self.is_gone = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait(self) -> None:
        """Until it has ended. Blocks without the interpreter."""
        self._process.wait()

    def kill(self) -> None:
        """End it, whatever it does; it has nothing to save."""
        self._process.kill()

    def how_it_ended(self) -> str:
        """Words for people; waits a moment for a child that is ending."""
        try:
            code = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return "the executor's process hung up"
        if code >= 0:
            return f"the executor's process ended with status {code}"
        hint = " (the system does that when it runs out of memory)" if -code == signal.SIGKILL else ""
        return f"the executor's process was ended by {_signal_name(-code)}{hint}"

    def resident_bytes(self) -> int:
        """Bytes of it that are in memory; 0 where the system does not say."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            return 0


def _start(fd: int) -> subprocess.Popen[bytes]:
    """A new interpreter rather than a fork: nothing of the host's state, no threads half copied, no `__main__`.

    -P   keeps the host's working directory out of its path
    """
    if not sys.executable:
        raise OSError("sys.executable is empty: the host is no Python interpreter that could be started again")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "streamgen.execution.worker", str(fd), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(fd,),
        start_new_session=True,  # a terminal's Ctrl-C is for the host
        env=_environment(os.environ),
    )


def _environment(host: Mapping[str, str]) -> dict[str, str]:
    """The host's, with a path on which the child finds what the host found, in the same order."""
    package = str(Path(__file__).resolve().parents[2])
    path = [str(Path(entry).resolve()) for entry in sys.path if entry]
    if package not in path:
        path.append(package)
    return {**host, "PYTHONPATH": os.pathsep.join(path)}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
