"""`streamgen bench`: how fast a model runs here, each figure beside what bounds it.

Ratios that mean something on any machine: decode against memory bandwidth (every step reads every weight once), prefill
against the rate of a large matrix product in torch, batches against one sequence, memory against the plan.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from streamgen.cli import exit_codes
from streamgen.cli.options import add_model_arguments

if TYPE_CHECKING:
    import argparse

SUMMARY = "how fast a model runs here"
DESCRIPTION = """\
Measure decoding, prefill, start-up and memory, each beside what bounds it on this machine. Best of several runs; the
machine should be idle. A few minutes with the demo model, --quick half a minute.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how it is opened, where the report goes."""
    add_model_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    parser.add_argument("--quick", action="store_true", help="one short run of each, and nothing in other processes")
    parser.add_argument("--ops", action="store_true", help="instead: where a decode's and a prefill's time goes")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print each figure as it is there, write the report."""
    import msgspec

    from streamgen.cli.benchmark.suite import measure, measure_steps

    if arguments.ops:
        measure_steps(arguments)
        return exit_codes.OK
    report = measure(arguments)
    if arguments.json is not None:
        Path(arguments.json).write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    return exit_codes.OK
