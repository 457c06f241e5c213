"""Processes of an engine's own: how one is started with nothing of its host's state, and how it ends with its host."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Never

if TYPE_CHECKING:
    from collections.abc import Mapping


def start_python(
    module: str, fd: int, *arguments: str, stderr: int | None = None, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Run `python -m module FD HOST_PID ARGUMENTS`: a new interpreter rather than a fork, so no threads half copied.

    fd         the child's end of a socket pair
    stderr     as of `Popen`; None is the host's
    variables  of the environment, beside the host's

    Raises:
        OSError: it cannot be started.
    """
    if not sys.executable:
        raise OSError("sys.executable is empty: the host is no Python interpreter that could be started again")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, str(fd), str(os.getpid()), *arguments],  # -P: not the working directory
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=(fd,),
        start_new_session=True,  # a terminal's Ctrl-C is for the host
        env={**os.environ, "PYTHONPATH": _path(), **(variables or {})},
    )


def end_with_host(host: int, fd: int) -> None:
    """From now on this process ends when its host does, whatever it is doing then. Returns at once."""
    threading.Thread(target=_end_with, args=(host, fd), name="lifeline", daemon=True).start()


def signal_name(number: int) -> str:
    """SIGKILL ...; "signal N" for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _path() -> str:
    """A path on which the child finds what the host found, in the same order."""
    package = str(Path(__file__).resolve().parents[1])
    path = [str(Path(entry).resolve()) for entry in sys.path if entry]
    if package not in path:
        path.append(package)
    return os.pathsep.join(path)


def _end_with(host: int, fd: int) -> Never:
    """Wait until the host is gone, then end: with no clean-up, as what runs may take minutes.

    Its process is watched besides the socket, since a fork of the host may hold the other end open.
    """
    poll = select.poll()
    poll.register(fd, getattr(select, "POLLRDHUP", 0))  # a hang-up is told in any case
    with suppress(AttributeError, OSError):  # no such call, or the host is gone: then so is its end of the socket
        poll.register(os.pidfd_open(host), select.POLLIN)
    if os.getppid() == host:
        poll.poll()
    os._exit(0)
