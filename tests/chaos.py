"""Chaos: thousands of requests on a real tiny model, cancelled at random, with faults and readers that sleep.

    python -m tests.chaos [--requests 10000] [--seed 1] [--model PATH]

Checks that nothing leaks, nobody hangs, each request has one end, usage is exact, and whoever survives got the very
tokens that it gets alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import anyio
from msgspec import Struct

import streamgen as sg

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.messages import StepDone, StepPlan

CLIENTS = 48
NUM_KINDS = 40  # different requests, each run alone first
CANCELLED, FAULTY = 0.40, 0.05
WORDS = "Once upon a time there was a little girl who liked to play in the park with her big red ball and dog".split()


class Kind(Struct, frozen=True):
    """One request as a client makes it, and what it says when it runs alone."""

    prompt: str
    fields: dict[str, Any]
    ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0


class Outcome(Struct):
    """What happened, counted."""

    ends: Counter[str] = Counter()
    tokens: int = 0
    step_faults: int = 0
    seconds: float = 0.0


def make_kind(random: Random) -> Kind:
    """A request of some length, greedy or seeded, some with stop strings."""
    words = [random.choice(WORDS) for _ in range(random.choice([1, 4, 15, 40, 80]))]
    fields: dict[str, Any] = {
        "max_tokens": random.choice([1, 3, 8, 24, 60]),
        "temperature": random.choice([0.0, 0.0, 0.9]),
        "seed": random.randrange(1000),
        "ignore_eos": random.random() < 0.3,
    }
    if random.random() < 0.2:
        fields["stop"] = random.choice(["the", ".", "she "])
    return Kind(" ".join(words), fields)


async def run_alone(engine: sg.Engine, kind: Kind) -> Kind:
    """The reference: the same request with nobody beside it."""
    completion = await engine.generate(kind.prompt, **kind.fields)
    return Kind(
        kind.prompt,
        kind.fields,
        completion.ids,
        completion.text,
        str(completion.finish_reason),
        completion.usage.prompt_tokens,
    )


class Chaos:
    """One run."""

    def __init__(self, engine: sg.Engine, kinds: list[Kind], seed: int) -> None:
        self.engine = engine
        self.kinds = kinds
        self.random = Random(seed)
        self.outcome = Outcome(ends=Counter())

    async def run(self, num_requests: int) -> None:
        """Clients take one request after the other until all are done."""
        left = iter(range(num_requests))
        started = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(CLIENTS):
                group.start_soon(self._client, left)
        self.outcome.seconds = time.perf_counter() - started

    async def _client(self, left: Any) -> None:
        for _ in left:
            await self._one()

    async def _one(self) -> None:
        random, kind = self.random, self.random.choice(self.kinds)
        dice = random.random()
        if dice < FAULTY:
            await self._faulty(kind)
        elif dice < FAULTY + CANCELLED:
            await self._cancelled(kind)
        elif random.random() < 0.1:
            await self._slow(kind)
        else:
            try:
                self._check(kind, await self.engine.generate(kind.prompt, tenant=self._tenant(), **kind.fields))
            except sg.EngineOverloaded:
                self.outcome.ends["overloaded"] += 1

    def _tenant(self) -> str | None:
        return self.random.choice([None, "a", "b"])

    def _check(self, kind: Kind, completion: sg.Completion[Any]) -> None:
        usage = completion.usage
        assert (completion.ids, completion.text) == (kind.ids, kind.text), f"{kind}: said {completion.text!r}"
        assert completion.finish_reason == kind.finish_reason
        assert (usage.prompt_tokens, usage.completion_tokens) == (kind.prompt_tokens, len(kind.ids))
        self._end(completion)

    def _check_partial(self, kind: Kind, completion: sg.Completion[Any]) -> None:
        assert completion.ids == kind.ids[: len(completion.ids)], f"{kind}: began with {completion.text!r}"
        assert kind.text.startswith(completion.text) or "\ufffd" in completion.text
        self._end(completion)

    def _end(self, completion: sg.Completion[Any]) -> None:
        assert completion.usage.completion_tokens == len(completion.ids)
        self.outcome.ends[str(completion.finish_reason)] += 1
        self.outcome.tokens += len(completion.ids)

    async def _cancelled(self, kind: Kind) -> None:
        """One of the ways to end it early, at a random moment."""
        way, moment = self.random.randrange(4), self.random.randrange(12)
        stream = self.engine.stream(kind.prompt, tenant=self._tenant(), **kind.fields)
        try:
            if way == 0:
                with anyio.move_on_after(self.random.random() * 0.05):
                    await stream.final()
                stream.cancel()
            elif way == 1:
                async with stream:
                    stream.cancel()
            elif way == 2:
                async with stream:
                    async for delta in stream:
                        moment -= len(delta.ids)
                        if moment <= 0:
                            break
            else:
                with anyio.CancelScope() as scope:
                    async with stream:
                        async for delta in stream:
                            moment -= len(delta.ids)
                            if moment <= 0:
                                scope.cancel()
        except sg.EngineOverloaded:
            self.outcome.ends["overloaded"] += 1
            return
        await stream._mailbox.wait_end()
        self._check_partial(kind, stream.result)

    async def _faulty(self, kind: Kind) -> None:
        """A request that cannot end well."""
        fault = self.random.randrange(4)
        fields: dict[str, Any] = dict(kind.fields)
        expected: type[Exception] = sg.ProcessorError
        if fault == 0:
            fields["processors"] = [_raising]
        elif fault == 1:
            fields["processors"] = [_spoiling]
        elif fault == 2:
            fields["timeout"], expected = 1e-6, sg.DeadlineExceeded
        else:
            expected = sg.PromptTooLong
            kind = Kind("word " * 2000, {})
        try:
            await self.engine.generate(kind.prompt, **fields)
            raise AssertionError(f"a request that cannot end well did: fault {fault}")
        except sg.EngineOverloaded:
            self.outcome.ends["overloaded"] += 1
        except expected as error:
            self.outcome.ends[type(error).__name__] += 1

    async def _slow(self, kind: Kind) -> None:
        """A reader that sleeps between deltas."""
        policy = self.random.choice(["coalesce", "pause"])
        try:
            async with self.engine.stream(kind.prompt, on_slow=policy, **kind.fields) as stream:
                text = ""
                async for delta in stream:
                    text += delta.text
                    await anyio.sleep(self.random.random() * 0.02)
            assert text == stream.result.text
            self._check(kind, stream.result)
        except sg.EngineOverloaded:
            self.outcome.ends["overloaded"] += 1


def _raising(ids: Any, logits: Any) -> None:
    raise ZeroDivisionError("a fault of the host's own")


def _spoiling(ids: Any, logits: Any) -> None:
    logits[0] = float("nan")


def break_steps(engine: sg.Engine, random: Random, outcome: Outcome, *, one_in: int = 150) -> None:
    """Now and then a step raises before it runs."""
    assert engine._thread is not None
    runner: Any = engine._thread.model.runner
    execute: Callable[[StepPlan, int | None], StepDone] = runner.execute

    def maybe(plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        if random.random() < 1 / one_in:
            outcome.step_faults += 1
            raise RuntimeError("the device stumbled")
        return execute(plan, wake_fd)

    runner.execute = maybe


async def run_chaos(model: str | Path, *, num_requests: int, seed: int) -> Outcome:
    """The whole run, with every check."""
    random = Random(seed)
    files = len(os.listdir("/proc/self/fd"))
    async with sg.Engine(model, kv_memory="8MiB", max_running=24, max_queued=40, threads=2) as engine:
        kinds = [await run_alone(engine, make_kind(random)) for _ in range(NUM_KINDS)]
        chaos = Chaos(engine, kinds, seed)
        break_steps(engine, Random(seed), chaos.outcome)
        await chaos.run(num_requests)
        stats = engine.stats()
        held = (stats.open_requests, stats.running, stats.waiting, stats.paused, stats.pages_used, stats.pages_pinned)
        assert held == (0, 0, 0, 0, 0, 0), f"left behind: {stats}"
    assert chaos.outcome.ends.total() == num_requests
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files, "files were left open"
    return chaos.outcome


def main() -> None:
    """Run and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default=Path(__file__).parents[2] / "shared" / "data" / "models" / "stories260K")
    arguments = parser.parse_args()

    async def run() -> Outcome:
        return await run_chaos(arguments.model, num_requests=arguments.requests, seed=arguments.seed)

    outcome = anyio.run(run)
    print(f"{arguments.requests} requests in {outcome.seconds:.1f} s, {outcome.tokens} tokens")
    print("ends:", dict(sorted(outcome.ends.items())), "steps that raised:", outcome.step_faults)
    print("0 leaks, 0 hangs; every survivor has the bits that it has alone, usage is exact")


if __name__ == "__main__":
    main()
