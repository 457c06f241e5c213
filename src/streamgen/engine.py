"""Engine: opens the engine thread, takes requests from any loop or thread, and closes everything again.

`EngineBase` holds what does not wait; `Engine` waits on asyncio or trio, `sync.Engine` in a plain thread.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import TYPE_CHECKING, Any, Never, NoReturn, Self, TypeVar, Unpack, cast, overload

import anyio
from msgspec import structs

from streamgen.actors.supervisor import Call, EngineThread
from streamgen.config import EngineOptions, EngineState, LoadProgress, MemoryPlan, make_options
from streamgen.errors import ConfigError, EngineClosed, InvalidRequest, NotSupported
from streamgen.metrics import Stats
from streamgen.prompt import Message, Prompt, Rendered, check_text, parse_prompt
from streamgen.request import (
    RequestFields,
    Seeds,
    Submission,
    check_continuation,
    check_count,
    check_request,
    make_submission,
)
from streamgen.sampling import Sampling, SamplingFields
from streamgen.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from streamgen.actors.model import ModelOpener, OpenModel
    from streamgen.completion import Completion, TokenLogprob

T = TypeVar("T")

_OPEN = (EngineState.LOADING, EngineState.READY, EngineState.DRAINING)
_numbers = itertools.count(1)  # for thread names alone


class EngineBase:
    """What engines of every kind of host share: options, and all that returns at once.

    model         a path or a hub id; None is the demo model
    device ...    as in `EngineOptions`
    on_progress   hears how loading goes, from the engine thread
    """

    def __init__(
        self,
        model: str | Path | None = None,
        /,
        *,
        device: str | Sequence[str] = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        kv_memory: str | float | None = None,
        kv_dtype: str = "auto",
        max_context: int | None = None,
        max_running: int | None = None,
        max_queued: int = 256,
        isolation: str = "thread",
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        speculation: object | None = None,
        prefix_cache: bool = True,
        deterministic: bool = False,
        seed: int | None = None,
        threads: int | None = None,
        step_budget_ms: float | None = None,
        tenants: Mapping[str, object] | None = None,
        grammars: Sequence[object] = (),
        idle_sleep: float | None = None,
        chat_template: str | None = None,
        offline: bool = False,
        revision: str | None = None,
        on_progress: Callable[[LoadProgress], None] | None = None,
        name: str | None = None,
        _opener: ModelOpener | None = None,
        **unknown: Never,
    ) -> None:
        """Check the options. Nothing is opened and nothing starts.

        Raises:
            ConfigError: an option is unknown, cannot be used, or is not available in this version.
        """
        given = dict(locals())
        options = {field: given[field] for field in EngineOptions.__struct_fields__ if field != "model"}
        self._thread: EngineThread | None = None
        self._was_closed = False
        self.options = make_options(model, {**options, **unknown})
        if on_progress is not None and not callable(on_progress):
            raise ConfigError("on_progress: expected a function of one LoadProgress", option="on_progress")
        self._on_progress = on_progress
        self._opener = _opener or _CheckpointOpener()
        self._seeds = Seeds(seed)

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life; any thread may ask."""
        if self._was_closed:
            return EngineState.CLOSED
        return EngineState.NEW if self._thread is None else self._thread.state

    @property
    def name(self) -> str:
        """The name given, else the model's."""
        return self.options.name or self.options.model or "demo"

    def plan(self) -> MemoryPlan:
        """What the engine takes, in bytes. Of an engine that is not open it reads headers only.

        Raises:
            LoadError: the model is not there, or cannot be run.
        """
        thread = self._thread
        if thread is not None and thread.state in (EngineState.READY, EngineState.DRAINING):
            return thread.model.plan
        return self._opener.plan(self.options)

    def stats(self) -> Stats:
        """A snapshot; any thread, never blocks."""
        thread = self._thread
        if thread is None:
            return Stats(state=self.state)
        prompt_tokens, completion_tokens = thread.token_counts
        counts = {
            "requests": thread.num_requests,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
        }
        scheduler = thread.scheduler_stats()
        if scheduler is not None:
            shared = set(Stats.__struct_fields__) & set(scheduler.__struct_fields__)
            counts.update({field: getattr(scheduler, field) for field in shared})
        times = thread.step_times()
        return Stats(
            state=self.state,
            open_requests=thread.num_open_requests,
            forward_seconds=0.0 if times is None else times.forward_seconds,
            step_seconds=0.0 if times is None else times.step_seconds,
            **counts,
        )

    def render(self, messages: Sequence[Message], /, **template_args: object) -> Rendered:
        """A chat after the checkpoint's template, as text and ids.

        Raises:
            TemplateError: the template refused it, or there is none. InvalidRequest: these are no messages.
        """
        encoder = self._open_thread().encoder
        chat = parse_prompt(messages).chat
        if chat is None:
            raise InvalidRequest("messages: expected a sequence of messages", param="messages")
        if encoder is None:
            raise EngineClosed("the engine is closed: open it with `async with`")
        text = encoder.render(chat, **template_args)
        return Rendered(text=text, ids=encoder.encode_rendered(text))

    # ---- what a later version brings ----

    def map(self, prompts: Iterable[Prompt], /, **fields: Any) -> NoReturn:
        """Many prompts at once: in a later version."""
        raise not_yet("map")

    def session(self, **fields: Any) -> NoReturn:
        """A conversation: in a later version."""
        raise not_yet("session")

    def subscribe(self) -> NoReturn:
        """Typed lifecycle events: in a later version."""
        raise not_yet("subscribe")

    def trace(self, path: str | Path, /) -> NoReturn:
        """The last seconds of scheduling: in a later version."""
        raise not_yet("trace")

    # ---- parts of what waits ----

    def _begin_open(self) -> EngineThread:
        if self.state in _OPEN:
            raise ConfigError(f"open: the engine is {self.state.value} already; close it first, or make another")
        thread = EngineThread(self._opener, self.options, self._on_progress, name=f"streamgen-{next(_numbers)}")
        self._thread, self._was_closed = thread, False
        thread.start()
        return thread

    def _check_opened(self, thread: EngineThread) -> None:
        if thread.load_error is not None:
            raise thread.load_error
        if thread.closed.is_set():
            thread.check_ready()

    def _begin_close(self) -> EngineThread | None:
        self._was_closed = True
        thread = self._thread
        if thread is not None:
            thread.stop()
        return thread

    def _open_thread(self) -> EngineThread:
        thread = self._thread
        if thread is None or self._was_closed:
            raise EngineClosed(f"the engine is {self.state.value}: open it with `async with` or `open()`")
        return thread

    def _submission(self, prompt: Prompt, fields: Mapping[str, Any], **how: Any) -> Submission:
        spec = check_request(prompt, fields)
        thread = self._open_thread()
        thread.check_ready()
        return make_submission(thread, spec, self._seeds, **how)

    def _sample_submission(self, prompt: Prompt, n: int, best_of: int | None, fields: Mapping[str, Any]) -> Submission:
        n = check_count("n", n)
        count = n if best_of is None else check_count("best_of", best_of, low=n)
        return self._submission(prompt, fields, num_sequences=count, wants_logprobs=count > n)

    def _score_submission(self, prompt: Prompt, continuation: str | Sequence[int]) -> Submission:
        thread = self._open_thread()
        thread.check_ready()
        checked = check_continuation(continuation, thread.model)
        return self._submission(prompt, {"prompt_logprobs": 0}, continuation=checked)

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__name__} {self.name!r} {self.state.value}>"

    def __del__(self) -> None:
        thread: EngineThread | None = getattr(self, "_thread", None)  # absent if the options were refused
        if thread is not None and not self._was_closed and not thread.closed.is_set():
            thread.stop()
            warnings.warn(f"{self!r} was dropped while open, and closed", ResourceWarning, stacklevel=2, source=self)


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
    def stream(self, prompt: Prompt, /, *, output: type[T], **fields: Unpack[RequestFields]) -> Stream[T]: ...
    def stream(
        self,
        prompt: Prompt,
        /,
        *,
        output: type[T] | None = None,
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
        processors: Sequence[object] = (),
        request_id: str | None = None,
        **sampling_fields: Unpack[SamplingFields],
    ) -> Stream[T] | Stream[None]:
        """A request, checked; it runs once the stream is entered or read.

        prompt    text, token ids, or messages
        sampling  a `Sampling`; its fields may be given as keywords too, and those win
        tenant    requests of different tenants never share cached prefixes
        priority  larger runs first
        timeout   seconds until the request ends with DeadlineExceeded

        Raises:
            RequestError: the request cannot be run as it stands. EngineClosed: the engine is not open. EngineFailed.
        """
        given = dict(locals())
        fields = {name: given[name] for name in ("output", *_STREAM_FIELDS)}
        return cast("Stream[T]", Stream(self, self._submission(prompt, {**fields, **sampling_fields})))

    @overload
    async def generate(
        self, prompt: Prompt, /, *, output: None = None, **fields: Unpack[RequestFields]
    ) -> Completion[None]: ...
    @overload
    async def generate(
        self, prompt: Prompt, /, *, output: type[T], **fields: Unpack[RequestFields]
    ) -> Completion[T]: ...
    async def generate(
        self, prompt: Prompt, /, *, output: type[T] | None = None, **fields: Unpack[RequestFields]
    ) -> Completion[T] | Completion[None]:
        """The whole answer. Arguments as for `stream`.

        Raises:
            RequestError, AdmissionError, GenerationError, EngineFailed: `partial` holds what there is.
        """
        stream = Stream[T](self, self._submission(prompt, {"output": output, **fields}))
        async with stream:
            return await stream.final()

    async def sample(
        self, prompt: Prompt, /, *, n: int, best_of: int | None = None, **fields: Unpack[RequestFields]
    ) -> list[Completion[None]]:
        """`n` independent answers to one prompt, which is computed once.

        With `best_of` so many are made, and the `n` of the highest mean log-probability per token come back.
        """
        submission = self._sample_submission(prompt, n, best_of, fields)
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

    # ---- what a later version brings ----

    async def restart(self) -> None:
        """After EngineFailed: in a later version. Until then `aclose` and `open` do it."""
        raise not_yet("restart")

    async def beam_search(
        self, prompt: Prompt, /, *, width: int, length_penalty: float = 1.0, **fields: Unpack[RequestFields]
    ) -> list[Completion[None]]:
        """In a later version."""
        raise not_yet("beam_search")

    async def compile(self, output: object, /) -> NoReturn:
        """In a later version."""
        raise not_yet("compile")

    async def run_tools(
        self, prompt: Prompt, /, *, tools: Sequence[Callable[..., object]], max_rounds: int = 8, **fields: Any
    ) -> Completion[None]:
        """In a later version."""
        raise not_yet("run_tools")

    async def embed(self, texts: Sequence[str], /) -> list[list[float]]:
        """In a later version."""
        raise not_yet("embed")

    async def load_adapter(self, path: str | Path, /, *, name: str | None = None) -> NoReturn:
        """In a later version."""
        raise not_yet("load_adapter")

    async def sleep(self) -> None:
        """In a later version."""
        raise not_yet("sleep")

    async def wake(self) -> None:
        """In a later version."""
        raise not_yet("wake")


_STREAM_FIELDS = tuple(name for name in RequestFields.__annotations__ if name not in SamplingFields.__annotations__)


class _CheckpointOpener:
    """Opens real models. `execution` is imported when it is needed: it brings numpy and the kernels."""

    def open(
        self,
        options: EngineOptions,
        on_progress: Callable[[LoadProgress], None] | None,
        is_cancelled: Callable[[], bool],
    ) -> OpenModel:
        from streamgen.execution.model import open_model

        return open_model(options, on_progress, is_cancelled)

    def plan(self, options: EngineOptions) -> MemoryPlan:
        from streamgen.execution.model import plan_model

        return plan_model(options)


def begin_tokenize(thread: EngineThread, text: str) -> Call[tuple[int, ...]]:
    """Start to encode in a tokenizer thread."""
    check_text("text", text)
    encoder = thread.encoder
    if encoder is None:
        thread.check_ready()
        raise EngineClosed("the engine is closed: open it with `async with`")
    return thread.call(lambda: encoder.encode_text(text, add_bos=True))


def wants_logprobs(fields: Mapping[str, Any]) -> bool:
    """Whether the request itself asked for logprobs."""
    sampling: Sampling | None = fields.get("sampling")
    return fields.get("logprobs", sampling.logprobs if sampling is not None else None) is not None


def sampled(submission: Submission, n: int, *, keeps_logprobs: bool) -> list[Completion[None]]:
    """The best `n` completions of a request that has ended; raises what ended it."""
    for mailbox in submission.mailboxes:
        mailbox.raise_error()
    completions = [mailbox.completion() for mailbox in submission.mailboxes]
    if len(completions) > n:
        completions = sorted(completions, key=_mean_logprob, reverse=True)[:n]
        if not keeps_logprobs:
            completions = [structs.replace(completion, logprobs=None) for completion in completions]
    return completions


def scored(submission: Submission) -> tuple[TokenLogprob, ...]:
    """What a scoring request brought; raises what ended it."""
    mailbox = submission.mailboxes[0]
    mailbox.raise_error()
    return tuple(entry for entry in mailbox.completion().prompt_logprobs or () if entry is not None)


def _mean_logprob(completion: Completion[Any]) -> float:
    logprobs = completion.logprobs or ()
    return sum(entry.logprob for entry in logprobs) / len(logprobs) if logprobs else -math.inf


async def _run(submission: Submission) -> None:
    """Submit, and wait for every sequence; cancelled if the caller is."""
    submission.submit()
    try:
        for mailbox in submission.mailboxes:
            await mailbox.wait_end()
    finally:
        submission.cancel()


async def _join(thread: EngineThread) -> None:
    await thread.closed.wait()
    # `closed` is the last thing that the thread does; what is left of it takes microseconds.
    while thread.thread.is_alive():
        await anyio.lowlevel.checkpoint()


def not_yet(what: str) -> NotSupported:
    """The error of a method that a later version brings."""
    return NotSupported(f"{what}: not available in this version", param=what)
