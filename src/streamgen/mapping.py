"""Many prompts through one engine: `Engine.map`, which takes from a source as fast as its results are read.

The iterator itself owns its requests and keeps the books on them (`MapBase`). There is no task for each of them: their
mailboxes announce their end to the iterator, and that is all it waits for.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Self, TypeAlias, TypeVar

import anyio
from msgspec import Struct

from streamgen.completion import Completion  # noqa: TC001  # decoding needs the type
from streamgen.errors import (
    EngineClosed,
    EngineFailed,
    EngineOverloaded,
    GenerationError,
    InvalidRequest,
    RateLimited,
    StreamgenError,
)
from streamgen.mailbox import Mailbox, Notifier, Waiter, Wakes, make_error
from streamgen.prompt import user
from streamgen.request import check_request
from streamgen.values import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from streamgen.completion import TokenLogprob
    from streamgen.engine_base import EngineBase
    from streamgen.mailbox import End
    from streamgen.prompt import Prompt
    from streamgen.request import Submission

T = TypeVar("T")

DEFAULT_RETRY = 0.1  # seconds, where an engine that is full names none


class Ok(Struct, Generic[T], frozen=True):
    """The answer to the source's item `index`, counted from 0."""

    index: int
    completion: Completion[T]


class Err(Struct, frozen=True):
    """What the source's item `index` failed with: the error that `generate` would have raised."""

    index: int
    error: StreamgenError


Result: TypeAlias = Ok[T] | Err
"""What `Engine.map` yields, one for each item of its source."""


class _Arrivals:
    """Requests of one map that ended, in order. The engine thread adds; the iterator takes."""

    def __init__(self) -> None:
        self.notifier = Notifier()
        self.count = 0
        self._ended: deque[_Letter] = deque()

    def __len__(self) -> int:
        return len(self._ended)

    def add(self, letter: _Letter) -> list[Waiter]:
        """One more has ended; who is to be woken for it."""
        with self.notifier.lock:
            self.count += 1
            self._ended.append(letter)
            return self.notifier.take_waiters()

    def take(self) -> list[_Letter]:
        """All that ended since the last call."""
        with self.notifier.lock:
            letters, self._ended = list(self._ended), deque()
            return letters

    def wake(self) -> None:
        """Have everybody who waits look again."""
        with self.notifier.lock:
            waiters = self.notifier.take_waiters()
        wakes = Wakes()
        wakes.add(waiters)
        wakes.flush()


class _Letter(Mailbox):
    """The mailbox of one item's request. The iterator does not wait at it: its end comes to the arrivals."""

    def __init__(self, index: int, submission: Submission, arrivals: _Arrivals, *, clock: Callable[[], float]) -> None:
        super().__init__(submission.id, clock=clock)
        self.index = index
        self._outcome = Outcome(submission.output)
        self._arrivals = arrivals

    def finish(self, end: End, prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None) -> list[Waiter]:
        """The one terminal event, announced."""
        if self.end is not None:
            return []
        waiters = super().finish(end, prompt_logprobs)
        return [*waiters, *self._arrivals.add(self)]

    def result(self) -> Result[Any]:
        """What the request came to; it has ended."""
        assert self.end is not None, "a result of a request that runs"
        completion = self.completion()
        if self.end.code is not None:
            return Err(self.index, make_error(self.end, request_id=self.request_id, partial=completion))
        try:
            return Ok(self.index, self._outcome.check(completion))
        except GenerationError as error:
            return Err(self.index, error)


class MapBase(Generic[T]):
    """The books of one map: what was taken from the source, what runs, what is there to read.

    At most `concurrency` requests are open. Up to as many results may lie unread before the source is asked again, so
    never more than twice `concurrency` items are taken and not delivered.
    """

    def __init__(
        self,
        engine: EngineBase,
        source: object,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        fields: Mapping[str, Any],
    ) -> None:
        _check_fields(fields)
        self._source = source
        self._iterator: Any = None
        thread = engine._open_thread()
        thread.check_ready()
        self._engine = engine
        self._limit = thread.model.plan.max_running if concurrency is None else _check_concurrency(concurrency)
        self._ordered = ordered
        self._fields = dict(fields)
        self._arrivals = _Arrivals()
        self._open: dict[int, Submission] = {}  # submitted, and not known to have ended
        self._ready: dict[int, Result[T]] = {}  # in the order in which they ended
        self._pending: tuple[int, Submission] | None = None  # what the engine had no place for
        self._retry_after = DEFAULT_RETRY
        self._num_ended = 0  # when the engine was last asked
        self._num_taken = 0
        self._next_out = 0  # of an ordered map: the index to deliver
        self._is_exhausted = False
        self._is_closed = False
        self._error: BaseException | None = None  # raised once all is delivered

    @property
    def num_open(self) -> int:
        """How many requests run or wait in the engine."""
        return len(self._open) - len(self._arrivals)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else f"{self.num_open} open"
        return f"<{type(self).__module__}.{type(self).__name__} {state}, {self._num_taken} taken>"

    def __del__(self) -> None:
        submissions: dict[int, Submission] = getattr(self, "_open", {})  # absent if the arguments were refused
        if any(submission.is_running for submission in submissions.values()):
            self._cancel_all()
            warnings.warn(
                f"{self!r} was dropped while it ran, and cancelled; use `with` or `async with`, or read it to its end",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    # ---- what came back ----

    def _collect(self) -> None:
        for letter in self._arrivals.take():
            if self._open.pop(letter.index, None) is not None:
                self._settle(letter.result())

    def _settle(self, result: Result[T]) -> None:
        if self._is_closed:
            return
        self._ready[result.index] = result
        if isinstance(result, Err) and isinstance(result.error, EngineFailed | EngineClosed):
            self._end_source(result.error)  # it would hit all that follows

    def _end_source(self, error: BaseException | None) -> None:
        self._is_exhausted = True
        self._error = self._error or error

    def _has_result(self) -> bool:
        self._collect()
        return self._next_out in self._ready if self._ordered else bool(self._ready)

    def _take(self) -> Result[T] | None:
        """The next result, if there is one."""
        if not self._has_result():
            return None
        result = self._ready.pop(self._next_out if self._ordered else next(iter(self._ready)))
        self._next_out += 1
        return result

    def _is_over(self) -> bool:
        """Whether nothing can come any more."""
        return self._is_exhausted and not (self._open or self._ready or self._pending)

    def _take_error(self) -> BaseException | None:
        error, self._error = self._error, None
        self._is_closed = True
        return error

    # ---- what goes in ----

    def _has_room(self) -> bool:
        """Whether the source may be asked."""
        self._collect()
        if self._is_exhausted or self._pending is not None:
            return False
        return self._is_below_limits()

    def _is_below_limits(self) -> bool:
        return len(self._open) < self._limit and len(self._open) + len(self._ready) < 2 * self._limit

    def _add(self, prompt: Any) -> None:
        """An item of the source: submit it, or know what is wrong with it."""
        index, self._num_taken = self._num_taken, self._num_taken + 1
        try:
            submission = self._engine._submission(prompt, self._fields)
        except StreamgenError as error:
            self._settle(Err(index, error))
            return
        letter = _Letter(index, submission, self._arrivals, clock=self._engine._world.clock)
        letter.collect()
        submission.mailboxes = (letter,)
        self._submit(index, submission)

    def _submit(self, index: int, submission: Submission) -> None:
        self._pending = None
        self._open[index] = submission
        self._num_ended = self._arrivals.count
        try:
            submission.submit()
        except (EngineOverloaded, RateLimited) as error:
            del self._open[index]
            self._pending = (index, submission)
            self._retry_after = error.retry_after or DEFAULT_RETRY
        except StreamgenError as error:
            del self._open[index]
            self._settle(Err(index, error))

    def _retry(self) -> None:
        """Try again what the engine had no place for."""
        if self._pending is not None:
            self._submit(*self._pending)

    def _cancel_all(self) -> list[Mailbox]:
        """End what runs soon. Returns their mailboxes, to wait for."""
        self._is_closed = self._is_exhausted = True
        submissions, self._open = list(self._open.values()), {}
        self._pending = None
        self._ready.clear()
        for submission in submissions:
            submission.cancel()
        return [mailbox for submission in submissions for mailbox in submission.mailboxes]

    # ---- what waiting looks at: called with the arrivals' lock held, so it must not collect ----

    def _is_news(self) -> bool:
        is_next_ready = self._next_out in self._ready if self._ordered else bool(self._ready)
        return len(self._arrivals) > 0 or is_next_ready or self._is_over()

    def _may_have_room(self) -> bool:
        return len(self._arrivals) > 0 or self._is_below_limits() or self._is_exhausted

    def _is_place_likely(self) -> bool:
        """Whether one of ours has ended since the engine had no place."""
        return self._arrivals.count != self._num_ended or self._is_closed


class _Feeder:
    """The task that reads the source of a `ResultStream` that was entered."""

    def __init__(self) -> None:
        self.tasks = anyio.create_task_group()
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()


class ResultStream(MapBase[T]):
    """An async iterator of results. Make one with `Engine.map`.

    With `async with`, the source is read beside the loop, also while the loop's body runs and while the source keeps
    one waiting; leaving it ends what runs and closes the source. In a plain `async for` the source is read only while
    the loop waits for a result. A source that blocks, blocks the loop that reads it.
    """

    def __init__(self, engine: EngineBase, source: Iterable[Prompt] | AsyncIterable[Prompt], **options: Any) -> None:
        if isinstance(source, str | bytes | Mapping) or not isinstance(source, Iterable | AsyncIterable):
            raise not_a_source(source, "an iterable or async iterable of prompts")
        super().__init__(engine, source, **options)
        self._is_async = isinstance(source, AsyncIterable)
        self._feeder: _Feeder | None = None
        self._close_error: Exception | None = None

    async def __aenter__(self) -> Self:
        """Begin to read the source."""
        self._feeder = feeder = _Feeder()
        await feeder.tasks.__aenter__()
        feeder.tasks.start_soon(self._feed, feeder)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what still runs; returns when the engine has freed it and the source is closed."""
        feeder = self._feeder
        assert feeder is not None, "left without being entered"
        feeder.scope.cancel()
        mailboxes = self._cancel_all()
        try:
            # Only a cancellation is the group's business; of another error it would make a group of errors.
            if isinstance(exc, anyio.get_cancelled_exc_class()):
                await feeder.tasks.__aexit__(exc_type, exc, traceback)
            else:
                await feeder.tasks.__aexit__(None, None, None)
        finally:
            await self._wait_closed(mailboxes)

    async def aclose(self) -> None:
        """End what runs, and close the source; returns when that is done. Idempotent."""
        if self._feeder is not None:
            self._feeder.scope.cancel()
        await self._wait_closed(self._cancel_all())

    def __aiter__(self) -> AsyncIterator[Result[T]]:
        return self

    async def __anext__(self) -> Result[T]:
        """The next result: as they end, or in the source's order if `ordered`.

        Raises:
            What the source raised, once everything before it is delivered. EngineFailed, EngineClosed: likewise.
        """
        if self._feeder is not None:
            return await self._next()
        try:
            return await self._next()
        except BaseException:
            await self.aclose()
            raise

    async def _next(self) -> Result[T]:
        await anyio.lowlevel.checkpoint()
        while True:
            if self._feeder is None:
                await self._fill()
            result = self._take()
            if result is not None:
                self._arrivals.wake()  # the feeder: there may be room
                return result
            if self._is_over():
                error = self._take_error()
                raise StopAsyncIteration if error is None else error
            # What the engine had no place for is tried again in time, by the feeder if there is one.
            limit = math.inf if self._pending is None or self._feeder is not None else self._retry_after
            with anyio.move_on_after(limit):
                await self._arrivals.notifier.wait(self._is_news)

    # ---- the source ----

    async def _fill(self) -> None:
        """Take what there is room for, but let no result wait for an async source."""
        self._retry()
        while self._has_room() and not (self._is_async and self._has_result()):
            await self._pull()

    async def _feed(self, feeder: _Feeder) -> None:
        try:
            with feeder.scope:
                while not self._is_exhausted or self._pending is not None:
                    await self._feed_once()
                    if self._is_news():
                        self._arrivals.wake()
        finally:
            with anyio.CancelScope(shield=True):
                await self._close_source()
            feeder.ended.set()

    async def _feed_once(self) -> None:
        if self._pending is not None:
            with anyio.move_on_after(self._retry_after):
                await self._arrivals.notifier.wait(self._is_place_likely)
            self._retry()
        elif self._has_room():
            await self._pull()
            await anyio.lowlevel.checkpoint()
        else:
            await self._arrivals.notifier.wait(self._may_have_room)

    async def _pull(self) -> None:
        try:
            prompt = await self._next_prompt()
        except (StopIteration, StopAsyncIteration):
            self._end_source(None)
        except Exception as error:  # the source's own; it is raised when its turn comes
            self._end_source(error)
        else:
            if not self._is_closed:
                self._add(prompt)

    async def _next_prompt(self) -> Any:
        if self._iterator is None:
            source: Any = self._source
            self._iterator = aiter(source) if self._is_async else iter(source)
        if self._is_async:
            return await anext(self._iterator)
        try:
            return next(self._iterator)
        except StopIteration:  # which a coroutine cannot raise
            raise StopAsyncIteration from None

    async def _close_source(self) -> None:
        iterator, self._iterator = self._iterator, None
        try:
            if self._is_async and hasattr(iterator, "aclose"):
                await iterator.aclose()
            else:
                close_generator(iterator)
        except Exception as error:  # kept for who closes: this may run in the feeder
            self._close_error = error

    async def _wait_closed(self, mailboxes: list[Mailbox]) -> None:
        self._arrivals.wake()
        with anyio.CancelScope(shield=True):
            for mailbox in mailboxes:
                if mailbox.end is None:
                    await mailbox.wait_end()
            if self._feeder is None:
                await self._close_source()
            else:
                await self._feeder.ended.wait()
        error, self._close_error = self._close_error, None
        if error is not None:
            raise error


def close_generator(iterator: object) -> None:
    """Run what a plain generator has in its `finally`; other iterators may be used further."""
    if inspect.isgenerator(iterator):
        iterator.close()


def not_a_source(source: object, wanted: str) -> InvalidRequest:
    """The error of a source that cannot be read."""
    return InvalidRequest(f"prompts: expected {wanted}, got {type(source).__name__}", param="prompts")


def _check_fields(fields: Mapping[str, Any]) -> None:
    check_request([user("-")], fields)  # once, here; what is wrong with a prompt is that item's error
    if fields.get("request_id") is not None:
        raise InvalidRequest("request_id: one name cannot be that of many requests; leave it out", param="request_id")


def _check_concurrency(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        got = value if isinstance(value, int) else type(value).__name__
        raise InvalidRequest(f"concurrency: expected an integer >= 1, got {got}", param="concurrency")
    return value
