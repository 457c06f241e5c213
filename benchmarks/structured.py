"""What a grammar costs a batch: eight streams with and without a schema, in turns, beside llama.cpp's server.

python benchmarks/structured.py [MODEL] [--rounds 3] [--streams 8] [--tokens 160] [--peer-root FOLDER] [--name NAME]

free     the same prompts, the same number of tokens, nothing to obey
cold     the first requests with a schema that the engine has never seen
warm     the same schema again: every token mask has been made

Two schemas: a list without bounds, which becomes an automaton, and one of exactly 60 items, which llguidance serves.
What is counted came while all streams ran; characters too, since what a grammar forces makes text cheaper, not tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import anyio
from msgspec import Struct

import streamgen as sg
from benchmarks.peersuite.adapters.base import Setting
from benchmarks.peersuite.adapters.llama_cpp import LlamaCpp, free_port
from benchmarks.peersuite.sse import Events, post, wait_until_up
from streamgen.cli.machine import affinity_cpus, cpu_model
from streamgen.hub import demo_model_path

ROOT = Path(__file__).parents[1]
ITEM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
        "unit": {"enum": ["piece", "bottle", "kilogram", "gram", "packet"]},
        "price": {"type": "number", "minimum": 0},
        "in_stock": {"type": "boolean"},
    },
    "required": ["name", "quantity", "unit", "price", "in_stock"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "list": {"type": "array", "items": ITEM},
    "60 items": {"type": "array", "items": ITEM, "minItems": 60, "maxItems": 60},
}
GOODS = tuple("apples cheese oil rice tea tomatoes honey flour eggs soap salt milk".split())


def prompt_of(index: int) -> list[dict[str, object]]:
    """A chat that asks for a list; no two are the same."""
    wanted = ", ".join(GOODS[index % 12 :] + GOODS[: index % 12])
    return [sg.user(f"Write a shopping list as JSON with name, quantity, unit, price and in_stock: {wanted}.")]


class Rates(Struct):
    """Of one run: tokens and characters a second over all streams."""

    tokens: float
    chars: float


def rates_of(stamps: list[list[tuple[float, int, int]]]) -> Rates:
    """From (time, tokens, characters) of each delta of each stream: what came while all of them ran."""
    first, last = max(s[0][0] for s in stamps), min(s[-1][0] for s in stamps)
    found = [(tokens, chars) for s in stamps for at, tokens, chars in s if first < at <= last]
    seconds = last - first
    return Rates(sum(n for n, _ in found) / seconds, sum(n for _, n in found) / seconds)


async def run_ours(engine: sg.Engine, args: argparse.Namespace, output: object) -> Rates:
    """All streams at once."""
    stamps: list[list[tuple[float, int, int]]] = [[] for _ in range(args.streams)]
    how: dict[str, Any] = {"ignore_eos": True} if output is None else {"output": output}

    async def read(index: int) -> None:
        async with engine.stream(
            prompt_of(index), max_tokens=args.tokens, temperature=0.7, seed=index, cache="private", **how
        ) as stream:
            async for delta in stream:
                stamps[index].append((time.perf_counter(), len(delta.ids), len(delta.text)))

    async with anyio.create_task_group() as group:
        for index in range(args.streams):
            group.start_soon(read, index)
    return rates_of(stamps)


def schema_of(kind: str, number: int) -> sg.JsonSchema:
    """A schema that no cache knows: the unit has another name."""
    unit = {"enum": [*ITEM["properties"]["unit"]["enum"], f"box {number}"]}
    item = {**ITEM, "properties": {**ITEM["properties"], "unit": unit}}
    return sg.JsonSchema({**SCHEMAS[kind], "items": item})


async def measure_ours(args: argparse.Namespace) -> dict[str, list[Rates]]:
    """Rounds of free, cold and warm, in turns."""
    found: dict[str, list[Rates]] = {}
    async with sg.Engine(args.model) as engine:
        await run_ours(engine, args, None)
        names = {}
        for kind in SCHEMAS:  # what the vocabulary alone needs is made once
            await run_ours(engine, args, schema_of(kind, 0))
            names[kind] = f"{kind} ({(await engine.compile(schema_of(kind, 0))).stats.backend})"
        for number in range(1, args.rounds + 1):
            found.setdefault("free", []).append(await run_ours(engine, args, None))
            for kind, name in names.items():
                for state in ("cold", "warm"):
                    found.setdefault(f"{name}, {state}", []).append(
                        await run_ours(engine, args, schema_of(kind, number))
                    )
    return found


async def run_peer(port: int, args: argparse.Namespace, texts: list[str], schema: object) -> Rates:
    """All streams at once, through the peer's server."""
    how = {"ignore_eos": True} if schema is None else {"json_schema": schema}

    async def read(index: int) -> list[tuple[float, int, int]]:
        body = {"prompt": texts[index], "n_predict": args.tokens, "temperature": 0.7, "seed": index, "stream": True}
        return _stamps(await post(port, "/completion", {**body, "cache_prompt": False, **how}))

    return rates_of(list(await asyncio.gather(*(read(index) for index in range(args.streams)))))


def _stamps(events: Events) -> list[tuple[float, int, int]]:
    entries = [json.loads(line) for line in events.lines]
    return [
        (at, 1, len(entry["content"])) for at, entry in zip(events.times, entries, strict=True) if not entry["stop"]
    ]


async def measure_peer(args: argparse.Namespace, peer: LlamaCpp, path: str, texts: list[str]) -> dict[str, list[Rates]]:
    """Rounds of free and with the schema, in turns."""
    found: dict[str, list[Rates]] = {"free": [], **{kind: [] for kind in SCHEMAS}}
    port = free_port()
    with peer.server(path, port, slots=args.streams, context=args.streams * 1024):
        await wait_until_up(port, "/health", 60)
        for _ in range(args.rounds + 1):
            found["free"].append(await run_peer(port, args, texts, None))
            for kind, schema in SCHEMAS.items():
                found[kind].append(await run_peer(port, args, texts, schema))
    return {name: runs[1:] for name, runs in found.items()}


async def render(args: argparse.Namespace) -> tuple[str, list[str]]:
    """The model's path, and the prompts as text, so that the peer reads the same."""
    async with sg.Engine(args.model) as engine:
        texts = [engine.render(prompt_of(index)).text for index in range(args.streams)]
        return str(args.model or demo_model_path()), texts


def table(name: str, found: dict[str, list[Rates]]) -> list[str]:
    """A line for each kind of run."""
    free = found["free"]
    lines = []
    for kind, runs in found.items():
        ratios = [run.tokens / base.tokens for run, base in zip(runs, free, strict=True)]
        chars = [run.chars / base.chars for run, base in zip(runs, free, strict=True)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        lines.append(
            f"| {name} | {kind} | {median(r.tokens for r in runs):.0f} | {median(ratios):.3f} ({spread}) "
            f"| {median(r.chars for r in runs):.0f} | {median(chars):.2f} |"
        )
    return lines


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--threads", type=int, default=affinity_cpus())
    parser.add_argument("--peer-root", type=Path)
    parser.add_argument("--name")
    args = parser.parse_args()
    lines = [
        f"{args.streams} streams of {args.tokens} tokens, {args.rounds} rounds in turns; {cpu_model()}, "
        f"{args.threads} threads, python {platform.python_version()}",
        "",
        "| engine | schema | tokens/s | of free (spread) | characters/s | of free |",
        "| --- | --- | --: | --- | --: | --: |",
    ]
    lines += table("streamgen", anyio.run(measure_ours, args))
    peer = LlamaCpp(Setting(root=args.peer_root, threads=args.threads))
    if peer.unavailable() is None:
        path, texts = anyio.run(render, args)
        lines += table("llama.cpp", asyncio.run(measure_peer(args, peer, path, texts)))
    print("\n".join(lines))
    if args.name:
        (ROOT / "docs" / "benchmarks" / f"{args.name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
