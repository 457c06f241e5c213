"""The four ways to end a request, in each state that it can be in: one synchronous post, and everything is free."""

from __future__ import annotations

import gc
import threading
import warnings
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest

import streamgen as sg
from tests.fakes import BOS, FakeOpener, expected_text, threads_of_engines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.anyio

WAYS = ("task cancelled", "scope left", "cancelled from a thread", "reference dropped")
STATES = (
    "tokenizing",
    "waiting for a grammar",
    "queued",
    "prefilling",
    "decoding",
    "paused",
    "preempted",
    "engine asleep",
)
PROMPT = "the one that ends"


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    gc.collect()
    assert threads_of_engines() == []


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await anyio.lowlevel.checkpoint()


class Scene:
    """An engine whose device waits at a gate, and one request that was brought into a state."""

    def __init__(self, state: str) -> None:
        self.state = state
        few: dict[str, dict[str, Any]] = {"queued": {"max_running": 1}, "preempted": {"num_pages": 8}}
        self.opener = FakeOpener(**few.get(state, {}))
        self.runner = self.opener.runner
        self.engine = sg.Engine(_opener=self.opener)
        self.others: list[sg.Stream[Any]] = []
        self.is_compiling, self.may_compile = threading.Event(), threading.Event()

    def make(self) -> sg.Stream[Any]:
        """The request, not yet submitted."""
        prompt = PROMPT * 12 if self.state == "prefilling" else PROMPT
        if self.state == "waiting for a grammar":
            return self.engine.stream(prompt, max_tokens=200, output=int)
        return self.engine.stream(prompt, max_tokens=200, on_slow="pause" if self.state == "paused" else "coalesce")

    async def reach(self, mailbox: Any) -> None:
        """Bring the request, which was just submitted, into the state."""
        match self.state:
            case "tokenizing":
                await until(self.opener.model.tokenizer.encoding.is_set)
            case "waiting for a grammar":
                await until(self.is_compiling.is_set)
            case "queued":
                await until(lambda: bool(mailbox.prompt_ids) and len(self.scheduler._queue) == 1)
            case "prefilling":
                self.runner.release(1)
                await until(lambda: mailbox.is_started)
                assert not mailbox.has_tokens
            case "decoding":
                self.runner.release(3)
                await until(lambda: len(mailbox.completion().ids) >= 2)
            case "paused":
                self.runner.release(300)
                await until(lambda: self.scheduler.stats().paused == 1 and not self.scheduler.num_in_flight)
            case "preempted":
                await self._preempt(mailbox)
            case "engine asleep":
                await until(lambda: self.engine.state == "asleep")

    async def prepare(self) -> None:
        """What has to be so before the request is submitted."""
        self.runner.is_gated = True
        match self.state:
            case "tokenizing":
                self.opener.model.tokenizer.may_encode.clear()
            case "waiting for a grammar":
                self._hold_up_compiling()
            case "queued":
                await self._occupy("another", max_tokens=3)
            case "engine asleep":
                self.opener.model.may_wake.clear()
                await self.engine.sleep()

    def _hold_up_compiling(self) -> None:
        assert self.engine._thread is not None and self.engine._thread._core is not None
        compiler = self.engine._thread._core.compiler._compiler
        compile_ = compiler.compile

        def wait(source: Any) -> Any:
            self.is_compiling.set()
            assert self.may_compile.wait(30), "the test left the compiler's gate shut"
            return compile_(source)

        compiler.compile = wait  # type: ignore[method-assign]

    async def _occupy(self, prompt: str, **fields: Any) -> None:
        stream = self.engine.stream(prompt, **fields)
        self.others.append(stream)
        await stream.__aenter__()
        await until(lambda: self.scheduler.stats().running >= 1)

    async def _preempt(self, mailbox: Any) -> None:
        """One that matters more takes its pages."""
        self.runner.release(2)
        await until(lambda: mailbox.has_tokens)
        self.scheduler._admission.fits = lambda *a, **k: True  # a wrong prediction, which leads to preemption
        stream = self.engine.stream("more important " * 7, max_tokens=16, priority=9)
        self.others.append(stream)
        await stream.__aenter__()
        self.runner.release(12)
        await until(lambda: self.scheduler.stats().preemptions >= 1)

    @property
    def scheduler(self) -> Any:
        assert self.engine._thread is not None and self.engine._thread._core is not None
        return self.engine._thread._core.scheduler._scheduler

    def holds(self, number: int) -> bool:
        """Whether the scheduler knows the request still."""
        return number in self.scheduler._requests

    async def finish(self) -> None:
        """Everything goes on; the others get their answers, and nothing is held."""
        self.opener.model.tokenizer.may_encode.set()
        self.opener.model.may_wake.set()
        self.may_compile.set()
        self.runner.open_gate()
        for other in self.others:
            completion = await other.final()
            assert completion.finish_reason == "length"
        assert (await self.engine.generate("last", max_tokens=2)).text == expected_text((BOS, *b"last"), 2)
        stats = self.engine.stats()
        assert (stats.open_requests, stats.running, stats.waiting, stats.pages_used) == (0, 0, 0, 0)


@asynccontextmanager
async def scene(state: str) -> AsyncIterator[Scene]:
    it = Scene(state)
    async with it.engine:
        await it.prepare()
        try:
            yield it
        finally:
            it.opener.model.tokenizer.may_encode.set()
            it.opener.model.may_wake.set()
            it.may_compile.set()
            it.runner.open_gate()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("way", WAYS)
async def test_the_four_ways_in_every_state(way: str, state: str) -> None:
    async with scene(state) as it:
        stream = it.make()
        mailbox, submission = stream._mailbox, stream._submission
        async with anyio.create_task_group() as group:
            if way == "reference dropped":
                submission.submit()
                await it.reach(mailbox)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ResourceWarning)
                    del stream
                    gc.collect()
            else:
                leave, scope = anyio.Event(), anyio.CancelScope()
                group.start_soon(_hold, stream, leave, scope)
                await until(lambda: submission.is_submitted)
                await it.reach(mailbox)
                steps = it.runner.num_steps
                if way == "task cancelled":
                    group.cancel_scope.cancel()
                elif way == "scope left":
                    leave.set()
                    if not mailbox.prompt_ids:  # `async with` is still waiting to get in
                        scope.cancel()
                else:
                    await anyio.to_thread.run_sync(stream.cancel)
        with anyio.fail_after(5):  # while the device stands still
            await mailbox.wait_end()
        number = submission._number
        assert number is not None and mailbox.end is not None
        assert mailbox.end.finish_reason == "cancelled" and mailbox.end.code is None
        assert not it.holds(number), "whoever sees the end may count on slot and pages being free"
        if state in ("tokenizing", "waiting for a grammar", "queued", "engine asleep"):
            assert not mailbox.is_started
            assert all(begin.ids != (BOS, *PROMPT.encode()) for begin in it.runner.begun), "it cost a forward"
        elif way != "reference dropped" and state != "preempted":  # there the others go on
            assert it.runner.num_steps - steps <= 1, "it was in the batch after the step in flight"
        await it.finish()


async def _hold(stream: sg.Stream[Any], leave: anyio.Event, scope: anyio.CancelScope) -> None:
    with scope:
        async with stream:
            await _stay(stream, leave)


async def _stay(stream: sg.Stream[Any], leave: anyio.Event) -> None:
    while stream._mailbox.end is None and not leave.is_set():
        await anyio.lowlevel.checkpoint()


async def test_cancel_twice_and_after_the_end() -> None:
    async with sg.Engine(_opener=FakeOpener()) as engine:
        stream = engine.stream("hello", max_tokens=2)
        completion = await stream.final()
        stream.cancel()
        stream.cancel()
        assert stream.result == completion and completion.finish_reason == "length"
        twice = engine.stream("hello", max_tokens=200)
        async with twice:
            twice.cancel()
            twice.cancel()
        assert twice.result.finish_reason == "cancelled"
