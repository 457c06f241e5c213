"""Failure and restart: everybody hears of it at once, and what had no output yet goes on."""

from __future__ import annotations

import gc
import logging
import threading
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

import streamgen as sg
from streamgen.actors.world import RealWorld
from tests.fakes import BOS, FakeOpener, expected_text, threads_of_engines

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

HELLO = (BOS, *b"hello")


@pytest.fixture(autouse=True)
def _no_thread_is_left(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.CRITICAL, "streamgen")
    yield
    gc.collect()
    assert threads_of_engines() == []


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await anyio.lowlevel.checkpoint()


class Dies(BaseException):
    """Not an error of a step: the end of the thread that runs them."""


def kill_device(opener: FakeOpener) -> None:
    """The device's thread ends at its next step."""
    execute = opener.runner.execute

    def die(plan: Any, wake_fd: int | None = None) -> Any:
        opener.runner.execute = execute  # type: ignore[method-assign]  # a device opened later is well
        raise Dies

    opener.runner.execute = die  # type: ignore[method-assign]


async def test_a_dead_device_reaches_everybody_and_restart_brings_it_back() -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener) as engine:
        stream = engine.stream("hello", max_tokens=400)
        await anext(stream)
        kill_device(opener)
        with anyio.fail_after(5), pytest.raises(sg.EngineFailed) as caught:
            await stream.final()
        text = caught.value.partial.text
        assert text and expected_text(HELLO, 400).startswith(text) and engine.state == "failed"
        with pytest.raises(sg.EngineFailed):
            engine.stream("x")
        await engine.restart()
        assert engine.state == "ready"
        assert (await engine.generate("hello", max_tokens=5)).text == expected_text(HELLO, 5)
        with pytest.raises(sg.ConfigError, match="restart: it is for an engine that failed"):
            await engine.restart()


async def test_requests_without_output_go_on_after_a_restart() -> None:
    opener = FakeOpener(max_running=2)
    opener.runner.is_gated = True
    texts: dict[int, str] = {}

    async def ask(engine: sg.Engine, i: int) -> None:
        texts[i] = (await engine.generate(f"request {i}", max_tokens=6)).text

    async with sg.Engine(_opener=opener) as engine, anyio.create_task_group() as group:
        for i in range(5):
            group.start_soon(ask, engine, i)
        await until(lambda: engine.stats().open_requests == 5)
        kill_device(opener)
        opener.runner.open_gate()
        await until(lambda: engine.state == "failed")
        await engine.restart()
    assert texts == {i: expected_text((BOS, *f"request {i}".encode()), 6) for i in range(5)}


async def test_without_a_restart_they_hear_of_it_within_the_grace() -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener) as engine:
        kill_device(opener)
        with anyio.fail_after(5), pytest.raises(sg.EngineFailed):
            await engine.generate("hello")


async def test_cancelled_while_it_is_moved() -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener) as engine:
        kill_device(opener)
        stream = engine.stream("hello", max_tokens=400)
        stream._submission.submit()
        await until(lambda: engine.state == "failed")
        failed, owners = engine._begin_restart()
        stream.cancel()
        await failed.closed.wait()
        await anyio.to_thread.run_sync(failed.thread.join)
        thread = engine._start_thread()
        await thread.opened.wait()
        engine._end_restart(owners)
        await stream._mailbox.wait_end()
        assert stream.result.finish_reason == "cancelled" and engine.stats().pages_used == 0


async def test_a_restart_that_fails_ends_those_that_waited_for_it() -> None:
    opener = FakeOpener()
    errors: list[BaseException] = []

    async def ask(engine: sg.Engine) -> None:
        try:
            await engine.generate("hello")
        except sg.EngineFailed as error:
            errors.append(error)

    async with sg.Engine(_opener=opener) as engine:
        async with anyio.create_task_group() as group:
            kill_device(opener)
            group.start_soon(ask, engine)
            await until(lambda: engine.state == "failed")
            opener._error = sg.ModelNotFound("it was deleted")
            with pytest.raises(sg.ModelNotFound):
                await engine.restart()
        assert len(errors) == 1


async def test_a_wedged_step_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that never comes back: everybody hears of it, and the engine can be closed or restarted."""
    monkeypatch.setattr(RealWorld, "min_step_deadline", 0.05)
    opener = FakeOpener()
    come_back, came_back = threading.Event(), threading.Event()
    execute = opener.runner.execute

    def wedge(plan: Any, wake_fd: int | None = None) -> Any:
        come_back.wait(30)
        came_back.set()
        return execute(plan)

    async with sg.Engine(_opener=opener) as engine:
        await engine.generate("hello", max_tokens=3)  # from now on it is known how long steps take
        opener.runner.execute = wedge  # type: ignore[method-assign]
        with anyio.fail_after(5), pytest.raises(sg.EngineFailed, match="deadline"):
            await engine.generate("hello")
        opener.runner.execute = execute  # type: ignore[method-assign]
        await engine.restart()
        assert (await engine.generate("hello", max_tokens=5)).text == expected_text(HELLO, 5)
        assert opener.models[0].num_closed == 0, "its memory is still in use"
    come_back.set()
    assert await anyio.to_thread.run_sync(came_back.wait, 20)
    await until(lambda: opener.models[0].num_closed == 1)
    await until(lambda: threads_of_engines() == [])


async def test_a_step_that_raises_ends_the_guilty_request_alone() -> None:
    opener = FakeOpener()
    execute = opener.runner.execute
    poison = tuple(b"poison")

    def fail_with_poison(plan: Any, wake_fd: int | None = None) -> Any:
        begins = {begin.slot: begin.ids for begin in [*opener.runner.begun, *plan.begins]}
        if any(begins[slot][1:7] == poison for slot in plan.slots):
            opener.runner.begun += plan.begins
            raise RuntimeError("this one breaks the device")
        return execute(plan, wake_fd)

    outcomes: dict[str, str | BaseException] = {}

    async def ask(engine: sg.Engine, prompt: str) -> None:
        try:
            outcomes[prompt] = (await engine.generate(prompt, max_tokens=20)).text
        except sg.GenerationError as error:
            outcomes[prompt] = error

    prompts = [*(f"fine {i}" for i in range(5)), "poison", *(f"good {i}" for i in range(2))]
    async with sg.Engine(_opener=opener) as engine:
        opener.runner.execute = fail_with_poison  # type: ignore[method-assign]
        async with anyio.create_task_group() as group:
            for prompt in prompts:
                group.start_soon(ask, engine, prompt)
        assert engine.state == "ready" and engine.stats().pages_used == 0
    guilty = outcomes.pop("poison")
    assert isinstance(guilty, sg.GenerationError) and "breaks the device" in str(guilty)
    assert outcomes == {p: expected_text((BOS, *p.encode()), 20) for p in prompts if p != "poison"}


async def test_a_fault_while_decoding_ends_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamgen.text.decoder import TextDecoder

    feed = TextDecoder.feed

    def broken(self: TextDecoder, ids: Any) -> str:
        if getattr(self, "_is_broken", False):
            raise KeyError("secret")
        return feed(self, ids)

    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        async with engine.stream("hello", max_tokens=20) as good, engine.stream("secret", max_tokens=20) as bad:
            opener.runner.release(4)
            await until(lambda: bad._mailbox.has_tokens)
            assert engine._thread is not None and engine._thread._core is not None
            detokenizer = engine._thread._core._actors[0]._detokenizer  # type: ignore[attr-defined]
            number = bad._submission._number
            monkeypatch.setattr(TextDecoder, "feed", broken)
            broken_decoder = detokenizer._requests[number].sequences[0].decoder
            monkeypatch.setattr(TextDecoder, "_is_broken", False, raising=False)
            object.__setattr__(broken_decoder, "_is_broken", True)
            opener.runner.open_gate()
            with pytest.raises(sg.GenerationError, match="decoding the output failed: KeyError") as caught:
                await bad.final()
            assert "secret" not in str(caught.value) and bad.result.finish_reason == "error"
            assert (await good.final()).text == expected_text(HELLO, 20)
        assert engine.state == "ready" and engine.stats().pages_used == 0
