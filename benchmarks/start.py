"""Where the time goes from the start of a process to the first token of a chat.

    python benchmarks/start.py [MODEL ...] [--rounds 5] [--name start]

Each round is a process of its own, which notes when each stage began and ended; the files are in the system's cache
after the first. Of each model the quickest round is shown: docs/benchmarks/NAME.md, and one timeline a model beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import wraps
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
PROMPT = "Tell me something about rivers."
WIDTH, ROW, LEFT, TOP = 760, 20, 180, 44
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#b7791f", "#4a5568")


# ---- in the process that is measured -------------------------------------------------------------------------------


class Stages:
    """Stages by name, thread, begin and end, in seconds since the process was started."""

    def __init__(self, start: float) -> None:
        self._start = start
        self.spans: list[dict[str, Any]] = []

    def now(self) -> float:
        """Seconds since the process was started: the clock is the system's, the same in both processes."""
        return time.perf_counter() - self._start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is inside is one stage."""
        begin = self.now()
        try:
            yield
        finally:
            self.add(name, begin)

    def add(self, name: str, begin: float) -> None:
        """A stage that ends now."""
        thread = threading.current_thread().name
        self.spans.append({"name": name, "thread": thread, "begin": begin, "end": self.now()})

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Each call of a function is a stage from now on."""
        function = getattr(owner, attribute)

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        setattr(owner, attribute, watched)


class Opener:
    """Opens a model as an engine does by itself, and watches."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def open(self, options: Any, on_progress: Any, is_cancelled: Callable[[], bool]) -> Any:
        """Called on the engine's thread."""
        stages = self._stages
        with stages.stage("import numpy, kernels, tokenizers"):
            from streamgen.backends.cpu import CpuModel
            from streamgen.execution import model
            from streamgen.execution.runner import Runner
        stages.watch(model.Prepared, "__init__", "header, program")
        stages.watch(model, "open_text", "tokenizer")
        stages.watch(CpuModel, "_pack", "pack weights")
        stages.watch(CpuModel, "_lower", "lower program")
        stages.watch(Runner, "execute", "step")
        return model.open_model(options, on_progress, is_cancelled)

    def plan(self, options: Any) -> Any:
        """What the protocol asks for; nobody calls it here."""
        raise NotImplementedError


def child(model: str, start: float) -> None:
    """Open, ask, print the stages."""
    stages = Stages(start)
    stages.add("interpreter", 0.0)
    with stages.stage("import asyncio"):
        import asyncio
    with stages.stage("import streamgen"):
        import streamgen as sg
        from streamgen import Engine
    from streamgen.actors.tokenizer import PromptEncoder

    stages.watch(PromptEncoder, "encode", "template, prompt to ids")

    async def ask() -> float:
        async with Engine(model, _opener=Opener(stages)) as engine:
            chat: list[sg.Message] = [{"role": "user", "content": PROMPT}]
            async with engine.stream(chat, max_tokens=2, temperature=0) as stream:
                async for _ in stream:
                    break
                return stages.now()
        raise AssertionError("the stream ended without a token")

    first = asyncio.run(ask())
    spans = [span for span in stages.spans if span["begin"] < first]
    print(json.dumps({"first_token": first, "cpu": time.process_time(), "spans": spans}))


# ---- in the process that measures ----------------------------------------------------------------------------------


def measure(model: str, rounds: int) -> tuple[dict[str, Any], list[float]]:
    """The quickest round, and the seconds to the first token of all."""
    runs = []
    for _ in range(rounds + 1):
        command = [sys.executable, __file__, "--child", model, repr(time.perf_counter())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    warm = runs[1:]  # the first one reads the files
    return min(warm, key=lambda run: run["first_token"]), [run["first_token"] for run in warm]


def draw(title: str, run: dict[str, Any]) -> str:
    """One row a stage, in order of their beginnings."""
    spans = sorted(run["spans"], key=lambda span: span["begin"])
    threads = list(dict.fromkeys(span["thread"] for span in spans))
    most = run["first_token"]
    scale = (WIDTH - LEFT - 60) / most
    height = TOP + ROW * len(spans) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="10" fill="#333"><rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="14" y="20" font-size="14">{escape(title)}</text>',
    ]
    x = 14
    for i, thread in enumerate(threads):
        parts.append(f'<rect x="{x}" y="28" width="9" height="9" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 13}" y="36">{escape(thread)}</text>')
        x += 30 + 6 * len(thread)
    for i, span in enumerate(spans):
        y, colour = TOP + ROW * i, COLOURS[threads.index(span["thread"]) % len(COLOURS)]
        left, width = LEFT + span["begin"] * scale, max(1.0, (span["end"] - span["begin"]) * scale)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(span["name"])}</text>')
        parts.append(f'<rect x="{left:.1f}" y="{y + 3}" width="{width:.1f}" height="{ROW - 6}" fill="{colour}"/>')
        label = f"{1e3 * (span['end'] - span['begin']):.0f} ms"
        parts.append(f'<text x="{left + width + 4:.1f}" y="{y + 13}">{label}</text>')
    bottom = TOP + ROW * len(spans)
    parts.append(f'<path d="M{LEFT + most * scale:.1f} {TOP}V{bottom + 6}" stroke="#c0392b" stroke-dasharray="3 2"/>')
    parts.append(
        f'<text x="{LEFT + most * scale:.1f}" y="{bottom + 18}" text-anchor="middle">first token, {most:.2f} s</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def report(name: str, command: str, results: dict[str, tuple[dict[str, Any], list[float]]]) -> str:
    """The page."""
    from streamgen.cli.machine import affinity_cpus, cpu_model

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    where = (
        f"{cpu_model()}, {affinity_cpus()} cores; Python {platform.python_version()}; commit {commit.stdout.strip()}"
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        f"# {name}",
        "",
        f"{where}; load average {load}.",
        "From the start of a process to the first token of a chat, files in the system's cache: the quickest round.",
        "",
        f"`{command}`",
        "",
        "| model | first token s | all rounds s | CPU s |",
        "|---|--:|---|--:|",
    ]
    for label, (run, seconds) in results.items():
        rounds = " ".join(f"{value:.2f}" for value in seconds)
        lines.append(f"| {label} | {run['first_token']:.2f} | {rounds} | {run['cpu']:.2f} |")
    for label, (run, _) in results.items():
        lines += [
            "",
            f"## {label}",
            "",
            f"![timeline]({name}-{label}.svg)",
            "",
            "| stage | thread | begins ms | takes ms |",
        ]
        lines.append("|---|---|--:|--:|")
        for span in sorted(run["spans"], key=lambda span: span["begin"]):
            begin, took = 1e3 * span["begin"], 1e3 * (span["end"] - span["begin"])
            lines.append(f"| {span['name']} | {span['thread']} | {begin:.0f} | {took:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="path or hub id; the demo model by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="start")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "START"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], float(arguments.child[1]))
        return
    from streamgen.hub import demo_model_path

    models = arguments.models or [str(demo_model_path())]
    results = {}
    for model in models:
        label = Path(model).stem
        results[label] = run, seconds = measure(model, arguments.rounds)
        print(f"{label}: first token after {min(seconds):.2f} s, {run['cpu']:.2f} s of CPU")
        (arguments.output / f"{arguments.name}-{label}.svg").write_text(draw(f"{label}: start to first token", run))
    flags = [Path(model).name for model in arguments.models] + [f"--rounds {arguments.rounds}"]
    page = report(arguments.name, " ".join(["python benchmarks/start.py", *flags]), results)
    (arguments.output / f"{arguments.name}.md").write_text(page)


if __name__ == "__main__":
    main()
