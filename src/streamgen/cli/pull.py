"""`streamgen pull`: bring the demo model into the user's cache, once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.cli import exit_codes
from streamgen.cli.options import pull_demo_with_progress

if TYPE_CHECKING:
    import argparse

SUMMARY = "bring the demo model into the cache"
DESCRIPTION = "Bring the demo model (98 MB, a chat model of 135M parameters) into the user's cache, once."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The one name this version can pull."""
    parser.add_argument("name", choices=("demo",), help="what to pull")


def run(arguments: argparse.Namespace) -> int:
    """Pull, or check the copy that is there; the path goes to stdout."""
    print(pull_demo_with_progress())
    return exit_codes.OK
