"""Sleep and wake: memory goes back, requests wake the engine, nobody hangs."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

import streamgen as sg
from tests.fakes import BOS, FakeOpener, expected_text, threads_of_engines

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

HELLO = (BOS, *b"hello")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    assert threads_of_engines() == []


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("keep_weights", [False, True])
async def test_sleep_and_wake(keep_weights: bool) -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener) as engine:
        before = await engine.generate("hello" * 20, max_tokens=5)
        await engine.sleep(keep_weights=keep_weights)
        assert engine.state == "asleep" and opener.model.sleeps == ["keep" if keep_weights else "drop"]
        assert engine.stats().pages_cached == 0, "pages went, and with them all prefixes"
        await engine.sleep()  # it sleeps already
        await engine.wake()
        await engine.wake()
        assert engine.state == "ready"
        again = await engine.generate("hello" * 20, max_tokens=5)
        assert again.text == before.text and again.usage.cached_tokens == 0
    assert opener.model.sleeps[1:] == ["wake"]


async def test_a_request_wakes_it() -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener) as engine:
        await engine.sleep()
        opener.model.may_wake.clear()
        texts: list[str] = []

        async def ask() -> None:
            texts.append((await engine.generate("hello", max_tokens=3)).text)

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(ask)
            await until(lambda: engine.stats().open_requests == 3)
            opener.model.may_wake.set()
        assert texts == [expected_text(HELLO, 3)] * 3 and engine.state == "ready"


async def test_it_waits_until_nothing_is_open() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine, anyio.create_task_group() as group:
        stream = engine.stream("hello", max_tokens=4)
        await stream.__aenter__()
        group.start_soon(engine.sleep)
        await until(lambda: engine._thread is not None and bool(engine._thread._signals))
        assert engine.state == "ready"
        opener.runner.open_gate()
        assert (await stream.final()).text == expected_text(HELLO, 4)
        await until(lambda: engine.state == "asleep")


async def test_a_timeout_counts_while_it_wakes() -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener) as engine:
        await engine.sleep()
        opener.model.may_wake.clear()
        with pytest.raises(sg.DeadlineExceeded):
            await engine.generate("hello", timeout=0.02)
        opener.model.may_wake.set()
        assert (await engine.generate("hello", max_tokens=2)).text == expected_text(HELLO, 2)


async def test_closing_while_asleep_and_while_waking() -> None:
    opener = FakeOpener()
    for waking in (False, True):
        async with sg.Engine(_opener=opener) as engine:
            await engine.sleep()
            if waking:
                opener.model.may_wake.clear()
                stream = engine.stream("hello")
                stream._submission.submit()
                await engine.aclose()
                assert stream.result.finish_reason == "cancelled"
        assert opener.model.num_closed == 1 and engine.state == "closed"


async def test_idle_sleep_comes_by_itself_and_requests_put_it_off() -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener, idle_sleep=0.05) as engine:
        for _ in range(3):
            assert (await engine.generate("hello", max_tokens=3)).text == expected_text(HELLO, 3)
        await until(lambda: engine.state == "asleep")
        assert (await engine.generate("hello", max_tokens=3)).text == expected_text(HELLO, 3)
        await until(lambda: engine.state == "asleep")


async def test_a_wake_that_fails_fails_the_engine() -> None:
    opener = FakeOpener()

    def no_memory(is_cancelled: object) -> None:
        raise sg.InsufficientMemory("there is no memory left")

    async with sg.Engine(_opener=opener) as engine:
        await engine.sleep()
        opener.model.wake = no_memory  # type: ignore[method-assign]  # what a full machine would do
        with pytest.raises(sg.EngineFailed, match="there is no memory left"):
            await engine.generate("hello")
        assert engine.state == "failed"


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), "soon", True])
def test_idle_sleep_is_checked(seconds: Any) -> None:
    with pytest.raises(sg.ConfigError, match="idle_sleep: expected seconds"):
        sg.Engine(idle_sleep=seconds)
