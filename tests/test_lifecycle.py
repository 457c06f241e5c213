"""An engine's life: open, time, cancel, drain, fail, close; nothing is left and nobody hangs."""

from __future__ import annotations

import gc
import logging
import pickle
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import streamgen as sg
from tests.fakes import BOS, FakeOpener, expected_text, say, threads_of_engines

if TYPE_CHECKING:
    import threading

    from anyio.abc import TaskStatus

pytestmark = pytest.mark.anyio

HELLO = (BOS, *b"hello")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    assert threads_of_engines() == []


async def in_thread(event: threading.Event) -> None:
    """Wait for a thread's event without holding the loop."""
    assert await anyio.to_thread.run_sync(event.wait, 20), "waited for an event that never came"


# ---- time and cancellation -------------------------------------------------------------------------------------------


async def test_timeout_raises_with_the_part_that_is_there() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        opener.runner.release(3)
        with pytest.raises(sg.DeadlineExceeded) as caught:
            await engine.generate("hello", timeout=0.05)
        partial = caught.value.partial
        assert isinstance(caught.value, TimeoutError) and caught.value.retryable
        assert expected_text(HELLO, 3).startswith(partial.text) and partial.finish_reason == "deadline"
        opener.runner.open_gate()


async def test_a_stream_yields_what_is_there_before_its_deadline_is_raised() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        opener.runner.release(2)
        read = ""
        stream = engine.stream("hello", timeout=1e6)
        with pytest.raises(sg.DeadlineExceeded) as caught:
            async with stream:
                while len(stream.result.ids) < 2:
                    await anyio.lowlevel.checkpoint()
                number, thread = stream._submission._number, engine._thread
                assert number is not None and thread is not None
                thread.cancel(number, "deadline")  # as its timer would
                async for delta in stream:
                    read += delta.text
        assert read == expected_text(HELLO, 2) == stream.result.text == caught.value.partial.text
        assert stream.result.finish_reason == "deadline"
        opener.runner.open_gate()


async def test_an_ended_request_leaves_no_timer() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        await engine.generate("hello", max_tokens=2, timeout=1e6)
        thread = engine._thread
        assert thread is not None
        loop: Any = thread._loop
        far = [timer for timer in list(loop._scheduled) if timer.when() > loop.time() + 1e5]
        assert all(timer.cancelled() for timer in far)


async def test_cancelling_generate_frees_everything() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        with anyio.move_on_after(5) as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(lambda: engine.generate("hello"))
                await in_thread(opener.runner.stepping)
                group.cancel_scope.cancel()
        assert not scope.cancelled_caught
        assert engine.stats().open_requests == 0
        opener.runner.open_gate()
        assert (await engine.generate("hello", max_tokens=3)).text == expected_text(HELLO, 3)
        assert engine.stats().pages_used == 0


async def test_cancel_while_the_prompt_is_encoded() -> None:
    opener = FakeOpener()
    async with sg.Engine(_opener=opener) as engine:
        tokenizer = opener.model.tokenizer
        tokenizer.may_encode.clear()
        stream = engine.stream("hello")
        async with anyio.create_task_group() as group:
            group.start_soon(stream.__aenter__)
            await in_thread(tokenizer.encoding)
            stream.cancel()
        assert stream.result.finish_reason == "cancelled"
        assert engine.stats().open_requests == 0
        tokenizer.may_encode.set()
        assert (await engine.generate("hello", max_tokens=2)).text == expected_text(HELLO, 2)
        assert opener.runner.num_steps == 2, "a cancelled request ran"


async def test_cancel_while_waiting_for_a_slot() -> None:
    opener = FakeOpener(max_running=1)
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        first = engine.stream("hello", max_tokens=2)
        second = engine.stream("other", max_tokens=2)
        async with first:
            async with second:
                second.cancel()
            events = [event async for event in second.events()]
            assert [type(event).__name__ for event in events] == ["Finished"], "it never started"
            assert second.result.finish_reason == "cancelled"
            opener.runner.open_gate()
            assert (await first.final()).text == expected_text(HELLO, 2)


async def test_random_cancels_leave_no_page_behind() -> None:
    import random

    rng = random.Random(11)
    opener = FakeOpener(num_pages=24, max_running=4)
    async with sg.Engine(_opener=opener) as engine:

        async def ask(i: int) -> None:
            prompt = f"{i}" * rng.randint(1, 60)
            read = ""
            stop_after = rng.randint(0, 40)
            async with engine.stream(prompt, max_tokens=rng.randint(1, 60), tenant="t") as stream:
                async for delta in stream:
                    read += delta.text
                    if len(read) >= stop_after:
                        break
            assert expected_text((BOS, *prompt.encode()), len(stream.result.ids)) == stream.result.text
            assert stream.result.text.startswith(read)

        async with anyio.create_task_group() as group:
            for i in range(60):
                group.start_soon(ask, i)
        await engine.generate("last", max_tokens=1)
        stats = engine.stats()
        assert (stats.open_requests, stats.running, stats.waiting, stats.pages_used) == (0, 0, 0, 0)
    assert opener.runner.num_steps > 20


# ---- life ------------------------------------------------------------------------------------------------------------


async def test_states_of_a_life() -> None:
    opener = FakeOpener()
    opener.load_gate.clear()
    seen: list[sg.LoadProgress] = []
    engine = sg.Engine("some/model", _opener=opener, on_progress=seen.append)
    assert engine.state == "new" and threads_of_engines() == []
    assert engine.plan().weights == 1000, "a plan needs no open engine"
    with pytest.raises(sg.EngineClosed, match="is new"):
        engine.stream("x")
    async with anyio.create_task_group() as group:
        group.start_soon(engine.open)
        await in_thread(opener.loading)
        assert engine.state == "loading"
        with pytest.raises(sg.EngineClosed, match="still loading"):
            engine.stream("x")
        opener.load_gate.set()
    assert engine.state == "ready" and seen == [sg.LoadProgress(stage="weights", done=500, total=1000)]
    with pytest.raises(sg.ConfigError, match="ready already"):
        await engine.open()
    await engine.drain()
    assert engine.state == "draining"
    with pytest.raises(sg.EngineClosed, match="draining"):
        engine.stream("x")
    await engine.aclose()
    await engine.aclose()
    assert engine.state == "closed" and opener.model.num_closed == 1
    with pytest.raises(sg.EngineClosed, match="is closed"):
        engine.stream("x")
    assert engine.stats().state == "closed"


async def test_one_engine_opened_twice_in_a_row() -> None:
    opener = FakeOpener()
    engine = sg.Engine(_opener=opener)
    for _ in range(2):
        async with engine:
            assert (await engine.generate("hello", max_tokens=4)).text == expected_text(HELLO, 4)
        assert engine.state == "closed"
    assert [model.num_closed for model in opener.models] == [1, 1]


async def test_two_engines_at_once() -> None:
    async with sg.Engine(_opener=FakeOpener(say("one"))) as one, sg.Engine(_opener=FakeOpener(say("two"))) as two:
        assert [(await engine.generate("x")).text for engine in (one, two, one)] == ["one", "two", "one"]
        assert len(threads_of_engines()) == 8


async def test_cancelling_open_gives_up_loading() -> None:
    opener = FakeOpener()
    opener.load_gate.clear()
    engine = sg.Engine(_opener=opener)
    async with anyio.create_task_group() as group:
        group.start_soon(engine.open)
        await in_thread(opener.loading)
        group.cancel_scope.cancel()
    assert opener.was_given_up and engine.state == "closed" and threads_of_engines() == []
    opener.load_gate.set()
    async with engine:
        assert engine.state == "ready"


async def test_closing_while_another_task_opens() -> None:
    opener = FakeOpener()
    opener.load_gate.clear()
    engine = sg.Engine(_opener=opener)
    caught: list[BaseException] = []

    async def open_it() -> None:
        try:
            await engine.open()
        except sg.StreamgenError as e:
            caught.append(e)

    async with anyio.create_task_group() as group:
        group.start_soon(open_it)
        await in_thread(opener.loading)
        await engine.aclose()
    assert isinstance(caught[0], sg.EngineClosed) and opener.was_given_up


async def test_a_load_error_comes_out_of_open() -> None:
    engine = sg.Engine(_opener=FakeOpener(error=sg.ModelNotFound("there is no such model")))
    with pytest.raises(sg.ModelNotFound, match="no such model"):
        await engine.open()
    assert engine.state == "closed" and threads_of_engines() == []
    with pytest.raises(sg.ModelNotFound):
        async with engine:
            pass


async def test_an_error_in_on_progress_ends_loading() -> None:
    def on_progress(progress: sg.LoadProgress) -> None:
        raise RuntimeError("the bar broke")

    with pytest.raises(RuntimeError, match="the bar broke"):
        async with sg.Engine(_opener=FakeOpener(), on_progress=on_progress):
            pass


async def test_leaving_well_drains() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        stream = engine.stream("hello", max_tokens=50)
        await stream.__aenter__()
    assert stream.result.text == expected_text(HELLO, 50) and stream.result.finish_reason == "length"
    assert (await stream.final()).finish_reason == "length", "a finished stream outlives its engine"


def open_gate_when_closing(engine: sg.Engine, opener: FakeOpener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps go on only once closing has begun, so that no request ends by itself before."""
    begin_close = engine._begin_close

    def begin() -> Any:
        thread = begin_close()
        opener.runner.open_gate()
        return thread

    monkeypatch.setattr(engine, "_begin_close", begin)


async def test_leaving_by_an_error_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    opener.runner.release(1)
    with pytest.raises(ZeroDivisionError):
        async with sg.Engine(_opener=opener) as engine:
            stream = engine.stream("hello", max_tokens=50)
            assert (await anext(stream)).text == expected_text(HELLO, 1)
            open_gate_when_closing(engine, opener, monkeypatch)
            raise ZeroDivisionError
    with pytest.raises(sg.EngineClosed, match="while the request ran") as caught:
        while True:
            await anext(stream)
    assert caught.value.partial.text.startswith(expected_text(HELLO, 1))
    assert stream.result.finish_reason == "cancelled"


async def test_drain_with_a_timeout_cuts() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:
        stream = engine.stream("hello", max_tokens=50)
        await stream.__aenter__()
        await engine.drain(timeout=0.05)
        with pytest.raises(sg.EngineClosed):
            await stream.final()
        assert stream.result.finish_reason == "cancelled"
        opener.runner.open_gate()


async def test_closing_from_another_task_ends_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    engine = await sg.Engine(_opener=opener).open()
    caught: list[BaseException] = []

    async def read(task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        try:
            async with engine.stream("hello") as stream:
                task_status.started()
                await stream.final()
        except sg.EngineClosed as e:
            caught.append(e)

    async with anyio.create_task_group() as group:
        for _ in range(3):
            await group.start(read)
        open_gate_when_closing(engine, opener, monkeypatch)
        await engine.aclose()
    assert len(caught) == 3


async def test_a_dropped_engine_closes_itself() -> None:
    engine = await sg.Engine(_opener=FakeOpener()).open()
    thread = engine._thread
    assert thread is not None
    with pytest.warns(ResourceWarning, match="was dropped while open"):
        del engine
        gc.collect()
    await thread.closed.wait()
    await anyio.to_thread.run_sync(thread.thread.join)


# ---- failure ---------------------------------------------------------------------------------------------------------


async def test_a_failed_step_reaches_everybody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    opener = FakeOpener(fail_at=4)
    opener.runner.is_gated = True
    failures: list[sg.EngineFailed] = []

    async def ask(engine: sg.Engine) -> None:
        with pytest.raises(sg.EngineFailed, match="the device is on fire") as caught:
            await engine.generate("secret prompt")
        failures.append(caught.value)

    async with sg.Engine(_opener=opener) as engine:
        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(ask, engine)
            await in_thread(opener.runner.stepping)
            opener.runner.open_gate()
        assert engine.state == "failed"
        with pytest.raises(sg.EngineFailed, match="on fire"):
            engine.stream("x")
        assert engine.stats().open_requests == 0
    assert engine.state == "closed" and opener.model.num_closed == 1
    assert len(failures) == 4 and all(e.partial.finish_reason == "error" for e in failures)
    assert all("secret" not in str(e) for e in failures) and "secret" not in caplog.text
    copy = pickle.loads(pickle.dumps(failures[0]))
    assert (copy.message, copy.partial) == (failures[0].message, failures[0].partial)


async def test_a_bug_in_an_actor_fails_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from streamgen.actors.detokenizer import Detokenizer

    def broken(self: object, entries: object) -> None:
        raise KeyError("a bug")

    async with sg.Engine(_opener=FakeOpener()) as engine:
        monkeypatch.setattr(Detokenizer, "advance", broken)
        with pytest.raises(sg.EngineFailed, match="KeyError in the engine thread"):
            await engine.generate("hello")
        monkeypatch.undo()
        await engine.aclose()
        async with engine:
            assert (await engine.generate("hello", max_tokens=1)).text == expected_text(HELLO, 1)
