"""Where the engine thread leaves what a request produced, and how its reader, on whatever loop or thread, is woken.

The engine thread writes, a host reads. What is unread merges, so a slow reader stalls nobody and holds at most its own
request's output. Hosts are woken through their own loop: all readers that a step concerns, on one loop, by one post.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import anyio
from msgspec import Struct

from streamgen import errors
from streamgen.completion import (
    Completion,
    Delta,
    FinishReason,
    Part,
    PartsLog,
    Text,
    Timings,
    TokenLogprob,
    Usage,
)
from streamgen.errors import StreamgenError

if TYPE_CHECKING:
    import asyncio

Post: TypeAlias = Callable[..., object]
"""Runs a call on a host's loop: `loop.call_soon_threadsafe` or `token.run_sync_soon`. Equal for the same loop."""

_ERRORS: dict[str, type[StreamgenError]] = {
    cls.code: cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, StreamgenError) and cls is not errors.RequestError
}


def current_post() -> Post:
    """How to reach the loop that runs this code."""
    trio = _current_trio()
    if trio is not None:
        post: Post = trio.lowlevel.current_trio_token().run_sync_soon
        return post
    import asyncio

    return asyncio.get_running_loop().call_soon_threadsafe


def _current_trio() -> Any:
    """The module, where a task of its runs this code."""
    trio: Any = sys.modules.get("trio")
    # NOTE: looked for before asyncio. As a guest it runs inside another loop, which asyncio would then find.
    return trio if trio is not None and trio.lowlevel.in_trio_task() else None


class WakeEvent(Protocol):
    """Set once, on the loop or by the thread that it belongs to."""

    def set(self) -> object:
        """Wake who waits."""
        ...


class Waiter:
    """One reader that waits: a task of a loop (`post` reaches it), or a plain thread (`post` is None)."""

    __slots__ = ("event", "post")

    def __init__(self, post: Post | None, event: WakeEvent) -> None:
        self.post = post
        self.event = event


class _LoopEvent:
    """An event of asyncio for one task: anyio's costs several times as much, and each delta needs one."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        import asyncio

        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def set(self) -> None:
        if not self._future.done():  # it is where the task was cancelled
            self._future.set_result(None)

    async def wait(self) -> None:
        await self._future


def _make_event() -> _LoopEvent:
    """For the current task of asyncio or trio to wait for."""
    trio = _current_trio()
    event: _LoopEvent = _LoopEvent() if trio is None else trio.Event()
    return event


class Wakes:
    """Readers to wake, gathered over a step: `flush` makes one post for each host loop."""

    def __init__(self) -> None:
        self._by_loop: dict[Post, list[Waiter]] = {}

    def add(self, waiters: list[Waiter]) -> None:
        """Wake these at the next flush; plain threads at once."""
        for waiter in waiters:
            if waiter.post is None:
                waiter.event.set()
            else:
                self._by_loop.setdefault(waiter.post, []).append(waiter)

    def flush(self) -> None:
        """Post to every loop."""
        if not self._by_loop:
            return
        for post, waiters in self._by_loop.items():
            try:
                post(_set_all, waiters)
            except RuntimeError:  # trio's RunFinishedError is one as well
                continue  # the loop has ended, and with it every task that waited there
        self._by_loop.clear()


def _set_all(waiters: list[Waiter]) -> None:
    for waiter in waiters:
        waiter.event.set()


class Notifier:
    """A lock, and the readers that wait for what it guards to change."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._waiters: list[Waiter] = []

    def take_waiters(self) -> list[Waiter]:
        """Everybody who waits, to be woken. Call with the lock held."""
        waiters, self._waiters = self._waiters, []
        return waiters

    async def wait(self, is_ready: Callable[[], bool]) -> None:
        """Return once `is_ready()`, called with the lock held; a checkpoint in any case."""
        waited = False
        while True:
            with self.lock:
                if is_ready():
                    break
                event = _make_event()
                waiter = Waiter(current_post(), event)
                self._waiters.append(waiter)
            waited = True
            try:
                await event.wait()
            finally:
                self._forget(waiter)
        if not waited:
            await anyio.lowlevel.checkpoint()

    def wait_blocking(self, is_ready: Callable[[], bool], timeout: float | None = None) -> bool:
        """The same for a plain thread; False if the time passed first."""
        deadline = _Deadline(timeout)
        while True:
            with self.lock:
                if is_ready():
                    return True
                event = threading.Event()
                waiter = Waiter(None, event)
                self._waiters.append(waiter)
            try:
                if not event.wait(deadline.left()):
                    return False
            finally:
                self._forget(waiter)

    def _forget(self, waiter: Waiter) -> None:
        with self.lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)


class _Deadline:
    """What is left of a timeout over several waits."""

    def __init__(self, timeout: float | None) -> None:
        import time

        self._clock = time.monotonic
        self._end = None if timeout is None else self._clock() + timeout

    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - self._clock())


class Signal:
    """Set once, by any thread; waited for on asyncio, trio or a plain thread."""

    def __init__(self) -> None:
        self._notifier = Notifier()
        self._is_set = False

    def is_set(self) -> bool:
        """Whether it was set."""
        return self._is_set

    def set(self) -> None:
        """Wake everybody, now and later."""
        with self._notifier.lock:
            self._is_set = True
            waiters = self._notifier.take_waiters()
        wakes = Wakes()
        wakes.add(waiters)
        wakes.flush()

    async def wait(self) -> None:
        """Wait as a task."""
        await self._notifier.wait(self.is_set)

    def wait_blocking(self, timeout: float | None = None) -> bool:
        """Wait as a thread; False if the time passed first."""
        return self._notifier.wait_blocking(self.is_set, timeout)


class End(Struct, frozen=True, kw_only=True):
    """How a sequence ended. `code` is an error's, None where it ended well."""

    finish_reason: FinishReason
    stop: str | int | None = None
    code: str | None = None
    message: str = ""
    details: dict[str, str | int | float | None] = {}


class Mailbox:
    """The output of one sequence: written by the engine thread, read by one host.

    NOTE: `cancel` of a dropped stream may run in a garbage collection inside any of these critical sections, so it must
    never take a mailbox's lock; it reads `end`, no more.
    """

    def __init__(self, request_id: str, *, clock: Callable[[], float]) -> None:
        self.request_id = request_id
        self.end: End | None = None
        self._notifier = Notifier()
        self._clock = clock
        self._created = clock()
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._read = (0, 0, 0)  # how much of texts, ids, logprobs the reader has
        self._taken_text = ""
        self._parts: PartsLog | None = None
        self._is_open = False
        self._is_started = False
        self._is_paused = False
        self._is_collected = False
        self._on_caught_up: Callable[[], None] = _nothing
        self._wants_logprobs = False
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self._prompt_ids: tuple[int, ...] = ()
        self._cached_tokens = 0
        self._drafts = (0, 0)
        self._tokenized: float | None = None
        self._first_token: float | None = None
        self._finished: float | None = None

    # ---- engine thread ----

    def open(self, *, prompt_ids: tuple[int, ...], wants_logprobs: bool) -> list[Waiter]:
        """The prompt was tokenized and the request is on its way to the scheduler."""
        with self._notifier.lock:
            self._is_open = True
            self._prompt_ids, self._wants_logprobs = prompt_ids, wants_logprobs
            self._tokenized = self._clock() - self._created
            return self._notifier.take_waiters()

    def start(self, *, cached_tokens: int) -> list[Waiter]:
        """The first step that works on it has run."""
        with self._notifier.lock:
            self._is_started, self._cached_tokens = True, cached_tokens
            return self._notifier.take_waiters()

    def put(
        self,
        text: str,
        ids: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        parts: Sequence[Part] = (),
        num_reasoning: int = 0,
    ) -> list[Waiter]:
        """Add output.

        parts   where they are told apart: all of it in order, with `text` among them
        num_reasoning   tokens that were reasoning
        """
        with self._notifier.lock:
            if self.end is not None:
                return []  # closing gave it its terminal while a step was under way
            if parts or num_reasoning:
                self._parts = self._parts or PartsLog()
                self._parts.put(parts, num_reasoning)
            if text:
                self._texts.append(text)
            if ids:
                self._ids += ids
                if self._first_token is None:
                    self._first_token = self._clock() - self._created
            self._logprobs += logprobs
            return self._notifier.take_waiters()

    def pause(self, max_unread: int) -> bool:
        """Whether the reader is more than `max_unread` tokens behind; it is told when it has caught up.

        A reader that waits for the end is never behind.
        """
        with self._notifier.lock:
            if self._is_collected or self._is_paused or self.end is not None or self._num_unread <= max_unread:
                return False
            self._is_paused = True
            return True

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """What drafting has come to, before the end."""
        self._drafts = drafted, accepted

    def finish(self, end: End, prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None) -> list[Waiter]:
        """The one terminal event; later ones are ignored."""
        with self._notifier.lock:
            if self.end is not None:
                return []
            self._finished = self._clock() - self._created
            self._prompt_logprobs = prompt_logprobs
            self._on_caught_up = _nothing  # it refers to the request, which refers to this
            self.end = end
            return self._notifier.take_waiters()

    # ---- host ----

    def when_caught_up(self, call: Callable[[], None]) -> None:
        """What a reader calls once it has read all after a `pause`. Set before the request is posted."""
        self._on_caught_up = call

    def collect(self) -> None:
        """From now on nobody reads piece by piece: the output may grow to its end, and no reader is behind."""
        with self._notifier.lock:
            self._is_collected = True
            was_paused, self._is_paused = self._is_paused, False
        if was_paused:
            self._on_caught_up()

    async def wait_open(self) -> None:
        """Until the request was tokenized, or refused."""
        await self._notifier.wait(self._opened_or_ended)

    async def wait_started(self) -> None:
        """Until a step has run on it, or it ended."""
        await self._notifier.wait(self._started_or_ended)

    async def wait_output(self) -> None:
        """Until there is something to take, or it ended."""
        await self._notifier.wait(self._has_output)

    async def wait_end(self) -> None:
        """Until it ended."""
        await self._notifier.wait(self._has_ended)

    def wait_open_blocking(self) -> None:
        """`wait_open` for a plain thread."""
        self._notifier.wait_blocking(self._opened_or_ended)

    def wait_started_blocking(self) -> None:
        """`wait_started` for a plain thread."""
        self._notifier.wait_blocking(self._started_or_ended)

    def wait_output_blocking(self) -> None:
        """`wait_output` for a plain thread."""
        self._notifier.wait_blocking(self._has_output)

    def wait_end_blocking(self) -> None:
        """`wait_end` for a plain thread."""
        self._notifier.wait_blocking(self._has_ended)

    def take(self) -> Delta | None:
        """Everything unread as one delta; None if there is nothing."""
        with self._notifier.lock:
            if not self._has_unread():
                return None
            texts, ids, logprobs = self._read
            self._read = (len(self._texts), len(self._ids), len(self._logprobs))
            was_paused, self._is_paused = self._is_paused, False
            text = self._taken_text = "".join(self._texts[texts:])
            reasoning, tool_calls = ("", ()) if self._parts is None else self._parts.take()
            delta = Delta(
                text=text,
                ids=tuple(self._ids[ids:]),
                logprobs=tuple(self._logprobs[logprobs:]),
                reasoning=reasoning,
                tool_calls=tool_calls,
            )
        if was_paused:
            self._on_caught_up()
        return delta

    def taken_parts(self) -> Sequence[Part]:
        """What the last `take` took, in order, without ids. Call it where `take` was called."""
        with self._notifier.lock:
            if self._parts is not None:
                return self._parts.taken()
            return (Text(text=self._taken_text),) if self._taken_text else ()

    def completion(self) -> Completion[Any]:
        """What there is, whole or partial."""
        with self._notifier.lock:
            end = self.end
            return Completion(
                id=self.request_id,
                text="".join(self._texts),
                ids=tuple(self._ids),
                reasoning="" if self._parts is None else self._parts.reasoning(),
                tool_calls=() if self._parts is None else self._parts.tool_calls(),
                finish_reason=None if end is None else end.finish_reason,
                stop=None if end is None else end.stop,
                usage=self.usage,
                timings=Timings(tokenized=self._tokenized, first_token=self._first_token, finished=self._finished),
                logprobs=tuple(self._logprobs) if self._wants_logprobs else None,
                prompt_logprobs=self._prompt_logprobs,
            )

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=len(self._prompt_ids),
            cached_tokens=self._cached_tokens,
            completion_tokens=len(self._ids),
            reasoning_tokens=0 if self._parts is None else self._parts.num_reasoning,
            drafted_tokens=self._drafts[0],
            accepted_tokens=self._drafts[1],
        )

    @property
    def is_started(self) -> bool:
        """Whether a step has worked on it."""
        return self._is_started

    @property
    def has_tokens(self) -> bool:
        """Whether it has any output."""
        return bool(self._ids)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The ids that ran; empty until they are known."""
        return self._prompt_ids

    def raise_error(self) -> None:
        """Raise what ended the request, if it was an error. Each call makes a fresh exception."""
        end = self.end
        if end is not None and end.code is not None:
            raise make_error(end, request_id=self.request_id, partial=self.completion())

    @property
    def _num_unread(self) -> int:
        return len(self._ids) - self._read[1]

    def _has_unread(self) -> bool:
        texts, ids, logprobs = self._read
        if texts < len(self._texts) or ids < len(self._ids) or logprobs < len(self._logprobs):
            return True
        return self._parts is not None and self._parts.has_unread

    def _has_output(self) -> bool:
        return self.end is not None or self._has_unread()

    def _has_ended(self) -> bool:
        return self.end is not None

    def _opened_or_ended(self) -> bool:
        return self._is_open or self.end is not None

    def _started_or_ended(self) -> bool:
        return self._is_started or self.end is not None


def _nothing() -> None:
    """Default of `Mailbox.when_caught_up`."""


def make_error(end: End, *, request_id: str, partial: Completion[Any] | None) -> StreamgenError:
    """The exception of an end with a code."""
    cls = _ERRORS.get(end.code or "", StreamgenError)
    return cls(end.message or cls.code.replace("_", " "), request_id=request_id, partial=partial, **end.details)
