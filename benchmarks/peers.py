"""Our engine beside others: same files, same prompts, same threads, in turns. Writes docs/benchmarks/NAME.{json,md} and plots.

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
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from peersuite.adapters.base import Engine, Setting
from peersuite.adapters.llama_cpp import LlamaCpp
from peersuite.adapters.openvino import OpenVino
from peersuite.adapters.ours import Ours
from peersuite.adapters.transformers import Transformers
from peersuite.models import NAMES, MissingModel, Model, Tools, find_model
from peersuite.plots import plots_of
from peersuite.report import OURS, Report, line_of
from peersuite.rounds import Quiet, measure
from peersuite.works import DEFAULT_WORKS, make_work

from streamgen.cli.machine import affinity_cpus, cpu_model
from streamgen.execution.threads import available_threads

ROOT = Path(__file__).parents[1]
PEERS_VARIABLE = "STREAMGEN_PEERS"
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
    add("--no-matmul", action="store_true", help="leave out torch's matrix product, 6 seconds of a round")
    return parser.parse_args()


def main() -> int:
    """Measure line by line; the report is written after each."""
    arguments = parse()
    named = os.environ.get(PEERS_VARIABLE)
    root = arguments.peer_root or (Path(named) if named else None)
    options = dict(_parse_option(text) for text in arguments.option)
    setting = Setting(threads=arguments.threads, root=root.absolute() if root else None, options=options)
    engines = find_engines(setting, arguments.peers.split(","))
    report = open_report(arguments, engines)
    for name in arguments.model.split(","):
        try:
            model = find_model(name, find_tools(setting))
        except MissingModel as error:
            print(error, file=sys.stderr)
            return 1
        for work_name in arguments.works.split(","):
            measure_line(report, model, work_name, engines, arguments, options)
            write(report, arguments.name)
    return 0


def measure_line(
    report: Report,
    model: Model,
    work_name: str,
    engines: list[Engine],
    arguments: argparse.Namespace,
    options: dict[str, Any],
) -> None:
    """One work on one model, into the report."""
    work = make_work(work_name, model.vocab)
    print(f"{model.name}, {work.name}", file=sys.stderr, flush=True)
    quiet = Quiet(threads=arguments.threads, matmul=not arguments.no_matmul and work.kind in ("prefill", "decode"))
    measured = measure(work, model, engines, arguments.rounds, quiet)
    line = line_of(
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
    report.add(line)


def find_engines(setting: Setting, peers: list[str]) -> list[Engine]:
    """Ours, and the peers that are named and installed."""
    known: list[Engine] = [LlamaCpp(setting), OpenVino(setting), Transformers(setting)]
    names = [engine.name for engine in known]
    unknown = [peer for peer in peers if peer and peer not in names]
    if unknown:
        raise SystemExit(f"--peers: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    engines: list[Engine] = [Ours(setting)]
    for engine in known:
        if engine.name not in peers:
            continue
        reason = engine.unavailable()
        if reason is None:
            engines.append(engine)
        else:
            print(f"without {engine.name}: {reason}", file=sys.stderr)
    return engines


def find_tools(setting: Setting) -> Tools:
    """Peers' programs that make files of other formats."""
    folder, python = LlamaCpp(setting).folder, OpenVino(setting).python
    return Tools(
        quantize=folder / "llama-quantize" if folder else None, openvino_python=Path(python) if python else None
    )


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
    assert OURS == Ours.name
    raise SystemExit(main())
