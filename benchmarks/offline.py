"""Measure a model on this machine and write docs/benchmarks/NAME.{json,md}.

    python benchmarks/offline.py [--name first-light] [--readme] [arguments of `streamgen bench`]

--readme puts the table into README.md too, between its bench marks.
"""

import argparse
import re
from pathlib import Path

import msgspec

from streamgen.cli.benchmark.figures import BenchReport
from streamgen.cli.main import main as streamgen

ROOT = Path(__file__).parents[1]
MARKS = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)


def main() -> int:
    """Run `streamgen bench` and write its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="first-light")
    parser.add_argument("--readme", action="store_true")
    arguments, rest = parser.parse_known_args()
    folder = ROOT / "docs" / "benchmarks"
    folder.mkdir(exist_ok=True)
    path = folder / f"{arguments.name}.json"
    code = streamgen(["bench", *rest, "--json", str(path)])
    if code != 0:
        return code
    table = msgspec.json.decode(path.read_bytes(), type=BenchReport).markdown()
    path.with_suffix(".md").write_text(f"# {arguments.name}\n\n{table}")
    if arguments.readme:
        readme = ROOT / "README.md"
        readme.write_text(MARKS.sub(lambda _: f"\n{table}\n", readme.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
