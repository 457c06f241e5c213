"""Which JSON schemas are enforced exactly: a table of each, the reasons of the others, and what compiling takes.

    python benchmarks/schemas.py FOLDER... [--count 500] [--draft https://json-schema.org/draft/2020-12/schema]

A folder holds files of one schema with its instances, {schema, tests: [{data, valid}]}, or of the JSON Schema Test
Suite's form, a list of {description, schema, tests}. A schema counts as

    exact    every valid instance is accepted, with and without escapes beyond ASCII, and no invalid one is
    narrow   a valid instance is not accepted           loose    an invalid instance is accepted
    refused  by name, before anything is compiled

Instances are taken as they stand. Properties are written in the schema's order, so one that has them in another order
is not accepted: some of the test suite count as narrow for that alone.
"""

from __future__ import annotations

import argparse
import collections
import json
import platform
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from streamgen.cli.machine import cpu_model
from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.compiler import compile_source
from streamgen.grammar.source import SchemaSource

if TYPE_CHECKING:
    from streamgen.grammar.grammar import Grammar

MAX_LISTED = 60


class Case(Struct, frozen=True):
    """A schema with instances."""

    name: str
    schema: Any
    tests: list[dict[str, Any]]


class Judged(Struct, frozen=True):
    """What became of a case; `detail` is why, or what was treated wrongly."""

    name: str
    verdict: str
    backend: str
    seconds: float
    detail: str = ""


def cases(folder: Path, draft: str | None) -> list[Case]:
    """All cases of a folder, in a fixed order."""
    found: list[Case] = []
    for path in sorted(folder.rglob("*.json")):
        held = json.loads(path.read_text())
        if isinstance(held, list):
            found.extend(
                Case(f"{path.stem}: {case['description']}", _of_draft(case["schema"], draft), case["tests"])
                for case in held
            )
        elif "schema" in held:
            found.append(Case(path.stem, held["schema"], held["tests"]))
    return found


def _of_draft(schema: Any, draft: str | None) -> Any:
    return {"$schema": draft, **schema} if draft and isinstance(schema, dict) and "$schema" not in schema else schema


def judge(case: Case) -> Judged:
    """Compile a case and try its instances."""
    start = time.perf_counter()
    try:
        grammar = compile_source(SchemaSource(text=json.dumps(case.schema)))
    except (SchemaError, SchemaTooComplex) as error:
        return Judged(case.name, "refused", "", time.perf_counter() - start, str(error))
    seconds = time.perf_counter() - start
    verdict, detail = "exact", ""
    for test in case.tests:
        answers = _answers(grammar, test["data"])
        if test["valid"] and not all(answers) and verdict != "loose":
            verdict, detail = "narrow", json.dumps(test["data"])[:80]
        elif not test["valid"] and any(answers):
            verdict, detail = "loose", json.dumps(test["data"])[:80]
    return Judged(case.name, verdict, grammar.stats.backend, seconds, detail)


def _answers(grammar: Grammar, value: Any) -> list[bool]:
    return [grammar.accepts(json.dumps(value, ensure_ascii=plain).encode()) for plain in (True, False)]


def report(folder: Path, judged: list[Judged]) -> None:
    """Print the table of a folder, each case if these are few."""
    counts = collections.Counter(one.verdict for one in judged)
    served = collections.Counter(one.backend for one in judged if one.verdict != "refused")
    print(f"\n## {folder}: {len(judged)} schemas")
    print(f"{dict(counts)}; exact {counts['exact'] / max(len(judged), 1):.3f}; served by {dict(served)}")
    seconds = sorted(one.seconds for one in judged if one.verdict != "refused")
    if seconds:
        p99 = seconds[min(int(len(seconds) * 0.99), len(seconds) - 1)]
        print(f"compile of accepted ones: p50 {seconds[len(seconds) // 2] * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms")
    listed = judged if len(judged) <= MAX_LISTED else [one for one in judged if one.verdict != "exact"]
    print("\n| schema | verdict | back end | compile, ms | why |\n| --- | --- | --- | --- | --- |")
    for one in listed:
        print(f"| {one.name} | {one.verdict} | {one.backend} | {one.seconds * 1e3:.1f} | {one.detail[:110]} |")


def main() -> None:
    """Judge the folders that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--count", type=int, default=None, help="only so many of each folder, chosen at random")
    parser.add_argument("--draft", default=None, help="$schema of the test suite's schemas that name none")
    options = parser.parse_args()
    print(f"{cpu_model()}; Python {platform.python_version()}")
    for folder in options.folders:
        found = cases(folder, options.draft)
        if options.count is not None and options.count < len(found):
            found = random.Random(0).sample(found, options.count)
        report(folder, [judge(case) for case in found])


if __name__ == "__main__":
    main()
