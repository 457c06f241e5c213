"""Traces of scheduling as files: Chrome's trace event format, which Perfetto opens, and a picture of one as SVG.

A trace has two processes. "device" has one row of steps and a counter of their rows; "sequences" has one row for each
sequence, in the order in which they came: what it waited for, was computed in and drew tokens in, one phase after the
other, with the chunks of its prompt inside "prefill". Times are in microseconds since the beginning of the trace.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator

TraceEvent: TypeAlias = dict[str, Any]

DEVICE, SEQUENCES = 1, 2  # process ids
PHASES = ("queued", "prefill", "decode")


class Phase(Struct, frozen=True):
    """What a sequence does from `time` on: one of PHASES, or the cause of its end."""

    time: float
    name: str


class Chunk(Struct, frozen=True):
    """Rows of a prompt that ran in one step: `rows` of them from `position` on."""

    start: float
    end: float
    position: int
    rows: int


class SequenceTrace(Struct, frozen=True, kw_only=True):
    """A sequence. Phases follow each other without a gap; the last of one that ended is the cause.

    name           its request's id; index: which continuation it is
    first_token    when it had one, or None
    completion_tokens   0 as long as it runs
    """

    name: str
    index: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token: float | None
    phases: tuple[Phase, ...]
    chunks: tuple[Chunk, ...]

    @property
    def label(self) -> str:
        """Its name, and its index where that is needed to tell it from others."""
        return f"{self.name} [{self.index}]" if self.index else self.name


class StepTrace(Struct, frozen=True):
    """A step that the device ran."""

    number: int
    start: float
    end: float
    rows: int
    sequences: int


class TraceSnapshot(Struct, frozen=True, kw_only=True):
    """The last seconds of scheduling; times are in seconds on the engine's clock.

    time    when it was taken; since: what ended before is left out
    """

    time: float
    since: float
    steps: tuple[StepTrace, ...]
    sequences: tuple[SequenceTrace, ...]


def write_trace(path: str | Path, snapshot: TraceSnapshot) -> None:
    """Write a snapshot as Chrome trace JSON. The file is replaced at once, so no reader sees half of it.

    Raises:
        OSError: it cannot be written; a file that was there before is as it was.
    """
    trace = {
        "traceEvents": list(trace_events(snapshot)),
        "displayTimeUnit": "ms",
        "otherData": {"producer": "streamgen"},
    }
    _replace(Path(path), msgspec.json.encode(trace))


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def trace_events(snapshot: TraceSnapshot) -> Iterator[TraceEvent]:
    """The events of a snapshot, ready for JSON."""
    base = min(
        [snapshot.time]
        + [step.start for step in snapshot.steps]
        + [max(sequence.phases[0].time, snapshot.since) for sequence in snapshot.sequences]
    )
    yield _metadata("process_name", DEVICE, name="device")
    yield _metadata("process_sort_index", DEVICE, sort_index=DEVICE)
    yield _metadata("process_name", SEQUENCES, name="sequences")
    yield _metadata("process_sort_index", SEQUENCES, sort_index=SEQUENCES)
    yield _metadata("thread_name", DEVICE, tid=1, name="steps")
    yield from _step_events(snapshot.steps, base)
    for tid, sequence in enumerate(sorted(snapshot.sequences, key=lambda s: s.phases[0].time), start=1):
        yield _metadata("thread_name", SEQUENCES, tid=tid, name=sequence.label)
        yield _metadata("thread_sort_index", SEQUENCES, tid=tid, sort_index=tid)
        yield from _sequence_events(sequence, tid, base, snapshot.time)


def _metadata(what: str, pid: int, *, tid: int = 0, **args: str | int) -> TraceEvent:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _slice(name: str, pid: int, tid: int, start: float, end: float, base: float, **args: str | int) -> TraceEvent:
    ts = _micros(start, base)
    return {"ph": "X", "name": name, "cat": "streamgen", "pid": pid, "tid": tid, "ts": ts, "args": args} | {
        "dur": round(max(0.0, _micros(end, base) - ts), 3)
    }


def _instant(name: str, tid: int, time: float, base: float, **args: str | int) -> TraceEvent:
    ts = _micros(time, base)
    return {"ph": "i", "s": "t", "name": name, "cat": "streamgen", "pid": SEQUENCES, "tid": tid, "ts": ts, "args": args}


def _micros(time: float, base: float) -> float:
    return round(max(0.0, time - base) * 1e6, 3)


def _step_events(steps: tuple[StepTrace, ...], base: float) -> Iterator[TraceEvent]:
    last = base
    for step in steps:
        # A step's end is when its results came, which may be late; slices of one row may not overlap.
        start = min(max(step.start, last), step.end)
        last = step.end
        args = {"step": step.number, "rows": step.rows, "sequences": step.sequences}
        yield _slice("step", DEVICE, 1, start, step.end, base, **args)
        counts = {"rows": step.rows, "sequences": step.sequences}
        yield {"ph": "C", "name": "batch", "pid": DEVICE, "tid": 1, "ts": _micros(start, base), "args": counts}


def _sequence_events(sequence: SequenceTrace, tid: int, base: float, now: float) -> Iterator[TraceEvent]:
    phases = sequence.phases
    if phases[-1].name in PHASES:
        phases = (*phases, Phase(now, "still running"))
    args = {"prompt_tokens": sequence.prompt_tokens, "cached_tokens": sequence.cached_tokens}
    for i, (phase, following) in enumerate(pairwise(phases)):
        if phase.name == "queued" and i and phase.time >= base:
            yield _instant("preempted", tid, phase.time, base)
        if following.time < base:
            continue
        yield _slice(phase.name, SEQUENCES, tid, phase.time, following.time, base, **args)
        if phase.name == "prefill":
            yield from _chunk_events(sequence.chunks, tid, base, (phase.time, following.time))
    if sequence.first_token is not None and sequence.first_token >= base:
        yield _instant("first token", tid, sequence.first_token, base)
    if phases[-1].name != "still running":
        yield _instant(
            "finished", tid, phases[-1].time, base, cause=phases[-1].name, completion_tokens=sequence.completion_tokens
        )


def _chunk_events(
    chunks: tuple[Chunk, ...], tid: int, base: float, within: tuple[float, float]
) -> Iterator[TraceEvent]:
    last, end = within
    for chunk in chunks:
        if within[0] <= chunk.end <= end and chunk.end >= base:
            start = min(max(chunk.start, last), chunk.end)
            last = chunk.end
            args = {"position": chunk.position, "rows": chunk.rows}
            yield _slice(f"chunk of {chunk.rows}", SEQUENCES, tid, start, chunk.end, base, **args)
