"""Soak: 120 % of what the engine can do, for minutes or hours; memory, files and threads have to stay flat.

    python benchmarks/soak.py [--minutes 10] [--load 1.2]

Arrivals come at a fixed rate above the measured throughput, so the queue is always full and some are refused. Clients
stop early, time out, read slowly and share tenants. Prints the slope of resident memory after warm-up.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections import Counter
from pathlib import Path
from random import Random

import anyio

import streamgen as sg

WARM_UP = 0.3  # of the time
SAMPLE_SECONDS = 2.0


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """The run: arrivals, clients and the samples of what they cost."""

    def __init__(self, engine: sg.Engine, seed: int) -> None:
        self.engine = engine
        self.random = Random(seed)
        self.ends: Counter[str] = Counter()
        self.samples: list[tuple[float, int, int, int]] = []

    async def measure_rate(self) -> float:
        """Requests a second when 64 clients ask as fast as they can."""
        done = 0

        async def client() -> None:
            nonlocal done
            while True:
                await self._ask()
                done += 1

        started = time.perf_counter()
        with anyio.move_on_after(8.0):
            async with anyio.create_task_group() as group:
                for _ in range(64):
                    group.start_soon(client)
        return done / (time.perf_counter() - started)

    async def run(self, seconds: float, rate: float) -> None:
        """Arrivals at a fixed rate for so long."""
        end = time.perf_counter() + seconds
        async with anyio.create_task_group() as group:
            group.start_soon(self._sample, end)
            next_arrival = time.perf_counter()
            while next_arrival < end:
                next_arrival += self.random.expovariate(rate)
                await anyio.sleep(max(0.0, next_arrival - time.perf_counter()))
                group.start_soon(self._ask)

    async def _ask(self) -> None:
        random = self.random
        prompt = f"Story {random.randrange(10_000)} " + "and then " * random.choice([1, 5, 30])
        tenant = f"tenant {random.randrange(1_000)}"
        try:
            async with self.engine.stream(
                prompt, max_tokens=random.choice([4, 16, 48]), tenant=tenant, timeout=random.choice([None, None, 2.0])
            ) as stream:
                async for _ in stream:
                    if random.random() < 0.02:
                        break
            self.ends[str(stream.result.finish_reason)] += 1
        except sg.StreamgenError as error:
            self.ends[type(error).__name__] += 1

    async def _sample(self, end: float) -> None:
        while time.perf_counter() < end:
            files = len(os.listdir("/proc/self/fd"))
            self.samples.append((time.perf_counter(), resident_bytes(), files, threading.active_count()))
            await anyio.sleep(SAMPLE_SECONDS)


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares, per second."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


async def soak(model: str | None, minutes: float, load: float) -> None:
    """Run and print."""
    async with sg.Engine(model, kv_memory="256MiB", max_running=32, max_queued=32) as engine:
        it = Soak(engine, 1)
        rate = await it.measure_rate()
        it.ends.clear()
        print(
            f"{rate:.1f} requests/s at most; {load * rate:.1f} arrive each second, for {minutes:g} minutes", flush=True
        )
        await it.run(minutes * 60, load * rate)
        stats = engine.stats()
    after = it.samples[int(len(it.samples) * WARM_UP) :]
    per_hour = slope([(t, size) for t, size, _, _ in after]) * 3600 / 2**20
    sizes = [size / 2**20 for _, size, _, _ in after]
    print(f"ends: {dict(sorted(it.ends.items()))}")
    print(f"resident {sizes[0]:.1f} -> {sizes[-1]:.1f} MiB after warm-up, slope {per_hour:+.2f} MiB/h")
    print(f"files {after[0][2]} -> {after[-1][2]}, threads {after[0][3]} -> {after[-1][3]}")
    print(f"held at the end: {stats.pages_used} pages, {stats.open_requests} requests; {stats.preemptions} preemptions")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--load", type=float, default=1.2)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    anyio.run(soak, arguments.model, arguments.minutes, arguments.load)


if __name__ == "__main__":
    main()
