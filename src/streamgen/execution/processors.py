"""Logits processors: functions of the host that change a row of logits before a token is drawn from it.

They run between the head and the sampler: a processor sees the model's own logits, and what it leaves goes through
bias, bans, grammar mask, penalties, temperature and the truncations. Log-probabilities stay those of the model's own.
If a processor leaves only tokens that a later rule bans (`min_tokens` bans what ends a text), the lowest id that is not
banned is drawn.

They are strangers in the device thread's step, so they run in a thread of their own, on private copies, with a limit on
time. A thread that is stuck in one is left to itself: whatever it writes later is read by nobody.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamgen.backends.base import Float32Array, Int32Array

PROCESSOR_SECONDS = 0.25  # for all rows that one request has in a step
MAX_STUCK = 16  # threads that may be stuck in processors before no more are started
_CLOSE_SECONDS = 1.0


class ProcessorRow(Struct):
    """One row for processors. ids int32 [length] and logits float32 [vocab] are copies of its own."""

    ids: Int32Array
    logits: Float32Array


class ProcessorFault(Exception):
    """A processor failed; the message is for the host, and holds nothing of an exception's text."""


class ProcessorThread:
    """Runs processors in one daemon thread, replaced when it is stuck. Used by one thread, the runner's.

    seconds   how long the processors of one request may take in one step
    """

    def __init__(self, seconds: float = PROCESSOR_SECONDS) -> None:
        self._seconds = seconds
        self._worker: _Worker | None = None
        self._stuck: list[_Worker] = []

    def run(
        self, functions: Sequence[Callable[..., object]], rows: Sequence[ProcessorRow]
    ) -> list[Float32Array | ProcessorFault]:
        """Per row, the logits that its processors left, or why there are none. Blocks for `seconds` at most."""
        self._stuck = [worker for worker in self._stuck if worker.is_alive]
        if len(self._stuck) >= MAX_STUCK:
            fault = ProcessorFault(f"processors: {MAX_STUCK} earlier calls have not returned yet; none is started")
            return [fault] * len(rows)
        if self._worker is None:
            self._worker = _Worker()
        job = _Job(functions, rows)
        self._worker.submit(job)
        if not job.done.wait(self._seconds):
            self._abandon(job)
        results = list(job.results[: len(rows)])
        late = ProcessorFault(f"processors: took longer than {self._seconds:g} s")
        return results + [late] * (len(rows) - len(results))

    def close(self) -> None:
        """End the thread; one that is stuck ends when its processor returns. Idempotent."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()
            worker.join(_CLOSE_SECONDS)

    def __del__(self) -> None:
        worker: _Worker | None = getattr(self, "_worker", None)
        if worker is not None:
            worker.stop()

    def _abandon(self, job: _Job) -> None:
        assert self._worker is not None
        job.is_given_up = True
        self._worker.stop()
        self._stuck.append(self._worker)
        self._worker = None


class _Job:
    """One request's rows; `results` grows row by row, and is only read after `done`, or once it was given up."""

    def __init__(self, functions: Sequence[Callable[..., object]], rows: Sequence[ProcessorRow]) -> None:
        self.functions = functions
        self.rows = rows
        self.results: list[Float32Array | ProcessorFault] = []
        self.done = threading.Event()
        self.is_given_up = False

    def run(self) -> None:
        for row in self.rows:
            if self.is_given_up:
                return
            try:
                self.results.append(_apply_all(self.functions, row))
            except ProcessorFault as fault:
                self.results.append(fault.with_traceback(None))
        self.done.set()


class _Worker:
    """A daemon: a processor that never returns must not keep the process alive."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="streamgen-processors", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: _Job) -> None:
        self._jobs.put(job)

    def stop(self) -> None:
        self._jobs.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # else the host's functions would live until the next one


def _apply_all(functions: Sequence[Callable[..., object]], row: ProcessorRow) -> Float32Array:
    logits = row.logits
    for number, function in enumerate(functions):
        try:
            result = function(row.ids, logits)
        except BaseException as error:  # of the host's code: only its kind is told, the text may hold anything
            raise ProcessorFault(f"processors[{number}]: raised {type(error).__name__[:80]}") from None
        logits = _checked(logits if result is None else result, number, row.logits.shape)
    return logits


def _checked(result: object, number: int, shape: tuple[int, ...]) -> Float32Array:
    """A private, writable copy of what a processor returned, or the array it changed in place."""
    wanted = f"processors[{number}]: expected None or a float32 array of shape {shape}, got"
    if not isinstance(result, np.ndarray):
        raise ProcessorFault(f"{wanted} {type(result).__name__[:80]}")
    if result.dtype != np.float32 or result.shape != shape:
        raise ProcessorFault(f"{wanted} {result.dtype} of shape {result.shape}")
    logits: Float32Array = np.array(result, np.float32)
    highest = logits.max()  # NaN if any is
    if np.isnan(highest):
        raise ProcessorFault(f"processors[{number}]: expected numbers as logits, got NaN")
    if highest == -np.inf:
        raise ProcessorFault(f"processors[{number}]: expected a logit above -inf, got none: no token is left")
    return logits
