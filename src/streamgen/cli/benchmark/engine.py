"""The measurements of `bench` that run inside an open engine. Prompts are token ids, greedy, end of text ignored.

The prefix cache is off, and every prompt differs from the others in its first token, so that every token is computed.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
from msgspec import Struct

import streamgen as sg

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamgen.config import MemoryPlan
    from streamgen.metrics import Stats


class Clocked(Struct):
    """When each delta of one stream came, and how many tokens it brought."""

    times: list[float]
    counts: list[int]


class Decode(Struct, frozen=True, kw_only=True):
    """A batch of equal requests.

    steady   tokens per second of all sequences while every one of them was decoding
    overall  output tokens per second from the first request to the last token, prompts included
    outside_seconds   of a step, on average: what Python adds to the one call
    """

    steady: float
    overall: float
    outside_seconds: float


class EngineBench:
    """One open engine, measured again and again."""

    def __init__(self, engine: sg.Engine, vocab: int) -> None:
        self._engine = engine
        self._vocab = vocab

    @property
    def plan(self) -> MemoryPlan:
        """What the engine took."""
        return self._engine.plan()

    @property
    def stats(self) -> Stats:
        """The engine's counters now."""
        return self._engine.stats()

    async def decode(self, num_seqs: int, *, prompt_tokens: int, tokens: int) -> Decode:
        """Run `num_seqs` requests at once."""
        clocks = [Clocked([], []) for _ in range(num_seqs)]
        before, began = self.stats, time.perf_counter()
        async with anyio.create_task_group() as group:
            for index, clock in enumerate(clocks):
                group.start_soon(self._run, self._prompt(prompt_tokens, index), tokens, clock)
        after = self.stats
        outside = (after.step_seconds - before.step_seconds) - (after.forward_seconds - before.forward_seconds)
        return Decode(
            steady=steady_rate(clocks),
            overall=num_seqs * tokens / (max(clock.times[-1] for clock in clocks) - began),
            outside_seconds=outside / (after.steps - before.steps),
        )

    async def prefill(self, prompt_tokens: int) -> float:
        """Prompt tokens per second of one request, until its first token is here."""
        clock = Clocked([], [])
        began = time.perf_counter()
        await self._run(self._prompt(prompt_tokens, 0), 1, clock)
        return prompt_tokens / (clock.times[0] - began)

    def _prompt(self, count: int, index: int) -> list[int]:
        """`count` ids; different indices begin differently."""
        return [(index * 31 + position * 7) % self._vocab for position in range(count)]

    async def _run(self, prompt: list[int], tokens: int, clock: Clocked) -> None:
        async with self._engine.stream(prompt, max_tokens=tokens, temperature=0, ignore_eos=True) as stream:
            async for delta in stream:
                if delta.ids:
                    clock.times.append(time.perf_counter())
                    clock.counts.append(len(delta.ids))


@asynccontextmanager
async def open_bench(model: str, options: dict[str, Any], vocab: int) -> AsyncIterator[EngineBench]:
    """An engine with the prefix cache off, warmed up."""
    async with sg.Engine(model, prefix_cache=False, **options) as engine:
        bench = EngineBench(engine, vocab)
        await bench.decode(2, prompt_tokens=32, tokens=4)
        yield bench


def steady_rate(clocks: list[Clocked]) -> float:
    """Tokens per second between the last sequence's first token and the first sequence's last."""
    start = max(clock.times[0] for clock in clocks)
    end = min(clock.times[-1] for clock in clocks)
    tokens = sum(n for clock in clocks for at, n in zip(clock.times, clock.counts, strict=True) if start < at <= end)
    return tokens / (end - start)
