"""The device's thread: failures by kind and generation, its own death, and a step that never ends."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import pytest

import streamgen
from streamgen.actors.device import Device, DeviceThread
from streamgen.faults import DeviceDead, ExecutorLost, StepRaised
from streamgen.messages import StepDone, StepFailed, StepPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Device is driven by the engine's own loop, which is asyncio whatever the host runs.
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


def plan(step: int, *, generation: int = 0, rows: int = 1) -> StepPlan:
    return StepPlan(
        step=step, slots=(0,), starts=(0,), counts=(rows,), samples=(1,), pages=((),), generation=generation
    )


def done(step: int) -> StepDone:
    return StepDone(step=step, tokens=((step,),))


class Runner:
    """Answers with the step's number, or raises what is set for it. `gate` holds every step."""

    def __init__(self, errors: dict[int, BaseException] | None = None) -> None:
        self.errors = errors or {}
        self.ran: list[int] = []
        self.started, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        self.ran.append(plan.step)
        self.started.set()
        if wake_fd is not None:
            os.write(wake_fd, b"\0")
        assert self.gate.wait(20), "the test left the gate shut"
        if plan.step in self.errors:
            raise self.errors[plan.step]
        return done(plan.step)


class Results:
    def __init__(self) -> None:
        self.got: list[StepDone | StepFailed] = []
        self._changed = asyncio.Event()

    def deliver(self, result: StepDone | StepFailed) -> None:
        self.got.append(result)
        self._changed.set()

    async def wait(self, count: int) -> list[StepDone | StepFailed]:
        with anyio.fail_after(10):
            while len(self.got) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.got


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else set()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if isinstance(t, DeviceThread)]


def make(runner: object, results: Results, **fields: Callable[[], float]) -> Device:
    return Device(
        runner,  # type: ignore[arg-type]  # some have more than the protocol
        name="streamgen-test",
        loop=asyncio.get_running_loop(),
        deliver=results.deliver,
        **fields,
    )


@pytest.mark.parametrize(
    ("error", "message", "kind"),
    [
        (RuntimeError("out of luck"), "RuntimeError: out of luck", "error"),
        (MemoryError(), "MemoryError: ", "error"),
        (StepRaised("ValueError: over there"), "ValueError: over there", "error"),
        (ExecutorLost("it was killed"), "it was killed", "lost"),
        (DeviceDead("no more"), "no more", "dead"),
        (SystemExit(3), "SystemExit: 3", "dead"),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", "dead"),
    ],
)
async def test_an_error_has_a_kind(error: BaseException, message: str, kind: str) -> None:
    results = Results()
    device = make(Runner({0: error}), results)
    device.submit(plan(0))
    assert await results.wait(1) == [StepFailed(step=0, message=message, kind=kind)]
    device.stop()


async def test_plans_of_a_failed_generation_are_skipped_and_later_ones_run() -> None:
    results, runner = Results(), Runner({1: RuntimeError("x"), 5: ExecutorLost("y")})
    device = make(runner, results)
    generations = [3, 3, 3, 2, 4, 4, 4, 5]
    for step, generation in enumerate(generations):
        device.submit(plan(step, generation=generation))
    got = await results.wait(len(generations))
    assert runner.ran == [0, 1, 4, 5, 7], "a plan that was skipped must not reach the device"
    assert [getattr(r, "kind", "done") for r in got] == [
        "done", "error", "skipped", "skipped", "done", "lost", "skipped", "done",
    ]  # fmt: skip
    assert [r.step for r in got] == list(range(len(generations)))
    device.stop()


async def test_a_thread_that_dies_is_announced_at_once() -> None:
    results, runner = Results(), Runner()
    device = make(runner, results)
    device.submit(plan(7))
    await results.wait(1)
    ident = device._thread.ident
    assert ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(SystemExit))
    device.submit(plan(8))  # it wakes up, and meets the exception outside of any step
    got = await results.wait(2)
    assert isinstance(got[1], StepFailed) and got[1].kind == "dead"
    assert device.stop() and got[2:] == []


async def test_the_step_under_way_can_be_seen() -> None:
    results, runner, now = Results(), Runner(), [10.0]
    runner.gate.clear()
    device = make(runner, results, clock=lambda: now[0])
    assert device.running is None and device.runs_since is None
    device.submit(plan(4, rows=5))
    assert runner.started.wait(10)
    now[0] = 12.0
    assert device.running == (4, 5, 10.0) and device.runs_since == 10.0
    runner.gate.set()
    await results.wait(1)
    assert device.stop() and device.running is None


async def test_stopping_with_a_limit_tells_whether_the_step_is_over() -> None:
    before = open_files()
    results, runner = Results(), Runner()
    runner.gate.clear()
    device = make(runner, results)
    device.submit(plan(0))
    assert runner.started.wait(10)
    assert device.stop(0.01) is False
    runner.gate.set()
    assert device.stop() is True and device.stop() is True
    assert open_files() == before


async def test_an_abandoned_step_touches_nothing_of_the_engine() -> None:
    before = open_files()
    results, runner = Results(), Runner()
    runner.gate.clear()
    device = make(runner, results)
    device.submit(plan(0))
    device.submit(plan(1))
    assert runner.started.wait(10)
    over = threading.Event()
    device.abandon(over.set)
    assert not over.is_set() and open_files() != before, "the step may still write to its pipe"
    runner.gate.set()
    assert over.wait(10)
    device._thread.join(10)
    assert open_files() == before
    await asyncio.sleep(0)
    assert results.got == [] and runner.ran == [0]


async def test_abandoning_a_thread_that_is_over_frees_at_once() -> None:
    before = open_files()
    device = make(Runner({0: SystemExit()}), Results())
    device._end_soon()
    device._thread.join(10)
    over = threading.Event()
    device.abandon(over.set)
    assert over.is_set() and open_files() == before


class Preparing(Runner):
    """Has to load something before each step, for as long as nobody cancels it."""

    def __init__(self) -> None:
        super().__init__()
        self.preparing, self.cancelled = threading.Event(), threading.Event()

    def prepare(self) -> None:
        self.preparing.set()
        if not self.cancelled.wait(20):
            raise AssertionError("nobody cancelled it")
        raise DeviceDead("cancelled")

    def cancel(self) -> None:
        self.cancelled.set()


async def test_making_ready_is_no_part_of_a_step_and_ends_when_the_device_stops() -> None:
    results, runner = Results(), Preparing()
    device = make(runner, results)
    device.submit(plan(0))
    assert runner.preparing.wait(10)
    assert device.runs_since is None
    assert device.stop() and runner.ran == []


def test_a_wedged_step_does_not_hold_up_the_interpreter(anyio_backend: str) -> None:
    code = (
        "import asyncio, threading\n"
        "from streamgen.actors.device import Device\n"
        "from streamgen.messages import StepPlan\n"
        "started = threading.Event()\n"
        "class Runner:\n"
        "    def execute(self, plan, wake_fd=None):\n"
        "        started.set(); threading.Event().wait()\n"
        "async def main():\n"
        "    d = Device(Runner(), name='d', loop=asyncio.get_running_loop(), deliver=print)\n"
        "    d.submit(StepPlan(step=0, slots=(0,), starts=(0,), counts=(1,), samples=(1,), pages=((),)))\n"
        "    started.wait(); d.abandon(lambda: None)\n"
        "asyncio.run(main()); print('end')\n"
    )
    path = str(Path(streamgen.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")
