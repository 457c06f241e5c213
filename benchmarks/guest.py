"""How good a guest the engine is: cancelling, refusing, slow readers and floods, measured on the demo model.

python benchmarks/guest.py [--rounds 3] [--name guest]

cancel   from `cancel()` to the scheduler having freed the pages, beyond the step that was in flight
refuse   what one EngineOverloaded costs under a burst ten times what the engine takes
readers  tokens a second of 63 readers, alone and beside one that sleeps, in turns
flood    a tenant's time to first token alone, and beside one that floods; Jain's index of four equal tenants
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import anyio

import streamgen as sg
from streamgen.cli.machine import affinity_cpus, cpu_model

ROOT = Path(__file__).parents[1]
LONG = {"ignore_eos": True}


def percentile(values: list[float], share: float) -> float:
    """A value that so many are below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure_cancel(engine: sg.Engine) -> list[str]:
    """Thirty cancels among sixteen streams. The step in flight is the longest that was measured meanwhile."""
    late: list[float] = []
    steps: list[float] = []
    is_over = False

    async def keep_busy() -> None:
        while not is_over:
            async with engine.stream("busy", max_tokens=100, **LONG) as stream:
                async for _ in stream:
                    pass

    async def watch() -> None:
        async with engine.subscribe() as events:
            async for event in events:
                if isinstance(event, sg.StepCompleted):
                    steps.append(event.seconds)  # noqa: PERF401  # it is cancelled half-way

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        for _ in range(15):
            group.start_soon(keep_busy)
        for _ in range(30):
            async with engine.stream("the one", max_tokens=200, **LONG) as stream:
                await anext(stream)
                started = time.perf_counter()
                stream.cancel()
                await stream._mailbox.wait_end()
                late.append(time.perf_counter() - started)
        is_over = True
        group.cancel_scope.cancel()
    return [
        f"cancel to free pages, 30 times among 15 others: p50 {1e3 * median(late):.1f} ms, "
        f"max {1e3 * max(late):.1f} ms; a step took p50 {1e3 * median(steps):.1f} ms, max {1e3 * max(steps):.1f} ms"
    ]


async def measure_refusals() -> list[str]:
    """Ten times as many requests as the engine takes, at once."""
    costs: list[float] = []
    outcomes: Counter[str] = Counter()
    async with sg.Engine(max_running=8, max_queued=8, kv_memory="256MiB") as engine:

        async def ask(i: int) -> None:
            started = time.perf_counter()
            try:
                await engine.generate(f"request {i} " * 50, max_tokens=16)
                outcomes["answered"] += 1
            except sg.EngineOverloaded as error:
                costs.append(time.perf_counter() - started)
                outcomes["refused"] += 1
                assert error.retry_after

        async with anyio.create_task_group() as group:
            for i in range(160):
                group.start_soon(ask, i)
    return [
        f"refusals under a tenfold burst: {outcomes['refused']} refused, {outcomes['answered']} answered; "
        f"a refusal takes p50 {1e6 * median(costs):.0f} us, max {1e3 * max(costs):.2f} ms"
    ]


async def measure_readers(engine: sg.Engine, rounds: int) -> list[str]:
    """63 readers with and without a sleeper."""
    rates: dict[bool, list[float]] = {False: [], True: []}

    async def read(i: int) -> None:
        async with engine.stream(f"reader {i}", max_tokens=64, **LONG) as stream:
            async for _ in stream:
                pass

    for _ in range(rounds):
        for has_sleeper in (False, True):
            sleeper = engine.stream("asleep", max_tokens=64, **LONG)
            async with anyio.create_task_group() as group:
                if has_sleeper:
                    await sleeper.__aenter__()
                else:
                    group.start_soon(read, 63)
                started = time.perf_counter()
                for i in range(63):
                    group.start_soon(read, i)
            seconds = time.perf_counter() - started
            rates[has_sleeper].append(63 * 64 / seconds)
            if has_sleeper:
                text = "".join([delta.text async for delta in sleeper])
                assert text == sleeper.result.text and len(sleeper.result.ids) == 64
                await sleeper.__aexit__(None, None, None)
    without, beside = median(rates[False]), median(rates[True])
    return [
        f"63 readers: {beside:.0f} tokens/s beside a sleeper, {without:.0f} beside a 64th reader: "
        f"{beside / without:.3f}; the sleeper got every character later"
    ]


class Load:
    """Clients of one tenant that ask again and again."""

    def __init__(self, engine: sg.Engine, tenant: str, *, prompt_words: int, max_tokens: int) -> None:
        self.engine = engine
        self.tenant = tenant
        self.prompt_words = prompt_words
        self.max_tokens = max_tokens
        self.first_tokens: list[float] = []
        self.tokens = 0
        self._count = 0

    async def client(self) -> None:
        """Until cancelled."""
        while True:
            self._count += 1
            prompt = f"{self.tenant} asks {self._count}: " + "word " * self.prompt_words
            fields: dict[str, Any] = {"max_tokens": self.max_tokens, "tenant": self.tenant, **LONG}
            async with self.engine.stream(prompt, **fields) as stream:
                async for delta in stream:
                    self.tokens += len(delta.ids)
                if stream.result.timings.first_token is not None:
                    self.first_tokens.append(stream.result.timings.first_token)


async def run_loads(loads: list[tuple[Load, int]], seconds: float) -> None:
    """So many clients of each for so long."""
    with anyio.move_on_after(seconds):
        async with anyio.create_task_group() as group:
            for load, clients in loads:
                for _ in range(clients):
                    group.start_soon(load.client)


async def measure_flood(seconds: float, rounds: int) -> list[str]:
    """A quiet tenant of two clients, alone and beside sixty of another; then four equal tenants with more than fits."""
    alone: list[float] = []
    beside: list[float] = []
    async with sg.Engine(max_running=32, kv_memory="1GiB") as engine:
        for _ in range(rounds):
            quiet = Load(engine, "quiet", prompt_words=150, max_tokens=24)
            await run_loads([(quiet, 2)], seconds)
            alone += quiet.first_tokens
            quiet = Load(engine, "quiet", prompt_words=150, max_tokens=24)
            flood = Load(engine, "flood", prompt_words=150, max_tokens=96)
            await run_loads([(quiet, 2), (flood, 60)], seconds)
            beside += quiet.first_tokens
        tenants = [Load(engine, f"tenant {i}", prompt_words=60, max_tokens=32) for i in range(4)]
        await run_loads([(tenants[0], 64), *((tenant, 16) for tenant in tenants[1:])], 2 * seconds)
    shares = [tenant.tokens for tenant in tenants]
    jain = sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))
    lines = [
        f"time to first token of a quiet tenant: p50 {1e3 * median(alone):.0f} ms alone, {1e3 * median(beside):.0f} ms "
        f"beside a flood of 60 clients: {median(beside) / median(alone):.2f}x; "
        f"p90 {1e3 * percentile(alone, 0.9):.0f} and {1e3 * percentile(beside, 0.9):.0f} ms: "
        f"{percentile(beside, 0.9) / percentile(alone, 0.9):.2f}x",
        f"four equal tenants, one with four times the clients: tokens {shares}, Jain's index {jain:.3f}",
    ]
    return lines


async def measure(rounds: int) -> list[str]:
    """Everything."""
    lines: list[str] = []
    async with sg.Engine(kv_memory="1GiB", max_running=64) as engine:
        await engine.generate("warm", max_tokens=4)
        lines += await measure_cancel(engine)
        lines += await measure_readers(engine, rounds)
    lines += await measure_refusals()
    lines += await measure_flood(8.0, rounds)
    return lines


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="guest")
    arguments = parser.parse_args()
    lines = anyio.run(measure, arguments.rounds)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    head = (
        f"{cpu_model()}, {affinity_cpus()} cores; Python {platform.python_version()}; commit {commit.stdout.strip()}; "
        f"{time.strftime('%Y-%m-%d')}; the demo model, {arguments.rounds} rounds.\n\n`python benchmarks/guest.py`"
    )
    text = "\n".join(f"- {line}" for line in lines)
    (ROOT / "docs" / "benchmarks" / f"{arguments.name}.md").write_text(f"# {arguments.name}\n\n{head}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
