"""The compiler's process: compiles strangers' grammars, one after the other, for as long as its host wants it.

Started by `CompileChild` as `python -m streamgen.grammar.child_main FD HOST_PID IDLE_SECONDS`. Compiling may exhaust
time or memory, or end the process: that is what it is for. It has no other way in or out, and ends with its host.
"""

from __future__ import annotations

import math
import os
import resource
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from streamgen.child_process import end_with_host
from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.child_frames import Compile, Compiled, Frames, OtherSideGone, Ready, Refused
from streamgen.grammar.compiler import compile_source

if TYPE_CHECKING:
    from streamgen.grammar.bounds import CompileLimits


def main(arguments: list[str]) -> None:
    """Serve the host on the other side of the descriptor until it goes, or says nothing for a while."""
    fd, host, idle_seconds = int(arguments[0]), int(arguments[1]), float(arguments[2])
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    end_with_host(host, fd)
    with suppress(OtherSideGone, TimeoutError):
        _serve(Frames(sock, Compile), idle_seconds)


def _serve(frames: Frames[Compile], idle_seconds: float) -> None:
    _warm()
    size_at_start = _virtual_bytes()
    frames.send(Ready())
    while True:
        work = frames.receive(idle_seconds)
        _limit(work.limits, size_at_start)
        answer, is_well = _compile(work)
        frames.send(answer)
        if not is_well or _virtual_bytes() - size_at_start > work.limits.max_child_bytes // 2:
            return  # what is left of the limit may be too little for the next one: a new process has all of it


def _warm() -> None:
    """Have the libraries in before memory is limited, and before time is."""
    from streamgen.grammar.source import RegexSource

    compile_source(RegexSource(pattern="a"))
    with suppress(SchemaError):
        compile_source(RegexSource(pattern="a", backend="llguidance"))


def _compile(work: Compile) -> tuple[Compiled | Refused, bool]:
    """The answer, and whether this process is as good as before."""
    try:
        return Compiled(compile_source(work.source, work.limits).dump()), True
    except SchemaTooComplex as error:
        return Refused.of(error), error.bound != "memory"
    except SchemaError as error:
        return Refused.of(error), True
    except (MemoryError, SystemError):  # an extension that got no memory may raise either
        limit = work.limits.max_child_bytes
        return Refused(f"max_child_bytes: compiling took more than {limit:,} bytes", bound="max_child_bytes"), False
    except Exception as error:  # the host has to hear of it
        return Refused(f"output: it could not be compiled: {type(error).__name__}: {error}"[:300]), False


def _limit(limits: CompileLimits, size_at_start: int) -> None:
    """Processor time from here on, and memory; past either the system ends this process, and keeps no image of it."""
    seconds = math.ceil(time.process_time() + limits.max_seconds)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = size_at_start + limits.max_child_bytes
    with suppress(ValueError, OSError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _virtual_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


if __name__ == "__main__":
    main(sys.argv[1:])
