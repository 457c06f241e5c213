"""The loop that lets a model use functions: generate, call what it asks for, hand the results back, until it answers.

`ToolLoop` decides and keeps the conversation; `run_tools` and `run_tools_blocking` wait for the engine and run the
functions.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import msgspec
from msgspec import Struct, structs

from streamgen.completion import Completion, ToolCall, Usage
from streamgen.errors import DeadlineExceeded, IncompleteOutput, InvalidRequest, OutputInvalid
from streamgen.prompt import tool_result
from streamgen.tools import read_tools

if TYPE_CHECKING:
    from streamgen.prompt import Prompt

logger = logging.getLogger(__name__)

MAX_ROUNDS = 8
MAX_ERROR = 2_000  # characters of an exception that the model gets to read


class Generates(Protocol):
    """What the loop needs of an engine."""

    @property
    def generate(self) -> Callable[..., Awaitable[Completion[Any]]]:
        """`TextEngine.generate`."""
        ...


class GeneratesBlocking(Protocol):
    """The same of an engine for plain code."""

    @property
    def generate(self) -> Callable[..., Completion[Any]]:
        """`generate` of `sync.Engine`."""
        ...


async def run_tools(
    engine: Generates,
    prompt: Prompt,
    /,
    *,
    tools: Sequence[Callable[..., object]],
    max_rounds: int = MAX_ROUNDS,
    tool_timeout: float | None = None,
    **fields: Any,
) -> Completion[Any]:
    """Generate and call functions until the model answers without a call.

    Functions of one answer run at the same time, `def` ones in worker threads. What a function returns goes back as
    text or JSON. An exception goes back as well, as a text that names it: the model may try again. A cancellation is
    never caught. `tool_choice` other than "auto" and "none" holds for the first round.

    tools          functions; classes and dicts have nothing to call
    max_rounds     how many answers the model may give
    tool_timeout   seconds that one function may take; then the model hears that it took too long. A `def` function runs
                   on in its thread, and its result is dropped
    fields         as for `generate`; `timeout` is for the whole loop, functions included

    Returns the last completion, with the usage of all of them.

    Raises:
        IncompleteOutput: the model still calls after `max_rounds`; `partial` is its last completion, whose calls have
            not been run.
        DeadlineExceeded: the timeout passed. InvalidRequest and what `generate` raises.
    """
    loop = ToolLoop(prompt, tools, max_rounds=max_rounds, tool_timeout=tool_timeout, fields=fields)
    try:
        with anyio.fail_after(loop.timeout):
            while True:
                completion = await engine.generate(loop.messages, **loop.next_fields())
                calls = loop.take(completion)
                if not calls:
                    return loop.result(completion)
                loop.add_results(await _run_all(calls, tool_timeout))
    except TimeoutError as error:
        if isinstance(error, DeadlineExceeded) or loop.timeout is None:
            raise
        raise loop.deadline() from None


def run_tools_blocking(
    engine: GeneratesBlocking,
    prompt: Prompt,
    /,
    *,
    tools: Sequence[Callable[..., object]],
    max_rounds: int = MAX_ROUNDS,
    **fields: Any,
) -> Completion[Any]:
    """`run_tools` for plain code: functions run one after the other, in the caller's thread."""
    loop = ToolLoop(prompt, tools, max_rounds=max_rounds, tool_timeout=None, fields=fields)
    for name, function in loop.plan.functions.items():
        if inspect.iscoroutinefunction(function):
            raise InvalidRequest(f"tools: {name}: an async function needs the async engine's run_tools", param="tools")
    while True:
        completion = engine.generate(loop.messages, **loop.next_fields())
        calls = loop.take(completion)
        if not calls:
            return loop.result(completion)
        loop.add_results([(call.call, call.run()) for call in calls])


class ToolLoop:
    """One conversation that uses tools.

    messages   the conversation so far
    timeout    seconds that all of it may take
    """

    def __init__(
        self,
        prompt: Prompt,
        tools: Sequence[object],
        *,
        max_rounds: int,
        tool_timeout: float | None,
        fields: Mapping[str, Any],
    ) -> None:
        self.plan = read_tools(tools, fields.get("tool_choice", "auto"))
        for name, tool in self.plan.tools.items():
            if tool.function is None:
                raise InvalidRequest(f"tools: {name}: expected a function, which can be called", param="tools")
        if isinstance(max_rounds, bool) or not isinstance(max_rounds, int) or max_rounds < 1:
            raise InvalidRequest(f"max_rounds: expected an integer >= 1, got {max_rounds!r:.40}", param="max_rounds")
        self.messages = _check_messages(prompt)
        self.timeout = _check_seconds("timeout", fields.get("timeout"))
        _check_seconds("tool_timeout", tool_timeout)
        self._fields = {**fields, "tools": tools}
        self._max_rounds = max_rounds
        self._started = time.monotonic()
        self._num_rounds = 0
        self._usage = Usage()
        self._last: Completion[Any] | None = None

    def next_fields(self) -> dict[str, Any]:
        """What the next round is generated with."""
        fields = dict(self._fields)
        if self._num_rounds:
            fields.pop("request_id", None)  # it names the first
            if self.plan.choice != "none":
                fields["tool_choice"] = "auto"
        if self.timeout is not None:
            left = self.timeout - (time.monotonic() - self._started)
            if left <= 0:
                raise self.deadline()
            fields["timeout"] = left
        return fields

    def take(self, completion: Completion[Any]) -> list[PreparedCall]:
        """The calls that a completion asks for; none if it is the answer.

        Raises:
            IncompleteOutput: it asks for calls, and was the last that may.
        """
        self._num_rounds += 1
        self._usage = _add(self._usage, completion.usage)
        self._last = completion
        if completion.finish_reason != "tool_calls":
            return []
        if self._num_rounds >= self._max_rounds:
            raise IncompleteOutput(
                f"run_tools: the model still calls functions after {self._num_rounds} rounds; raise max_rounds, or say "
                "in the prompt when to stop",
                request_id=completion.id,
                partial=self.result(completion),
            )
        self.messages.append(completion.message)
        return [self._prepare(call) for call in completion.tool_calls]

    def add_results(self, results: Sequence[tuple[ToolCall, str]]) -> None:
        """What the functions returned, in the order of the calls."""
        self.messages += [tool_result(text, tool_call_id=call.id, name=call.name) for call, text in results]

    def result(self, completion: Completion[Any]) -> Completion[Any]:
        """The completion with the usage of all rounds."""
        return structs.replace(completion, usage=self._usage)

    def deadline(self) -> DeadlineExceeded:
        """What to raise once the timeout has passed."""
        partial_ = None if self._last is None else self.result(self._last)
        return DeadlineExceeded(
            f"run_tools: the timeout of {self.timeout:g} s passed in round {self._num_rounds + 1}", partial=partial_
        )

    def _prepare(self, call: ToolCall) -> PreparedCall:
        try:
            arguments = self.plan.parse_arguments(call.name, call.arguments)
        except OutputInvalid as error:
            return PreparedCall(call, None, error.message)
        function = self.plan.functions[call.name]
        return PreparedCall(call, partial(function, **arguments))


class PreparedCall(Struct, frozen=True):
    """A call with its function, or with what is wrong with it."""

    call: ToolCall
    function: Callable[[], Any] | None
    error: str = ""

    def run(self) -> str:
        """Call it here; what the model gets to read."""
        if self.function is None:
            return f"error: {self.error}"
        try:
            return _as_text(self.function())
        except Exception as error:
            return _explain(self.call, error)

    async def run_async(self, timeout: float | None) -> str:  # noqa: ASYNC109  # it becomes a text, no exception
        """Await it, or call it in a worker thread."""
        if self.function is None:
            return f"error: {self.error}"
        try:
            with anyio.move_on_after(timeout):
                if _is_async(self.function):
                    return _as_text(await self.function())
                value = await anyio.to_thread.run_sync(self.function, abandon_on_cancel=True)
                return _as_text(await value if inspect.isawaitable(value) else value)
        except Exception as error:
            return _explain(self.call, error)
        return f"error: it took more than {timeout:g} s"


async def _run_all(calls: Sequence[PreparedCall], timeout: float | None) -> list[tuple[ToolCall, str]]:  # noqa: ASYNC109
    texts = [""] * len(calls)

    async def run(index: int) -> None:
        texts[index] = await calls[index].run_async(timeout)

    async with anyio.create_task_group() as group:
        for index in range(len(calls)):
            group.start_soon(run, index)
    return [(call.call, text) for call, text in zip(calls, texts, strict=True)]


def _is_async(function: Callable[..., Any]) -> bool:
    inner = function
    while isinstance(inner, partial):
        inner = inner.func
    return inspect.iscoroutinefunction(inner)


def _explain(call: ToolCall, error: Exception) -> str:
    logger.debug("tool %s failed", call.name, exc_info=error)
    return f"error: {type(error).__name__}: {error}"[:MAX_ERROR]


def _as_text(value: Any) -> str:
    """Text as it is, all else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=_to_plain).decode()


def _to_plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)  # pydantic's
    if dump is None:
        raise TypeError(f"expected a result that can be written as JSON, got {type(value).__name__}")
    return dump(mode="json")


def _check_messages(prompt: Any) -> list[Any]:
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    if not is_list or not all(isinstance(message, Mapping) for message in prompt):
        raise InvalidRequest("prompt: expected messages, to which calls and results can be added", param="prompt")
    return list(prompt)


def _check_seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InvalidRequest(f"{name}: expected seconds > 0, got {value!r:.40}", param=name)
    return float(value)


def _add(a: Usage, b: Usage) -> Usage:
    return Usage(**{name: getattr(a, name) + getattr(b, name) for name in Usage.__struct_fields__})
