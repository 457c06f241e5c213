"""The `streamgen` command: finds the subcommand, runs it, turns errors into a sentence and an exit code.

Nothing here imports the engine, numpy or torch: a command does so when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from streamgen.cli import bench, chat, doctor, exit_codes, inspect, pull, quantize, run, simulate
from streamgen.cli.output import complain
from streamgen.errors import StreamgenError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = (run, chat, pull, inspect, quantize, doctor, bench, simulate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` leaves out the program's name."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return exit_codes.BROKEN_PIPE
    except Exception as error:
        return _report(_cause(error), debug=arguments.debug)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    parser = argparse.ArgumentParser(
        prog="streamgen",
        description="Run language models in this process: an engine that is a library, and this command over it.",
        epilog=exit_codes.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.DESCRIPTION,
            epilog=exit_codes.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser


class _ShowVersion(argparse.Action):
    """Looks the version up only when it is asked for: that takes longer than all the rest of the parser."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"streamgen {version('streamgen')}")
        except PackageNotFoundError:  # run from a source tree that was never installed
            print("streamgen (not installed)")
        parser.exit()


def _cause(error: Exception) -> Exception:
    """The error itself; of a task group's, the one error inside, if it is one."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _report(error: Exception, *, debug: bool) -> int:
    """Print the error; its exit code."""
    if debug:
        import traceback

        traceback.print_exception(error, file=sys.stderr)
    elif isinstance(error, StreamgenError):
        complain(str(error))
    else:
        complain(f"unexpected {type(error).__name__}: {error} (--debug shows where)")
    return exit_codes.exit_code(error)


def _silence_stdout() -> None:
    """Keep the interpreter's last flush from failing on the closed pipe once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
