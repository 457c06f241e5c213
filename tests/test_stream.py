"""Streams: what they yield, how they are left, and that what is left is freed."""

from __future__ import annotations

import gc
import threading
from typing import Any

import anyio
import pytest

import streamgen as sg
from tests.fakes import BOS, EOS, FakeOpener, expected_text, say, threads_of_engines

pytestmark = pytest.mark.anyio

HELLO = (BOS, *b"hello")


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener()


@pytest.fixture
async def engine(opener: FakeOpener) -> Any:
    async with sg.Engine(_opener=opener) as engine:
        yield engine
        opener.runner.open_gate()
        gc.collect()  # a stream that a test dropped must not be what keeps the engine from draining
    assert threads_of_engines() == []


async def until_free(engine: sg.Engine) -> None:
    """Until the engine has nothing open; a request that is done afterwards proves that its pages came back."""
    with anyio.fail_after(10):
        while engine.stats().open_requests:
            await anyio.lowlevel.checkpoint()


# ---- what comes out --------------------------------------------------------------------------------------------------


async def test_deltas_concatenate_to_the_result(engine: sg.Engine) -> None:
    async with engine.stream("hello", max_tokens=40, logprobs=0) as stream:
        deltas = [delta async for delta in stream]
    result = stream.result
    assert "".join(d.text for d in deltas) == result.text == expected_text(HELLO, 40)
    assert sum((d.ids for d in deltas), ()) == result.ids
    assert sum((d.logprobs for d in deltas), ()) == result.logprobs
    assert all(d.text or d.ids for d in deltas)
    assert result.finish_reason == "length" and result.id == stream.id


async def test_plain_iteration_without_entering(engine: sg.Engine) -> None:
    text = ""
    async for delta in engine.stream("hello", max_tokens=9):
        text += delta.text
    assert text == expected_text(HELLO, 9)


async def test_characters_are_whole() -> None:
    said = "größe 🙂 e"
    async with sg.Engine(_opener=FakeOpener(say(said))) as engine:
        async with engine.stream("x") as stream:
            texts = [text async for text in stream.texts()]
        cut = await engine.generate("x", max_tokens=9)  # within the smile
    assert "".join(texts) == said and "�" not in "".join(texts)
    assert all(texts)
    assert cut.text == "größe �"


async def test_texts_leave_out_empty_deltas() -> None:
    opener = FakeOpener(say("🙂"))
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine, engine.stream("x") as stream:
        opener.runner.release(1)
        first = await anext(stream)
        assert (first.text, first.ids) == ("", (0xF0,)), "ids run ahead of text"
        opener.runner.open_gate()
        assert [text async for text in stream.texts()] == ["🙂"]


async def test_events(engine: sg.Engine) -> None:
    async with engine.stream("hello", max_tokens=12, request_id="mine") as stream:
        events = [event async for event in stream.events()]
        assert [event async for event in stream.events()] == [events[0], events[-1]], "a second reader has no text left"
    assert events[0] == sg.Started(id="mine", prompt_tokens=6, cached_tokens=0)
    assert "".join(e.text for e in events[1:-1] if isinstance(e, sg.Text)) == expected_text(HELLO, 12)
    assert events[-1] == sg.Finished(completion=stream.result)


async def test_final_takes_nothing_from_the_iterator(engine: sg.Engine) -> None:
    async with engine.stream("hello", max_tokens=7) as stream:
        whole = await stream.final()
        assert "".join([d.text async for d in stream]) == whole.text == expected_text(HELLO, 7)
        assert await stream.final() == whole == stream.result
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_slow_reader_gets_everything_merged(opener: FakeOpener, engine: sg.Engine) -> None:
    async with engine.stream("slow", max_tokens=60) as slow:
        quick = await engine.generate("quick", max_tokens=60)  # ends although nobody reads the other
        assert quick.text == expected_text((BOS, *b"quick"), 60)
        await slow.final()
        deltas = [delta async for delta in slow]
    assert len(deltas) == 1 and deltas[0].text == expected_text((BOS, *b"slow"), 60)


async def test_two_readers_of_one_stream_share_it(engine: sg.Engine) -> None:
    read: list[str] = []

    async def read_all(stream: sg.Stream[None]) -> None:
        async for delta in stream:
            read.append(delta.text)  # noqa: PERF401  # readers share the list

    async with engine.stream("hello", max_tokens=30) as stream, anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(read_all, stream)
    assert "".join(read) == expected_text(HELLO, 30)


async def test_result_is_usable_at_any_time(opener: FakeOpener, engine: sg.Engine) -> None:
    opener.runner.is_gated = True
    stream = engine.stream("hello", max_tokens=30)
    assert (stream.result.text, stream.result.finish_reason) == ("", None)
    async with stream:
        opener.runner.release(2)
        first = await anext(stream)
        assert expected_text(HELLO, 2).startswith(first.text)
        assert stream.result.finish_reason is None
        opener.runner.open_gate()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.usage.prompt_tokens == 6
    assert expected_text(HELLO, 30).startswith(stream.result.text)


async def test_values_of_plain_text_are_refused_by_name(engine: sg.Engine) -> None:
    stream = engine.stream("hello")
    for name in ("partials", "items", "fields"):
        with pytest.raises(sg.InvalidRequest, match=name):
            getattr(stream, name)()
    stream.cancel()
    assert (await stream.final()).finish_reason == "cancelled"


# ---- ways out --------------------------------------------------------------------------------------------------------


async def test_early_break_in_a_scope(opener: FakeOpener, engine: sg.Engine) -> None:
    async with engine.stream("hello") as stream:
        async for _ in stream:
            break
    assert stream.result.finish_reason == "cancelled" and stream.result.text
    assert engine.stats().open_requests == 0, "leaving the scope returns when the engine has freed it"
    steps = opener.runner.num_steps
    await engine.generate("hello", max_tokens=1)
    assert opener.runner.num_steps <= steps + 4, "it went on running"


async def test_early_break_without_a_scope_warns(engine: sg.Engine) -> None:
    with pytest.warns(ResourceWarning, match="was dropped while it ran"):
        async for _ in engine.stream("hello"):
            break
        gc.collect()
    await until_free(engine)


async def test_a_dropped_stream_is_cancelled(opener: FakeOpener, engine: sg.Engine) -> None:
    opener.runner.is_gated = True
    stream = engine.stream("hello")
    await stream.__aenter__()
    with pytest.warns(ResourceWarning, match="was dropped while it ran"):
        del stream
        gc.collect()
    await until_free(engine)


async def test_a_stream_that_never_ran_goes_silently(engine: sg.Engine) -> None:
    stream = engine.stream("hello")
    del stream
    gc.collect()
    assert engine.stats().requests == 0


async def test_cancel_from_a_thread_ends_iteration_normally(opener: FakeOpener, engine: sg.Engine) -> None:
    opener.runner.is_gated = True
    stream = engine.stream("hello")
    opener.runner.release(1)
    text = (await anext(stream)).text
    thread = threading.Thread(target=stream.cancel)
    thread.start()
    async for delta in stream:
        text += delta.text
    thread.join()
    stream.cancel()
    assert stream.result.finish_reason == "cancelled" and stream.result.text == text
    assert (await stream.final()).finish_reason == "cancelled"


async def test_cancel_before_it_ran(engine: sg.Engine) -> None:
    stream = engine.stream("hello")
    stream.cancel()
    async with stream:
        assert [d async for d in stream] == []
    assert stream.result.finish_reason == "cancelled" and engine.stats().requests == 0


async def test_cancel_after_the_end_changes_nothing(engine: sg.Engine) -> None:
    async with engine.stream("hello", max_tokens=3) as stream:
        whole = await stream.final()
        stream.cancel()
    assert stream.result == whole and whole.finish_reason == "length"


async def test_a_cancelled_scope_is_neither_caught_nor_wrapped(opener: FakeOpener, engine: sg.Engine) -> None:
    opener.runner.is_gated = True
    with anyio.CancelScope() as scope:
        async with engine.stream("hello") as stream:
            scope.cancel()
            async for _ in stream:
                pytest.fail("nothing was released")
        pytest.fail("the cancellation was swallowed")
    assert scope.cancelled_caught
    assert stream.result.finish_reason == "cancelled" and engine.stats().open_requests == 0


async def test_a_task_cancelled_while_it_enters(opener: FakeOpener, engine: sg.Engine) -> None:
    tokenizer = opener.model.tokenizer
    tokenizer.may_encode.clear()

    async def enter() -> None:
        async with engine.stream("hello"):
            pytest.fail("it was never encoded")

    async with anyio.create_task_group() as group:
        group.start_soon(enter)
        assert await anyio.to_thread.run_sync(tokenizer.encoding.wait, 10)
        group.cancel_scope.cancel()
    await until_free(engine)
    tokenizer.may_encode.set()


async def test_native_asyncio_cancellation(opener: FakeOpener, engine: sg.Engine, anyio_backend: str) -> None:
    if anyio_backend != "asyncio":
        pytest.skip("Task.cancel is asyncio's")
    import asyncio

    opener.runner.is_gated = True
    task = asyncio.create_task(engine.generate("hello"))
    assert await anyio.to_thread.run_sync(opener.runner.stepping.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_free(engine)


async def test_an_error_in_the_body_passes_through(engine: sg.Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        async with engine.stream("hello") as stream:
            await anext(stream)
            raise ZeroDivisionError
    assert stream.result.finish_reason == "cancelled"


async def test_cancelling_at_every_step(opener: FakeOpener, engine: sg.Engine) -> None:
    opener.runner.is_gated = True
    for steps in range(12):
        text = ""
        async with engine.stream("hello", max_tokens=450) as stream:
            for _ in range(steps):
                opener.runner.release(3)  # two steps may still be under way for the stream before
                text += (await anext(stream)).text
        assert stream.result.text.startswith(text)
        assert stream.result.finish_reason == "cancelled"
        assert expected_text(HELLO, 450).startswith(stream.result.text)
        assert engine.stats().open_requests == 0


async def test_a_stop_string_frees_at_once(engine: sg.Engine) -> None:
    opener = FakeOpener(say("abc" + "." * 400))
    async with sg.Engine(_opener=opener) as other:
        reply = await other.generate("x", stop="c", max_tokens=400)
        again = await other.generate("y", stop="c", max_tokens=400)
    assert (reply.text, reply.ids, reply.stop) == ("ab", (*b"abc",), "c") and again.text == "ab"
    assert opener.runner.num_steps < 20, "the sequence ran on after its stop string"


async def test_wakes_are_one_per_step_and_loop(
    opener: FakeOpener, engine: sg.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamgen import mailbox

    posts = 0
    set_all = mailbox._set_all

    def counted(waiters: list[Any]) -> None:
        nonlocal posts
        posts += 1
        set_all(waiters)

    opener.runner.is_gated = True
    streams = [engine.stream(f"number {i}", max_tokens=10) for i in range(6)]
    for stream in streams:
        await stream.__aenter__()

    async def read(stream: sg.Stream[None]) -> None:
        async for _ in stream:
            pass

    monkeypatch.setattr(mailbox, "_set_all", counted)
    async with anyio.create_task_group() as group:
        for stream in streams:
            group.start_soon(read, stream)
        await anyio.wait_all_tasks_blocked()
        opener.runner.open_gate()
    assert 0 < posts <= opener.runner.num_steps + 1


def test_repr_tells_the_state() -> None:
    async def main() -> None:
        async with sg.Engine(_opener=FakeOpener(say("a"))) as engine:
            stream = engine.stream("x", request_id="mine")
            assert repr(stream) == "<Stream mine new>"
            await stream.final()
            assert repr(stream) == "<Stream mine stop>" and stream.result.stop == EOS

    anyio.run(main)
