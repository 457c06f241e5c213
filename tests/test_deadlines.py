"""Time limits of every kind, and overload: typed errors, at the right moment, before any work."""

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


async def test_queue_timeout_ends_who_has_not_started() -> None:
    opener = FakeOpener(max_running=1)
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        running = engine.stream("hello", max_tokens=3, queue_timeout=1e6)
        await running.__aenter__()
        with pytest.raises(sg.DeadlineExceeded, match="queue_timeout passed") as caught:
            await engine.generate("waits", queue_timeout=0.03)
        assert caught.value.partial.finish_reason == "deadline"
        opener.runner.open_gate()
        assert (await running.final()).text == expected_text(HELLO, 3)
        assert all(begin.ids == HELLO for begin in opener.runner.begun)


async def test_queue_timeout_leaves_who_has_started_alone() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        stream = engine.stream("hello", max_tokens=4, queue_timeout=0.03, first_token_timeout=0.03)
        await stream.__aenter__()
        opener.runner.release(1)
        await until(lambda: stream._mailbox.has_tokens)
        with anyio.move_on_after(0.06):
            await stream._mailbox.wait_end()
        assert stream.result.finish_reason is None
        opener.runner.open_gate()
        assert (await stream.final()).text == expected_text(HELLO, 4)


async def test_first_token_timeout() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        stream = engine.stream("x" * 200, first_token_timeout=0.05)
        with pytest.raises(sg.DeadlineExceeded, match="first_token_timeout passed"):
            async with stream:
                opener.runner.release(1)  # some of the prompt runs
                await until(lambda: stream._mailbox.is_started)
                await stream.final()
        opener.runner.open_gate()
    assert not stream.result.ids


@pytest.mark.parametrize("field", ["timeout", "queue_timeout", "first_token_timeout"])
@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e300, "1", True])
async def test_limits_are_checked_when_the_request_is_made(field: str, seconds: Any) -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        with pytest.raises(sg.InvalidRequest, match=f"{field}: expected seconds") as caught:
            engine.stream("hello", **{field: seconds})
        assert caught.value.param == field


async def test_a_burst_is_refused_before_it_is_tokenized() -> None:
    opener = FakeOpener(max_running=2)
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener, max_queued=3) as engine:
        tokenizer = opener.model.tokenizer
        taken = [engine.stream(f"taken {i}", max_tokens=2) for i in range(5)]
        for stream in taken:
            await stream.__aenter__()
        tokenizer.may_encode.clear()
        tokenizer.encoding.clear()
        for i in range(50):
            with pytest.raises(sg.EngineOverloaded, match="open sequences") as caught:
                await engine.generate(f"too much {i}")
            assert caught.value.retry_after is not None and caught.value.retry_after > 0
        assert not tokenizer.encoding.is_set()
        tokenizer.may_encode.set()
        opener.runner.open_gate()
        for i, stream in enumerate(taken):
            assert (await stream.final()).text == expected_text((BOS, *f"taken {i}".encode()), 2)


async def test_a_tenant_over_its_limits_is_refused_and_others_are_not() -> None:
    opener = FakeOpener(max_running=4)
    opener.runner.is_gated = True
    tenants = {"greedy": {"max_running": 1, "max_queued": 1}}
    async with sg.Engine(_opener=opener, tenants=tenants) as engine:
        taken = [engine.stream("hello", max_tokens=2, tenant="greedy") for _ in range(2)]
        for stream in taken:
            await stream.__aenter__()
        with pytest.raises(sg.RateLimited, match="tenant 'greedy'"):
            await engine.generate("hello", tenant="greedy")
        other = engine.stream("hello", max_tokens=2, tenant="other")
        await other.__aenter__()
        opener.runner.open_gate()
        for stream in (*taken, other):
            assert (await stream.final()).text == expected_text(HELLO, 2)


@pytest.mark.parametrize(
    ("first", "second", "is_shared"),
    [
        ({"tenant": "a"}, {"tenant": "a"}, True),
        ({"tenant": "a"}, {"tenant": "b"}, False),
        ({"cache": "private"}, {"cache": "private"}, False),
        ({"tenant": "a", "cache": "public"}, {"tenant": "b", "cache": "public"}, True),
        ({"tenant": "a", "cache": "public"}, {"tenant": "a"}, False),
        ({"tenant": "public"}, {"cache": "public"}, False),
    ],
)
async def test_prefixes_are_shared_within_a_scope(first: Any, second: Any, is_shared: bool) -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        prompt = "a prompt of several pages " * 4
        one = await engine.generate(prompt, max_tokens=2, **first)
        two = await engine.generate(prompt, max_tokens=2, **second)
        assert one.text == two.text and (two.usage.cached_tokens > 0) is is_shared
