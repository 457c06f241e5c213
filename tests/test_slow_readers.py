"""Readers that do not read: they stall nobody, and get what they asked for."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

import streamgen as sg
from streamgen.actors.detokenizer import SLOW_TOKENS
from tests.fakes import BOS, FakeOpener, expected_text, threads_of_engines

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

HELLO = (BOS, *b"hello")
LONG = 2 * SLOW_TOKENS + 100


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    assert threads_of_engines() == []


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await anyio.lowlevel.checkpoint()


def num_paused(engine: sg.Engine) -> int:
    assert engine._thread is not None and engine._thread._core is not None
    return int(engine._thread._core.scheduler._scheduler.stats().paused)


async def test_coalesce_lets_the_output_grow_and_loses_nothing() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine, engine.stream("hello", max_tokens=LONG) as stream:
        await until(lambda: stream.result.finish_reason is not None)
        deltas = [delta async for delta in stream]
        assert len(deltas) == 1 and deltas[0].text == expected_text(HELLO, LONG)


async def test_pause_stops_it_and_reading_goes_on() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        async with engine.stream("hello", max_tokens=LONG, on_slow="pause") as stream:
            await until(lambda: num_paused(engine) == 1)
            written = len(stream.result.ids)
            # The step that ran, and the one planned behind it, still bring theirs.
            assert SLOW_TOKENS < written <= SLOW_TOKENS + 4
            others = await engine.generate("others go on", max_tokens=60)
            assert others.text == expected_text((BOS, *b"others go on"), 60)
            assert len(stream.result.ids) <= SLOW_TOKENS + 4, "it was paused"
            text = "".join([delta.text async for delta in stream])
        assert text == expected_text(HELLO, LONG) and stream.result.finish_reason == "length"
        assert engine.stats().pages_used == 0


async def test_who_waits_for_the_end_is_never_slow() -> None:
    for policy in ("pause", "cancel"):
        async with sg.Engine(_opener=FakeOpener()) as engine:
            completion = await engine.generate("hello", max_tokens=LONG, on_slow=policy)
            assert completion.text == expected_text(HELLO, LONG)
            samples = await engine.sample("hello", n=2, max_tokens=LONG, on_slow=policy)
            assert [len(sample.ids) for sample in samples] == [LONG, LONG]


async def test_a_paused_stream_that_asks_for_the_whole_goes_on() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        async with engine.stream("hello", max_tokens=LONG, on_slow="pause") as stream:
            await until(lambda: num_paused(engine) == 1)
            assert (await stream.final()).text == expected_text(HELLO, LONG)


async def test_cancel_ends_it_with_what_there_is() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        read = ""
        with pytest.raises(sg.SlowConsumer, match="tokens behind") as caught:
            async with engine.stream("hello", max_tokens=LONG, on_slow="cancel") as stream:
                await until(lambda: stream.result.finish_reason is not None)
                async for delta in stream:
                    read += delta.text
        partial = caught.value.partial
        assert read == partial.text == expected_text(HELLO, len(partial.ids)) and len(partial.ids) > SLOW_TOKENS
        assert partial.finish_reason == "error" and engine.stats().pages_used == 0


async def test_leaving_the_engine_well_lets_paused_ones_end() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        stream = engine.stream("hello", max_tokens=LONG, on_slow="pause")
        await stream.__aenter__()
        await until(lambda: num_paused(engine) == 1)
    assert stream.result.text == expected_text(HELLO, LONG)


@pytest.mark.parametrize("policy", ["sometimes", None, 3])
async def test_an_unknown_policy_is_refused(policy: Any) -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        with pytest.raises(sg.InvalidRequest, match="on_slow: expected one of coalesce, pause, cancel"):
            engine.stream("hello", on_slow=policy)
