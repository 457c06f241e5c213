"""Engine: a model that is open in this process, for asyncio and trio."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar, Unpack, overload

import anyio

from streamgen.compiled import CompiledOutput
from streamgen.engine_base import (
    STREAM_FIELDS,
    EngineBase,
    begin_tokenize,
    collect,
    not_yet,
    sampled,
    scored,
    wants_logprobs,
)
from streamgen.mapping import ResultStream
from streamgen.session import Session
from streamgen.stream import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from streamgen.actors.supervisor import EngineThread
    from streamgen.completion import Completion, TokenLogprob
    from streamgen.grammar.outputs import OutputSpec
    from streamgen.prompt import Prompt
    from streamgen.request import RequestFields, Submission
    from streamgen.sampling import LogitsProcessor, Sampling, SamplingFields

T = TypeVar("T")


class Engine(EngineBase):
    """A model that is open in this process. Use it with `async with`, on asyncio or trio; loops may share it."""

    async def open(self) -> Self:
        """Load the model. Cancelling this gives up loading.

        Raises:
            LoadError: the model cannot be opened. ConfigError: an option does not fit, or it is open already.
        """
        thread = self._begin_open()
        try:
            await thread.opened.wait()
        except BaseException:
            await self.aclose()
            raise
        if thread.load_error is not None:
            await _join(thread)
        self._check_opened(thread)
        try:
            for output in self.options.grammars:
                await self.compile(output)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Success: wait for what runs. Error: cancel it. Then close."""
        try:
            if exc is None:
                await self.drain()
        finally:
            await self.aclose()

    async def drain(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # it cuts; it does not raise
        """Take no more requests and wait for those that were taken; after `timeout` seconds they are cancelled."""
        thread = self._thread
        if thread is None:
            return
        idle = thread.drain()
        with anyio.move_on_after(math.inf if timeout is None else timeout) as scope:
            await idle.wait()
        if scope.cancelled_caught:
            thread.cancel_all()
            await idle.wait()

    async def aclose(self) -> None:
        """Cancel what runs, free everything, end every thread. Idempotent; from any loop, in any state."""
        thread = self._begin_close()
        if thread is not None:
            with anyio.CancelScope(shield=True):
                await _join(thread)

    @overload
    def stream(self, prompt: Prompt, /, *, output: None = None, **fields: Unpack[RequestFields]) -> Stream[None]: ...
    @overload
    def stream(
        self, prompt: Prompt, /, *, output: type[T] | OutputSpec[T], **fields: Unpack[RequestFields]
    ) -> Stream[T]: ...
    @overload
    def stream(self, prompt: Prompt, /, *, output: object, **fields: Unpack[RequestFields]) -> Stream[Any]: ...
    def stream(
        self,
        prompt: Prompt,
        /,
        *,
        output: object = None,
        sampling: Sampling | None = None,
        tools: Sequence[object] = (),
        tool_choice: str = "auto",
        tenant: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        first_token_timeout: float | None = None,
        queue_timeout: float | None = None,
        cache: str = "tenant",
        adapter: object | None = None,
        on_slow: str = "coalesce",
        processors: Sequence[LogitsProcessor] = (),
        request_id: str | None = None,
        **sampling_fields: Unpack[SamplingFields],
    ) -> Stream[Any]:
        """A request, checked; it runs once the stream is entered or read.

        prompt    text, token ids, or messages
        sampling  a `Sampling`; its fields may be given as keywords too, and those win
        tenant    who asks: tenants share the engine by their weights (`Engine(tenants=...)`)
        priority  larger runs first, within the tenant; waiting makes up for a smaller one
        timeout, queue_timeout, first_token_timeout
                  seconds from submission until the request ends with DeadlineExceeded: at all, if it has not started,
                  if it has no output
        cache     who shares cached prefixes with it: "private" nobody, "tenant" its tenant, "public" everybody who
                  says so
        on_slow   what becomes of it when its reader falls behind: "coalesce" output merges; "pause" it stops until the
                  reader has caught up; "cancel" it ends with SlowConsumer
        processors  functions of (ids, logits), run before each token is drawn

        Raises:
            RequestError: the request cannot be run as it stands. EngineClosed: the engine is not open. EngineFailed.
        """
        given = dict(locals())
        fields = {name: given[name] for name in ("output", *STREAM_FIELDS)}
        return Stream(self, self._submission(prompt, {**fields, **sampling_fields}))

    @overload
    async def generate(
        self, prompt: Prompt, /, *, output: None = None, **fields: Unpack[RequestFields]
    ) -> Completion[None]: ...
    @overload
    async def generate(
        self, prompt: Prompt, /, *, output: type[T] | OutputSpec[T], **fields: Unpack[RequestFields]
    ) -> Completion[T]: ...
    @overload
    async def generate(
        self, prompt: Prompt, /, *, output: object, **fields: Unpack[RequestFields]
    ) -> Completion[Any]: ...
    async def generate(
        self, prompt: Prompt, /, *, output: object = None, **fields: Unpack[RequestFields]
    ) -> Completion[Any]:
        """The whole answer. Arguments as for `stream`.

        Raises:
            RequestError, AdmissionError, GenerationError, EngineFailed: `partial` holds what there is.
        """
        stream = Stream[Any](self, self._submission(prompt, {"output": output, **fields}))
        async with stream:
            return await stream.final()

    @overload
    async def sample(
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
    async def sample(
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
    async def sample(
        self, prompt: Prompt, /, *, n: int, best_of: int | None = None, output: object, **fields: Unpack[RequestFields]
    ) -> list[Completion[Any]]: ...
    async def sample(
        self,
        prompt: Prompt,
        /,
        *,
        n: int,
        best_of: int | None = None,
        output: object = None,
        **fields: Unpack[RequestFields],
    ) -> list[Completion[Any]]:
        """`n` independent answers to one prompt, which is computed once.

        With `best_of` so many are made, and the `n` of the highest mean log-probability per token come back.
        """
        submission = self._sample_submission(prompt, n, best_of, {"output": output, **fields})
        await _run(submission)
        return sampled(submission, n, keeps_logprobs=wants_logprobs(fields))

    async def score(self, prompt: Prompt, continuation: str | Sequence[int], /) -> tuple[TokenLogprob, ...]:
        """The log-probability of each token of `continuation` after `prompt`; nothing is generated."""
        submission = self._score_submission(prompt, continuation)
        await _run(submission)
        return scored(submission)

    async def tokenize(self, text: str, /) -> list[int]:
        """The ids that `generate(text)` would run: special tokens parsed, BOS in front if the checkpoint wants it."""
        call = begin_tokenize(self._open_thread(), text)
        await call.done.wait()
        return list(call.result())

    def session(
        self, *, system: str | None = None, tools: Sequence[object] = (), pin: bool = False, **defaults: Any
    ) -> Session:
        """A conversation: it keeps the history, and the pages of what was said.

        pin        keep the pages of its last turn until it is closed
        defaults   fields of every turn's request, as for `stream`

        Raises:
            RequestError: a default cannot be used.
        """
        return Session(self, system=system, tools=tools, pin=pin, defaults=defaults)

    @overload
    def map(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
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
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
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
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        /,
        *,
        output: object,
        concurrency: int | None = None,
        ordered: bool = False,
        **fields: Unpack[RequestFields],
    ) -> ResultStream[Any]: ...
    def map(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        /,
        *,
        output: object = None,
        concurrency: int | None = None,
        ordered: bool = False,
        **fields: Unpack[RequestFields],
    ) -> ResultStream[Any]:
        """Many prompts, `concurrency` at a time: an async iterator of `Ok(index, completion)` and `Err(index, error)`.

        The source is read only as fast as results are taken. Leaving the iterator ends what runs.
        """
        return ResultStream(
            self, prompts, concurrency=concurrency, ordered=ordered, fields={"output": output, **fields}
        )

    async def sleep(self, *, keep_weights: bool = False) -> None:
        """Give the memory back, as soon as no request is open; returns then. A request, or `wake`, takes it again.

        keep_weights   only the cache goes: waking is immediate, answers are the same
        """
        await self._open_thread().sleep(keep_weights=keep_weights).wait()

    async def wake(self) -> None:
        """Be ready for requests; returns when the engine is."""
        thread = self._open_thread()
        await thread.wake().wait()
        thread.check_ready()

    async def restart(self) -> None:
        """Open anew after EngineFailed. Requests that had no output yet go on, if this comes soon enough after it.

        Raises:
            ConfigError: the engine has not failed. LoadError: the model cannot be opened any more.
        """
        failed, owners = self._begin_restart()
        try:
            with anyio.CancelScope(shield=True):
                await _join(failed)
            thread = self._start_thread()
            try:
                await thread.opened.wait()
            except BaseException:
                await self.aclose()
                raise
            self._check_opened(thread)
        finally:
            self._end_restart(owners)

    @overload
    async def compile(self, output: type[T] | OutputSpec[T], /) -> CompiledOutput[T]: ...
    @overload
    async def compile(self, output: object, /) -> CompiledOutput[Any]: ...
    async def compile(self, output: object, /) -> CompiledOutput[Any]:
        """The grammar of an output type, made now rather than with the first request, and to be asked without a model.

        Raises:
            SchemaError, SchemaTooComplex: it cannot be made. InvalidRequest: this is no output type.
        """
        plan, call = self._begin_compile(output)
        await call.done.wait()
        return CompiledOutput(plan, call.result().grammar)

    async def run_tools(
        self,
        prompt: Prompt,
        /,
        *,
        tools: Sequence[Callable[..., object]],
        max_rounds: int = 8,
        tool_timeout: float | None = None,
        **fields: Any,
    ) -> Completion[Any]:
        """Generate and call functions until the model answers without a call: the last completion, with all usage.

        tools          functions; their results go back to the model as text or JSON, and so do their exceptions
        max_rounds     how many answers the model may give
        tool_timeout   seconds that one function may take; then the model hears that it took too long
        fields         as for `generate`; `timeout` is for the whole loop

        Raises:
            IncompleteOutput: the model still calls after `max_rounds`; those last calls were not made.
            DeadlineExceeded, and what `generate` raises.
        """
        from streamgen.tool_loop import run_tools

        return await run_tools(self, prompt, tools=tools, max_rounds=max_rounds, tool_timeout=tool_timeout, **fields)

    # ---- what a later version brings ----

    async def beam_search(
        self, prompt: Prompt, /, *, width: int, length_penalty: float = 1.0, **fields: Unpack[RequestFields]
    ) -> list[Completion[None]]:
        """In a later version."""
        raise not_yet("beam_search")

    async def embed(self, texts: Sequence[str], /) -> list[list[float]]:
        """In a later version."""
        raise not_yet("embed")

    async def load_adapter(self, path: str | Path, /, *, name: str | None = None) -> NoReturn:
        """In a later version."""
        raise not_yet("load_adapter")


async def _run(submission: Submission) -> None:
    """Submit, and wait for every sequence; cancelled if the caller is."""
    try:
        for mailbox in collect(submission):
            await mailbox.wait_end()
    finally:
        submission.cancel()


async def _join(thread: EngineThread) -> None:
    await thread.closed.wait()
    # `closed` is the last thing that the thread does; what is left of it takes microseconds.
    while thread.thread.is_alive():
        await anyio.lowlevel.checkpoint()
