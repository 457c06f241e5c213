"""How late a host's loop runs while a model generates in its process, here and under other engines.

    python benchmarks/host_lag.py [--streams 32] [--tokens 128] [--name host-lag]

A task sleeps for 1 ms, again and again, on the host's own loop; what it comes late is the lag. Every subject runs in a
process of its own, in rounds, so that a noisy neighbour meets all of them. Peers are measured where they are installed:
transformers (continuous batching) and openvino-genai (its step loop in a thread), on the same weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TICK = 0.001
IDLE_SECONDS = 5.0
SUBJECTS = (
    "idle",
    "asyncio",
    "trio",
    "asyncio, second model loads",
    "trio, second model loads",
    "transformers",
    "openvino",
)


class Ticker:
    """Sleeps for a millisecond at a time and keeps how much too long each sleep was."""

    def __init__(self) -> None:
        self.late: list[float] = []

    async def run(self) -> None:
        """Until cancelled."""
        import anyio

        while True:
            before = time.perf_counter()
            await anyio.sleep(TICK)
            self.late.append(max(0.0, time.perf_counter() - before - TICK))

    def result(self, tokens: int, seconds: float) -> dict[str, Any]:
        """Milliseconds at p50, p99 and the most, and tokens a second meanwhile."""
        late = sorted(self.late)
        return {
            "p50": 1e3 * late[len(late) // 2],
            "p99": 1e3 * late[int(len(late) * 0.99)],
            "max": 1e3 * late[-1],
            "ticks": len(late),
            "tokens_per_second": tokens / seconds,
        }


async def measure_idle(streams: int, tokens: int) -> dict[str, Any]:
    """The ticker alone."""
    import anyio

    ticker = Ticker()
    with anyio.move_on_after(IDLE_SECONDS):
        await ticker.run()
    return ticker.result(0, IDLE_SECONDS)


async def measure_engine(streams: int, tokens: int, *, loads: bool) -> dict[str, Any]:
    """Streams read on the host's loop, one task each; `loads`: another engine opens and closes meanwhile."""
    import anyio

    import streamgen as sg

    count = 0

    async def read(engine: sg.Engine, i: int) -> None:
        nonlocal count
        async with engine.stream(f"Tell me story {i}.", max_tokens=tokens, ignore_eos=True) as stream:
            async for delta in stream:
                count += len(delta.ids)

    async def load() -> None:
        while True:
            async with sg.Engine(kv_memory="256MiB"):
                pass

    async with sg.Engine(kv_memory="1GiB") as engine:
        await engine.generate("warm", max_tokens=4)
        ticker = Ticker()
        async with anyio.create_task_group() as background:
            background.start_soon(ticker.run)
            if loads:
                background.start_soon(load)
            started = time.perf_counter()
            async with anyio.create_task_group() as group:
                for i in range(streams):
                    group.start_soon(read, engine, i)
            seconds = time.perf_counter() - started
            background.cancel_scope.cancel()
    return ticker.result(count, seconds)


async def measure_transformers(streams: int, tokens: int) -> dict[str, Any]:
    """Continuous batching of transformers, whose thread runs beside the loop."""
    import anyio
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from streamgen.hub import demo_model_path

    path = demo_model_path()
    names = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **names)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype="bfloat16", attn_implementation="sdpa", **names)
    prompts = [tokenizer(f"Tell me story {i}.")["input_ids"] for i in range(streams)]
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
    ticker, count = Ticker(), 0
    manager = model.init_continuous_batching(generation_config=config)
    manager.start()
    async with anyio.create_task_group() as group:
        group.start_soon(ticker.run)
        started = time.perf_counter()
        for i, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=f"r{i}", max_new_tokens=tokens)
        finished = 0
        while finished < streams:
            result = await anyio.to_thread.run_sync(lambda: manager.get_result(timeout=1))
            if result is not None and result.is_finished():
                finished, count = finished + 1, count + len(result.generated_tokens)
        seconds = time.perf_counter() - started
        group.cancel_scope.cancel()
    await anyio.to_thread.run_sync(lambda: manager.stop(block=True, timeout=10))
    return ticker.result(count, seconds)


async def measure_openvino(streams: int, tokens: int) -> dict[str, Any]:
    """The step loop of openvino-genai in a thread."""
    import anyio
    import openvino_genai as genai

    from streamgen.hub import demo_model_path

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.cache_size = 512, streams, 1
    pipeline = genai.ContinuousBatchingPipeline(str(demo_model_path()), scheduler, "CPU")
    config = genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
    ticker = Ticker()
    async with anyio.create_task_group() as group:
        group.start_soon(ticker.run)
        started = time.perf_counter()
        for i in range(streams):
            pipeline.add_request(i, f"Tell me story {i}.", config)

        def run() -> None:
            while pipeline.has_non_finished_requests():
                pipeline.step()

        thread = threading.Thread(target=run)
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        seconds = time.perf_counter() - started
        group.cancel_scope.cancel()
    if not ticker.late or seconds < tokens * TICK:
        raise SystemExit("openvino-genai ended without generating")  # it cannot read every GGUF file
    return ticker.result(streams * tokens, seconds)


def run_subject(subject: str, streams: int, tokens: int) -> dict[str, Any]:
    """Measure in this process."""
    import anyio

    backend, _, rest = subject.partition(", ")
    match backend:
        case "idle":
            return anyio.run(measure_idle, streams, tokens)
        case "transformers":
            return anyio.run(measure_transformers, streams, tokens)
        case "openvino":
            return anyio.run(measure_openvino, streams, tokens)
        case _:
            return anyio.run(lambda: measure_engine(streams, tokens, loads=bool(rest)), backend=backend)


def run_child(subject: str, streams: int, tokens: int) -> dict[str, Any] | str:
    """Measure in a process of its own; a string says why not."""
    command = [sys.executable, __file__, "--subject", subject, "--streams", str(streams), "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    lines = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()
    try:
        result: dict[str, Any] = json.loads(lines[-1])
    except json.JSONDecodeError:
        return lines[-1][:100]
    return result


def table(results: dict[str, list[dict[str, Any]]], why_not: dict[str, str]) -> str:
    """The median round of each subject by its p99; the most of all rounds as `max`."""
    rows = ["| the loop's process | p50 ms | p99 ms | max ms | out tok/s |", "|---|--:|--:|--:|--:|"]
    for subject, rounds in results.items():
        if not rounds:
            rows.append(f"| {subject} | {why_not.get(subject, '')} | | | |")
            continue
        middle = sorted(rounds, key=lambda r: float(r["p99"]))[len(rounds) // 2]
        most = max(r["max"] for r in rounds)
        rate = middle["tokens_per_second"]
        rows.append(f"| {subject} | {middle['p50']:.2f} | {middle['p99']:.2f} | {most:.1f} | {rate:.0f} |")
    return "\n".join(rows)


def main() -> None:
    """Run every subject in rounds, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="host-lag")
    parser.add_argument("--subject")
    arguments = parser.parse_args()
    if arguments.subject:
        print(json.dumps(run_subject(arguments.subject, arguments.streams, arguments.tokens)))
        return
    results: dict[str, list[dict[str, Any]]] = {subject: [] for subject in SUBJECTS}
    why_not: dict[str, str] = {}
    for _ in range(arguments.rounds):
        for subject in SUBJECTS:
            if subject in why_not:
                continue
            result = run_child(subject, arguments.streams, arguments.tokens)
            if isinstance(result, str):
                why_not[subject] = result
                print(f"{subject}: {result}", file=sys.stderr)
            else:
                results[subject].append(result)
                print(f"{subject}: p99 {result['p99']:.2f} ms, max {result['max']:.1f} ms", file=sys.stderr)
    import platform

    from streamgen.cli.machine import affinity_cpus, cpu_model

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    head = (
        f"{cpu_model()}, {affinity_cpus()} cores; Python {platform.python_version()}; commit {commit.stdout.strip()}; "
        f"{time.strftime('%Y-%m-%d')}. {arguments.streams} streams of {arguments.tokens} tokens of the demo model, "
        f"1 ms ticker, {arguments.rounds} rounds.\n\n`python benchmarks/host_lag.py`"
    )
    text = table(results, why_not)
    (ROOT / "docs" / "benchmarks" / f"{arguments.name}.md").write_text(f"# {arguments.name}\n\n{head}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
