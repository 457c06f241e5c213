"""What happens to requests and steps, as typed events, and the stream in which a host reads them.

The engine writes into a bounded buffer of each subscriber and never waits: who reads too slowly loses the oldest
events, and is told how many. No event holds any text of a prompt or an answer.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Self

import anyio.lowlevel
from msgspec import Struct

from streamgen.completion import FinishReason  # noqa: TC001  # decoding needs the type
from streamgen.config import EngineState  # noqa: TC001  # likewise
from streamgen.mailbox import Notifier, Wakes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from streamgen.mailbox import Waiter

MAX_UNREAD = 4096


class LifecycleEvent(Struct, frozen=True, kw_only=True, tag=True):
    """Base of all. `time` is in seconds on the engine's clock, which is `time.perf_counter()`."""

    time: float


class RequestAdmitted(LifecycleEvent, frozen=True, kw_only=True, tag=True):
    """A request is tokenized and waits for its turn. After a restart, one that goes on is admitted again.

    request_id     as in `Stream.id`
    num_sequences  how many continuations were asked for
    """

    request_id: str
    prompt_tokens: int
    num_sequences: int = 1
    tenant: str = ""
    priority: int = 0


class RequestStarted(LifecycleEvent, frozen=True, kw_only=True, tag=True):
    """A sequence took a slot; after a preemption it does so again.

    index           which continuation of its request it is
    cached_tokens   tokens that need not be computed, since their pages were found
    queue_seconds   since it was submitted
    """

    request_id: str
    index: int = 0
    cached_tokens: int = 0
    queue_seconds: float = 0.0


class FirstToken(LifecycleEvent, frozen=True, kw_only=True, tag=True):
    """A sequence has its first token, `seconds` after it was submitted."""

    request_id: str
    index: int = 0
    seconds: float = 0.0


class RequestPreempted(LifecycleEvent, frozen=True, kw_only=True, tag=True):
    """A sequence lost its slot, to another or because a step failed, and waits again; none of its output is lost."""

    request_id: str
    index: int = 0


class RequestFinished(LifecycleEvent, frozen=True, kw_only=True, tag=True):
    """A sequence ended; its slot and pages are free.

    finish_reason       as in `Completion`
    cause               the same in more detail: "stop" "stopped" (a stop string) "length" "cancelled" "deadline"
                        "queue_deadline" "first_token_deadline" "slow_consumer" "error" "engine_failed" "engine_closed"
    cached_tokens       of the last start
    completion_tokens   tokens drawn; behind a stop string there may be a few that the answer does not show. 0 where the
                        engine itself ended
    seconds             since it was submitted
    """

    request_id: str
    index: int = 0
    finish_reason: FinishReason
    cause: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class StepCompleted(LifecycleEvent, frozen=True, kw_only=True, tag=True):
    """The device ran a step.

    rows       tokens that went through the model
    sequences  how many sequences they belong to
    seconds    the device's time for it
    """

    step: int
    rows: int
    sequences: int
    seconds: float


class StateChanged(LifecycleEvent, frozen=True, kw_only=True, tag=True):
    """The engine is in another state from now on."""

    state: EngineState


AnyLifecycleEvent = (
    RequestAdmitted | RequestStarted | FirstToken | RequestPreempted | RequestFinished | StepCompleted | StateChanged
)


class EventStream:
    """Events from `Engine.subscribe()` on; any number of tasks and threads may read it, each event goes to one of them.

    `async for` on asyncio and trio, `for` in a plain thread. It ends after the engine is closed, or once `close` was
    called. Use it with `async with` or `with`; one that is dropped unsubscribes itself.

    capacity   how many events may be unread; beyond that the oldest are dropped
    """

    def __init__(self, *, capacity: int = MAX_UNREAD) -> None:
        self._notifier = Notifier()
        self._events: deque[AnyLifecycleEvent] = deque(maxlen=capacity)
        self._capacity = capacity
        self._dropped = 0
        self._is_over = False  # nothing more comes; what is there may be read

    @property
    def dropped(self) -> int:
        """How many events were lost because they were not read in time."""
        return self._dropped

    @property
    def is_closed(self) -> bool:
        """Whether nothing more comes."""
        return self._is_over

    # ---- engine ----

    def put(self, events: Sequence[AnyLifecycleEvent], *, is_last: bool = False) -> list[Waiter]:
        """Add events; returns the readers to wake. Nothing comes after the last."""
        with self._notifier.lock:
            if self._is_over:
                return []
            self._dropped += max(0, len(self._events) + len(events) - self._capacity)
            self._events.extend(events)
            self._is_over = is_last
            return self._notifier.take_waiters()

    # ---- host ----

    def close(self) -> None:
        """Unsubscribe. Unread events are gone, and every reader's loop ends. Idempotent, any thread."""
        with self._notifier.lock:
            self._is_over = True
            self._events.clear()
            waiters = self._notifier.take_waiters()
        wakes = Wakes()
        wakes.add(waiters)
        wakes.flush()

    async def aclose(self) -> None:
        """`close`, for code that closes what it iterates over."""
        self.close()
        await anyio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> AnyLifecycleEvent:
        while True:
            await self._notifier.wait(self._has_news)
            event = self._take()
            if event is not None:
                return event
            if self._is_over:
                raise StopAsyncIteration

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AnyLifecycleEvent:
        while True:
            self._notifier.wait_blocking(self._has_news)
            event = self._take()
            if event is not None:
                return event
            if self._is_over:
                raise StopIteration

    def take(self) -> list[AnyLifecycleEvent]:
        """All that is unread, at once; never waits."""
        with self._notifier.lock:
            events = list(self._events)
            self._events.clear()
            return events

    def _take(self) -> AnyLifecycleEvent | None:
        with self._notifier.lock:
            return self._events.popleft() if self._events else None  # another reader may have been quicker

    def _has_news(self) -> bool:
        return bool(self._events) or self._is_over

    def __repr__(self) -> str:
        return f"<EventStream {len(self._events)} unread, {self._dropped} dropped{', closed' if self._is_over else ''}>"
