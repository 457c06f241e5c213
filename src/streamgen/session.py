"""Session: one conversation with a model, which remembers what was said and keeps it computed."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias, Unpack

import anyio
from msgspec import structs

from streamgen.completion import Usage
from streamgen.errors import InvalidRequest, SessionBusy
from streamgen.prompt import system as system_message
from streamgen.prompt import user
from streamgen.request import RequestFields, check_request
from streamgen.sampling import Sampling
from streamgen.stream import Stream

if TYPE_CHECKING:
    from types import TracebackType

    from streamgen.completion import Completion, Delta
    from streamgen.engine_base import EngineBase
    from streamgen.request import Submission

Said: TypeAlias = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What a turn adds: a user's text, a message, or several. With none (`[]`) the history as it is gets an answer."""


ENDED_WELL = ("stop", "length", "tool_calls")


class Turn:
    """One turn of a session, from its making until its reader has left it.

    Its stream refers to it, not the other way round, so a stream that is dropped ends its turn.
    """

    def __init__(self, session: SessionBase, said: list[dict[str, object]], submission: Submission) -> None:
        self.submission = submission
        self.is_dropped = False
        self._session = session
        self._said = said

    @property
    def is_blocking(self) -> bool:
        """Whether another turn must wait: it runs, or it has ended and its reader may still keep it."""
        return not (self.is_dropped and self.submission.is_over)

    def drop(self) -> None:
        """Whatever comes, it will not be part of the history."""
        self.is_dropped = True

    def end(self, *, is_whole: bool) -> None:
        """Its reader is through with it. It becomes history if it was read to its end, and ended by itself."""
        mailbox = self.submission.mailboxes[0]
        end = mailbox.end
        is_kept = is_whole and not self.is_dropped and end is not None and end.finish_reason in ENDED_WELL
        self._session._settle(self, self._said if is_kept else None)


class SessionBase:
    """What sessions of every kind of host share: the history and its rules.

    messages   the history, without the system prompt: a plain list, to be changed between turns as one likes;
               it is checked when the next turn is made
    system     the system prompt, or None
    """

    def __init__(
        self,
        engine: EngineBase,
        *,
        system: str | None = None,
        tools: Sequence[object] = (),
        pin: bool = False,
        defaults: Mapping[str, Any],
    ) -> None:
        self._turn: Turn | None = None
        self._is_pinned = False
        self._engine = engine
        _check(system, tools, pin, defaults)
        self.system = system
        self.tools = tuple(tools)
        self.messages: list[dict[str, object]] = []
        self._defaults = dict(defaults)
        self._pin = pin
        self._name = f"session:{os.urandom(8).hex()}"  # of its pinned pages
        self._scope = self._name  # of its cached pages, where they are private
        self._known: tuple[int, ...] = ()  # the ids of the last turn, prompt and output
        self._usage = Usage()
        self._is_closed = False
        self._lock = threading.RLock()  # NOTE: a garbage collection may end a turn while it is held

    @property
    def usage(self) -> Usage:
        """Token counts of all turns, also of those that were dropped."""
        return self._usage

    @property
    def is_busy(self) -> bool:
        """Whether a turn is under way, so that another would raise SessionBusy."""
        turn = self._turn
        return turn is not None and turn.is_blocking

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "busy" if self.is_busy else "idle"
        return f"<{type(self).__module__}.{type(self).__name__} {len(self.messages)} messages, {state}>"

    def __del__(self) -> None:
        if getattr(self, "_is_pinned", False):
            self._engine._unpin(self._name)

    def fork(self) -> Self:
        """A session of its own with the same history, from before a turn that is under way.

        Pages of what both have said are shared while they are cached. Its usage counts from zero.
        """
        with self._lock:
            other = type(self)(
                self._engine, system=self.system, tools=self.tools, pin=self._pin, defaults=self._defaults
            )
            other.messages = copy.deepcopy(self.messages)
            other._known, other._scope = self._known, self._scope
            return other

    def _begin(self, said: Said, fields: Mapping[str, Any]) -> Turn:
        """Check and make a turn.

        Raises:
            SessionBusy: another is under way. RequestError, EngineClosed, EngineFailed: as for `Engine.stream`.
        """
        new = _as_messages(said)
        with self._lock:
            if self._is_closed:
                raise InvalidRequest("session: it was closed; make another with engine.session()")
            if self._turn is not None:
                self._replace(self._turn)
            submission = self._engine._submission(self._prompt(new), self._fields(fields), **self._how(fields))
            self._turn = turn = Turn(self, copy.deepcopy(new), submission)
            self._is_pinned = self._pin
            return turn

    def _replace(self, turn: Turn) -> None:
        """Make room for another turn: this one was cancelled, and its reader has not come back."""
        if turn.is_blocking:
            raise SessionBusy(
                "session: one turn runs at a time; read or leave the one under way first, or fork() the session",
                request_id=turn.submission.id,
            )
        turn.end(is_whole=False)

    def _prompt(self, new: list[dict[str, object]]) -> list[dict[str, object]]:
        if not isinstance(self.messages, list):
            raise InvalidRequest(
                f"messages: expected a list of messages, got {type(self.messages).__name__}", param="messages"
            )
        if self.system is None:
            return [*self.messages, *new]
        return [system_message(self.system), *self.messages, *new]

    def _fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The turn's own fields before the defaults. A `sampling` of the turn replaces all defaults of sampling."""
        defaults = dict(self._defaults)
        if fields.get("sampling") is not None:
            defaults = {name: value for name, value in defaults.items() if name not in Sampling.__struct_fields__}
        return {"tools": self.tools, **defaults, **fields}

    def _how(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        how: dict[str, Any] = {"known": self._known, "pin": self._name if self._pin else ""}
        if self._fields(fields).get("cache") == "private":
            how["scope"] = self._scope  # nobody else's, but one for all its turns
        return how

    def _settle(self, turn: Turn, said: list[dict[str, object]] | None) -> None:
        """A turn is over. `said` is what it adds to the history, with its reply; None if it was dropped."""
        with self._lock:
            if self._turn is not turn:
                return
            self._turn = None
            mailbox = turn.submission.mailboxes[0]
            self._usage = _sum(self._usage, mailbox.usage)
            if said is not None:
                completion = mailbox.completion()
                self.messages.extend([*said, completion.message])
                self._known = mailbox.prompt_ids + completion.ids
            if self._is_closed:
                self._release()  # again: it may have pinned its pages after the first time

    def _close(self) -> Turn | None:
        """Take no more turns. The one under way, cancelled."""
        with self._lock:
            self._is_closed = True
            turn = self._turn
        if turn is not None:
            turn.drop()
            turn.submission.cancel()
        return turn

    def _release(self) -> None:
        """Let the pinned pages go. While a turn is under way it may pin them once more."""
        if self._is_pinned:
            self._is_pinned = self._turn is not None
            self._engine._unpin(self._name)


class SessionStream(Stream[Any]):
    """The stream of one turn. Make one with `Session.stream`.

    The turn becomes part of the session's history when the stream is read to its end, or `final()` returns. A turn that
    is left, cancelled or fails before is dropped, also what it had said: the history is as it was before.
    """

    def __init__(self, owner: object, turn: Turn) -> None:
        super().__init__(owner, turn.submission)
        self._turn = turn

    async def __aenter__(self) -> Self:
        """Submit, and wait until the prompt is tokenized. Raises as `Stream` does."""
        try:
            return await super().__aenter__()
        except BaseException:
            self._turn.end(is_whole=False)
            raise

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what still runs; returns when the engine has freed it. The session is free for another turn."""
        try:
            await super().__aexit__(exc_type, exc, traceback)
        finally:
            self._turn.end(is_whole=False)

    async def __anext__(self) -> Delta:
        """Everything that came since the last delta. Raises as `Stream` does."""
        try:
            return await super().__anext__()
        except StopAsyncIteration:
            self._turn.end(is_whole=True)
            raise
        except Exception:
            self._turn.end(is_whole=False)
            raise

    async def final(self) -> Completion[Any]:
        """Wait for the end and return the whole. Raises as `Stream` does."""
        try:
            completion = await super().final()
        except Exception:
            self._turn.end(is_whole=False)
            raise
        self._turn.end(is_whole=True)
        return completion

    def cancel(self) -> None:
        """End the turn soon, and keep nothing of it. Thread-safe, idempotent, never blocks."""
        self._turn.drop()
        super().cancel()

    def __del__(self) -> None:
        turn: Turn | None = getattr(self, "_turn", None)
        super().__del__()
        if turn is not None:
            turn.end(is_whole=False)


class Session(SessionBase):
    """A conversation. Make one with `Engine.session`.

    One turn runs at a time: another, from whatever task or thread, raises SessionBusy at once. Each turn's request
    carries the ids of the turns before, so only what is new is computed as long as the pages are cached; `pin` keeps
    those of the last turn until the session is closed or dropped.
    """

    async def ask(self, said: Said, /, *, output: object = None, **fields: Unpack[RequestFields]) -> Completion[Any]:
        """One turn: the whole answer, which is then part of the history. `fields` as for `Engine.stream`.

        Raises:
            SessionBusy: another turn is under way.
            RequestError, AdmissionError, GenerationError, EngineFailed: the history is as it was before.
        """
        async with self.stream(said, output=output, **fields) as stream:
            return await stream.final()

    def stream(self, said: Said, /, *, output: object = None, **fields: Unpack[RequestFields]) -> SessionStream:
        """One turn, as it comes. It begins here: the session is busy until the stream is read, left or dropped.

        Raises:
            SessionBusy: another turn is under way.
            RequestError, EngineClosed, EngineFailed: as for `Engine.stream`.
        """
        return SessionStream(
            self._engine, self._begin(said, fields if output is None else {"output": output, **fields})
        )

    async def __aenter__(self) -> Self:
        """Nothing happens until the first turn."""
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel a turn that runs, and let pinned pages go. Idempotent. The history stays readable."""
        turn = self._close()
        if turn is not None:
            with anyio.CancelScope(shield=True):
                await turn.submission.mailboxes[0].wait_end()
            turn.end(is_whole=False)
        self._release()

    def close(self) -> None:
        """`aclose` for code that cannot wait: a turn that runs ends soon after."""
        self._close()
        self._release()


def _check(system: Any, tools: Any, pin: Any, defaults: Mapping[str, Any]) -> None:
    if system is not None and not isinstance(system, str):
        raise InvalidRequest(f"system: expected text or None, got {type(system).__name__}", param="system")
    if not isinstance(pin, bool):
        raise InvalidRequest(f"pin: expected True or False, got {type(pin).__name__}", param="pin")
    check_request([user("-")], {**defaults, "tools": tools})
    if defaults.get("request_id") is not None:
        raise InvalidRequest("request_id: one name cannot be that of every turn; give it to each", param="request_id")


def _as_messages(said: Any) -> list[dict[str, object]]:
    if isinstance(said, str):
        return [user(said)]
    if isinstance(said, Mapping):
        return [dict(said)]
    if not isinstance(said, Sequence) or not all(isinstance(message, Mapping) for message in said):
        raise InvalidRequest(
            f"session: expected a user's text or messages, got {type(said).__name__}; token ids go to engine.stream()",
            param="prompt",
        )
    return [dict(message) for message in said]


def _sum(a: Usage, b: Usage) -> Usage:
    return Usage(**{name: getattr(a, name) + getattr(b, name) for name in structs.asdict(a)})
