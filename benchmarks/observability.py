"""What watching an engine costs: the share of a step, and tokens a second with and without it, in turns in one run.

    python benchmarks/observability.py [MODEL] [--sequences 32] [--rounds 5] [--json PATH]

The share is time in the recorder over time of steps, measured around every call of it. The rates say the same from
outside, as far as the machine is quiet enough; rounds take turns, so that it disturbs all alike.
"""

import argparse
import json
import platform
import statistics
import subprocess
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from streamgen import sync
from streamgen.cli.machine import cpu_model
from streamgen.lifecycle import EventStream

CALLS = ("admitted", "started", "planned", "completed", "first_token", "preempted", "finished", "_hand_out")
MODES = ("off", "recorder", "recorder, one subscriber")


class Meter:
    """Stands between scheduler and recorder: lets calls through, measures them, or swallows them."""

    def __init__(self, recorder: Any) -> None:
        self.seconds = 0.0
        self.is_off = False
        self.is_measuring = False
        attach = recorder.attach

        def metered(name_of: Any, **options: Any) -> Any:
            journal = attach(name_of, **options)
            for name in CALLS:
                setattr(journal, name, self._around(getattr(journal, name)))
            return journal

        recorder.attach = metered

    def _around(self, call: Any) -> Any:
        def around(*arguments: Any) -> None:
            if self.is_off:
                return
            if not self.is_measuring:
                call(*arguments)
                return
            started = time.perf_counter()
            call(*arguments)
            self.seconds += time.perf_counter() - started

        return around


def run(engine: sync.Engine, sequences: int, tokens: int) -> tuple[float, int, float]:
    """Decode; (tokens a second, steps, seconds of steps)."""
    before = engine.stats()
    prompts = [f"{number} rivers of the world, and what they are known for:" for number in range(sequences)]
    started = time.perf_counter()
    threads = [
        threading.Thread(
            target=engine.generate, args=(prompt,), kwargs={"max_tokens": tokens, "ignore_eos": True, "seed": 1}
        )
        for prompt in prompts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    after = engine.stats()
    return sequences * tokens / seconds, after.steps - before.steps, after.step_seconds - before.step_seconds


def read_all(stream: EventStream) -> threading.Thread:
    """A subscriber that reads every event in a thread of its own."""
    thread = threading.Thread(target=lambda: deque(stream, maxlen=0))
    thread.start()
    return thread


def measure(engine: sync.Engine, meter: Meter, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rates by mode, and the recorder's own time by step."""
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    own: dict[str, tuple[float, float]] = {}
    run(engine, arguments.sequences, 8)  # warm
    for is_measuring in (False, True):
        meter.is_measuring = is_measuring
        for _ in range(arguments.rounds if not is_measuring else 1):
            for mode in MODES:
                meter.is_off, meter.seconds = mode == "off", 0.0
                stream = engine.subscribe()
                reader = read_all(stream) if "subscriber" in mode else None
                if reader is None:
                    stream.close()
                rate, steps, step_seconds = run(engine, arguments.sequences, arguments.tokens)
                stream.close()
                if reader is not None:
                    reader.join()
                if not is_measuring:
                    rates[mode].append(rate)
                elif mode != "off":
                    own[mode] = (meter.seconds / steps * 1e6, meter.seconds / step_seconds)
    return {"tokens_per_second": rates, "own": own}


def commit() -> str:
    """The commit of the source tree this runs from."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    engine = sync.Engine(arguments.model, max_running=arguments.sequences)
    meter = Meter(engine._recorder)
    with engine:
        figures = measure(engine, meter, arguments)
        started = time.perf_counter()
        snapshot = engine._recorder.snapshot()
        took = time.perf_counter() - started
    print(f"{cpu_model()}, {platform.platform()}, python {platform.python_version()}, commit {commit()}")
    print(
        f"{engine.name}: {arguments.sequences} sequences, {arguments.tokens} tokens each, {arguments.rounds} rounds\n"
    )
    print("| watching | tok/s, median (min-max) | own time a step | share of a step |\n| --- | --: | --: | --: |")
    for mode, rates in figures["tokens_per_second"].items():
        micros, share = figures["own"].get(mode, (0.0, 0.0))
        print(
            f"| {mode} | {statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f}) "
            f"| {micros:.0f} us | {share:.3%} |"
        )
    print(f"\na snapshot of {len(snapshot.steps)} steps, {len(snapshot.sequences)} sequences: {took * 1e3:.1f} ms")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
