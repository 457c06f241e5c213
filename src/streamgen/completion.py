"""What a request gives back: deltas while it runs, one `Completion` at the end, and the events between."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from msgspec import Struct

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


class Delta(Struct, frozen=True, kw_only=True):
    """What a stream gained since the last delta. Texts concatenate to `Completion.text`, ids to `Completion.ids`.

    `ids` may run ahead of `text`: a character cut by a token border, or the beginning of a stop string, is held back.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


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
    message         the assistant message, to append to a chat
    prompt_logprobs one entry per prompt token, the first None
    """

    id: str
    text: str = ""
    parsed: T | None = None
    ids: tuple[int, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[Any, ...] = ()
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    usage: Usage = Usage()
    timings: Timings = Timings()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None

    @property
    def message(self) -> dict[str, object]:
        """This completion as an assistant message."""
        return {"role": "assistant", "content": self.text}


class Started(Struct, frozen=True, kw_only=True, tag=True):
    """The first step that works on the request has run."""

    id: str
    prompt_tokens: int
    cached_tokens: int


class Text(Struct, frozen=True, kw_only=True, tag=True):
    """Answer text."""

    text: str


class Finished(Struct, Generic[T], frozen=True, kw_only=True, tag=True):
    """The one terminal event."""

    completion: Completion[T]


Event = Started | Text | Finished[Any]
