"""Structured output as it comes: the value so far, elements as they close, fields as they complete; and the whole.

A `Feed` makes values of text, knowing nothing of streams; a `ValueReader` gives it the stream's text, whoever else
reads the stream, and knows how it ended. `Values` and `AsyncValues` only wait. They are objects, not generators: a loop
over one may be left at any time, and nothing needs closing.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import structs

from streamgen.errors import IncompleteOutput, InvalidRequest, OutputInvalid, StreamgenError
from streamgen.grammar.partial import ItemScanner, JsonMalformed, JsonReader, NotAnArray

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from streamgen.completion import Completion, Delta
    from streamgen.grammar.outputs import OutputPlan
    from streamgen.stream import Stream, StreamBase
    from streamgen.sync import Stream as SyncStream

V = TypeVar("V")

_MAX_COPY = 256
"""Entries that showing the value so far may copy, for each character that came since it was last shown.

It bounds what all partials of an output cost by its length. Only a value with more than 256 entries in what is open, or
in a string of more than 4,096 characters, is shown less often than it changes.
"""


class Outcome:
    """What a request's whole output means: read when somebody asks, and once."""

    def __init__(self, plan: OutputPlan | None) -> None:
        self._plan = plan
        self._value: Any = None
        self._error: OutputInvalid | None = None
        self._is_read = False

    def fill(self, completion: Completion[Any]) -> Completion[Any]:
        """The completion with `parsed`, if its text is whole and valid."""
        if self._plan is None or not self._is_good_end(completion):
            return completion
        self._read(completion.text)
        return structs.replace(completion, parsed=self._value)

    def check(self, completion: Completion[Any]) -> Completion[Any]:
        """The completion with `parsed`; a cancelled one has none.

        Raises:
            IncompleteOutput: the output was cut. OutputInvalid: it does not validate. `partial` is the completion.
        """
        if self._plan is None:
            return completion
        if completion.finish_reason == "length" and self._plan.source is not None:
            raise IncompleteOutput(
                f"output: cut after {completion.usage.completion_tokens} tokens, before it was whole; raise max_tokens",
                request_id=completion.id,
                partial=completion,
            )
        filled = self.fill(completion)
        if self._error is not None:
            error = OutputInvalid(self._error.message, request_id=completion.id, partial=completion)
            raise error from self._error.__cause__
        return filled

    def _is_good_end(self, completion: Completion[Any]) -> bool:
        is_any_text = self._plan is not None and self._plan.source is None
        return completion.finish_reason == "stop" or (is_any_text and completion.finish_reason == "length")

    def _read(self, text: str) -> None:
        assert self._plan is not None, "without output= there is nothing to read"
        if self._is_read:
            return
        try:
            self._value = self._plan.parse(text)
        except OutputInvalid as error:
            self._error = error
        self._is_read = True


class Feed(Generic[V]):
    """Makes values of an output's text. `ready` holds those that nobody has taken."""

    def __init__(self) -> None:
        self.ready: deque[V] = deque()

    def add(self, text: str) -> None:
        """More of the text, in pieces of any kind."""
        raise NotImplementedError

    def end(self, *, is_whole: bool) -> None:
        """There is no more. `is_whole`: it was not cut."""


class PartialFeed(Feed[Any]):
    """The value so far, after each piece that changes it."""

    def __init__(self, plan: OutputPlan | None) -> None:
        super().__init__()
        self._reader = JsonReader(_check_json("partials", plan).shape)
        self._shown = 0  # the version
        self._num_unshown = 0

    def add(self, text: str) -> None:
        """Show it, if it has changed by enough to be worth a copy."""
        self._reader.feed(text)
        self._num_unshown += len(text)
        if self._num_unshown * _MAX_COPY >= self._reader.snapshot_cost:
            self._show()

    def end(self, *, is_whole: bool) -> None:
        """Show what is left."""
        if is_whole:
            self._reader.finish()
        self._show()

    def _show(self) -> None:
        if self._shown != self._reader.version:
            self._shown, self._num_unshown = self._reader.version, 0
            self.ready.append(self._reader.snapshot())


class FieldFeed(Feed[tuple[str, Any]]):
    """(JSON pointer, value) of each object's member, when its value is complete."""

    def __init__(self, plan: OutputPlan | None) -> None:
        super().__init__()
        self._reader = JsonReader(_check_json("fields", plan).shape, wants_fields=True)

    def add(self, text: str) -> None:
        """Take the fields that it completes."""
        self._reader.feed(text)
        self.ready.extend(self._reader.fields)
        self._reader.fields.clear()


class ItemFeed(Feed[Any]):
    """The elements of an array, each validated when it closes."""

    def __init__(self, plan: OutputPlan | None) -> None:
        super().__init__()
        self._plan = _check_json("items", plan)
        if self._plan.item is None:
            raise InvalidRequest(f"items: expected an output like list[T], got {self._plan.name}", param="items")
        self._scanner = ItemScanner()

    def add(self, text: str) -> None:
        """Read the elements that it closes."""
        for element in self._scanner.feed(text):
            self.ready.append(self._plan.parse_item(element.encode()))


def _check_json(name: str, plan: OutputPlan | None) -> OutputPlan:
    if plan is None:
        raise InvalidRequest(f"{name}: the request has no output=; read texts(), or give it a type", param=name)
    if not plan.is_json:
        raise InvalidRequest(f"{name}: expected an output that is JSON, got {plan.name}; read texts()", param=name)
    return plan


class ValueReader(Generic[V]):
    """One iterator's way through a stream.

    The iterator may come late, or share the stream with others: what they took of it is read from the whole.
    """

    def __init__(self, stream: StreamBase[Any], feed: Feed[V]) -> None:
        self._stream = stream
        self._feed = feed
        self._num_fed = 0  # characters
        self._is_over = False
        self._error: StreamgenError | None = None

    def has_value(self) -> bool:
        """Whether one can be taken.

        Raises:
            StreamgenError: what ended the values, once all before it are taken.
        """
        if self._feed.ready:
            return True
        error, self._error = self._error, None
        if error is not None:
            raise error
        return False

    @property
    def is_over(self) -> bool:
        """Whether no text will come."""
        return self._is_over

    def take(self) -> V:
        """The next value."""
        return self._feed.ready.popleft()

    def add(self, delta: Delta) -> None:
        """The stream has given this."""
        num_taken = self._stream._num_taken
        if num_taken - len(delta.text) == self._num_fed:
            text = delta.text
        else:
            text = self._stream._mailbox.completion().text[self._num_fed : num_taken]
        self._num_fed = num_taken
        self._try(lambda: self._feed.add(text))

    def end(self) -> None:
        """The stream has ended, and not with an error of its own."""
        completion = self._stream._mailbox.completion()
        self._try(lambda: self._feed.add(completion.text[self._num_fed :]))
        if not self._is_over:
            self._try(lambda: self._feed.end(is_whole=completion.finish_reason == "stop"))
        if not self._is_over:
            self._try(lambda: self._stream._outcome.check(completion))
        self._is_over = True

    def _try(self, step: Any) -> None:
        try:
            step()
        except JsonMalformed as error:
            self._fail(OutputInvalid(f"output: {error}"))
        except NotAnArray as error:
            self._fail(InvalidRequest(f"items: {error}; read partials()", param="items"))
        except StreamgenError as error:
            self._fail(error)

    def _fail(self, error: StreamgenError) -> None:
        error.request_id = self._stream.id
        error.partial = self._stream._mailbox.completion()
        self._error, self._is_over = error, True


class AsyncValues(Generic[V]):
    """Iterator of `Stream.partials`, `items` and `fields`."""

    def __init__(self, stream: Stream[Any], feed: Feed[V]) -> None:
        self._stream = stream
        self._reader = ValueReader(stream, feed)

    def __aiter__(self) -> AsyncIterator[V]:
        return self

    async def __anext__(self) -> V:
        while not self._reader.has_value():
            if self._reader.is_over:
                raise StopAsyncIteration
            try:
                delta = await self._stream.__anext__()
            except StopAsyncIteration:
                self._reader.end()
            else:
                self._reader.add(delta)
        return self._reader.take()


class Values(Generic[V]):
    """The same for plain code."""

    def __init__(self, stream: SyncStream[Any], feed: Feed[V]) -> None:
        self._stream = stream
        self._reader = ValueReader(stream, feed)

    def __iter__(self) -> Iterator[V]:
        return self

    def __next__(self) -> V:
        while not self._reader.has_value():
            if self._reader.is_over:
                raise StopIteration
            try:
                delta = self._stream.__next__()
            except StopIteration:
                self._reader.end()
            else:
                self._reader.add(delta)
        return self._reader.take()
