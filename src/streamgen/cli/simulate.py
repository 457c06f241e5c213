"""`streamgen simulate`: the scheduler in virtual time, under a recorded trace or under everything that can go wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from streamgen.cli import exit_codes
from streamgen.cli.output import complain, note

if TYPE_CHECKING:
    import argparse

    from streamgen.scheduling.limits import Limits
    from streamgen.testing.simulator.cost import CostModel
    from streamgen.testing.simulator.replay import Quantiles, ReplayReport
    from streamgen.testing.simulator.traces import TraceRequest

SUMMARY = "the scheduler in virtual time: a trace of requests, or random faults"
DESCRIPTION = """\
With TRACE: replay recorded requests (Azure's CSV, Mooncake's JSONL) on the real scheduler against a cost model of a
machine, and say how long they would have waited.
Without: thousands of random requests, cancels, faults and slow readers from one seed, with every promise checked.
"""
BROKEN = 1  # a promise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The trace and the machine; or the scenario."""
    parser.add_argument("trace", nargs="?", metavar="TRACE", help="a .csv of Azure's or a .jsonl of Mooncake's traces")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    faults = parser.add_argument_group("without a trace")
    faults.add_argument("--scenario", metavar="NAME", help="default: mixed; a wrong one lists all")
    faults.add_argument("--requests", type=int, metavar="N", help="default: 1000")
    faults.add_argument("--log", metavar="FILE", help="write a line for everything that happens")
    load = parser.add_argument_group("with a trace")
    load.add_argument("--limit", type=int, metavar="N", help="only the trace's first N requests")
    load.add_argument("--repeat", type=int, metavar="N", help="N times in a row, jittered, prefixes anew")
    load.add_argument("--scale", type=float, metavar="X", help="requests come X times as fast")
    load.add_argument("--plot", metavar="FILE", help="where the SVG goes (default: the trace's name, here)")
    load.add_argument("--knows-lengths", action="store_true", help="the scheduler is told how long answers will be")
    machine = parser.add_argument_group("machine, with a trace")
    machine.add_argument("--cost", metavar="A,B,C", help="seconds of a step, a row, a position of context")
    machine.add_argument("--measure", metavar="MODEL", help="measure them here on a model, or on `demo`")
    machine.add_argument("--pages", type=int, metavar="N", help="of 16 tokens in the cache (default: 65536)")
    machine.add_argument("--kv-memory", metavar="SIZE", help="of the cache instead, e.g. 24GiB; needs --measure")
    machine.add_argument("--max-running", type=int, metavar="N", help="sequences at once (default: 256)")
    machine.add_argument("--step-tokens", type=int, metavar="N", help="rows of a step (default: 512)")
    machine.add_argument(
        "--max-queued", type=int, metavar="N", help="that wait before others are refused (default: all)"
    )


FAULT_OPTIONS = ("scenario", "requests", "log")
TRACE_OPTIONS = (
    "limit", "repeat", "scale", "plot", "knows_lengths",
    "cost", "measure", "pages", "kv_memory", "max_running", "step_tokens", "max_queued",
)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Replay or simulate, print, write files."""
    from streamgen.errors import ConfigError

    unused = FAULT_OPTIONS if arguments.trace else TRACE_OPTIONS
    wrong = [name for name in unused if getattr(arguments, name) not in (None, False)]
    if wrong:
        option = "--" + wrong[0].replace("_", "-")
        where = "without a trace" if arguments.trace else "with a trace"
        raise ConfigError(f"{option}: expected only {where}", option=wrong[0])
    return _replay(arguments) if arguments.trace else _simulate(arguments)


# ---- faults -------------------------------------------------------------------------------------------------------


def _simulate(arguments: argparse.Namespace) -> int:
    from streamgen.testing.simulator.simulation import SimulationFailed, simulate

    scenario, requests = arguments.scenario or "mixed", arguments.requests if arguments.requests is not None else 1000
    log = None if arguments.log is None else open(arguments.log, "w")  # closed below
    started = time.process_time()
    try:
        report = simulate(
            arguments.seed,
            requests=requests,
            scenario=scenario,
            log=None if log is None else lambda line: log.write(line + "\n"),
        )
    except SimulationFailed as error:
        complain(str(error))
        return BROKEN
    finally:
        if log is not None:
            log.close()
    seconds = time.process_time() - started
    print(f"scenario {scenario}, seed {report.seed}: {requests:,} requests in {report.seconds:,.1f} virtual seconds")
    print(f"ends        {', '.join(f'{name} {count:,}' for name, count in report.endings.items())}")
    if report.failures:
        print(f"failures    {', '.join(f'{name} {count:,}' for name, count in report.failures.items())}")
    print(f"steps       {report.steps:,} with {report.computed_tokens:,} rows; {report.preemptions:,} preemptions")
    print(f"tokens      {report.output_tokens:,} drawn, {report.cached_tokens:,} found in the cache")
    print("promises    kept")
    print(f"event log   {report.digest}")
    note(f"{requests / max(seconds, 1e-9):,.0f} requests a second, in {seconds:.1f} s of one core")
    _write_json(arguments, report)
    return exit_codes.OK


def _write_json(arguments: argparse.Namespace, report: object) -> None:
    if arguments.json is not None:
        import msgspec

        Path(arguments.json).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


# ---- traces -------------------------------------------------------------------------------------------------------


def _replay(arguments: argparse.Namespace) -> int:
    from streamgen.errors import ConfigError
    from streamgen.testing.simulator.plot import plot_replay
    from streamgen.testing.simulator.replay import replay
    from streamgen.testing.simulator.traces import read_trace

    trace = read_trace(arguments.trace)
    if arguments.limit is not None:
        if arguments.limit < 1:
            raise ConfigError(f"limit: expected >= 1, got {arguments.limit}", option="limit")
        trace = trace[: arguments.limit]
    cost, num_pages = _machine(arguments)
    started = time.process_time()
    report = replay(
        trace,
        limits=_limits(arguments, trace, num_pages),
        cost=cost,
        scale=1.0 if arguments.scale is None else arguments.scale,
        repeat=1 if arguments.repeat is None else arguments.repeat,
        seed=arguments.seed,
        knows_lengths=arguments.knows_lengths,
    )
    seconds = time.process_time() - started
    _print_report(report)
    plot = Path(arguments.plot) if arguments.plot else Path(Path(arguments.trace).stem + ".svg")
    plot.write_text(plot_replay(report, Path(arguments.trace).name))
    rate = report.requests / max(seconds, 1e-9)
    note(f"{rate:,.0f} requests a second, in {seconds:.1f} s of one core; the plot is {plot}")
    _write_json(arguments, report)
    return exit_codes.OK


def _machine(arguments: argparse.Namespace) -> tuple[CostModel, int]:
    """What a step costs, and how many pages there are."""
    from streamgen.errors import ConfigError
    from streamgen.testing.simulator.cost import DEMO_ON_TWO_CORES, CostModel

    if arguments.measure is None:
        if arguments.kv_memory is not None:
            raise ConfigError("--kv-memory: expected with --measure, which knows a page's size; or give --pages")
        cost = DEMO_ON_TWO_CORES if arguments.cost is None else CostModel.parse(arguments.cost)
        return cost, 65_536 if arguments.pages is None else arguments.pages
    if arguments.cost is not None:
        raise ConfigError("--cost: expected without --measure, got both", option="cost")
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> tuple[CostModel, int]:
    from streamgen import sync
    from streamgen.cli.options import model_or_demo
    from streamgen.config import parse_bytes
    from streamgen.errors import ConfigError
    from streamgen.testing.simulator.cost import CostModel

    note("Measuring; the machine should be idle.")
    with sync.Engine(model_or_demo(arguments.measure)) as engine:
        cost, plan = CostModel.measure(engine), engine.plan()
    note(
        f"a step takes {cost.describe()} (mean error {cost.error:.0%}): "
        f"--cost {cost.step:.3g},{cost.row:.3g},{cost.context:.3g}"
    )
    if arguments.pages is not None:
        return cost, arguments.pages
    if arguments.kv_memory is not None:
        try:
            size = parse_bytes(arguments.kv_memory)
        except ValueError as error:
            raise ConfigError(f"--kv-memory: {error}", option="kv_memory") from None
        return cost, max(1, size // plan.page_bytes)
    return cost, plan.num_pages


def _limits(arguments: argparse.Namespace, trace: list[TraceRequest], num_pages: int) -> Limits:
    from streamgen.scheduling.limits import Limits

    longest = max(request.prompt_tokens + max(1, request.output_tokens) for request in trace)
    return Limits(
        num_pages=num_pages,
        max_running=256 if arguments.max_running is None else arguments.max_running,
        step_tokens=512 if arguments.step_tokens is None else arguments.step_tokens,
        max_context=longest,
        max_queued=10**9 if arguments.max_queued is None else arguments.max_queued,
    )


def _print_report(report: ReplayReport) -> None:
    print(f"requests            {report.requests:,}, of which {report.finished:,} finished")
    print(
        f"time                {report.seconds:,.1f} virtual seconds, {report.steps:,} steps of {report.cost.describe()}"
    )
    for code, count in report.refused.items():
        print(f"refused             {count:,} ({code})")
    print(
        f"throughput          {report.output_per_second:,.1f} tokens/s drawn, {report.computed_per_second:,.0f} rows/s"
    )
    print(f"first token         {_quantiles(report.first_token, 1.0, 's')}")
    print(f"per output token    {_quantiles(report.per_token, 1e3, 'ms')}")
    print(f"in the queue        {_quantiles(report.queue, 1.0, 's')}")
    print(f"cache hits          {report.cache_hits:.1%} of {report.prompt_tokens:,} prompt tokens")
    print(f"preemptions         {report.preemptions:,}")
    print(f"waiting             {report.mean_waiting:,.1f} on average, {report.most_waiting:,} at most")
    print(f"running             {report.mean_running:,.1f} on average, {report.rows_per_step:,.0f} rows a step")
    print(f"pages held          {report.mean_pages / report.limits.num_pages:.1%} on average")
    print(f"device busy         {report.busy:.1%}")


def _quantiles(times: Quantiles, factor: float, unit: str) -> str:
    values = [("p50", times.p50), ("p90", times.p90), ("p99", times.p99), ("most", times.most)]
    return "  ".join(f"{name} {factor * value:,.2f} {unit}" for name, value in values)
