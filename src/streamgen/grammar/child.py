"""The host's side of the compiler's process: where grammars of strangers are compiled.

A thread can neither be stopped nor survive what ends its process, so what a stranger wrote is compiled in another one,
with limits of the system on time and memory. It is started when the first such grammar comes, and ends when none has
come for a while.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
from typing import TYPE_CHECKING

from streamgen.child_process import signal_name, start_python
from streamgen.errors import EngineClosed, SchemaError, SchemaTooComplex
from streamgen.grammar.bounds import DEFAULT_LIMITS
from streamgen.grammar.child_frames import Compile, Compiled, Frames, FromChild, OtherSideGone, Refused
from streamgen.grammar.compiler import load_grammar

if TYPE_CHECKING:
    from streamgen.grammar.bounds import CompileLimits
    from streamgen.grammar.grammar import Grammar
    from streamgen.grammar.source import GrammarSource

IDLE_SECONDS = 60.0
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_START_SECONDS = 60.0  # of a slow disk and a busy machine; usually one
_EXIT_SECONDS = 5.0


class CompileChild:
    """A compiler in a process of its own. Any thread may call; one grammar is compiled at a time.

    limits         that each grammar is held to
    idle_seconds   without work after which the process ends
    """

    def __init__(self, limits: CompileLimits = DEFAULT_LIMITS, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._limits = limits
        self._idle_seconds = idle_seconds
        self._turn = threading.Lock()
        self._process: _Process | None = None
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """The process id, while there is a process."""
        process = self._process
        return None if process is None else process.pid

    def compile(self, source: GrammarSource) -> Grammar:
        """Compile it there. Blocks, without the interpreter.

        Raises:
            SchemaError: it is no grammar. SchemaTooComplex: it passes a limit. EngineClosed: `close` was called.
        """
        with self._turn:
            answer = self._answer(source)
        if isinstance(answer, Refused):
            raise answer.error()
        assert isinstance(answer, Compiled), f"expected a grammar, got {type(answer).__name__}"
        return load_grammar(answer.dump)

    def close(self) -> None:
        """End the process, and with an error whatever is compiled there. Idempotent."""
        self._is_closed = True
        process = self._process
        if process is not None:
            process.kill()
        with self._turn:
            self._end()

    def _answer(self, source: GrammarSource) -> FromChild:
        process = self._process
        if process is not None:
            try:
                return self._ask(process, source)
            except _EndedIdle:
                pass
        try:
            return self._ask(self._start(), source)
        except _EndedIdle as error:
            raise SchemaError("output: the compiler's process ended before it answered") from error

    def _start(self) -> _Process:
        if self._is_closed:
            raise EngineClosed("the engine is closed")
        process = self._process = _Process(self._idle_seconds)
        try:
            process.frames.receive(_START_SECONDS)
        except (OtherSideGone, TimeoutError) as error:
            raise self._failed_to_start(error) from error
        return process

    def _failed_to_start(self, error: Exception) -> Exception:
        ending = self._end()
        if self._is_closed:
            return EngineClosed("the engine is closed")
        return SchemaError(f"output: the compiler's process did not start: {ending}, {error}")

    def _ask(self, process: _Process, source: GrammarSource) -> FromChild:
        try:
            process.frames.send(Compile(source, self._limits))
            return process.frames.receive(self._limits.max_seconds)
        except TimeoutError as error:
            self._end()
            raise self._too_slow() from error
        except OtherSideGone as error:
            raise self._ended(self._end()) from error

    def _ended(self, status: int) -> Exception:
        if self._is_closed:
            return EngineClosed("the engine is closed")
        if status == 0:
            return _EndedIdle()
        if -status == getattr(signal, "SIGXCPU", None):
            return self._too_slow()
        limit = self._limits.max_child_bytes
        return SchemaTooComplex(
            f"max_child_bytes: compiling ended its process ({_words(status)}), most likely since it took more than "
            f"{limit:,} bytes; make the grammar smaller",
            bound="max_child_bytes",
        )

    def _too_slow(self) -> SchemaTooComplex:
        if self._is_closed:
            raise EngineClosed("the engine is closed")
        limit = self._limits.max_seconds
        return SchemaTooComplex(
            f"max_seconds: expected a grammar that compiles in {limit:g} seconds; make it smaller", bound="max_seconds"
        )

    def _end(self) -> int:
        """End the process, if there is one; how it did, 0 if it had ended by itself and well."""
        process, self._process = self._process, None
        return 0 if process is None else process.end()


class _EndedIdle(Exception):
    """The process had ended in peace before it was asked."""


class _Process:
    def __init__(self, idle_seconds: float) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = start_python(
                "streamgen.grammar.child_main",
                theirs.fileno(),
                str(idle_seconds),
                stderr=subprocess.DEVNULL,  # where libraries write before they end their process
                variables=_ONE_THREAD,
            )
        except OSError as error:
            ours.close()
            raise SchemaError(f"output: the compiler's process cannot be started: {error}") from error
        finally:
            theirs.close()
        self.frames: Frames[FromChild] = Frames(ours, FromChild)

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """Whatever it does; it has nothing to save."""
        self._process.kill()

    def end(self) -> int:
        """Its exit status. It had better be ending already: it is killed if it is not."""
        self.frames.close()
        try:
            return self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait(_EXIT_SECONDS)


def _words(status: int) -> str:
    return f"status {status}" if status >= 0 else signal_name(-status)
