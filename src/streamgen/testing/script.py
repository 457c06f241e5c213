"""What a FakeEngine says: replies, and how a script chooses one for a request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from msgspec import Struct

from streamgen.errors import AdmissionError, ConfigError, EngineFailed, GenerationError, RequestError, StreamgenError

_ERRORS = RequestError | AdmissionError | GenerationError | EngineFailed


class FakeRequest(Struct, frozen=True, kw_only=True):
    """A request as the application made it.

    text      the prompt as text; of a chat, the last message's content
    messages  the chat; None where text or ids were given
    fields    everything else that was passed: sampling fields, tenant, timeout ...
    """

    text: str
    messages: tuple[Mapping[str, Any], ...] | None = None
    ids: tuple[int, ...] | None = None
    fields: Mapping[str, Any] = {}
    request_id: str = ""


class Reply(Struct, frozen=True, kw_only=True):
    """What one request gets.

    text               what is said
    seconds_per_token  how long each token takes; a token is a byte
    first_token_seconds   how long the first one takes instead
    error              raised: when the request is submitted if it is a RequestError or an AdmissionError, else after
                       `fail_after` tokens. EngineFailed takes the whole engine down
    never_ends         after the text, the last byte is repeated until `max_tokens`, or for ever
    logprob            of every token, those of a scored prompt included

    Requests that run together share each step, as on a device: it takes as long as the slowest of their tokens.
    A request that ends holds nobody up any more.

    Raises:
        ConfigError: a field is not what it should be.
    """

    text: str = ""
    seconds_per_token: float = 0.0
    first_token_seconds: float | None = None
    error: StreamgenError | None = None
    fail_after: int = 0
    never_ends: bool = False
    logprob: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ConfigError(f"Reply.text: expected text, got {type(self.text).__name__}", option="text")
        for name in ("seconds_per_token", "first_token_seconds", "fail_after"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"Reply.{name}: expected >= 0, got {value}", option=name)
        if not self.logprob <= 0:
            raise ConfigError(f"Reply.logprob: expected <= 0, got {self.logprob}", option="logprob")
        if not isinstance(self.error, _ERRORS | None):
            words = "expected a RequestError, AdmissionError, GenerationError or EngineFailed"
            raise ConfigError(f"Reply.error: {words}, got {type(self.error).__name__}", option="error")

    def seconds(self, index: int) -> float:
        """How long the token at this place of the output takes."""
        if index == 0 and self.first_token_seconds is not None:
            return self.first_token_seconds
        return self.seconds_per_token


Answer: TypeAlias = str | Reply
Script: TypeAlias = Answer | Sequence[Answer] | Mapping[str, Answer] | Callable[[FakeRequest], Answer]
"""The same answer to all, answers in turn, answers by the prompt's text, or a function."""


class ScriptExhausted(AssertionError):
    """More requests came than the script has answers for, or one that it does not know."""


class Chooser:
    """Chooses replies. Thread-safe: requests may be made on any thread."""

    def __init__(self, script: Script) -> None:
        if not isinstance(script, str | Reply | Sequence | Mapping) and not callable(script):
            got = type(script).__name__
            words = "expected text, a Reply, a list, a mapping or a function"
            raise ConfigError(f"script: {words}, got {got}", option="script")
        self._script = script
        self._lock = threading.Lock()
        self._num_given = 0

    def choose(self, request: FakeRequest) -> Reply:
        """The reply to a request.

        Raises:
            ScriptExhausted: the script has none. ConfigError: it is neither text nor a Reply.
        """
        answer = self._find(request)
        if isinstance(answer, Reply):
            return answer
        if not isinstance(answer, str):
            got = type(answer).__name__
            raise ConfigError(f"script: expected text or a Reply as an answer, got {got}", option="script")
        return Reply(text=answer)

    def _find(self, request: FakeRequest) -> Answer:
        script = self._script
        if isinstance(script, str | Reply):
            return script
        if isinstance(script, Mapping):
            if request.text not in script:
                raise ScriptExhausted(f"the script has no answer for {request.text[:80]!r}")
            return script[request.text]
        if isinstance(script, Sequence):
            with self._lock:
                index, self._num_given = self._num_given, self._num_given + 1
            if index >= len(script):
                raise ScriptExhausted(f"the script has {len(script)} answers, and this is request {index + 1}")
            return script[index]
        return script(request)
