"""What planning and accounting for a step costs: against the sequences in it, and against the requests ever seen.

    python benchmarks/scheduler_cost.py [--plot docs/simulator/scheduler_cost.svg] [--rounds 5]

Sequences decode side by side; the device answers at once. Per number of sequences the quickest of some rounds is taken,
each the mean of some hundred steps. The line is fitted to those; what it leaves unexplained is printed.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import time
from pathlib import Path

from streamgen.cli.machine import cpu_model
from streamgen.messages import Admit, StepDone
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.scheduler import Scheduler
from streamgen.testing.simulator.plot import Line, Panel, draw

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 896, 1024)
SEEN = (0, 1_000, 5_000, 20_000, 60_000)
STEPS = 128  # eight pages' worth: so many of them begin a page
PROMPT = 16
BETWEEN = 64  # sequences that run while the number of requests ever seen grows
SAMPLING = ResolvedSampling()


class Bench:
    """A scheduler with a device that answers at once."""

    def __init__(self, max_running: int) -> None:
        self._now = 0.0
        self._num_requests = 0
        limits = Limits(
            num_pages=max_running * 32,
            max_running=max_running,
            step_tokens=max(2048, PROMPT * max_running),
            max_context=1024,
            max_queued=10**9,
        )
        self.scheduler = Scheduler(limits, prefix_key=b"bench", clock=lambda: self._now)

    def admit(self, max_tokens: int) -> None:
        """A request, with a prompt that no other has."""
        self._num_requests += 1
        prompt = (self._num_requests, *range(PROMPT - 1))
        request = Admit(
            request_id=self._num_requests,
            prompt_ids=prompt,
            sampling=SAMPLING,
            max_tokens=max_tokens,
            arrival=self._now,
        )
        assert self.scheduler.admit(request) is None

    def step(self) -> bool:
        """Plan, answer, account; False if there was nothing to do."""
        plan = self.scheduler.plan()
        if plan is None:
            return False
        self._now += 0.01
        self.scheduler.complete(StepDone(step=plan.step, tokens=tuple([(1,) * count for count in plan.samples])))
        self.scheduler.take_progress()
        return True

    def drain(self) -> None:
        """Until nothing is left."""
        while self.step():
            pass

    def seconds_per_step(self, number: int) -> float:
        """The mean over STEPS steps in which so many sequences decode."""
        for _ in range(number):
            self.admit(STEPS + 8)
        while self.scheduler.stats().waiting or self.scheduler.stats().output_tokens % number:
            self.step()
        self.step()
        start = time.process_time()
        for _ in range(STEPS):
            self.step()
        seconds = (time.process_time() - start) / STEPS
        assert len(self.scheduler._batch) == number, "a sequence ended while steps were measured"
        self.drain()
        return seconds

    def see(self, number: int) -> None:
        """Let requests come and go until so many were seen."""
        while self._num_requests < number:
            for _ in range(BETWEEN):
                self.admit(2)
            self.drain()


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Least squares of relative errors: seconds at 0, seconds each, and the worst relative error."""
    weights = [1.0 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    each = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True)) / sum(
        w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True)
    )
    start = mean_y - each * mean_x
    return start, each, max(abs((start + each * x) / y - 1.0) for x, y in points)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, default=Path("docs/simulator/scheduler_cost.svg"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    machine = f"{cpu_model()}, Python {platform.python_version()}, commit {commit.strip() or 'unknown'}"
    print(machine)
    by_size = [(float(n), min(Bench(n).seconds_per_step(n) for _ in range(arguments.rounds))) for n in SIZES]
    start, each, error = fit(by_size)
    for number, seconds in by_size:
        print(f"{number:6.0f} sequences  {1e6 * seconds:8.1f} us a step  {1e6 * seconds / number:6.2f} us a sequence")
    formula = f"{1e6 * start:.0f} us + {1e6 * each:.2f} us a sequence, off by at most {error:.0%}"
    print(f"a step: {formula}")
    bench, by_seen = Bench(BETWEEN), list[tuple[float, float]]()
    for seen in SEEN:
        bench.see(seen)
        by_seen.append((float(seen), min(bench.seconds_per_step(BETWEEN) for _ in range(arguments.rounds))))
        print(f"{seen:6d} requests seen before: {1e6 * by_seen[-1][1]:8.1f} us a step of {BETWEEN} sequences")
    line = [(x, 1e3 * (start + each * x)) for x in (SIZES[0], SIZES[-1])]
    panels = [
        Panel(
            title="milliseconds of plan + complete a step, by sequences that decode in it",
            lines=(
                Line(name="measured", points=tuple((x, 1e3 * y) for x, y in by_size), dots=True),
                Line(name="fitted", points=tuple(line)),
            ),
            x_label="sequences",
        ),
        Panel(
            title=f"microseconds of a step of {BETWEEN} sequences, by requests seen before",
            lines=(Line(name="measured", points=tuple((x, 1e6 * y) for x, y in by_seen)),),
            x_label="requests",
        ),
    ]
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    arguments.plot.write_text(draw("What the scheduler costs", [machine, f"a step takes {formula}"], panels))


if __name__ == "__main__":
    main()
