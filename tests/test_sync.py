"""The engine for plain code: the same answers with `with` and plain iterators, on threads and inside a running loop."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest

import streamgen as sg
from streamgen import sync
from tests.fakes import BOS, EOS, FakeOpener, expected_text, say, threads_of_engines

HELLO = (BOS, *b"hello")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    assert threads_of_engines() == []


def test_generate_and_stream() -> None:
    with sync.Engine(_opener=FakeOpener()) as engine:
        assert engine.state == "ready"
        assert engine.generate("hello", max_tokens=9).text == expected_text(HELLO, 9)
        with engine.stream("hello", max_tokens=30) as stream:
            text = "".join(delta.text for delta in stream)
        assert text == stream.result.text == expected_text(HELLO, 30)
        assert "".join(engine.stream("hello", max_tokens=5).texts()) == expected_text(HELLO, 5)
        events = list(engine.stream("hello", max_tokens=5, request_id="mine").events())
        assert events[0] == sg.Started(id="mine", prompt_tokens=6, cached_tokens=0)
        assert isinstance(events[-1], sg.Finished) and events[-1].completion.text == expected_text(HELLO, 5)
    assert engine.state == "closed"


def test_sample_score_tokenize_render() -> None:
    with sync.Engine(_opener=FakeOpener()) as engine:
        assert len({c.text for c in engine.sample("hello", n=3, max_tokens=8)}) == 3
        assert len(engine.sample("hello", n=1, best_of=3, max_tokens=8)) == 1
        assert [entry.text for entry in engine.score("hello", "you")] == ["y", "o", "u"]
        assert engine.tokenize("hello") == list(HELLO)
        assert engine.render([sg.user("hi")]).text == "<|user|>hi"


def test_inside_a_running_loop() -> None:
    async def notebook() -> str:
        with sync.Engine(_opener=FakeOpener()) as engine:
            return engine.generate("hello", max_tokens=9).text

    for backend in ("asyncio", "trio"):
        assert anyio.run(notebook, backend=backend) == expected_text(HELLO, 9)


def test_many_threads_share_one_engine() -> None:
    opener = FakeOpener()
    prompts = [f"thread {i}" for i in range(16)]
    with sync.Engine(_opener=opener) as engine, ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda prompt: engine.generate(prompt, max_tokens=25).text, prompts))
    assert texts == [expected_text((BOS, *prompt.encode()), 25) for prompt in prompts]
    assert opener.runner.max_sequences > 1


def test_leaving_early_and_dropping() -> None:
    opener = FakeOpener()
    with sync.Engine(_opener=opener) as engine:
        with engine.stream("hello") as stream:
            next(stream)
        assert stream.result.finish_reason == "cancelled" and engine.stats().open_requests == 0
        with pytest.warns(ResourceWarning, match="was dropped while it ran"):
            for _ in engine.stream("hello"):
                break
            gc.collect()


def test_cancel_from_another_thread() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    with sync.Engine(_opener=opener) as engine:
        stream = engine.stream("hello")
        opener.runner.release(1)
        next(stream)
        timer = threading.Thread(target=stream.cancel)
        timer.start()
        assert list(stream) == []
        timer.join()
        assert stream.final().finish_reason == "cancelled"
        opener.runner.open_gate()


def test_errors_are_the_same() -> None:
    with sync.Engine(_opener=FakeOpener(say("ab"), max_context=32)) as engine:
        with pytest.raises(sg.InvalidRequest, match="did you mean 'max_tokens'"):
            engine.stream("x", max_tokns=1)  # type: ignore[call-overload]
        with pytest.raises(sg.PromptTooLong):
            engine.generate("x" * 40)
        with pytest.raises(sg.PromptTooLong), engine.stream("x" * 40):
            pytest.fail("it was entered")
        with pytest.raises(sg.NotSupported):
            engine.embed(["x"])
        assert engine.generate("x").stop == EOS
    with pytest.raises(sg.EngineClosed):
        engine.generate("x")


def test_deadline() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    with sync.Engine(_opener=opener) as engine:
        opener.runner.release(2)
        with pytest.raises(sg.DeadlineExceeded) as caught:
            engine.generate("hello", timeout=0.05)
        assert expected_text(HELLO, 2).startswith(caught.value.partial.text)
        opener.runner.open_gate()


def test_failure_and_a_fresh_start() -> None:
    opener = FakeOpener(fail_at=2)
    engine = sync.Engine(_opener=opener)
    with engine:
        with pytest.raises(sg.EngineFailed, match="on fire"):
            engine.generate("hello")
        with pytest.raises(sg.EngineFailed, match="on fire"):
            engine.generate("hello")
    opener.runner.fail_at = None
    with engine:
        assert engine.generate("hello", max_tokens=2).text == expected_text(HELLO, 2)


def test_open_close_without_with() -> None:
    engine = sync.Engine(_opener=FakeOpener())
    engine.close()
    assert engine.open() is engine
    engine.drain()
    engine.close()
    engine.aclose()
    assert engine.state == "closed"


def test_drain_with_a_timeout_cuts() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    with sync.Engine(_opener=opener) as engine:
        stream = engine.stream("hello")
        stream.__enter__()
        engine.drain(timeout=0.05)
        with pytest.raises(sg.EngineClosed):
            stream.final()
        opener.runner.open_gate()


def test_many_lives_leave_nothing() -> None:
    for _ in range(20):
        with sync.Engine(_opener=FakeOpener(say("a"))) as engine:
            engine.generate("x")
    assert threads_of_engines() == []


def test_same_names_as_the_async_engine() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_")}

    assert public(sg.Engine) == public(sync.Engine) - {"close"}
    assert public(sg.Stream) == public(sync.Stream)
