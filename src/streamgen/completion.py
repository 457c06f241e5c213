"""What a request gives back: deltas while it runs, one `Completion` at the end, and the events between."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from streamgen.errors import OutputInvalid

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "deadline", "error"]


class TopLogprob(Struct, frozen=True, kw_only=True):
    """One alternative at a position: id, its text, natural-log probability."""

    id: int
    text: str
    logprob: float


class TokenLogprob(Struct, frozen=True, kw_only=True):
    """The token at one position: id, text, natural-log probability, rank (1 = likeliest), likeliest alternatives."""

    id: int
    text: str
    logprob: float
    rank: int
    top: tuple[TopLogprob, ...] = ()


class ToolDelta(Struct, frozen=True, kw_only=True, tag=True):
    """More of a call: `arguments` is a piece of the JSON text that `ToolCall.arguments` has whole."""

    index: int
    id: str
    name: str
    arguments: str = ""


class ToolCall(Struct, frozen=True, kw_only=True, tag=True):
    """A call that the model has written. `arguments` is JSON text as it came: whether it is valid is not known yet."""

    id: str
    name: str
    arguments: str = "{}"

    @property
    def parsed(self) -> dict[str, Any]:
        """The arguments as an object.

        Raises:
            OutputInvalid: they are none.
        """
        try:
            return msgspec.json.decode(self.arguments, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise OutputInvalid(f"tool call {self.name!r}: expected a JSON object as arguments: {error}") from None

    @property
    def message(self) -> dict[str, Any]:
        """This call as an entry of an assistant message's `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class Delta(Struct, frozen=True, kw_only=True):
    """What a stream gained since the last delta. Texts concatenate to `Completion.text`, ids to `Completion.ids`.

    `ids` may run ahead of `text`: a character cut by a token border, or the beginning of a stop string, is held back.
    Several kinds of output in one delta have no order; `Stream.events` keeps it.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolDelta, ...] = ()


class Usage(Struct, frozen=True, kw_only=True):
    """Token counts of one request."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class Timings(Struct, frozen=True, kw_only=True):
    """Seconds since the request was made; None where the stage was not reached."""

    tokenized: float | None = None
    first_token: float | None = None
    finished: float | None = None


class Completion(Struct, Generic[T], frozen=True, kw_only=True):
    """The result of a request, whole or partial.

    finish_reason   None while it runs
    stop            the stop string or stop id that ended it
    reasoning       what the model wrote before its answer, where its format tells the two apart
    tool_calls      calls in the order in which they were written; one that was cut off is the last
    message         the assistant message, to append to a chat
    prompt_logprobs one entry per prompt token, the first None
    """

    id: str
    text: str = ""
    parsed: T | None = None
    ids: tuple[int, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    usage: Usage = Usage()
    timings: Timings = Timings()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def message(self) -> dict[str, object]:
        """This completion as an assistant message, in OpenAI's form; reasoning as templates look for it."""
        message: dict[str, object] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["content"] = self.text or None
            message["tool_calls"] = [call.message for call in self.tool_calls]
        return message


class Started(Struct, frozen=True, kw_only=True, tag=True):
    """The first step that works on the request has run."""

    id: str
    prompt_tokens: int
    cached_tokens: int


class Text(Struct, frozen=True, kw_only=True, tag=True):
    """Answer text."""

    text: str


class Reasoning(Struct, frozen=True, kw_only=True, tag=True):
    """Text that the model wrote before its answer."""

    text: str


class Finished(Struct, Generic[T], frozen=True, kw_only=True, tag=True):
    """The one terminal event."""

    completion: Completion[T]


Event = Started | Text | Reasoning | ToolDelta | ToolCall | Finished[Any]

Part: TypeAlias = Text | Reasoning | ToolDelta | ToolCall
"""A piece of an output whose parts are told apart. A `ToolCall` says that the call of the deltas before it is whole."""


class PartsLog:
    """The output of a sequence whose parts are told apart, in order, and what is unread of it.

    Nearly no sequence has parts that anybody tells apart, so a mailbox makes this with the first.
    """

    def __init__(self) -> None:
        self.num_reasoning = 0  # tokens
        self._parts: list[Part] = []
        self._read = 0
        self._taken = 0

    @property
    def has_unread(self) -> bool:
        """Whether `take` would find anything."""
        return self._read < len(self._parts)

    def put(self, parts: Sequence[Part], num_reasoning: int) -> None:
        """Add output."""
        self._parts += parts
        self.num_reasoning += num_reasoning

    def take(self) -> tuple[str, tuple[ToolDelta, ...]]:
        """Unread reasoning and calls."""
        self._taken, self._read = self._read, len(self._parts)
        new = self._parts[self._taken :]
        return "".join(p.text for p in new if isinstance(p, Reasoning)), _merge_calls(new)

    def taken(self) -> list[Part]:
        """What the last `take` took, in order."""
        return _merge_parts(self._parts[self._taken : self._read])

    def reasoning(self) -> str:
        """The reasoning so far."""
        return "".join(part.text for part in self._parts if isinstance(part, Reasoning))

    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far, the last of them perhaps unfinished."""
        deltas = _merge_calls(self._parts)
        return tuple(ToolCall(id=delta.id, name=delta.name, arguments=delta.arguments) for delta in deltas)


def _merge_calls(parts: Sequence[Part]) -> tuple[ToolDelta, ...]:
    """One delta for each call."""
    pieces: dict[int, list[ToolDelta]] = {}
    for part in parts:
        if isinstance(part, ToolDelta):
            pieces.setdefault(part.index, []).append(part)
    return tuple(_join_deltas(deltas) for deltas in pieces.values())


def _join_deltas(deltas: Sequence[ToolDelta]) -> ToolDelta:
    first = deltas[0]
    arguments = "".join([delta.arguments for delta in deltas])
    return ToolDelta(index=first.index, id=first.id, name=first.name, arguments=arguments)


def _merge_parts(parts: Sequence[Part]) -> list[Part]:
    """The same with neighbours of one kind as one."""
    merged: list[Part] = []
    for _, group in itertools.groupby(parts, _kind):
        run = list(group)
        match run[0]:
            case Text():
                merged.append(Text(text="".join([part.text for part in run if isinstance(part, Text)])))
            case Reasoning():
                merged.append(Reasoning(text="".join([part.text for part in run if isinstance(part, Reasoning)])))
            case ToolDelta():
                merged.append(_join_deltas([part for part in run if isinstance(part, ToolDelta)]))
            case ToolCall():
                merged += run
    return merged


def _kind(part: Part) -> tuple[type[Part], int]:
    return type(part), part.index if isinstance(part, ToolDelta) else 0
