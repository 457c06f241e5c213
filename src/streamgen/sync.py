"""The same engine for plain code: `with` instead of `async with`, iterators instead of async iterators.

The engine has its own thread and loop, so this works anywhere, inside a running loop (a notebook) as well; there it
blocks that loop while it waits, as any blocking call does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, Unpack, overload

from streamgen.compiled import CompiledOutput
from streamgen.completion import Completion, Delta, Event, Finished, TokenLogprob
from streamgen.engine_base import (
    EngineBase,
    begin_tokenize,
    collect,
    not_yet,
    sampled,
    scored,
    wants_logprobs,
)
from streamgen.stream import StreamBase
from streamgen.sync_mapping import ResultStream
from streamgen.values import FieldFeed, ItemFeed, PartialFeed, Values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from streamgen.actors.supervisor import EngineThread
    from streamgen.grammar.outputs import OutputSpec
    from streamgen.prompt import Prompt
    from streamgen.request import RequestFields, Submission
    from streamgen.sync_session import Session

__all__ = ["Engine", "Stream"]

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741  # an item


class Stream(StreamBase[T]):
    """An iterator of deltas. Make one with `Engine.stream`."""

    def __enter__(self) -> Self:
        """Submit, and wait until the prompt is tokenized. Raises as its async namesake."""
        try:
            self._submission.submit()
            self._mailbox.wait_open_blocking()
            if self._mailbox.end is not None and not self._mailbox.is_started:
                self._mailbox.raise_error()
        except BaseException:
            self._submission.cancel()  # __exit__ will not be called
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what still runs; returns when the engine has freed it."""
        self._submission.cancel()
        if self._submission.is_submitted:
            self._mailbox.wait_end_blocking()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        """Everything that came since the last delta. Raises as its async namesake."""
        self._submission.submit()
        self._mailbox.wait_output_blocking()
        delta = self._take()
        if delta is None:
            raise StopIteration
        return delta

    def texts(self) -> Iterator[str]:
        """Only the texts; never an empty one."""
        for delta in self:
            if delta.text:
                yield delta.text

    def events(self) -> Iterator[Event]:
        """`Started`, `Text` ..., `Finished`."""
        self._submission.submit()
        self._mailbox.wait_started_blocking()
        if self._mailbox.is_started:
            yield self._started()
        for _ in self:
            yield from self._mailbox.taken_parts()
        yield Finished(completion=self.result)

    def final(self) -> Completion[T]:
        """Wait for the end and return the whole. Raises as its async namesake."""
        self._submission.submit()
        self._mailbox.collect()
        self._mailbox.wait_end_blocking()
        self._mailbox.raise_error()
        return self._outcome.check(self._mailbox.completion())

    def partials(self) -> Iterator[Any]:
        """The value so far, as it grows. What it holds, and what is raised, as its async namesake."""
        return Values(self, PartialFeed(self._submission.output))

    @overload
    def items(self: Stream[list[I]]) -> Iterator[I]: ...
    @overload
    def items(self: Stream[set[I]]) -> Iterator[I]: ...
    @overload
    def items(self: Stream[frozenset[I]]) -> Iterator[I]: ...
    @overload
    def items(self: Stream[tuple[I, ...]]) -> Iterator[I]: ...
    @overload
    def items(self) -> Iterator[Any]: ...
    def items(self) -> Iterator[Any]:
        """The elements of an output like `list[Line]`, each validated the moment it closes; as its async namesake."""
        return Values(self, ItemFeed(self._submission.output))

    def fields(self) -> Iterator[tuple[str, Any]]:
        """(JSON pointer, value) of each member of an object as it completes. As its async namesake."""
        return Values(self, FieldFeed(self._submission.output))


class Engine(EngineBase):
    """A model that is open in this process. Use it with `with`; several threads may share it."""

    def open(self) -> Self:
        """Load the model. Raises as its async namesake."""
        thread = self._begin_open()
        try:
            thread.opened.wait_blocking()
        except BaseException:  # a KeyboardInterrupt gives up loading
            self.close()
            raise
        if thread.load_error is not None:
            _join(thread)
        self._check_opened(thread)
        try:
            for output in self.options.grammars:
                self.compile(output)
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Success: wait for what runs. Error: cancel it. Then close."""
        try:
            if exc is None:
                self.drain()
        finally:
            self.close()

    def drain(self, timeout: float | None = None) -> None:
        """Take no more requests and wait for those that were taken; after `timeout` seconds they are cancelled."""
        thread = self._thread
        if thread is None:
            return
        idle = thread.drain()
        if not idle.wait_blocking(timeout):
            thread.cancel_all()
            idle.wait_blocking()

    def close(self) -> None:
        """Cancel what runs, free everything, end every thread. Idempotent; from any thread, in any state."""
        thread = self._begin_close()
        if thread is not None:
            _join(thread)

    aclose = close  # the same name as the async engine's, for code that handles both

    @overload
    def stream(self, prompt: Prompt, /, *, output: None = None, **fields: Unpack[RequestFields]) -> Stream[None]: ...
    @overload
    def stream(
        self, prompt: Prompt, /, *, output: type[T] | OutputSpec[T], **fields: Unpack[RequestFields]
    ) -> Stream[T]: ...
    @overload
    def stream(self, prompt: Prompt, /, *, output: object, **fields: Unpack[RequestFields]) -> Stream[Any]: ...
    def stream(self, prompt: Prompt, /, *, output: object = None, **fields: Unpack[RequestFields]) -> Stream[Any]:
        """A request, checked; it runs once the stream is entered or read. Arguments as for the async engine."""
        return Stream[Any](self, self._submission(prompt, {"output": output, **fields}))

    @overload
    def generate(
        self, prompt: Prompt, /, *, output: None = None, **fields: Unpack[RequestFields]
    ) -> Completion[None]: ...
    @overload
    def generate(
        self, prompt: Prompt, /, *, output: type[T] | OutputSpec[T], **fields: Unpack[RequestFields]
    ) -> Completion[T]: ...
    @overload
    def generate(self, prompt: Prompt, /, *, output: object, **fields: Unpack[RequestFields]) -> Completion[Any]: ...
    def generate(self, prompt: Prompt, /, *, output: object = None, **fields: Unpack[RequestFields]) -> Completion[Any]:
        """The whole answer."""
        stream = Stream[Any](self, self._submission(prompt, {"output": output, **fields}))
        with stream:
            return stream.final()

    @overload
    def sample(
        self,
        prompt: Prompt,
        /,
        *,
        n: int,
        best_of: int | None = None,
        output: None = None,
        **fields: Unpack[RequestFields],
    ) -> list[Completion[None]]: ...
    @overload
    def sample(
        self,
        prompt: Prompt,
        /,
        *,
        n: int,
        best_of: int | None = None,
        output: type[T] | OutputSpec[T],
        **fields: Unpack[RequestFields],
    ) -> list[Completion[T]]: ...
    @overload
    def sample(
        self, prompt: Prompt, /, *, n: int, best_of: int | None = None, output: object, **fields: Unpack[RequestFields]
    ) -> list[Completion[Any]]: ...
    def sample(
        self,
        prompt: Prompt,
        /,
        *,
        n: int,
        best_of: int | None = None,
        output: object = None,
        **fields: Unpack[RequestFields],
    ) -> list[Completion[Any]]:
        """`n` independent answers to one prompt; with `best_of` the likeliest of so many."""
        submission = self._sample_submission(prompt, n, best_of, {"output": output, **fields})
        _run(submission)
        return sampled(submission, n, keeps_logprobs=wants_logprobs(fields))

    def score(self, prompt: Prompt, continuation: str | Sequence[int], /) -> tuple[TokenLogprob, ...]:
        """The log-probability of each token of `continuation` after `prompt`; nothing is generated."""
        submission = self._score_submission(prompt, continuation)
        _run(submission)
        return scored(submission)

    def tokenize(self, text: str, /) -> list[int]:
        """The ids that `generate(text)` would run."""
        call = begin_tokenize(self._open_thread(), text)
        call.done.wait_blocking()
        return list(call.result())

    def session(
        self, *, system: str | None = None, tools: Sequence[object] = (), pin: bool = False, **defaults: Any
    ) -> Session:
        """A conversation. Arguments as for the async engine."""
        from streamgen.sync_session import Session  # which builds on the streams of this module

        return Session(self, system=system, tools=tools, pin=pin, defaults=defaults)

    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        /,
        *,
        output: None = None,
        concurrency: int | None = None,
        ordered: bool = False,
        **fields: Unpack[RequestFields],
    ) -> ResultStream[None]: ...
    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        /,
        *,
        output: type[T] | OutputSpec[T],
        concurrency: int | None = None,
        ordered: bool = False,
        **fields: Unpack[RequestFields],
    ) -> ResultStream[T]: ...
    @overload
    def map(
        self,
        prompts: Iterable[Prompt],
        /,
        *,
        output: object,
        concurrency: int | None = None,
        ordered: bool = False,
        **fields: Unpack[RequestFields],
    ) -> ResultStream[Any]: ...
    def map(
        self,
        prompts: Iterable[Prompt],
        /,
        *,
        output: object = None,
        concurrency: int | None = None,
        ordered: bool = False,
        **fields: Unpack[RequestFields],
    ) -> ResultStream[Any]:
        """Many prompts, `concurrency` at a time: an iterator of `Ok(index, completion)` and `Err(index, error)`."""
        return ResultStream(
            self, prompts, concurrency=concurrency, ordered=ordered, fields={"output": output, **fields}
        )

    def sleep(self, *, keep_weights: bool = False) -> None:
        """Give the memory back, as soon as no request is open."""
        self._open_thread().sleep(keep_weights=keep_weights).wait_blocking()

    def wake(self) -> None:
        """Be ready for requests; returns when the engine is."""
        thread = self._open_thread()
        thread.wake().wait_blocking()
        thread.check_ready()

    def restart(self) -> None:
        """Open anew after EngineFailed. Raises as its async namesake."""
        failed, owners = self._begin_restart()
        try:
            _join(failed)
            thread = self._start_thread()
            try:
                thread.opened.wait_blocking()
            except BaseException:
                self.close()
                raise
            self._check_opened(thread)
        finally:
            self._end_restart(owners)

    @overload
    def compile(self, output: type[T] | OutputSpec[T], /) -> CompiledOutput[T]: ...
    @overload
    def compile(self, output: object, /) -> CompiledOutput[Any]: ...
    def compile(self, output: object, /) -> CompiledOutput[Any]:
        """The grammar of an output type, made now rather than with the first request, and to be asked without a model.

        Raises:
            SchemaError, SchemaTooComplex: it cannot be made. InvalidRequest: this is no output type.
        """
        plan, call = self._begin_compile(output)
        call.done.wait_blocking()
        return CompiledOutput(plan, call.result().grammar)

    def run_tools(
        self,
        prompt: Prompt,
        /,
        *,
        tools: Sequence[Callable[..., object]],
        max_rounds: int = 8,
        **fields: Any,
    ) -> Completion[Any]:
        """Generate and call functions until the model answers without a call. Raises as its async namesake.

        Functions run one after the other, in this thread.
        """
        from streamgen.tool_loop import run_tools_blocking

        return run_tools_blocking(self, prompt, tools=tools, max_rounds=max_rounds, **fields)

    # ---- what a later version brings ----

    def beam_search(
        self, prompt: Prompt, /, *, width: int, length_penalty: float = 1.0, **fields: Unpack[RequestFields]
    ) -> list[Completion[None]]:
        """In a later version."""
        raise not_yet("beam_search")

    def embed(self, texts: Sequence[str], /) -> list[list[float]]:
        """In a later version."""
        raise not_yet("embed")

    def load_adapter(self, path: str | Path, /, *, name: str | None = None) -> NoReturn:
        """In a later version."""
        raise not_yet("load_adapter")


def _run(submission: Submission) -> None:
    try:
        for mailbox in collect(submission):
            mailbox.wait_end_blocking()
    finally:
        submission.cancel()


def _join(thread: EngineThread) -> None:
    thread.closed.wait_blocking()
    thread.thread.join()
