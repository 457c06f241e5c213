"""How fast the simulator is on one core, and where the time goes.

    python benchmarks/simulator.py [--requests 20000] [--trace FILE ...]

The scheduler alone, with a device that answers at once and nothing checked; then each scenario with every promise
checked; then traces. Processor time of this process, the best of three for the short ones.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

from streamgen.cli.machine import cpu_model
from streamgen.messages import StepDone
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.scheduler import Scheduler
from streamgen.testing.simulator import SCENARIOS, CostModel, read_trace, replay, simulate
from streamgen.testing.simulator.driver import Driver
from streamgen.testing.simulator.workload import Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.messages import StepPlan

# A device on which the traces are neither idle nor hopeless: 6 ms a step, 33,000 rows a second.
FAST = CostModel(step=6e-3, row=3e-5, context=1e-9)
TRACE_REQUESTS = 4000


def processor_seconds(call: Callable[[], object], rounds: int = 3) -> float:
    """Of the quickest round."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best


def run_alone(requests: int) -> None:
    """The scenario "short" on the scheduler, with a device that says 1 and nobody who looks."""
    from random import Random

    scenario = SCENARIOS["short"]
    left = requests

    def execute(plan: StepPlan) -> StepDone:
        return StepDone(step=plan.step, tokens=tuple([(1,) * count for count in plan.samples]))

    def arrive() -> None:
        nonlocal left
        request, _ = workload.next_request(driver.now)
        scheduler.admit(request)
        left -= 1
        if left:
            driver.at(driver.now + random.expovariate(scenario.requests_per_second), arrive)

    def hear(plan: StepPlan | None) -> None:
        scheduler.take_progress()

    random = Random(0)
    driver = Driver(cost=scenario.cost, execute=execute, heard=hear)
    scheduler = Scheduler(scenario.limits, prefix_key=b"bench", clock=driver.clock)
    workload = Workload(scenario, random)
    driver.at(0.0, arrive)
    while driver.turn(scheduler):
        pass


def replay_once(path: Path) -> None:
    """A trace's first requests on the fast device."""
    trace = read_trace(path)[:TRACE_REQUESTS]
    limits = Limits(num_pages=65_536, step_tokens=2048, max_context=1 << 17, max_queued=10**9)
    start = time.process_time()
    report = replay(trace, limits=limits, cost=FAST)
    seconds = time.process_time() - start
    rows = report.rows_per_step * report.steps
    print(
        f"  {path.name:34s} {len(trace) / seconds:8,.0f} requests/s  {report.output_tokens / seconds:9,.0f} tokens/s  "
        f"{rows / seconds:11,.0f} rows/s  a million: {1e6 / len(trace) * seconds / 60:6.1f} min"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--trace", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    number = arguments.requests
    print(f"{cpu_model()}, Python {platform.python_version()}; one core, {number:,} requests")
    scenario = SCENARIOS["short"]
    print(
        f"short: prompts of {scenario.prompt} tokens, {scenario.output[1]} drawn, {scenario.limits.max_running} slots"
    )
    print(
        f"  scheduler alone, nothing checked   {number / processor_seconds(lambda: run_alone(number)):8,.0f} requests/s"
    )
    for name in SCENARIOS:
        count = number if name == "short" else number // 10
        seconds = processor_seconds(lambda name=name, count=count: simulate(0, requests=count, scenario=name))  # type: ignore[misc]  # bound at once
        print(f"  {name:34s} {count / seconds:8,.0f} requests/s, everything checked")
    for path in arguments.trace:
        replay_once(path)


if __name__ == "__main__":
    main()
