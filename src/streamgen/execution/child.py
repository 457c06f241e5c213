"""One child process that executes plans: how it is started, spoken to, and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from streamgen.child_process import signal_name, start_python
from streamgen.errors import LoadError
from streamgen.execution.wire import Connection, ToHost

_EXIT_SECONDS = 1.0  # from the end of its socket until it can be asked how it ended


class Child:
    """A child that was just started. Any thread may `kill` it; one at a time may use `connection`.

    is_gone   set by who waits for its end
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = start_python("streamgen.execution.worker", theirs.fileno())
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
        return f"the executor's process was ended by {signal_name(-code)}{hint}"

    def resident_bytes(self) -> int:
        """Bytes of it that are in memory; 0 where the system does not say."""
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            return 0
