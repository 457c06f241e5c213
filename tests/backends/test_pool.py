"""The thread pool: every item once, writes visible in the next share, no processor time while idle."""

from __future__ import annotations

import gc
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

_cpu = pytest.importorskip("streamgen._cpu")


def expected_checksum(rounds: int) -> int:
    """What `pool_selftest` computes, on one thread of Python."""
    total, modulus = 0, 2**64
    for r in range(rounds):
        n = 1 + r * 7 % 61
        first = [(i + 1) * (i + r) for i in range(n)]
        for i in range(n):
            total = (total * 31 + first[n - 1 - i] + 3 * first[(i + 1) % n]) % modulus
    return total


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("rounds", [0, 1, 3000])
def test_shares_are_complete_and_ordered(threads: int, rounds: int) -> None:
    assert _cpu.pool_selftest(threads, rounds) == expected_checksum(rounds)


def test_pools_of_several_python_threads_do_not_disturb_each_other() -> None:
    results: list[int] = []
    runners = [threading.Thread(target=lambda: results.append(_cpu.pool_selftest(2, 300))) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert results == [expected_checksum(300)] * 3


def test_size() -> None:
    assert [_cpu.Pool(n).size for n in (1, 3)] == [1, 3]


def worker_threads() -> set[Path]:
    """Threads of this process that pools have started."""
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("needs /proc")
    return {task for task in tasks.iterdir() if (task / "comm").read_text().strip() == "streamgen"}


def until(condition: Callable[[], bool]) -> bool:
    """Wait for what the system does in its own time."""
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


class NewPool:
    """A pool and the threads it started, once they have named themselves."""

    def __init__(self, threads: int) -> None:
        before = worker_threads()
        self.pool = _cpu.Pool(threads)
        assert until(lambda: len(worker_threads() - before) == threads - 1)
        self.workers = worker_threads() - before


def is_asleep(worker: Path) -> bool:
    return (worker / "stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


def test_an_idle_pool_sleeps() -> None:
    new = NewPool(3)
    assert until(lambda: all(is_asleep(worker) for worker in new.workers))


def test_workers_leave_signals_to_the_host() -> None:
    new = NewPool(2)
    (worker,) = new.workers
    status = (worker / "status").read_text()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM):
        assert blocked >> (number - 1) & 1
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_closed_pool_has_no_threads() -> None:
    new = NewPool(4)
    assert len(new.workers) == 3
    del new.pool
    gc.collect()
    assert until(lambda: not new.workers & worker_threads())
