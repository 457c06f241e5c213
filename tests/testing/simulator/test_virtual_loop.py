"""The virtual loop: time jumps, a seed fixes the order, and what could not be repeated is refused."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest

from streamgen.testing.simulator.virtual_loop import Deadlock, VirtualLoop, check_private_parts

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def run(main: Callable[[], Awaitable[object]], seed: int | None = None) -> object:
    return anyio.run(main, backend="asyncio", backend_options={"loop_factory": partial(VirtualLoop, seed)})


def test_this_python_has_what_the_loop_leans_on() -> None:
    loop = VirtualLoop()
    check_private_parts(loop)
    loop.close()


def test_a_python_without_it_is_told() -> None:
    loop = VirtualLoop()
    scheduled = loop.__dict__.pop("_scheduled")
    with pytest.raises(RuntimeError, match="no _scheduled in this Python"):
        check_private_parts(loop)
    loop.__dict__["_scheduled"] = scheduled
    loop.close()


def test_hours_take_no_time() -> None:
    async def main() -> float:
        start = anyio.current_time()
        await anyio.sleep(7200)
        return anyio.current_time() - start

    began = time.monotonic()
    assert run(main) == 7200.0
    assert time.monotonic() - began < 5.0


def test_timers_come_in_order_at_their_very_times() -> None:
    seen: list[tuple[float, int]] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for i in range(20):
                group.start_soon(note, i)

    async def note(i: int) -> None:
        await anyio.sleep(0.1 * ((i * 7) % 20 + 1))
        seen.append((anyio.current_time(), i))

    run(main)
    assert [number for _, number in seen] == sorted(range(20), key=lambda i: (i * 7) % 20)
    assert [moment for moment, _ in seen] == [0.1 * (k + 1) for k in range(20)]


def test_time_limits_are_virtual() -> None:
    async def main() -> str:
        with anyio.move_on_after(30) as scope:
            await anyio.sleep_forever()
        assert scope.cancelled_caught and anyio.current_time() == 30.0
        with anyio.fail_after(10):
            await anyio.sleep(9.999)
        return "done"

    assert run(main) == "done"


def order_of(seed: int | None) -> list[int]:
    order: list[int] = []

    async def main() -> None:
        async with anyio.create_task_group() as group:
            for i in range(8):
                group.start_soon(step, i)

    async def step(i: int) -> None:
        for _ in range(3):
            order.append(i)
            await anyio.lowlevel.checkpoint()

    run(main, seed)
    return order


def test_a_seed_fixes_the_order() -> None:
    assert order_of(1) == order_of(1)
    assert order_of(1) != order_of(2)
    assert order_of(None) == [*range(8)] * 3
    assert sorted(order_of(1)) == sorted(order_of(None))


def test_plain_calls_keep_their_order() -> None:
    order: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for i in range(20):
            loop.call_soon_threadsafe(order.append, i)
        await anyio.sleep(1)

    for seed in range(5):
        order.clear()
        run(main, seed)
        assert order == [*range(20)]


def test_time_may_be_far_away() -> None:
    async def main() -> float:
        await anyio.sleep_until(1e12)
        await anyio.sleep(0.5)
        return anyio.current_time()

    assert run(main) == 1e12 + 0.5


def test_waiting_for_what_cannot_come_is_an_error() -> None:
    async def main() -> None:
        await anyio.Event().wait()

    with pytest.raises(Deadlock, match="no timer is set"):
        run(main)


def test_tasks_that_keep_each_other_busy_are_an_error() -> None:
    async def main() -> None:
        with anyio.move_on_after(1):
            while True:
                await anyio.lowlevel.checkpoint()

    with pytest.raises(Deadlock, match="no time passed"):
        run(main)


def test_calls_of_its_own_thread_come_through() -> None:
    async def main() -> bool:
        event, loop = anyio.Event(), asyncio.get_running_loop()
        loop.call_soon_threadsafe(event.set)
        await event.wait()
        return True

    assert run(main, 3) is True


def test_other_threads_are_refused() -> None:
    errors: list[BaseException] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def call() -> None:
            try:
                loop.call_soon_threadsafe(lambda: None)
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match="has no threads"):
            await loop.run_in_executor(None, lambda: None)

    run(main)
    assert "its own thread only" in str(errors[0])
