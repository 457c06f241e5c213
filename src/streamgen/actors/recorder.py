"""Keeps the last seconds of scheduling for traces, fills the latency histograms, and tells subscribers what happens.

The scheduler calls a `LifeJournal` on the engine thread; everything else may be called from anywhere, and shares one
lock with it. What is kept is plain numbers and names: a few objects a request, one a step, all within fixed bounds.

Events are gathered over a turn of the engine's loop and handed out once at its end, so that a step wakes each host loop
at most once.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, TypeAlias

from streamgen.config import EngineState
from streamgen.latencies import STEP_BOUNDS, WAIT_BOUNDS, Buckets, Latencies
from streamgen.lifecycle import (
    AnyLifecycleEvent,
    EventStream,
    FirstToken,
    RequestAdmitted,
    RequestFinished,
    RequestPreempted,
    RequestStarted,
    StateChanged,
    StepCompleted,
)
from streamgen.mailbox import Wakes
from streamgen.tracefile import Chunk, Phase, SequenceTrace, StepTrace, TraceSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.completion import FinishReason
    from streamgen.messages import Admit
    from streamgen.scheduling.sequence import Rows, Sequence
    from streamgen.scheduling.step import Step

TRACE_SECONDS = 30.0
MAX_STEPS = 16_384  # a step is some hundred bytes
MAX_ENDED = 4_096  # sequences that ended
MAX_PHASES = 256  # of one sequence: only preemptions make them many
MAX_CHUNKS = 1_024

CallSoon: TypeAlias = "Callable[[Callable[[], object]], object]"

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "stopped": "stop",
    "length": "length",
    "cancelled": "cancelled",
    "engine_closed": "cancelled",
    "deadline": "deadline",
    "queue_deadline": "deadline",
    "first_token_deadline": "deadline",
}
_ENDS = {EngineState.FAILED: "engine_failed", EngineState.CLOSED: "engine_closed"}


class _Track:
    """What is kept of a sequence. `phases` and `chunks` hold tuples that the garbage collector need not look at."""

    __slots__ = (
        "arrival",
        "cached_tokens",
        "chunks",
        "first_token",
        "index",
        "name",
        "num_outputs",
        "num_prompt",
        "phases",
    )

    def __init__(self, name: str, index: int, *, arrival: float, num_prompt: int, now: float) -> None:
        self.name = name
        self.index = index
        self.arrival = arrival
        self.num_prompt = num_prompt
        self.cached_tokens = 0
        self.num_outputs = 0
        self.first_token: float | None = None
        self.phases: deque[tuple[float, str]] = deque([(now, "queued")], MAX_PHASES)
        self.chunks: deque[tuple[float, float, int, int]] = deque(maxlen=MAX_CHUNKS)

    @property
    def end(self) -> float:
        """When the last phase began: of a sequence that ended, its end."""
        return self.phases[-1][0]

    def enter(self, now: float, phase: str) -> None:
        """Another phase begins; that of the end is named by its cause."""
        self.phases.append((now, phase))

    def finished(self, cause: str) -> RequestFinished:
        """The event of its end."""
        return RequestFinished(
            time=self.end,
            request_id=self.name,
            index=self.index,
            finish_reason=_REASONS.get(cause, "error"),
            cause=cause,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.num_outputs,
            seconds=self.end - self.arrival,
        )

    def trace(self) -> SequenceTrace:
        """A copy, for a trace."""
        return SequenceTrace(
            name=self.name,
            index=self.index,
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.num_outputs,
            first_token=self.first_token,
            phases=tuple([Phase(time, name) for time, name in self.phases]),
            chunks=tuple([Chunk(*chunk) for chunk in self.chunks]),
        )


class Recorder:
    """All that is remembered of an engine, over all its lives.

    clock    the engine's, in seconds
    seconds  how far back traces reach; 0 keeps nothing for them
    """

    def __init__(self, *, clock: Callable[[], float], seconds: float = TRACE_SECONDS) -> None:
        self._clock = clock
        self._seconds = seconds
        # NOTE: reentrant, since a garbage collection inside it may end an engine, which comes back here.
        self._lock = threading.RLock()
        self._streams: tuple[weakref.ref[EventStream], ...] = ()
        self._pending: list[AnyLifecycleEvent] = []
        self._steps: deque[tuple[int, float, float, int, int]] = deque(maxlen=MAX_STEPS)
        self._ended: deque[_Track] = deque(maxlen=MAX_ENDED)
        self._tracks: dict[int, _Track] = {}
        self._prefilling: dict[int, _Track] = {}  # all that wait for the end of a chunk, and some that lost their slot
        self._queue, self._first_token, self._per_token = (Buckets(WAIT_BOUNDS) for _ in range(3))
        self._step = Buckets(STEP_BOUNDS)

    # ---- any thread ----

    def subscribe(self) -> EventStream:
        """Everything that happens from now on. The stream is forgotten when nobody refers to it any more."""
        stream = EventStream()
        with self._lock:
            self._streams = (*(ref for ref in self._streams if _is_open(ref())), weakref.ref(stream))
        return stream

    def snapshot(self) -> TraceSnapshot:
        """What is kept, without what is too old."""
        with self._lock:
            now = self._clock()
            steps, ended = list(self._steps), list(self._ended)
            running = [track.trace() for track in self._tracks.values()]
        since = now - self._seconds
        return TraceSnapshot(
            time=now,
            since=since,
            steps=tuple([StepTrace(*step) for step in steps if step[2] >= since]),
            sequences=(*(track.trace() for track in ended if track.end >= since), *running),
        )

    def latencies(self) -> Latencies:
        """Histograms since the recorder was made; never blocks."""
        return Latencies(
            queue=self._queue.histogram(),
            first_token=self._first_token.histogram(),
            per_token=self._per_token.histogram(),
            step=self._step.histogram(),
        )

    def state_changed(self, state: EngineState) -> None:
        """The engine is in another state. Failing and closing end every sequence; closing ends every subscription."""
        with self._lock:
            now = self._clock()
            cause = _ENDS.get(state)
            if cause is not None:
                events = [self._end(key, now, cause) for key in tuple(self._tracks)]
                self._pending += [event for event in events if event is not None]
            if self._streams:
                self._pending.append(StateChanged(time=now, state=state))
            wakes = self._deliver(is_last=state is EngineState.CLOSED)
        wakes.flush()

    # ---- engine thread ----

    def attach(self, name_of: Callable[[int], str], *, call_soon: CallSoon | None = None) -> LifeJournal:
        """The journal of one life of the engine.

        name_of     request number -> the id that the host knows it by
        call_soon   runs a call after this turn of the loop; None: the running loop's, and without a loop at once
        """
        if call_soon is None:
            try:
                call_soon = asyncio.get_running_loop().call_soon
            except RuntimeError:
                call_soon = _at_once
        with self._lock:
            self._tracks.clear()
            self._prefilling.clear()
        return LifeJournal(self, name_of, call_soon)

    def hand_out(self) -> None:
        """Give subscribers the events of this turn."""
        with self._lock:
            wakes = self._deliver()
        wakes.flush()

    def _deliver(self, *, is_last: bool = False) -> Wakes:
        """Put what is pending where it is read; who is to be woken."""
        events, self._pending = self._pending, []
        wakes = Wakes()
        for stream in [stream for ref in self._streams if (stream := ref()) is not None]:
            wakes.add(stream.put(events, is_last=is_last))
        self._streams = tuple([ref for ref in self._streams if _is_open(ref())])
        return wakes

    def _keep_step(self, step: tuple[int, float, float, int, int]) -> None:
        self._steps.append(step)
        while self._steps[0][2] < step[2] - self._seconds:
            self._steps.popleft()

    def _end(self, key: int, now: float, cause: str) -> RequestFinished | None:
        """A sequence ended: keep its track for a while. The event of it, where somebody listens."""
        track = self._tracks.pop(key)
        self._prefilling.pop(key, None)
        track.enter(now, cause)
        if track.first_token is not None and track.num_outputs > 1:
            self._per_token.add((now - track.first_token) / (track.num_outputs - 1))
        if self._seconds:
            self._ended.append(track)
            while self._ended[0].end < now - self._seconds:
                self._ended.popleft()
        return track.finished(cause) if self._streams else None


class LifeJournal:
    """Implements `scheduling.journal.Journal` for one life of an engine; the engine thread alone calls it."""

    def __init__(
        self,
        recorder: Recorder,
        name_of: Callable[[int], str],
        call_soon: CallSoon,
    ) -> None:
        self._recorder = recorder
        self._name_of = name_of
        self._call_soon = call_soon
        self._is_due = False  # whether the events of this turn will be handed out
        # Used at every call, hence without the way over the recorder.
        self._clock = recorder._clock
        self._lock = recorder._lock
        self._tracks = recorder._tracks
        self._prefilling = recorder._prefilling

    def admitted(self, request: Admit) -> None:
        """A request waits from now on."""
        recorder, name = self._recorder, self._name_of(request.request_id)
        with self._lock:
            now = self._clock()
            for index in range(request.num_sequences):
                self._tracks[request.request_id << 8 | index] = _Track(
                    name, index, arrival=request.arrival, num_prompt=len(request.prompt_ids), now=now
                )
            if recorder._streams:
                self._tell(
                    RequestAdmitted(
                        time=now,
                        request_id=name,
                        prompt_tokens=len(request.prompt_ids),
                        num_sequences=request.num_sequences,
                        tenant=request.tenant,
                        priority=request.priority,
                    )
                )

    def started(self, sequence: Sequence) -> None:
        """A sequence took a slot."""
        key = _key(sequence)
        with self._lock:
            track = self._tracks.get(key)
            if track is None:
                return
            now = self._clock()
            waited = now - track.arrival
            if len(track.phases) == 1:
                self._recorder._queue.add(waited)
            track.cached_tokens = sequence.cached_tokens
            track.enter(now, "prefill")
            self._prefilling[key] = track
            if self._recorder._streams:
                event = RequestStarted(
                    time=now,
                    request_id=track.name,
                    index=track.index,
                    cached_tokens=track.cached_tokens,
                    queue_seconds=waited,
                )
                self._tell(event)

    def planned(self, step: Step) -> None:
        """Nothing is kept of a step before its results are there."""

    def completed(self, step: Step, seconds: float) -> None:
        """A step's results came."""
        recorder, all_rows = self._recorder, step.rows
        num_rows = sum([rows.count for rows in all_rows])
        with self._lock:
            now = self._clock()
            if self._prefilling:
                self._note_chunks(all_rows, now - seconds, now)
            recorder._step.add(seconds)
            if recorder._seconds:
                recorder._keep_step((step.number, now - seconds, now, num_rows, len(all_rows)))
            if recorder._streams:
                event = StepCompleted(
                    time=now, step=step.number, rows=num_rows, sequences=len(all_rows), seconds=seconds
                )
                self._tell(event)

    def _note_chunks(self, all_rows: list[Rows], start: float, end: float) -> None:
        for rows in all_rows:
            key = _key(rows.sequence)
            track = self._prefilling.get(key)
            if track is None or rows.run != rows.sequence.run:
                continue  # it decodes, or the rows are of a run that was preempted
            track.chunks.append((start, end, rows.start, rows.count))
            if rows.samples:
                track.enter(end, "decode")
                del self._prefilling[key]

    def first_token(self, sequence: Sequence) -> None:
        """A sequence has its first output token."""
        with self._lock:
            track = self._tracks.get(_key(sequence))
            if track is None or track.first_token is not None:
                return
            track.first_token = now = self._clock()
            self._recorder._first_token.add(now - track.arrival)
            if self._recorder._streams:
                self._tell(FirstToken(time=now, request_id=track.name, index=track.index, seconds=now - track.arrival))

    def preempted(self, sequence: Sequence) -> None:
        """A sequence lost its slot and waits again."""
        with self._lock:
            track = self._tracks.get(_key(sequence))
            if track is None:
                return
            now = self._clock()
            track.enter(now, "queued")
            if self._recorder._streams:
                self._tell(RequestPreempted(time=now, request_id=track.name, index=track.index))

    def finished(self, sequence: Sequence, reason: str) -> None:
        """A sequence ended."""
        key = _key(sequence)
        with self._lock:
            track = self._tracks.get(key)
            if track is None:
                return
            track.num_outputs = sequence.num_outputs
            event = self._recorder._end(key, self._clock(), reason)
            if event is not None:
                self._tell(event)

    def _tell(self, event: AnyLifecycleEvent) -> None:
        """Hand the event out at the end of this turn. Called with the lock held, where somebody listens."""
        self._recorder._pending.append(event)
        if not self._is_due:
            self._is_due = True
            self._call_soon(self._hand_out)

    def _hand_out(self) -> None:
        self._is_due = False
        self._recorder.hand_out()


def _key(sequence: Sequence) -> int:
    return sequence.request.request_id << 8 | sequence.index


def _is_open(stream: EventStream | None) -> bool:
    return stream is not None and not stream.is_closed


def _at_once(call: Callable[[], object]) -> None:
    call()
