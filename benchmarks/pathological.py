"""Grammars that are meant to exhaust a compiler: how fast each is refused, within how much memory, and by which bound.

python benchmarks/pathological.py [--schemas FOLDER]

Each is compiled in a process of its own, by the engine's own compiler with nothing to protect it but its estimates.
`served` is no failure: the back end without tables takes some of them in its stride. With a folder of files that hold a
`schema` each, the times of compiling those are added.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from streamgen.cli.machine import affinity_cpus, cpu_model
from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.compiler import compile_source
from streamgen.grammar.source import CfgSource, GrammarSource, RegexSource, SchemaSource

REFUSAL_MS, REFUSAL_MB = 100, 64  # what a refusal may take


def schema(value: object) -> SchemaSource:
    """A schema of a value."""
    return SchemaSource(text=json.dumps(value))


def nested_choices(depth: int) -> object:
    """A choice of two, in each of which is a choice of two."""
    value: object = {"type": "integer"}
    for number in range(depth):
        value = {"anyOf": [{"type": "array", "items": value, "maxItems": 3}, {"const": number}]}
    return value


CORPUS: dict[str, GrammarSource] = {
    "a{1000000}": RegexSource(pattern="a{1000000}"),
    "(a|b)*a(a|b){18}": RegexSource(pattern="(a|b)*a(a|b){18}"),
    "(a|b)*a(a|b){20}": RegexSource(pattern="(a|b)*a(a|b){20}"),
    "(a|b)*a, then (a|b) 20 times": RegexSource(pattern="(a|b)*a" + "(a|b)" * 20),
    "(ab|ac)*ab(ab|ac){20}": RegexSource(pattern="(ab|ac)*ab(ab|ac){20}"),
    "(.{1,1000}){1,1000}": RegexSource(pattern="(.{1,1000}){1,1000}"),
    "(.{1,1000}){1,5}": RegexSource(pattern="(.{1,1000}){1,5}"),
    "(((a{0,99}){0,99}){0,99})": RegexSource(pattern="(((a{0,99}){0,99}){0,99})"),
    "60,000 (": RegexSource(pattern="(" * 60_000),
    "150 nested stars": RegexSource(pattern="(" * 150 + "a*" + "b?)*" * 150),
    "a? 2,000 times, a 2,000 times": RegexSource(pattern="a?" * 2_000 + "a" * 2_000),
    "20,000 alternatives": RegexSource(pattern="|".join(f"{number:08x}" for number in range(20_000))),
    "200,001 characters": RegexSource(pattern="x" * 200_001),
    "\\w{1,5000}": RegexSource(pattern=r"\w{1,5000}"),
    "schema, 5,000 deep": SchemaSource(text='{"items":' * 5_000 + "{}" + "}" * 5_000),
    "schema, 64 KiB and more": schema({"description": "x" * 70_000}),
    "schema, $ref to itself": schema({"$ref": "#"}),
    "schema, $ref without a base": schema({"properties": {"n": {"$ref": "#"}}, "required": ["n"], "type": "object"}),
    "schema, enum of 100,000": schema({"enum": list(range(100_000))}),
    "schema, enum of 5,000": schema({"enum": list(range(5_000))}),
    "schema, maxLength 100,000": schema({"type": "string", "maxLength": 100_000}),
    "schema, maxItems 100 x 100": schema(
        {"type": "array", "maxItems": 100, "items": {"type": "array", "maxItems": 100, "items": {"type": "integer"}}}
    ),
    "schema, 16 nested anyOf": schema(nested_choices(16)),
    "schema, allOf of 16 anyOf": schema(
        {"allOf": [{"anyOf": [{"minimum": number}, {"multipleOf": number + 2}]} for number in range(16)]}
    ),
    "schema, 300 optional properties": schema(
        {"type": "object", "properties": {f"p{number}": {} for number in range(300)}}
    ),
    "schema, (a|b)*a(a|b){20}": schema({"type": "string", "pattern": "^(a|b)*a(a|b){20}$"}),
    "schema, (.{1,1000}){1,1000}": schema({"type": "string", "pattern": "^(.{1,1000}){1,1000}$"}),
    "lark, 3,000 (": CfgSource(text="start: " + "(" * 3_000),
    "lark, repeats of repeats": CfgSource(text='start: a{5000}\na: b{5000}\nb: "x"{5000}'),
    "lark, enum of 60 KB": CfgSource(text="start: " + " | ".join(f'"{number}"' for number in range(6_500))),
    "gbnf, rules that double 60 times": CfgSource(
        text="root ::= a0\n" + "".join(f"a{n} ::= a{n + 1} a{n + 1}\n" for n in range(60)) + 'a60 ::= "x"',
        syntax="gbnf",
    ),
    "gbnf, 3,000 (": CfgSource(text="root ::= " + "(" * 3_000, syntax="gbnf"),
}


def compile_one(name: str) -> dict[str, object]:
    """In this process: what came of it, in milliseconds and mebibytes."""
    compile_source(RegexSource(pattern="a"))
    compile_source(RegexSource(pattern="a", backend="llguidance"))
    compile_source(schema({"type": "integer"}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    try:
        outcome = f"served by {compile_source(CORPUS[name]).stats.backend}"
    except SchemaTooComplex as error:
        outcome = f"refused: {error.bound}"
    except SchemaError as error:
        outcome = f"refused: {error.message[:60]}"
    seconds = time.perf_counter() - start
    return {
        "outcome": outcome,
        "ms": seconds * 1e3,
        "mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def print_corpus() -> None:
    """One line for each, compiled in a process of its own."""
    print(f"| grammar | ms | MiB | |\n|---|---|---|---|  <!-- a refusal: <= {REFUSAL_MS} ms, <= {REFUSAL_MB} MiB -->")
    for name in CORPUS:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            print(f"| `{name}` | - | - | the process ended with status {done.returncode} |")
            continue
        figures = json.loads(done.stdout)
        print(f"| `{name}` | {figures['ms']:.1f} | {figures['mb']:.1f} | {figures['outcome']} |", flush=True)


def print_times(folder: Path) -> None:
    """How long schemas that are accepted take to compile, in this process, each for the first time."""
    compile_source(RegexSource(pattern="a", backend="llguidance"))
    times: dict[str, list[float]] = {}
    refused = 0
    for path in sorted(folder.glob("*.json")):
        value = json.loads(path.read_text())
        if "schema" not in value:
            continue
        start = time.perf_counter()
        try:
            grammar = compile_source(schema(value["schema"]))
        except (SchemaError, SchemaTooComplex):
            refused += 1
        else:
            times.setdefault(grammar.stats.backend, []).append((time.perf_counter() - start) * 1e3)
    print("| accepted | schemas | p50 ms | p99 ms | longest ms |\n|---|---|---|---|---|")
    for name, values in (*times.items(), ("all", [ms for group in times.values() for ms in group])):
        ordered = sorted(values)
        p50, p99 = (ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in (0.5, 0.99))
        print(f"| {name} | {len(ordered)} | {p50:.1f} | {p99:.1f} | {ordered[-1]:.1f} |")
    print(f"\n{refused} refused")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=Path, help="a folder of schemas to time")
    parser.add_argument("--one", choices=CORPUS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(compile_one(arguments.one)))
        return
    print(f"{cpu_model()}, {affinity_cpus()} CPUs, Python {platform.python_version()}\n")
    print_corpus()
    if arguments.schemas:
        print()
        print_times(arguments.schemas)


if __name__ == "__main__":
    main()
