"""`isolation="process"` through the public interface: a child that dies or hangs costs no stream a token."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

import streamgen as sg
from tests.fakes import threads_of_engines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.anyio

FIELDS: dict[str, Any] = {"kv_memory": "16MiB", "max_running": 32, "threads": 2}
TOKENS = 60
DEADLINE = 0.3  # seconds, of a step: a busy machine must not pass for one that hangs


def children() -> set[int]:
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for file in found for pid in file.read_text().split()}


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    gc.collect()
    files, processes = len(os.listdir("/proc/self/fd")), children()
    yield
    gc.collect()
    assert threads_of_engines() == [] and children() == processes
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.fixture(autouse=True)
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgen.actors.world.RealWorld.min_step_deadline", DEADLINE)
    monkeypatch.setattr("streamgen.actors.watchdog.UNMEASURED", 10.0)
    monkeypatch.setattr("streamgen.execution.remote.LOAD_SILENCE", 2.0)


def engine(path: Path, **fields: Any) -> sg.Engine:
    return sg.Engine(path, isolation="process", **{**FIELDS, **fields})


def prompt(number: int) -> str:
    return "Once upon a time, there was a little girl " + "named Lily " * (number % 7) + str(number)


async def ask(opened: sg.Engine, number: int, begun: anyio.Semaphore | None = None) -> tuple[str, tuple[int, ...]]:
    """One stream, read to its end: its text as it came, and its ids."""
    text = ""
    temperature = 0.9 if number % 2 else 0.0
    async with opened.stream(
        prompt(number), max_tokens=TOKENS, ignore_eos=True, temperature=temperature, seed=number
    ) as stream:
        async for delta in stream:
            text += delta.text
            if begun is not None:
                begun.release()
                begun = None
        final = await stream.final()
    assert final.text == text
    return text, final.ids


async def ask_all(opened: sg.Engine, count: int, *, when_begun: Callable[[], None] = lambda: None) -> list[Any]:
    """`count` streams at once; `when_begun` is called when each has output, unless some had all of it first."""
    answers: list[Any] = [None] * count
    begun = anyio.Semaphore(0)

    async def one(number: int) -> None:
        answers[number] = await ask(opened, number, begun)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for number in range(count):
                group.start_soon(one, number)
            for _ in range(count):
                await begun.acquire()
            when_begun()
    return answers


async def expected_of(path: Path, count: int) -> list[Any]:
    async with sg.Engine(path, isolation="thread", **FIELDS) as opened:
        answers = await ask_all(opened, count)
    assert all(len(ids) == TOKENS for _, ids in answers) and len({text for text, _ in answers}) >= min(count, 2)
    return answers


def strike(how: signal.Signals) -> None:
    (pid,) = children()
    os.kill(pid, how)


BOTH = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])


async def test_it_answers_as_a_thread_does(stories: Path) -> None:
    expected = await expected_of(stories, 32)
    async with engine(stories) as opened:
        assert len(children()) == 1
        assert await ask_all(opened, 32) == expected


@BOTH
async def test_32_streams_go_on_when_the_child_falls_in_decode(stories: Path, how: signal.Signals) -> None:
    expected = await expected_of(stories, 32)
    async with engine(stories) as opened:
        before = children()
        assert await ask_all(opened, 32, when_begun=lambda: strike(how)) == expected
        assert opened.state == "ready" and children() != before


@BOTH
async def test_it_falls_while_idle(stories: Path, how: signal.Signals) -> None:
    expected = await expected_of(stories, 4)
    async with engine(stories) as opened:
        assert await ask_all(opened, 4) == expected
        strike(how)
        assert await ask_all(opened, 4) == expected


@BOTH
async def test_it_falls_in_the_first_prompt(stories: Path, how: signal.Signals) -> None:
    expected = await expected_of(stories, 1)
    async with engine(stories) as opened:
        strike(how)  # before anything ran: nothing is known of how long a step takes
        assert await ask_all(opened, 1) == expected


@BOTH
async def test_it_falls_while_the_engine_drains(stories: Path, how: signal.Signals) -> None:
    expected = await expected_of(stories, 3)
    opened = await engine(stories).open()
    answers: list[Any] = [None] * 3
    begun = anyio.Semaphore(0)

    async def one(number: int) -> None:
        answers[number] = await ask(opened, number, begun)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(one, number)
            for _ in range(3):
                await begun.acquire()
            group.start_soon(opened.drain)
            strike(how)
    await opened.aclose()
    assert answers == expected


@BOTH
async def test_it_falls_while_it_loads(stories: Path, how: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamgen import child_process
    from streamgen.execution import child

    expected = await expected_of(stories, 1)
    start, started = child_process.start_python, []

    def start_and_strike(*arguments: Any) -> Any:
        process = start(*arguments)
        started.append(process.pid)
        if len(started) == 1:
            os.kill(process.pid, how)
        return process

    monkeypatch.setattr(child, "start_python", start_and_strike)
    async with engine(stories) as opened:
        assert await ask_all(opened, 1) == expected
    assert len(started) == 2


async def test_over_its_budget_the_engine_fails_and_restart_brings_it_back(stories: Path) -> None:
    expected = await expected_of(stories, 1)
    async with engine(stories) as opened:
        with anyio.fail_after(60), pytest.raises(sg.EngineFailed, match="replaced 3 times"):
            while True:
                for pid in children():
                    os.kill(pid, signal.SIGKILL)
                await opened.generate(prompt(0), max_tokens=2)
        assert opened.state == "failed"
        await opened.restart()
        assert await ask_all(opened, 1) == expected


async def test_closing_in_the_middle_leaves_no_process(stories: Path) -> None:
    opened = await engine(stories).open()
    stream = opened.stream(prompt(1), max_tokens=200, ignore_eos=True)
    await anext(stream)
    strike(signal.SIGSTOP)  # the step under way will not end by itself
    with anyio.fail_after(10):
        await opened.aclose()
    assert children() == set()


async def test_a_processor_is_refused(stories: Path) -> None:
    async with engine(stories) as opened:
        with pytest.raises(sg.InvalidRequest, match="processors"):
            await opened.generate(prompt(1), max_tokens=2, processors=[lambda ids, logits: None])
        assert (await opened.generate(prompt(1), max_tokens=2)).text
