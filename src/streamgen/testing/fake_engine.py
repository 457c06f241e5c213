"""FakeEngine: the engine without a model, for an application's tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from msgspec import structs

from streamgen.engine import Engine
from streamgen.engine_base import EngineBase
from streamgen.errors import AdmissionError, EngineOverloaded, LoadError, RequestError, StreamgenError
from streamgen.prompt import parse_prompt
from streamgen.testing.clock import VirtualClock, world_options
from streamgen.testing.script import Chooser, FakeRequest, Reply
from streamgen.testing.scripted import ScriptedOpener

if TYPE_CHECKING:
    from streamgen.actors.supervisor import EngineThread
    from streamgen.prompt import Prompt
    from streamgen.request import Submission
    from streamgen.testing.script import Script


class _Cue:
    """Carries a reply to the runner, in the place of a logits processor."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply

    def __call__(self, ids: object, logits: object) -> None:
        raise AssertionError("a fake model has no logits")


class ScriptedEngine(EngineBase):
    """What fake engines of every kind of host share; it stands before the real one among their bases."""

    def __init__(
        self,
        script: Script = "ok",
        /,
        *,
        clock: VirtualClock | None = None,
        num_pages: int = 16_384,
        load_error: LoadError | None = None,
        **options: Any,
    ) -> None:
        self.requests: list[FakeRequest] = []
        self._chooser = Chooser(script)
        self._is_overloaded = False
        self._scripted = ScriptedOpener(clock, num_pages=num_pages, load_error=load_error)
        super().__init__("fake", _opener=self._scripted, **world_options(clock), **options)

    def overload(self, is_overloaded: bool = True) -> None:
        """Refuse every request from now on with EngineOverloaded; or take them again."""
        self._is_overloaded = is_overloaded

    def fail(self, message: str = "the fake engine was told to fail") -> None:
        """Fail at the next step, as an engine does whose device died."""
        model = self._scripted.model
        if model is not None:
            model.runner.failure = message

    def _submission(self, prompt: Prompt, fields: Mapping[str, Any], **how: Any) -> Submission:
        submission = super()._submission(prompt, fields, **how)
        request = _describe(prompt, fields, submission.id)
        self.requests.append(request)
        reply = self._chooser.choose(request)
        submission.processors = (_Cue(reply),)
        error = self._refusal(reply)
        if error is not None:
            submission.submit = partial(_raise, error)  # type: ignore[method-assign]  # where the door would refuse it
        return submission

    def _refusal(self, reply: Reply) -> StreamgenError | None:
        if self._is_overloaded:
            return EngineOverloaded("the fake engine was told to be overloaded", retry_after=1.0)
        return reply.error if isinstance(reply.error, AdmissionError | RequestError) else None

    def _begin_close(self) -> EngineThread | None:
        thread = super()._begin_close()
        if self._scripted.model is not None:
            self._scripted.model.runner.give_up()
        return thread


class FakeEngine(ScriptedEngine, Engine):
    """An engine that says what a script says. Everything around the model is real; nothing else is needed.

    script      the same text for all; a list, one answer each; a mapping from prompt texts; or a function of the
                FakeRequest. An answer is text or a `Reply`
    clock       a VirtualClock that decides when timeouts and delays pass; None is real time
    num_pages   of 16 tokens each; a token is a byte
    load_error  raised by opening
    options     as for `Engine`: max_running, max_queued, tenants, idle_sleep, max_context (65,536 unless given) ...

    requests    every request that was made, in order
    """


def _raise(error: StreamgenError) -> NoReturn:
    raise error


def _describe(prompt: Prompt, fields: Mapping[str, Any], request_id: str) -> FakeRequest:
    parsed = parse_prompt(prompt)
    given = {name: value for name, value in fields.items() if value is not None and value != ()}
    sampling = given.pop("sampling", None)
    if sampling is not None:
        given = {**{k: v for k, v in structs.asdict(sampling).items() if v is not None}, **given}
    text = parsed.text or ""
    if parsed.chat is not None:
        text = _text_of(parsed.chat[-1].get("content", ""))
    return FakeRequest(text=text, messages=parsed.chat, ids=parsed.ids, fields=given, request_id=request_id)


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
