"""The actor loop, the worker threads and the executor."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import anyio
import pytest

from streamgen.actors.actor import Actor
from streamgen.actors.executor import ExecutorActor
from streamgen.actors.workers import EngineOwnedThread, Workers, host_has_ended
from streamgen.messages import SchedulerInbox, StepDone, StepFailed, StepPlan

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The engine thread runs asyncio."""
    return "asyncio"


class Adder(Actor[int]):
    name = "adder"

    def __init__(self) -> None:
        super().__init__(capacity=8)
        self.turns: list[list[int]] = [[]]

    def handle(self, message: int) -> None:
        if message < 0:
            raise ValueError("negative")
        self.turns[-1].append(message)

    def settle(self) -> None:
        self.turns.append([])


async def test_what_waits_together_is_one_turn() -> None:
    actor = Adder()
    async with anyio.create_task_group() as group:
        actor.post(1)
        actor.post(2)
        await group.start(actor.run)
        await anyio.wait_all_tasks_blocked()
        actor.post(3)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert actor.turns == [[1, 2], [3], []]


async def test_messages_to_an_ended_actor_are_dropped() -> None:
    actor = Adder()
    async with anyio.create_task_group() as group:
        await group.start(actor.run)
        group.cancel_scope.cancel()
    actor.post(1)
    assert actor.turns == [[]]


async def test_a_full_inbox_is_a_bug_that_shows() -> None:
    actor = Adder()
    for i in range(8):
        actor.post(i)
    with pytest.raises(anyio.WouldBlock):
        actor.post(8)
    async with anyio.create_task_group() as group:
        await group.start(actor.run)
        group.cancel_scope.cancel()


async def test_a_crash_ends_the_group() -> None:
    actor = Adder()
    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as group:
            await group.start(actor.run)
            actor.post(-1)
    assert caught.group_contains(ValueError, match="negative")


async def test_workers_run_in_order_and_report_on_the_loop() -> None:
    workers = Workers(1, name="streamgen-test", loop=asyncio.get_running_loop())
    seen: list[tuple[Any, Any, int]] = []
    all_done = anyio.Event()

    def done(result: int | None, error: BaseException | None) -> None:
        seen.append((result, error, threading.get_ident()))
        if len(seen) == 3:
            all_done.set()

    broken = ZeroDivisionError("no")

    def fail() -> int:
        raise broken

    workers.submit(lambda: 1, done)
    workers.submit(fail, done)
    workers.submit(threading.get_ident, done)
    await all_done.wait()
    assert [(r, e) for r, e, _ in seen[:2]] == [(1, None), (None, broken)]
    assert {ident for *_, ident in seen} == {threading.get_ident()}, "results are handed over on the loop"
    assert seen[2][0] != threading.get_ident(), "calls run elsewhere"
    workers.stop()
    assert not any(isinstance(t, EngineOwnedThread) for t in threading.enumerate())


async def test_stopping_drops_what_waits() -> None:
    workers = Workers(1, name="streamgen-test", loop=asyncio.get_running_loop())
    started, may_end = threading.Event(), threading.Event()
    ran: list[str] = []

    def slow() -> None:
        started.set()
        may_end.wait(10)
        ran.append("slow")

    workers.submit(slow, lambda result, error: None)
    workers.submit(lambda: ran.append("late"), lambda result, error: None)
    assert started.wait(10)
    stopper = threading.Thread(target=workers.stop)
    stopper.start()
    while not workers._stopping:
        await anyio.lowlevel.checkpoint()
    may_end.set()
    stopper.join(10)
    assert ran == ["slow"] and not stopper.is_alive()


def test_the_host_has_not_ended_while_it_asks() -> None:
    assert not host_has_ended()


class Runner:
    """Answers two steps, then breaks."""

    def execute(self, plan: StepPlan) -> StepDone:
        if plan.step == 2:
            raise RuntimeError("out of luck")
        return StepDone(step=plan.step, tokens=((plan.step,),))


async def test_executor_reports_results_and_failures_in_order() -> None:
    device = Workers(1, name="streamgen-test", loop=asyncio.get_running_loop())
    got: list[SchedulerInbox] = []
    all_done = anyio.Event()

    def to_scheduler(message: SchedulerInbox) -> None:
        got.append(message)
        if len(got) == 3:
            all_done.set()

    executor = ExecutorActor(Runner(), device, to_scheduler=to_scheduler, capacity=3)
    async with anyio.create_task_group() as group:
        await group.start(executor.run)
        for step in range(3):
            executor.post(StepPlan(step=step, slots=(0,), starts=(0,), counts=(1,), samples=(1,), pages=((),)))
        await all_done.wait()
        group.cancel_scope.cancel()
    device.stop()
    assert got == [
        StepDone(step=0, tokens=((0,),)),
        StepDone(step=1, tokens=((1,),)),
        StepFailed(step=2, message="RuntimeError: out of luck"),
    ]
