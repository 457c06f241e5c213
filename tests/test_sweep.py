"""The exhaustive sweep: in twenty small scenarios, something happens at the i-th message between actors, for every i.

A request is cancelled, a step raises, the device dies, or the engine is closed. Whenever that is, everybody gets one
end, whoever survives gets every character, and nothing is held at the end.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import streamgen as sg
from streamgen.actors.actor import Actor
from tests.fakes import BOS, FakeOpener, expected_text, threads_of_engines

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

Plan = list[tuple[Any, dict[str, Any]]]

LONG = "a long prompt that takes more than one step of sixty-four rows to compute " * 2
SCENARIOS: dict[str, tuple[dict[str, Any], Plan]] = {
    "one": ({}, [("hello", {"max_tokens": 5})]),
    "one token": ({}, [("hello", {"max_tokens": 1})]),
    "ids": ({}, [((1, 2, 3), {"max_tokens": 4})]),
    "chat": ({}, [([{"role": "user", "content": "hello"}], {"max_tokens": 4})]),
    "two at once": ({}, [("hello", {"max_tokens": 5}), ("other", {"max_tokens": 5})]),
    "a shared prefix": ({}, [("shared " * 5 + "a", {"max_tokens": 3}), ("shared " * 5 + "b", {"max_tokens": 3})]),
    "a public prefix": ({}, [("shared " * 5, {"max_tokens": 3, "cache": "public", "tenant": t}) for t in "ab"]),
    "a private one": ({}, [("shared " * 5, {"max_tokens": 3, "cache": "private"})] * 2),
    "in chunks": ({}, [(LONG, {"max_tokens": 3})]),
    "chunks beside decodes": ({}, [("hello", {"max_tokens": 8}), (LONG, {"max_tokens": 3})]),
    "one slot": ({"max_running": 1}, [("first", {"max_tokens": 3}), ("second", {"max_tokens": 3})]),
    "few pages": ({"num_pages": 4}, [("hello", {"max_tokens": 30}), ("other", {"max_tokens": 30})]),
    "more important": ({"max_running": 1}, [("low", {"max_tokens": 3}), ("high", {"max_tokens": 3, "priority": 3})]),
    "two tenants": ({"max_running": 2}, [(f"t{i}", {"max_tokens": 3, "tenant": "ab"[i % 2]}) for i in range(4)]),
    "a stop string": ({}, [("hello", {"max_tokens": 9, "stop": expected_text((BOS, *b"hello"), 4)[2:]})]),
    "log-probabilities": ({}, [("hello", {"max_tokens": 4, "logprobs": 1, "prompt_logprobs": 0})]),
    "time limits": ({}, [("hello", {"max_tokens": 4, "timeout": 1e6, "queue_timeout": 1e6})]),
    "pausing readers": ({}, [("hello", {"max_tokens": 4, "on_slow": "pause"})]),
    "a prompt that is refused": ({"max_context": 32}, [("x" * 40, {}), ("hello", {"max_tokens": 3})]),
    "a template that refuses": ({}, [([{"role": "system", "content": "refuse"}], {}), ("hello", {"max_tokens": 3})]),
}
ACTIONS = ("cancel", "step raises", "device dies", "close")


class Trigger:
    """Counts the messages that actors are sent, and does something after the one it is set to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._count = 0
        self._at = -1
        self._action: Callable[[], object] = lambda: None
        post = Actor.post

        def counted(actor: Actor[Any], message: Any) -> None:
            post(actor, message)
            self._count += 1
            if self._count == self._at:
                self._action()

        monkeypatch.setattr(Actor, "post", counted)

    def set(self, at: int, action: Callable[[], object]) -> None:
        self._count, self._at, self._action = 0, at, action

    def disarm(self) -> bool:
        """Whether it happened; from now on it does not."""
        has_fired = self._count >= self._at
        self._at = -1
        return has_fired


def break_device(opener: FakeOpener, error: BaseException) -> Callable[[], None]:
    """The next step raises this; later ones are well."""
    execute = opener.runner.execute

    def broken(plan: Any, wake_fd: int | None = None) -> Any:
        opener.runner.execute = execute  # type: ignore[method-assign]
        raise error

    def act() -> None:
        opener.runner.execute = broken  # type: ignore[method-assign]

    return act


class Death(BaseException):
    """Ends the device's thread."""


async def run(plan: Plan, options: dict[str, Any], action: str, at: int, trigger: Trigger) -> bool:
    """One run; False if the scenario was over before anything happened."""
    opener = FakeOpener(**options)
    execute = opener.runner.execute
    async with sg.Engine(_opener=opener) as engine:
        streams = [engine.stream(prompt, **fields) for prompt, fields in plan]
        actions: dict[str, Callable[[], object]] = {
            "cancel": streams[0].cancel,
            "step raises": break_device(opener, RuntimeError("a hiccup")),
            "device dies": break_device(opener, Death()),
            "close": engine._begin_close,
        }
        trigger.set(at, actions[action])
        for stream in streams:
            try:
                stream._submission.submit()
            except sg.StreamgenError:
                assert action in ("device dies", "close")
        with anyio.fail_after(20):
            for stream in streams:
                if stream._submission.is_submitted:
                    await stream._mailbox.wait_end()
        has_fired = trigger.disarm()
        opener.runner.execute = execute  # type: ignore[method-assign]  # a fault that found no step
        for i, stream in enumerate(streams):
            check(stream, plan[i], action, is_first=i == 0)
        try:
            if engine.state == "ready":
                await check_nothing_is_held(engine)
            else:
                assert action in ("device dies", "close")
        except sg.EngineFailed:  # the device died of a row that was planned ahead, and that nobody needed any more
            assert action == "device dies" and has_fired
        return has_fired


async def check_nothing_is_held(engine: sg.Engine) -> None:
    assert (await engine.generate("after", max_tokens=2)).text == expected_text((BOS, *b"after"), 2)
    stats = engine.stats()
    assert (stats.open_requests, stats.running, stats.waiting, stats.pages_used) == (0, 0, 0, 0)


def check(stream: sg.Stream[Any], request: tuple[Any, dict[str, Any]], action: str, *, is_first: bool) -> None:
    end, result = stream._mailbox.end, stream.result
    if end is None:
        assert not stream._submission.is_submitted
        return
    prompt = stream._mailbox.prompt_ids
    assert expected_text(prompt, 60).startswith(result.text), f"{request}: {result.text}"
    assert result.usage.completion_tokens == len(result.ids)
    if end.code in ("prompt_too_long", "template_error"):
        assert request[1] == {} and not result.ids
    elif end.finish_reason == "cancelled":
        assert (action == "cancel" and is_first) or (action == "close" and end.code == "engine_closed")
    elif end.code is not None:
        assert action == "device dies" and end.code == "engine_failed"
    elif result.finish_reason == "length":
        assert len(result.ids) == request[1]["max_tokens"]
    else:
        assert result.finish_reason == "stop" and result.stop == request[1]["stop"]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", SCENARIOS)
async def test_at_every_crossing(
    name: str, action: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "streamgen")
    monkeypatch.setattr("streamgen.actors.supervisor.RESTART_GRACE", 0.0)
    options, plan = SCENARIOS[name]
    trigger = Trigger(monkeypatch)
    at = 1
    while await run(plan, options, action, at, trigger):
        at += 1
        assert at < 400, "the scenario never ends by itself"
    assert at > 4, "the sweep swept nothing"
    gc.collect()
    assert threads_of_engines() == []
