"""One request on the host's side: its arguments, checked when it is made, and its way into the engine thread."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import Struct, structs

from streamgen.actors.core import MAX_SEQUENCES
from streamgen.config import MAX_NAME, MAX_SECONDS
from streamgen.errors import InvalidRequest, NotSupported, PromptTooLong
from streamgen.mailbox import End, Mailbox
from streamgen.messages import Submit
from streamgen.prompt import ParsedPrompt, Prompt, check_ids, check_text, parse_prompt
from streamgen.sampling import (
    LogitsProcessor,
    ResolvedSampling,
    Sampling,
    SamplingFields,
    make_sampling,
    resolve_sampling,
)

if TYPE_CHECKING:
    from streamgen.actors.model import OpenModel
    from streamgen.actors.supervisor import EngineThread
    from streamgen.completion import FinishReason
    from streamgen.grammar.outputs import OutputPlan
    from streamgen.tools import ToolPlan

MAX_PRIORITY = 1_000_000
MAX_PROCESSORS = 16
CACHE_SCOPES = ("private", "tenant", "public")
SLOW_POLICIES = ("coalesce", "pause", "cancel")

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment


class RequestFields(SamplingFields, total=False):
    """What `stream`, `generate` and `sample` take beside the prompt and `output`."""

    sampling: Sampling | None
    tools: Sequence[object]
    tool_choice: str
    tenant: str | None
    priority: int
    timeout: float | None
    first_token_timeout: float | None
    queue_timeout: float | None
    cache: str
    adapter: object | None
    on_slow: str
    processors: Sequence[LogitsProcessor]
    request_id: str | None


class RequestSpec(Struct, frozen=True, kw_only=True):
    """A checked request."""

    prompt: ParsedPrompt
    sampling: Sampling
    request_id: str
    tenant: str = ""
    priority: int = 0
    timeout: float | None = None
    queue_timeout: float | None = None
    first_token_timeout: float | None = None
    cache: str = "tenant"
    on_slow: str = "coalesce"
    processors: tuple[Callable[..., object], ...] = ()
    output: OutputPlan | None = None
    tools: ToolPlan | None = None


# What a later version brings: field -> (does this value work today, what works today).
_NOT_YET: dict[str, tuple[Callable[[Any], bool], str]] = {
    "adapter": (lambda v: v is None, "None"),
}
_OWN_FIELDS = (
    "sampling",
    "tenant",
    "priority",
    "timeout",
    "queue_timeout",
    "first_token_timeout",
    "cache",
    "on_slow",
    "processors",
    "request_id",
    "output",
    "tools",
    "tool_choice",
)
_KNOWN = (*_OWN_FIELDS, *_NOT_YET, *Sampling.__struct_fields__)


def check_request(prompt: Prompt, fields: Mapping[str, Any]) -> RequestSpec:
    """Check everything that needs no model.

    Raises:
        InvalidRequest: a field is unknown, of a wrong type or out of range. NotSupported: a later version has it.
    """
    for name, value in fields.items():
        _check_known(name)
        if name in _NOT_YET and not _NOT_YET[name][0](value):
            raise NotSupported(f"{name}: not available in this version; use {_NOT_YET[name][1]}", param=name)
    sampling = fields.get("sampling")
    if sampling is not None and not isinstance(sampling, Sampling):
        raise InvalidRequest(f"sampling: expected a Sampling, got {type(sampling).__name__}", param="sampling")
    sampling_fields = {name: value for name, value in fields.items() if name in Sampling.__struct_fields__}
    parsed, joined = parse_prompt(prompt), make_sampling(sampling, sampling_fields)
    return RequestSpec(
        prompt=parsed,
        sampling=joined,
        output=_read_output(fields.get("output"), joined),
        tools=_read_tools(fields.get("tools", ()), fields.get("tool_choice", "auto"), parsed),
        request_id=_check_name("request_id", fields.get("request_id")) or f"req_{os.urandom(8).hex()}",
        tenant=_check_name("tenant", fields.get("tenant")) or "",
        priority=_check_priority(fields.get("priority", 0)),
        timeout=_check_timeout("timeout", fields.get("timeout")),
        queue_timeout=_check_timeout("queue_timeout", fields.get("queue_timeout")),
        first_token_timeout=_check_timeout("first_token_timeout", fields.get("first_token_timeout")),
        cache=_check_choice("cache", fields.get("cache", "tenant"), CACHE_SCOPES),
        on_slow=_check_choice("on_slow", fields.get("on_slow", "coalesce"), SLOW_POLICIES),
        processors=_check_processors(fields.get("processors", ())),
    )


def _read_output(output: object, sampling: Sampling) -> OutputPlan | None:
    """What the output has to be. A grammar decides where it ends: there is nothing for stop strings and ids to do."""
    if output is None:
        return None
    from streamgen.grammar.outputs import read_output  # what types mean is known where one is asked for

    for name in ("stop", "stop_ids"):
        if getattr(sampling, name):
            why = "a request with output= ends where its value does"
            raise InvalidRequest(f"{name}: {why}; leave {name} out", param=name)
    return read_output(output)


def _read_tools(tools: Any, choice: Any, prompt: ParsedPrompt) -> ToolPlan | None:
    """Functions that the model may call."""
    if isinstance(tools, Sequence) and not tools and choice in ("auto", "none"):
        return None
    from streamgen.tools import read_tools

    plan = read_tools(tools, choice)
    if prompt.chat is None:
        raise InvalidRequest("tools: expected a chat as the prompt, since its template describes them", param="tools")
    return plan


def check_against_model(spec: RequestSpec, model: OpenModel) -> None:
    """Check what needs the open model: ids against the vocabulary, and their number against the context.

    Raises:
        InvalidRequest, PromptTooLong. NotSupported: this engine has no logits processors.
    """
    if spec.processors and not model.supports_processors:
        raise NotSupported(
            'processors: functions of this process cannot run in this engine; use a real one with isolation="thread"',
            param="processors",
        )
    vocab_size = model.config.vocab_size
    if spec.prompt.ids is not None:
        _check_range("prompt", spec.prompt.ids, vocab_size)
        max_context = model.plan.max_context
        if len(spec.prompt.ids) >= max_context:
            raise PromptTooLong(
                f"prompt: expected < {max_context} tokens (max_context), got {len(spec.prompt.ids)}",
                prompt_tokens=len(spec.prompt.ids),
                max_context=max_context,
            )
    _check_range("stop_ids", spec.sampling.stop_ids or (), vocab_size)
    _check_range("logit_bias", tuple(spec.sampling.logit_bias or ()), vocab_size)


def check_continuation(continuation: str | Sequence[int], model: OpenModel) -> str | tuple[int, ...]:
    """What `score` shall score.

    Raises:
        InvalidRequest: empty, or ids out of range.
    """
    if isinstance(continuation, str):
        return check_text("continuation", continuation)
    if not isinstance(continuation, Sequence) or not continuation:
        raise InvalidRequest("continuation: expected text or token ids that are not empty", param="continuation")
    ids = check_ids("continuation", continuation)
    _check_range("continuation", ids, model.config.vocab_size)
    return ids


def check_count(name: str, value: Any, *, low: int = 1) -> int:
    """A number of sequences.

    Raises:
        InvalidRequest: not an integer between `low` and MAX_SEQUENCES.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_SEQUENCES:
        got = value if isinstance(value, int) else type(value).__name__
        raise InvalidRequest(f"{name}: expected an integer >= {low} and <= {MAX_SEQUENCES}, got {got}", param=name)
    return value


class Seeds:
    """Seeds for requests that bring none: a fixed series where the engine has a seed, else random ones."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._counter = itertools.count(1)

    def next(self) -> int:
        """A seed that no other request has."""
        if self._seed is None:
            return int.from_bytes(os.urandom(8), "little")
        return _mix((self._seed + next(self._counter) * _GOLDEN) & _MASK)


class Submission:
    """A request on its way: posted once, cancelled at most once, one mailbox per sequence.

    scope   name of a prefix-cache scope of its own, instead of what `cache` says
    known, pin   as in `Submit`
    """

    def __init__(
        self,
        thread: EngineThread,
        spec: RequestSpec,
        sampling: ResolvedSampling,
        *,
        num_sequences: int = 1,
        continuation: str | tuple[int, ...] | None = None,
        known: tuple[int, ...] = (),
        pin: str = "",
        scope: str | None = None,
    ) -> None:
        self.id = spec.request_id
        self._thread = thread
        self._spec = spec
        self._sampling = sampling
        self._continuation = continuation
        self._known = known
        self._pin = pin
        self._scope = scope
        self._number: int | None = None
        self._is_cancelled = False
        self.processors = spec.processors
        self.output = spec.output
        self.tools = spec.tools
        self._arrival: float | None = None
        self.mailboxes = tuple(Mailbox(self.id, clock=thread.world.clock) for _ in range(num_sequences))

    def submit(self) -> None:
        """Post the request, the first time it is called.

        Raises:
            AdmissionError, EngineFailed: the engine does not take it.
        """
        if self._number is None and not self._is_cancelled:
            self._arrival = self._thread.world.clock()
            for index, mailbox in enumerate(self.mailboxes):
                mailbox.when_caught_up(partial(self._resume, index))
            self._number = self._thread.submit(self)
            if self._is_cancelled:  # by another thread, meanwhile
                self._thread.cancel(self._number)

    def cancel(self) -> None:
        """End it soon; thread-safe, idempotent, never blocks. Ended requests are left as they are."""
        if self._is_cancelled or self.is_over:
            return
        self._is_cancelled = True
        if self._number is not None:
            self._thread.cancel(self._number)
        else:
            end_locally(self.mailboxes, "cancelled")

    def moved(self, thread: EngineThread, number: int) -> None:
        """Another engine thread has it now."""
        self._thread, self._number = thread, number
        if self._is_cancelled:
            thread.cancel(number)

    @property
    def is_running(self) -> bool:
        """Posted, not ended, and nobody has cancelled it."""
        return self._number is not None and not self._is_cancelled and not self.is_over

    @property
    def is_submitted(self) -> bool:
        """Whether the engine has it, or had it."""
        return self._number is not None

    @property
    def is_over(self) -> bool:
        """Every sequence has its terminal."""
        return all(mailbox.end is not None for mailbox in self.mailboxes)

    def _resume(self, index: int) -> None:
        if self._number is not None:
            self._thread.resume(self._number, index)

    def message(self, number: int) -> Submit:
        """The request, under this number."""
        spec = self._spec
        return Submit(
            request_id=number,
            sampling=self._sampling,
            text=spec.prompt.text,
            ids=spec.prompt.ids,
            chat=spec.prompt.chat,
            continuation=self._continuation,
            num_sequences=len(self.mailboxes),
            scope=self._scope or _scope(spec),
            tenant=spec.tenant,
            priority=spec.priority,
            known=self._known,
            pin=self._pin,
            on_slow=spec.on_slow,
            output=None if spec.output is None else spec.output.source,
            tools=() if spec.tools is None else spec.tools.definitions,
            tool_choice="none" if spec.tools is None else spec.tools.choice,
            has_processors=bool(self.processors),
            arrival=self._arrival or 0.0,
            timeout=spec.timeout,
            queue_timeout=spec.queue_timeout,
            first_token_timeout=spec.first_token_timeout,
        )


def make_submission(
    thread: EngineThread,
    spec: RequestSpec,
    seeds: Seeds,
    *,
    wants_logprobs: bool = False,
    **how: Any,
) -> Submission:
    """A checked request for an open engine. `wants_logprobs` asks for them whatever the request says."""
    model = thread.model
    check_against_model(spec, model)
    sampling = resolve_sampling(spec.sampling, model.sampling_defaults, seed=seeds.next())
    if wants_logprobs and sampling.logprobs is None:
        sampling = structs.replace(sampling, logprobs=0)
    return Submission(thread, spec, sampling, **how)


def _scope(spec: RequestSpec) -> str:
    """The prefix-cache scope. The first letter keeps scopes of different kinds apart."""
    match spec.cache:
        case "public":
            return "public"
        case "private":
            return f"request:{os.urandom(16).hex()}"
        case _:
            return f"tenant:{spec.tenant}"


def end_locally(mailboxes: tuple[Mailbox, ...], reason: FinishReason) -> None:
    """The terminal of a request that never reached the engine."""
    for mailbox in mailboxes:
        mailbox.finish(End(finish_reason=reason))


def _check_known(name: str) -> None:
    if name in _KNOWN:
        return
    near = get_close_matches(name, _KNOWN, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidRequest(f"unknown field {name!r}{hint}", param=name)


def _check_name(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidRequest(f"{name}: expected a string, got {type(value).__name__}", param=name)
    if not 1 <= len(value) <= MAX_NAME:
        raise InvalidRequest(f"{name}: expected 1 to {MAX_NAME} characters, got {len(value)}", param=name)
    return value


def _check_priority(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"priority: expected an integer, got {type(value).__name__}", param="priority")
    if abs(value) > MAX_PRIORITY:
        raise InvalidRequest(f"priority: expected >= -{MAX_PRIORITY} and <= {MAX_PRIORITY}", param="priority")
    return value


def _check_timeout(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name}: expected seconds, got {type(value).__name__}", param=name)
    if not (math.isfinite(value) and 0 < value <= MAX_SECONDS):
        raise InvalidRequest(f"{name}: expected seconds > 0 and <= {MAX_SECONDS:g}, got {value}", param=name)
    return float(value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        got = repr(value)[:40] if isinstance(value, str) else type(value).__name__
        raise InvalidRequest(f"{name}: expected one of {', '.join(choices)}, got {got}", param=name)
    return str(value)


def _check_processors(value: Any) -> tuple[Callable[..., object], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidRequest(
            f"processors: expected a sequence of functions, got {type(value).__name__}", param="processors"
        )
    if len(value) > MAX_PROCESSORS:
        raise InvalidRequest(f"processors: expected <= {MAX_PROCESSORS}, got {len(value)}", param="processors")
    for processor in value:
        if not callable(processor):
            raise InvalidRequest(
                f"processors: expected functions of (ids, logits), got {type(processor).__name__}", param="processors"
            )
    return tuple(value)


def _check_range(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequest(f"{name}: expected token ids < {vocab_size} (the vocabulary), got {wrong}", param=name)


def _mix(value: int) -> int:
    """The finalizer of splitmix64: https://prng.di.unimi.it/splitmix64.c"""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
