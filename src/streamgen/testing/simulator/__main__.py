"""`python -m streamgen.testing.simulator`: the same as `streamgen simulate`."""

from __future__ import annotations

import argparse
import sys

from streamgen.cli import simulate
from streamgen.cli.exit_codes import exit_code
from streamgen.cli.output import complain
from streamgen.errors import StreamgenError


def main() -> int:
    """Parse, run, and say what went wrong in a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m streamgen.testing.simulator",
        description=simulate.DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    simulate.add_arguments(parser)
    try:
        return simulate.run(parser.parse_args())
    except StreamgenError as error:
        complain(str(error))
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
