"""Our engine beside others: same files, prompts and threads, in turns. Writes docs/benchmarks/NAME.{json,md} and plots.

    python benchmarks/peers.py [--model demo,135m-bf16] [--works decode-1,burst] [--rounds 3] [--peers llama.cpp,...]
                               [--peer-root DIR] [--name peers] [--fresh]

A report keeps its lines: measuring one work on one model replaces that line and leaves the others, unless --fresh. How
to install each peer below --peer-root (or STREAMGEN_PEERS) is in docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from peersuite.adapters.base import Engine, Setting
from peersuite.adapters.ours import Ours
from peersuite.models import NAMES, MissingModel, Model, find_model
from peersuite.plots import plots_of
from peersuite.report import Line, Report, line_of
from peersuite.rounds import Manner, measure
from peersuite.tools import PEERS_VARIABLE, find_tools, known_peers
from peersuite.works import DEFAULT_WORKS, Work, make_work

from streamgen.cli.machine import affinity_cpus, cpu_model
from streamgen.execution.threads import available_threads

ROOT = Path(__file__).parents[1]
DEFAULT_PEERS = ("llama.cpp", "openvino-genai")
VERSIONS = ("numpy", "torch")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", metavar="NAMES", help=f"some of {', '.join(NAMES)}, with commas between")
    add("--works", default=",".join(DEFAULT_WORKS), help="with commas between; default %(default)s")
    add("--rounds", type=int, default=3, help="default %(default)s")
    add("--peers", default=",".join(DEFAULT_PEERS), help="with commas between; also transformers; default %(default)s")
    add("--peer-root", type=Path, help=f"where peers are installed; default {PEERS_VARIABLE}")
    add("--threads", type=int, default=available_threads(), help="of every engine; default %(default)s")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of our Engine; VALUE is JSON, or text")
    add("--name", default="peers", help="of the report; default %(default)s")
    add("--fresh", action="store_true", help="forget the lines of the report that is there")
    add(
        "--most-others",
        type=float,
        default=0.15,
        metavar="CPUS",
        help="a turn during which others kept more processors busy is tried again, three times at most; default 0.15",
    )
    add("--patience", type=float, default=30.0, metavar="SECONDS", help="to wait for quiet before a turn; default 30")
    add("--no-matmul", action="store_true", help="leave out torch's matrix product, 6 seconds of a round")
    return parser.parse_args()


def main() -> int:
    """Measure line by line; the report is written after each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs below is ended too
    arguments = parse()
    named = os.environ.get(PEERS_VARIABLE)
    root = arguments.peer_root or (Path(named) if named else None)
    options = dict(_parse_option(text) for text in arguments.option)
    setting = Setting(threads=arguments.threads, root=root.absolute() if root else None, options=options)
    try:
        engines = find_engines(setting, arguments.peers.split(","))
        works = arguments.works.split(",")
        for name in works:
            make_work(name, vocab=1024)  # a name that is wrong is known before anything is measured
        report = open_report(arguments, engines)
        for name in arguments.model.split(","):
            model = find_model(name, find_tools(setting))
            for work in works:
                report.add(measure_line(model, make_work(work, model.vocab), engines, arguments, options))
                write(report, arguments.name)
    except (MissingModel, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def measure_line(
    model: Model, work: Work, engines: list[Engine], arguments: argparse.Namespace, options: dict[str, Any]
) -> Line:
    """One work on one model."""
    print(f"{model.name}, {work.name}", file=sys.stderr, flush=True)
    manner = Manner(
        threads=arguments.threads,
        rounds=arguments.rounds,
        matmul=not arguments.no_matmul and work.kind in ("prefill", "decode"),
        most_others=arguments.most_others,
        patience=arguments.patience,
    )
    measured = measure(work, model, engines, manner)
    return line_of(
        work,
        model,
        options={**model.options, **options},
        threads=arguments.threads,
        commit=commit(),
        when=time.strftime("%Y-%m-%d %H:%M"),
        turns=measured.turns,
        machines=measured.machines,
        missing=measured.missing,
    )


def find_engines(setting: Setting, wanted: list[str]) -> list[Engine]:
    """Ours, and the peers that are named and installed."""
    peers = {engine.name: engine for engine in known_peers(setting)}
    if unknown := sorted({name for name in wanted if name} - set(peers)):
        raise ValueError(f"--peers: expected some of {', '.join(peers)}, got {', '.join(unknown)}")
    engines: list[Engine] = [Ours(setting)]
    for name in wanted:
        reason = peers[name].unavailable() if name else None
        if reason is not None:
            print(f"without {name}: {reason}", file=sys.stderr)
        elif name:
            engines.append(peers[name])
    return engines


def open_report(arguments: argparse.Namespace, engines: list[Engine]) -> Report:
    """The report that is there with this run's versions, or a new one."""
    path = ROOT / "docs" / "benchmarks" / f"{arguments.name}.json"
    versions = {engine.name: engine.version() for engine in engines}
    versions |= {"python": platform.python_version(), **{name: _version(name) for name in VERSIONS}}
    report = Report(processor=cpu_model(), cores=affinity_cpus(), system=platform.platform(), versions=versions)
    if path.is_file() and not arguments.fresh:
        before = msgspec.json.decode(path.read_bytes(), type=Report)
        report.lines, report.commands = before.lines, before.commands
        report.versions = {**before.versions, **versions}
    command = shlex.join(["python", "benchmarks/peers.py", *_shown(sys.argv[1:])])
    report.commands = [other for other in report.commands if other != command] + [command]
    return report


def write(report: Report, name: str) -> None:
    """NAME.json, NAME.md and NAME-*.svg."""
    folder = ROOT / "docs" / "benchmarks"
    folder.mkdir(exist_ok=True)
    plots = {f"{name}-{part}.svg": document for part, document in plots_of(report).items()}
    for file, document in plots.items():
        (folder / file).write_text(document)
    (folder / f"{name}.md").write_text(report.markdown(name, plots))
    (folder / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def commit() -> str:
    """Of the source tree, marked where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _shown(arguments: list[str]) -> list[str]:
    """The command without where peers lie on this machine."""
    shown: list[str] = []
    for argument in arguments:
        if shown and shown[-1] == "--peer-root":
            shown[-1:] = []
        elif not argument.startswith("--peer-root="):
            shown.append(argument)
    return shown


def _parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"--option: expected NAME=VALUE, got {text!r}")
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name, value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    raise SystemExit(main())
