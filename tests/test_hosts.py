"""Hosts of every kind: loops, threads, several at once, and hosts that just end."""

from __future__ import annotations

import gc
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from blockbuster import blockbuster_ctx

import streamgen as sg
from tests.fakes import BOS, FakeOpener, expected_text, threads_of_engines

if TYPE_CHECKING:
    import threading


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


async def test_one_engine_serves_several_loops_and_threads_at_once() -> None:
    answers: dict[str, str] = {}
    prompts = {name: f"from {name}" for name in ("asyncio", "trio", "thread", "here")}

    async with sg.Engine(_opener=FakeOpener()) as engine:

        async def ask(name: str) -> None:
            text = ""
            async with engine.stream(prompts[name], max_tokens=60) as stream:
                async for delta in stream:
                    text += delta.text
            answers[name] = text

        def ask_blocking() -> None:
            submission = engine._submission(prompts["thread"], {"max_tokens": 60})
            submission.submit()
            submission.mailboxes[0].wait_end_blocking()
            answers["thread"] = submission.mailboxes[0].completion().text

        async with anyio.create_task_group() as group:
            for backend in ("asyncio", "trio"):
                group.start_soon(anyio.to_thread.run_sync, partial(anyio.run, ask, backend, backend=backend))
            group.start_soon(anyio.to_thread.run_sync, ask_blocking)
            group.start_soon(ask, "here")
    assert answers == {name: expected_text((BOS, *prompt.encode()), 60) for name, prompt in prompts.items()}


async def test_a_loop_that_ended_stalls_nobody() -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with sg.Engine(_opener=opener) as engine:

        async def leave() -> None:
            stream = engine.stream("gone")
            await stream.__aenter__()
            left.append(stream)

        left: list[Any] = []
        await anyio.to_thread.run_sync(lambda: anyio.run(leave))
        opener.runner.open_gate()
        assert (await engine.generate("hello", max_tokens=5)).text == expected_text(HELLO, 5)
        left[0].cancel()


async def test_the_host_loop_is_never_blocked(anyio_backend: str) -> None:
    if anyio_backend == "trio":
        pytest.skip("blockbuster watches asyncio")
    with blockbuster_ctx("streamgen"):
        async with sg.Engine(_opener=FakeOpener()) as engine:
            async with engine.stream([sg.user("hello")], max_tokens=20, stop="zzz") as stream:
                async for _ in stream:
                    pass
            await engine.sample("hello", n=2, max_tokens=3)
            await engine.tokenize("hello")
            engine.stats()


def run_script(path: Path, body: str) -> list[str]:
    path.write_text(
        "import anyio, threading, time, streamgen as sg\n"
        "from tests.fakes import FakeOpener\n"
        "opener = FakeOpener()\n"
        "opener.runner.close = lambda: print('closed', flush=True)\n" + body
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": f"{root / 'src'}:{root}", "PATH": ""},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_a_host_that_ends_without_closing_ends_well(tmp_path: Path) -> None:
    words = run_script(
        tmp_path / "leave.py",
        "async def main():\n"
        "    global engine, stream\n"
        "    engine = await sg.Engine(_opener=opener).open()\n"
        "    stream = engine.stream('hello')\n"
        "    print((await anext(stream)).text[:1], flush=True)\n"
        "anyio.run(main)\n",
    )
    assert words == [expected_text(HELLO, 1), "closed"]


def test_a_host_that_ends_while_loading_ends_well(tmp_path: Path) -> None:
    words = run_script(
        tmp_path / "leave.py",
        "opener.load_gate.clear()\n"
        "engine = sg.Engine(_opener=opener)\n"
        "engine._begin_open()\n"
        "assert opener.loading.wait(20)\n"
        "print('leaving')\n",
    )
    assert words == ["leaving"]


def test_an_engine_outlives_the_main_thread_while_another_uses_it(tmp_path: Path) -> None:
    words = run_script(
        tmp_path / "leave.py",
        "engine = sg.sync.Engine(_opener=opener)\n"
        "engine.open()\n"
        "def work():\n"
        "    threading.main_thread().join()\n"
        "    time.sleep(0.6)\n"
        "    print(engine.generate('hello', max_tokens=8).text, flush=True)\n"
        "threading.Thread(target=work).start()\n",
    )
    assert words == [expected_text(HELLO, 8), "closed"]
