"""The whole of `bench`: every figure in order, each beside what bounds it on this machine."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import anyio
from msgspec import Struct

import streamgen._cpu as _cpu
from streamgen.backends.cpu import chosen_isa
from streamgen.cli import machine
from streamgen.cli.benchmark.engine import Decode, EngineBench, open_bench
from streamgen.cli.benchmark.figures import BenchReport, Figure
from streamgen.cli.benchmark.model_size import ModelSize, read_model_size
from streamgen.cli.options import ENGINE_FIELDS, chosen, model_or_demo
from streamgen.cli.output import note
from streamgen.config import EngineOptions
from streamgen.engine import Engine
from streamgen.execution.threads import available_threads

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

PROMPT_TOKENS = 128
PREFILL_TOKENS = 512
BATCHES = (1, 8, 32)
BANDWIDTH_BYTES = 512 * 2**20  # well beyond any cache
BANDWIDTH_SECONDS = 1.0
START_RUNS = 3
BANDWIDTH, MATMUL = "read bandwidth", "torch bf16 matmul 4096"
VERSIONS = ("streamgen", "numpy", "torch")


def measure(arguments: argparse.Namespace) -> BenchReport:
    """Run every measurement."""
    bench = Bench(arguments)
    for line in bench.report().header():
        note(line)
    bench.measure_machine()
    anyio.run(bench.measure_engine)
    if not bench.is_quick:
        bench.measure_start()
        bench.measure_memory()
    report = bench.report()
    for reason in report.skipped:
        note(f"not measured: {reason}")
    return report


def measure_steps(arguments: argparse.Namespace) -> None:
    """Print the ops of decode steps and of a prefill step, slowest first, each beside its limit."""
    from streamgen.cli.benchmark.ops import CONTEXT, StepShape, measure_ops

    options = EngineOptions(model=str(model_or_demo(arguments.model)), **chosen(arguments, ENGINE_FIELDS))
    threads = str(options.threads or available_threads())
    peak = None if util.find_spec("torch") is None else _child("matmul", threads)["gflops"]
    decodes = [StepShape(f"decode, {n} sequences", n, 1, CONTEXT) for n in BATCHES]
    shapes = [*decodes, StepShape(f"prefill, {PREFILL_TOKENS} tokens", 1, PREFILL_TOKENS, 0)]
    if peak is not None:
        print(f"torch's bf16 product, the arithmetic limit named below: {peak:.0f} GFLOP/s")
    for table in measure_ops(options, shapes, peak=peak):
        print("\n".join(table.lines()), flush=True)


class Round(Struct, frozen=True):
    """One turn through all batch sizes, and the read bandwidth (GB/s) just before."""

    bandwidth: float
    decodes: dict[int, Decode]


class Bench:
    """Collects the figures of one run, and prints each."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.is_quick: bool = arguments.quick
        self._model = str(model_or_demo(arguments.model))
        self._options = chosen(arguments, ENGINE_FIELDS)
        self._plan = Engine(self._model, **self._options).plan()
        self._size: ModelSize = read_model_size(EngineOptions(model=self._model, **self._options))
        flags = ["--quick"] if arguments.quick else []
        model = [] if arguments.model is None else [arguments.model]
        self._command = shlex.join(["streamgen", "bench", *model, *_as_arguments(self._options), *flags])
        self._threads: int = arguments.threads or available_threads()
        self._isa = chosen_isa()
        self._figures: dict[str, Figure] = {}
        self._skipped: list[str] = []

    def report(self) -> BenchReport:
        """What was measured so far, with the machine and the versions."""

        return BenchReport(
            model=Path(self._model).name,
            dtype=self._plan.dtype,
            threads=self._threads,
            isa=self._isa,
            processor=machine.cpu_model(),
            system=platform.platform(),
            versions={"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}},
            commit=_commit(),
            command=self._command,
            figures=tuple(self._figures.values()),
            skipped=tuple(self._skipped),
        )

    def measure_machine(self) -> None:
        """What bounds the engine here: memory bandwidth, and a large matrix product in torch."""

        if util.find_spec("torch") is None:
            self._skipped.append("torch's matrix product: torch is not installed")
        elif not self.is_quick:
            self._add(MATMUL, [_child("matmul", str(self._threads))["gflops"]], "GFLOP/s")

    async def measure_engine(self) -> None:
        """Decode, prefill, time per step.

        Rounds of all batch sizes, with the bandwidth measured in each, so that every ratio is of neighbours in time:
        the speed of a shared machine's memory and clock moves by half within a minute.
        """
        async with open_bench(self._model, self._options, self._size.vocab) as bench:
            rounds = [await self._measure_round(bench) for _ in self._repeats()]
            self._add_decodes(rounds)
            await self._measure_prefill(bench)

    async def _measure_round(self, bench: EngineBench) -> Round:
        bandwidth = _cpu.read_bandwidth(self._threads, BANDWIDTH_BYTES, BANDWIDTH_SECONDS)
        tokens = min(32 if self.is_quick else 128, self._plan.max_context - PROMPT_TOKENS)
        decodes = {
            num_seqs: await bench.decode(num_seqs, prompt_tokens=PROMPT_TOKENS, tokens=tokens)
            for num_seqs in BATCHES
            if num_seqs <= self._plan.max_running
        }
        return Round(bandwidth, decodes)

    def _add_decodes(self, rounds: list[Round]) -> None:
        bound = 1e9 / self._size.step_bytes
        self._add(BANDWIDTH, [r.bandwidth for r in rounds], "GB/s")
        for num_seqs in BATCHES:
            if num_seqs not in rounds[0].decodes:
                self._skipped.append(f"decode of {num_seqs} sequences: max_running is {self._plan.max_running}")
                continue
            rates = [r.decodes[num_seqs].steady for r in rounds]
            if num_seqs == 1:
                ratios = [rate / (r.bandwidth * bound) for rate, r in zip(rates, rounds, strict=True)]
                of = "of read bandwidth / bytes of weights"
            else:
                ratios = [rate / r.decodes[1].steady for rate, r in zip(rates, rounds, strict=True)]
                of = "times one sequence"
            self._add(f"decode {num_seqs} seq", rates, "tok/s", ratio=median(ratios), ratio_of=of)
        largest = max(rounds[0].decodes)
        runs = [r.decodes[largest] for r in rounds]
        self._add(f"offline {largest} requests, 128 in", [run.overall for run in runs], "tok/s out")
        outside = [run.outside_seconds * 1e6 for run in runs]
        self._add(f"Python per step, {largest} seq", outside, "us", best=min)

    async def _measure_prefill(self, bench: EngineBench) -> None:
        """Tokens per second, and what the layers' linears alone do in it: 2 x weights x tokens.

        Attention, and the head of the one row that samples, are left out of the operations; the time is all of it.
        """
        tokens = min(PREFILL_TOKENS, self._plan.max_context - 1)
        runs = [await bench.prefill(tokens) for _ in self._repeats()]
        self._add(f"prefill {tokens} tokens", runs, "tok/s")
        rates = [rate * 2 * self._size.layer_weights / 1e9 for rate in runs]
        product = self._figures.get(MATMUL)
        ratio = None if product is None else max(rates) / product.value
        self._add("prefill, layers' linears alone", rates, "GFLOP/s", ratio=ratio, ratio_of="of torch bf16 matmul")

    def measure_start(self) -> None:
        """Import time, and the time from the start of a process to its first token."""
        python = [sys.executable, "-c"]
        empty = min(_seconds([*python, "pass"]) for _ in range(START_RUNS))
        runs = [_seconds([*python, "import streamgen"]) - empty for _ in range(START_RUNS)]
        self._add("import streamgen", [run * 1e3 for run in runs], "ms", best=min)
        command = [sys.executable, "-m", "streamgen", "run", self._model, "-p", "Hi", "--max-tokens", "2"]
        runs = [_seconds_to_output([*command, *_as_arguments(self._options)]) for _ in range(START_RUNS)]
        self._add("process start to first token", runs, "s", best=min)

    def measure_memory(self) -> None:
        """Resident memory against the plan, in an engine of its own whose pages are all used."""
        if not sys.platform.startswith("linux"):
            self._skipped.append("resident memory: read from /proc, which only Linux has")
            return
        sizes = _child("memory", self._model, json.dumps(self._options))
        mib = 2**20
        self._add(
            "resident beyond weights and pages", [(sizes["now"] - sizes["planned"] + sizes["runtime"]) / mib], "MiB"
        )
        self._add(
            "peak memory", [sizes["peak"] / mib], "MiB", ratio=sizes["peak"] / sizes["planned"], ratio_of="of the plan"
        )

    def _repeats(self) -> range:
        return range(1 if self.is_quick else 3)

    def _add(
        self,
        name: str,
        runs: list[float],
        unit: str,
        *,
        ratio: float | None = None,
        ratio_of: str = "",
        best: Callable[[list[float]], float] = max,
    ) -> None:

        value = best(runs)
        figure = Figure(
            name=name, value=value, unit=unit, runs=tuple(runs), ratio=ratio, ratio_of=ratio_of if ratio else ""
        )
        self._figures[name] = figure
        print(figure.line(), flush=True)


def _child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "streamgen.cli.benchmark.children", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def _seconds_to_output(command: list[str]) -> float:
    """Until the first byte of output; the process is then left to end."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.communicate()
    if process.returncode != 0 or not first:
        raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}")
    return seconds


def _as_arguments(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str | None:
    """The commit of the source tree this runs from, marked where files differ; None outside a tree."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
