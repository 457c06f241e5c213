"""Stream: the output of one request as it comes, read on asyncio or trio.

Iterators here are objects, not generators: nothing needs closing when a loop is left early. What keeps a request alive
is the `Stream` alone; when it goes, the request is cancelled.
"""

from __future__ import annotations

import warnings
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

import anyio

from streamgen.completion import Completion, Delta, Event, Finished, Started
from streamgen.values import AsyncValues, FieldFeed, ItemFeed, Outcome, PartialFeed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType

    from streamgen.request import Submission

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
I = TypeVar("I")  # noqa: E741  # an item


class StreamBase(Generic[T]):
    """What streams of every kind of host share: identity, cancel, result, the finalizer."""

    def __init__(self, owner: object, submission: Submission) -> None:
        self._owner = owner  # an engine that nobody refers to is closed; its streams refer to it
        self._submission = submission
        self._mailbox = submission.mailboxes[0]
        self._outcome = Outcome(submission.output)
        self._num_taken = 0  # characters, by whoever reads
        self.id = submission.id

    def cancel(self) -> None:
        """End the request soon. Thread-safe, idempotent, never blocks; iteration then ends normally."""
        self._submission.cancel()

    @property
    def result(self) -> Completion[T]:
        """What there is so far; whole once the stream has ended, however it ended.

        `parsed` is there once the output is whole, if it validates.
        """
        return self._outcome.fill(self._mailbox.completion())

    def __repr__(self) -> str:
        end = self._mailbox.end
        state = end.finish_reason if end else "running" if self._submission.is_submitted else "new"
        return f"<{type(self).__name__} {self.id} {state}>"

    def __del__(self) -> None:
        submission: Submission | None = getattr(self, "_submission", None)  # absent if __init__ was never reached
        if submission is not None and submission.is_running:
            submission.cancel()
            warnings.warn(
                f"{self!r} was dropped while it ran, and cancelled; use `with` or `async with`, or read it to its end",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )

    def _take(self) -> Delta | None:
        """What is unread; None at the end. Raises what ended the request, if that was an error."""
        delta = self._mailbox.take()
        if delta is None:
            self._mailbox.raise_error()
        else:
            self._num_taken += len(delta.text)
        return delta

    def _started(self) -> Started:
        usage = self._mailbox.usage
        return Started(id=self.id, prompt_tokens=usage.prompt_tokens, cached_tokens=usage.cached_tokens)


class Stream(StreamBase[T]):
    """An async iterator of deltas. Make one with `Engine.stream`."""

    async def __aenter__(self) -> Self:
        """Submit, and wait until the prompt is tokenized.

        Raises:
            AdmissionError: the engine does not take the request. RequestError: the prompt is too long, or the template
            refused it.
        """
        try:
            self._submission.submit()
            await self._mailbox.wait_open()
            if self._mailbox.end is not None and not self._mailbox.is_started:
                self._mailbox.raise_error()
        except BaseException:
            self._submission.cancel()  # __aexit__ will not be called
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what still runs; returns when the engine has freed it."""
        self._submission.cancel()
        if self._submission.is_submitted and self._mailbox.end is None:
            with anyio.CancelScope(shield=True):
                await self._mailbox.wait_end()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        """Everything that came since the last delta.

        Raises:
            DeadlineExceeded, GenerationError, EngineFailed: what ended the request, after its last delta.
        """
        self._submission.submit()
        await self._mailbox.wait_output()
        delta = self._take()
        if delta is None:
            raise StopAsyncIteration
        return delta

    def texts(self) -> AsyncIterator[str]:
        """Only the texts; never an empty one."""
        return _Texts(self)

    def events(self) -> AsyncIterator[Event]:
        """`Started`, then `Text`, `Reasoning`, `ToolDelta`, `ToolCall` as they come, `Finished`."""
        return _Events(self)

    async def final(self) -> Completion[T]:
        """Wait for the end and return the whole. It takes nothing from an iterator.

        Raises:
            DeadlineExceeded, GenerationError, EngineFailed: with what there is as `partial`. With `output=` also
            IncompleteOutput, when it was cut, and OutputInvalid, when it does not validate.
        """
        self._submission.submit()
        self._mailbox.collect()
        await self._mailbox.wait_end()
        self._mailbox.raise_error()
        return self._outcome.check(self._mailbox.completion())

    def partials(self) -> AsyncIterator[Any]:
        """The value so far, as it grows: plain dicts, lists and scalars, whatever the type; each complete in itself.

        Members and elements are there once they have begun, numbers and literals once they are complete, and so are
        strings that are no free text (an enum's, a date's); free text grows. The last one is the whole value; the typed
        one is `result.parsed`. Partials share what no longer changes: read them, and copy what is to be changed.

        Raises:
            InvalidRequest: there is no `output=`, or it is no JSON. While it is read, after the last value: as `final`.
        """
        return AsyncValues(self, PartialFeed(self._submission.output))

    @overload
    def items(self: Stream[list[I]]) -> AsyncIterator[I]: ...
    @overload
    def items(self: Stream[set[I]]) -> AsyncIterator[I]: ...
    @overload
    def items(self: Stream[frozenset[I]]) -> AsyncIterator[I]: ...
    @overload
    def items(self: Stream[tuple[I, ...]]) -> AsyncIterator[I]: ...
    @overload
    def items(self) -> AsyncIterator[Any]: ...
    def items(self) -> AsyncIterator[Any]:
        """The elements of an output like `list[Line]`, each validated the moment it closes.

        Raises:
            InvalidRequest: there is no `output=`, or it is no array of one type. While it is read: OutputInvalid for an
            element that does not validate; after the last one: as `final`.
        """
        return AsyncValues(self, ItemFeed(self._submission.output))

    def fields(self) -> AsyncIterator[tuple[str, Any]]:
        """(JSON pointer, value) of each member of an object, at any depth, as it completes; plain values, inner first.

        Raises:
            InvalidRequest: there is no `output=`, or it is no JSON. While it is read, after the last value: as `final`.
        """
        return AsyncValues(self, FieldFeed(self._submission.output))

    async def _wait_started(self) -> Started | None:
        self._submission.submit()
        await self._mailbox.wait_started()
        return self._started() if self._mailbox.is_started else None


class _Texts:
    """Iterator of `Stream.texts`."""

    def __init__(self, stream: Stream[Any]) -> None:
        self._stream = stream

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        while True:
            delta = await self._stream.__anext__()
            if delta.text:
                return delta.text


class _Events:
    """Iterator of `Stream.events`."""

    def __init__(self, stream: Stream[Any]) -> None:
        self._stream = stream
        self._is_started = False
        self._is_finished = False
        self._waiting: deque[Event] = deque()  # read already, in order

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if not self._is_started:
            self._is_started = True
            started = await self._stream._wait_started()
            if started is not None:
                return started
        while not self._waiting:
            if self._is_finished:
                raise StopAsyncIteration
            await self._read()
        return self._waiting.popleft()

    async def _read(self) -> None:
        try:
            await self._stream.__anext__()
        except StopAsyncIteration:
            self._is_finished = True
            self._waiting.append(Finished(completion=self._stream.result))
        else:
            self._waiting.extend(self._stream._mailbox.taken_parts())
