"""What engines of every kind of host share: options, and all that returns at once.

`engine.Engine` adds what waits on asyncio or trio, `sync.Engine` what waits in a plain thread.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import TYPE_CHECKING, Any, Never

from msgspec import structs

from streamgen.actors.recorder import Recorder
from streamgen.actors.supervisor import TAKES_REQUESTS, EngineThread
from streamgen.actors.world import RealWorld
from streamgen.config import EngineOptions, EngineState, LoadProgress, MemoryPlan, make_options
from streamgen.errors import ConfigError, EngineClosed, InvalidRequest, NotSupported
from streamgen.grammar.source import RegexSource
from streamgen.mailbox import End, Wakes
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
from streamgen.tracefile import write_trace
from streamgen.values import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from streamgen.actors.call import Call
    from streamgen.actors.compiler import CompiledGrammar
    from streamgen.actors.model import ModelOpener, OpenModel
    from streamgen.actors.routes import Owner
    from streamgen.actors.world import World
    from streamgen.completion import Completion, TokenLogprob
    from streamgen.grammar.outputs import OutputPlan
    from streamgen.lifecycle import EventStream
    from streamgen.mailbox import Mailbox

_OPEN = (EngineState.LOADING, EngineState.READY, EngineState.DRAINING, EngineState.ASLEEP)
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
        _world: World | None = None,
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
        self._world = _world or RealWorld()
        self._recorder = Recorder(clock=self._world.clock)
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
        if thread is not None and thread.state in (EngineState.READY, EngineState.DRAINING, EngineState.ASLEEP):
            return thread.model.plan
        return self._opener.plan(self.options)

    def stats(self) -> Stats:
        """A snapshot; any thread, never blocks."""
        thread = self._thread
        latencies = self._recorder.latencies()
        if thread is None:
            return Stats(state=self.state, latencies=latencies)
        prompt_tokens, completion_tokens = thread.routes.token_counts
        counts = {
            "requests": thread.routes.num_requests,
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
        }
        scheduler = thread.scheduler
        if scheduler is None:
            return Stats(state=self.state, open_requests=len(thread.routes), latencies=latencies, **counts)
        snapshot, times = scheduler.stats, scheduler.times
        shared = set(Stats.__struct_fields__) & set(snapshot.__struct_fields__)
        counts.update({field: getattr(snapshot, field) for field in shared})
        return Stats(
            state=self.state,
            open_requests=len(thread.routes),
            forward_seconds=times.forward_seconds,
            step_seconds=times.step_seconds,
            latencies=latencies,
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
        text = encoder.render(chat, **template_args)
        return Rendered(text=text, ids=encoder.encode_rendered(text))

    @property
    def load_progress(self) -> LoadProgress | None:
        """How far loading is, or was; any thread may ask. None before it began."""
        thread = self._thread
        return None if thread is None else thread.progress

    def subscribe(self) -> EventStream:
        """What happens to requests and steps from now on, as typed events; any engine state, any loop or thread.

        Events that are not read in time are dropped, oldest first, and counted: `EventStream.dropped`.
        """
        return self._recorder.subscribe()

    def trace(self, path: str | Path, /) -> None:
        """Write the last 30 seconds of scheduling as a Chrome trace: one row a sequence, one for the device.

        Open it in https://ui.perfetto.dev or chrome://tracing. Blocks while the file is written.
        """
        write_trace(path, self._recorder.snapshot())

    # ---- parts of what waits ----

    def _begin_open(self) -> EngineThread:
        if self.state in _OPEN:
            raise ConfigError(f"open: the engine is {self.state.value} already; close it first, or make another")
        self._was_closed = False
        return self._start_thread()

    def _start_thread(self) -> EngineThread:
        self._thread = thread = EngineThread(
            self._opener,
            self.options,
            self._on_progress,
            name=f"streamgen-{next(_numbers)}",
            world=self._world,
            recorder=self._recorder,
        )
        thread.start()
        return thread

    def _begin_restart(self) -> tuple[EngineThread, list[Owner]]:
        """The thread that failed, and its requests that can go on."""
        thread = self._thread
        if self.state is not EngineState.FAILED or thread is None:
            raise ConfigError(f"restart: it is for an engine that failed, this one is {self.state.value}")
        return thread, thread.rescue()

    def _end_restart(self, owners: list[Owner]) -> None:
        """Go on with the requests, or end them if the engine did not come back."""
        thread = self._thread
        assert thread is not None, "a restart without a thread"
        if thread.state in TAKES_REQUESTS:
            for owner in owners:
                thread.adopt(owner)
        else:
            lose(owners)

    def _check_opened(self, thread: EngineThread) -> None:
        if thread.load_error is not None:
            raise thread.load_error
        if thread.closed.is_set():
            thread.check_ready()

    def _begin_close(self) -> EngineThread | None:
        self._was_closed = True
        thread = self._thread
        if thread is None or thread.state in (EngineState.FAILED, EngineState.CLOSED):
            self._recorder.state_changed(EngineState.CLOSED)  # its thread has had its last word
        if thread is not None:
            thread.stop()
        return thread

    def _open_thread(self) -> EngineThread:
        thread = self._thread
        if thread is None or self._was_closed:
            raise EngineClosed(f"the engine is {self.state.value}: open it with `async with` or `open()`")
        return thread

    def _unpin(self, key: str) -> None:
        """Pages kept under this key may go; takes no lock, in any state."""
        thread = self._thread
        if thread is not None:
            thread.unpin(key)

    def _begin_compile(self, output: object) -> tuple[OutputPlan, Call[CompiledGrammar]]:
        from streamgen.grammar.outputs import read_output  # what types mean is known where one is asked for

        plan = read_output(output)
        source = plan.source or RegexSource(pattern=ANY_TEXT)
        return plan, self._open_thread().compile(source)

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


ANY_TEXT = r"[\s\S]*"
STREAM_FIELDS = tuple(name for name in RequestFields.__annotations__ if name not in SamplingFields.__annotations__)


class _CheckpointOpener:
    """Opens real models. `execution` is imported when it is needed: it brings numpy and the kernels."""

    def open(
        self,
        options: EngineOptions,
        on_progress: Callable[[LoadProgress], None] | None,
        is_cancelled: Callable[[], bool],
    ) -> OpenModel:
        if options.isolation == "process":
            from streamgen.execution.remote import open_remote

            return open_remote(options, on_progress, is_cancelled)
        from streamgen.execution.model import open_model

        return open_model(options, on_progress, is_cancelled)

    def plan(self, options: EngineOptions) -> MemoryPlan:
        from streamgen.execution.model import plan_model

        return plan_model(options)


def begin_tokenize(thread: EngineThread, text: str) -> Call[tuple[int, ...]]:
    """Start to encode in a tokenizer thread."""
    check_text("text", text)
    encoder = thread.encoder
    return thread.call(lambda: encoder.encode_text(text, add_bos=True))


def wants_logprobs(fields: Mapping[str, Any]) -> bool:
    """Whether the request itself asked for logprobs."""
    sampling: Sampling | None = fields.get("sampling")
    return fields.get("logprobs", sampling.logprobs if sampling is not None else None) is not None


def sampled(submission: Submission, n: int, *, keeps_logprobs: bool) -> list[Completion[Any]]:
    """The best `n` completions of a request that has ended; raises what ended it."""
    for mailbox in submission.mailboxes:
        mailbox.raise_error()
    completions = [Outcome(submission.output).check(mailbox.completion()) for mailbox in submission.mailboxes]
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


def collect(submission: Submission) -> tuple[Mailbox, ...]:
    """Submit a request whose output nobody reads piece by piece."""
    submission.submit()
    for mailbox in submission.mailboxes:
        mailbox.collect()
    return submission.mailboxes


def lose(owners: list[Owner]) -> None:
    """End requests whose engine did not come back."""
    wakes = Wakes()
    end = End(finish_reason="error", code="engine_failed", message="the engine failed, and could not be restarted")
    for owner in owners:
        for mailbox in owner.mailboxes:
            wakes.add(mailbox.finish(end))
    wakes.flush()


def not_yet(what: str) -> NotSupported:
    """The error of a method that a later version brings."""
    return NotSupported(f"{what}: not available in this version", param=what)
