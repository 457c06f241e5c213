"""The actor loop, the worker threads and the executor."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from streamgen.actors.actor import Actor
from streamgen.actors.device import Device
from streamgen.actors.executor import ExecutorActor
from streamgen.actors.workers import EngineOwnedThread, Workers, host_has_ended
from streamgen.messages import StepDone, StepFailed, StepPlan

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
    """Answers with the step's number; breaks at `fail_at`. A step waits for its gate once it has announced the last."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.gates = [threading.Event() for _ in range(4)]

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        if plan.step == self.fail_at:
            raise RuntimeError("out of luck")
        if wake_fd is not None:
            os.write(wake_fd, b"\0")
        assert self.gates[plan.step].wait(10)
        return StepDone(step=plan.step, tokens=((plan.step,),))


def plan(step: int) -> StepPlan:
    return StepPlan(step=step, slots=(0,), starts=(0,), counts=(1,), samples=(1,), pages=((),))


def num_open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


class Results:
    """What a device delivered on this loop, and a way to wait for so many."""

    def __init__(self) -> None:
        self.got: list[StepDone | StepFailed] = []
        self._changed = anyio.Event()

    def deliver(self, result: StepDone | StepFailed) -> None:
        self.got.append(result)
        self._changed.set()

    async def wait(self, count: int) -> None:
        while len(self.got) < count:
            self._changed = anyio.Event()
            await self._changed.wait()


async def test_executor_reports_results_and_failures_in_order() -> None:
    results, runner = Results(), Runner(fail_at=2)
    device = Device(runner, name="streamgen-test", loop=asyncio.get_running_loop(), deliver=results.deliver)
    executor = ExecutorActor(device, capacity=3)
    async with anyio.create_task_group() as group:
        await group.start(executor.run)
        for step in range(3):
            executor.post(plan(step))
        for gate in runner.gates:
            gate.set()
        await results.wait(3)
        group.cancel_scope.cancel()
    device.stop()
    assert results.got == [
        StepDone(step=0, tokens=((0,),)),
        StepDone(step=1, tokens=((1,),)),
        StepFailed(step=2, message="RuntimeError: out of luck"),
    ]


async def test_a_result_comes_while_the_next_step_runs() -> None:
    results, runner = Results(), Runner()
    device = Device(runner, name="streamgen-test", loop=asyncio.get_running_loop(), deliver=results.deliver)
    device.submit(plan(0))
    device.submit(plan(1))
    runner.gates[0].set()
    with anyio.fail_after(10):
        await results.wait(1)
    assert [r.step for r in results.got] == [0], "step 1 is held, and step 0 was delivered all the same"
    runner.gates[1].set()
    with anyio.fail_after(10):
        await results.wait(2)
    device.stop()


async def test_a_stopped_device_leaves_nothing_behind() -> None:
    before = num_open_files()
    runner = Runner()
    device = Device(runner, name="streamgen-test", loop=asyncio.get_running_loop(), deliver=lambda result: None)
    device.submit(plan(0))
    device.submit(plan(1))
    runner.gates[0].set()
    runner.gates[1].set()
    device.stop()
    device.stop()
    assert not any(isinstance(t, EngineOwnedThread) for t in threading.enumerate())
    assert num_open_files() == before
