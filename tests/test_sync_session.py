"""Sessions for plain code: the same rules without a loop."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Any

import pytest

import streamgen as sg
from streamgen.sync_session import Session
from tests.fakes import PAGE, FakeOpener, threads_of_engines
from tests.test_session import TEMPLATE

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener(template=TEMPLATE)


@pytest.fixture
def engine(opener: FakeOpener) -> Any:
    with sg.sync.Engine(_opener=opener) as engine:
        yield engine
        opener.runner.open_gate()
        gc.collect()
    assert threads_of_engines() == []


def test_turns_become_history(engine: sg.sync.Engine) -> None:
    session = engine.session(system="S", max_tokens=20)
    first = session.ask("x" * 20)
    with session.stream("two") as stream:
        text = "".join(stream.texts())
    events = list(session.stream("three").events())
    assert isinstance(events[-1], sg.Finished)
    assert session.messages == [
        sg.user("x" * 20),
        first.message,
        sg.user("two"),
        sg.assistant(text),
        sg.user("three"),
        events[-1].completion.message,
    ]
    assert stream.result.usage.cached_tokens >= 20 // PAGE * PAGE
    assert session.usage.completion_tokens == 60


@pytest.mark.parametrize("way", ["break", "cancel", "error", "deadline", "dropped"])
def test_a_turn_that_is_cut_leaves_the_history(engine: sg.sync.Engine, opener: FakeOpener, way: str) -> None:
    session = engine.session(max_tokens=400)
    session.ask("one", max_tokens=3)
    before = list(session.messages)
    opener.runner.is_gated = True
    if way == "dropped":
        session.stream("two")
    elif way == "deadline":
        with pytest.raises(sg.DeadlineExceeded):
            session.ask("two", timeout=0.02)
    elif way == "error":
        with pytest.raises(KeyError), session.stream("two"):
            raise KeyError
    else:
        with session.stream("two") as stream:
            opener.runner.release(2)
            next(stream)
            if way == "cancel":
                stream.cancel()
                assert sum(len(delta.ids) for delta in stream) <= 2
    assert session.messages == before and not session.is_busy
    opener.runner.open_gate()
    session.ask("three", max_tokens=3)
    assert [m["content"] for m in session.messages[::2]] == ["one", "three"]


def test_a_refused_turn_leaves_the_history(engine: sg.sync.Engine) -> None:
    session = engine.session(max_tokens=3)
    with pytest.raises(sg.TemplateError):
        session.ask("refuse")
    with pytest.raises(sg.PromptTooLong):
        list(session.stream("x" * 600))
    assert session.messages == [] and not session.is_busy


def test_threads_take_turns_or_are_refused(engine: sg.sync.Engine, opener: FakeOpener) -> None:
    opener.runner.is_gated = True
    session = engine.session(max_tokens=4)
    running = threading.Thread(target=session.ask, args=("one",))
    running.start()
    assert opener.runner.stepping.wait(10)
    with pytest.raises(sg.SessionBusy):
        session.ask("two")
    with pytest.raises(sg.SessionBusy):
        session.stream("two")
    opener.runner.open_gate()
    running.join()
    assert [m["content"] for m in session.messages[::2]] == ["one"]
    session.ask("three")


def test_forks_are_independent(engine: sg.sync.Engine) -> None:
    session = engine.session(system="S" * 40, max_tokens=8)
    session.ask("one")
    fork = session.fork()
    assert type(fork) is Session
    here, there = session.ask("here"), fork.ask("there")
    assert session.messages[2:] == [sg.user("here"), here.message]
    assert fork.messages[2:] == [sg.user("there"), there.message]
    assert there.usage.cached_tokens > 0


def test_closing_ends_the_turn_that_runs(engine: sg.sync.Engine, opener: FakeOpener) -> None:
    opener.runner.is_gated = True
    with engine.session(max_tokens=300) as session:
        stream = session.stream("one")
        stream.__enter__()
    assert engine.stats().open_requests == 0
    assert list(stream) == [] and session.messages == []
    with pytest.raises(sg.InvalidRequest, match="it was closed"):
        session.ask("two")
    session.aclose()


def test_a_real_chat_computes_only_what_is_new(demo_model_path: Path) -> None:
    with sg.sync.Engine(demo_model_path, max_running=1) as engine:
        session = engine.session(system="You answer briefly.", max_tokens=24, temperature=0)
        first = session.ask("Name three rivers, and say where they begin and where they end.")
        known = first.usage.prompt_tokens + len(first.ids)
        assert session.ask("And a lake?").usage.cached_tokens >= (known - 1) // PAGE * PAGE
