"""What `isolation="process"` costs: time per step beside a runner in this process, memory of the child, restart time.

    python -m benchmarks.isolation [MODEL] [--sequences 1 32] [--steps 60]

Both runners get the same plans, in turns of some steps each, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from typing import TYPE_CHECKING

from streamgen.config import make_options
from streamgen.execution.model import open_model
from streamgen.execution.remote import open_remote
from streamgen.faults import ExecutorLost
from streamgen.hub import demo_model_path
from streamgen.messages import Begin, StepPlan
from streamgen.sampling import ResolvedSampling

if TYPE_CHECKING:
    from streamgen.actors.model import RunsPlans
    from streamgen.execution.remote import RemoteRunner

PROMPT = tuple(range(100, 116))
PAGES = 16  # of each sequence
TURN = 10  # steps


def begin_all(count: int) -> StepPlan:
    """Every sequence takes its slot and computes its prompt."""
    begins = [
        Begin(
            slot=i,
            ids=(*PROMPT[1:], 200 + i),
            num_prompt=len(PROMPT),
            sampling=ResolvedSampling(temperature=0.0),
            pages=tuple(range(PAGES * i, PAGES * (i + 1))),
        )
        for i in range(count)
    ]
    return _plan(0, count, start=0, rows=len(PROMPT), begins=tuple(begins))


def _plan(step: int, count: int, *, start: int, rows: int, begins: tuple[Begin, ...] = ()) -> StepPlan:
    return StepPlan(
        step=step,
        begins=begins,
        slots=tuple(range(count)),
        starts=(start,) * count,
        counts=(rows,) * count,
        samples=(1,) * count,
        pages=((),) * count,
    )


def measure(runners: dict[str, RunsPlans], count: int, steps: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a decode step of `count` sequences: all of it, and what is not the forward."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    tokens: dict[str, list[object]] = {
        name: [runner.execute(begin_all(count)).tokens] for name, runner in runners.items()
    }
    for turn in range(0, steps, TURN):
        for name, runner in runners.items():
            for step in range(turn, turn + TURN):
                plan = _plan(step + 1, count, start=len(PROMPT) + step, rows=1)
                start = time.perf_counter()
                done = runner.execute(plan)
                took = time.perf_counter() - start
                seconds[name].append((took, took - done.seconds))
                tokens[name].append(done.tokens)
    assert len({tuple(map(str, t)) for t in tokens.values()}) == 1, "the two gave different tokens"
    whole, beside = ({n: statistics.median(v[i] for v in values) for n, values in seconds.items()} for i in (0, 1))
    return {name: (whole[name], beside[name]) for name in runners}


def restart_seconds(runner: RemoteRunner) -> tuple[float, float]:
    """From a kill until it is noticed, and until the next step can begin."""
    runner.execute(begin_all(1))
    assert runner.pid is not None
    start = time.perf_counter()
    os.kill(runner.pid, signal.SIGKILL)
    try:
        runner.execute(_plan(1, 1, start=len(PROMPT), rows=1))
    except ExecutorLost:
        noticed = time.perf_counter() - start
    runner.prepare()
    return noticed, time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=str(demo_model_path()))
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    options = make_options(arguments.model, {"kv_memory": "512MiB", "max_running": 64})
    thread = open_model(options, None, lambda: False)
    start = time.perf_counter()
    process = open_remote(options, None, lambda: False)
    print(f"open: {time.perf_counter() - start:.2f} s")
    try:
        for count in arguments.sequences:
            found = measure({"thread": thread.runner, "process": process.runner}, count, arguments.steps)
            extra = (found["process"][1] - found["thread"][1]) * 1e3
            shown = ", ".join(
                f"{name} {a * 1e3:.2f} ms ({b * 1e3:.2f} beside the forward)" for name, (a, b) in found.items()
            )
            print(f"{count:3} sequences: {shown}: {extra:.2f} ms a step for the way")
        print(
            f"child: {process.runner.resident_bytes() / 2**20:.0f} MiB, weights {process.plan.weights / 2**20:.0f} MiB"
        )
        noticed, ready = restart_seconds(process.runner)
        print(f"killed: noticed after {noticed * 1e3:.1f} ms, ready again after {ready:.2f} s")
    finally:
        process.close()
        thread.close()


if __name__ == "__main__":
    main()
