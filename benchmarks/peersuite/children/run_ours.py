"""Our engine, in a process of its own: reads a task as JSON, prints when each request's tokens came."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import anyio

import streamgen as sg


class Reader:
    """Reads requests' streams; the first token of all is announced if that is asked for."""

    def __init__(self, engine: sg.Engine, *, announces: bool) -> None:
        self._engine = engine
        self._announces = announces

    async def run(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All of them, each from when it arrives."""
        timelines: list[dict[str, Any]] = [{} for _ in requests]
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for request, timeline in zip(requests, timelines, strict=True):
                group.start_soon(self._read, request, timeline, began)
        return timelines

    async def _read(self, request: dict[str, Any], timeline: dict[str, Any], began: float) -> None:
        if request["arrival"]:
            await anyio.sleep(began + request["arrival"] - time.perf_counter())
        times: list[float] = []
        counts: list[int] = []
        async with self._engine.stream(
            request["ids"], max_tokens=request["max_tokens"], temperature=0, ignore_eos=True
        ) as stream:
            async for delta in stream:
                if delta.ids:
                    times.append(time.perf_counter())
                    counts.append(len(delta.ids))
                    self._announce()
        timeline.update(submitted=began + request["arrival"], times=times, counts=counts)

    def _announce(self) -> None:
        if self._announces:
            self._announces = False
            print(json.dumps({"first": True}), flush=True)


async def run(task: dict[str, Any]) -> dict[str, Any]:
    """Open, warm, run."""
    count = len(task["requests"])
    options = {"prefix_cache": False, "max_running": max(count, 2), "threads": task["threads"], **task["options"]}
    async with sg.Engine(task["model"], **options) as engine:
        if task["warm"]:
            warm = {"ids": task["requests"][0]["ids"][:32], "max_tokens": 4, "arrival": 0.0}
            await Reader(engine, announces=False).run([warm, warm])
        reader = Reader(engine, announces=not task["warm"])
        runs = [await reader.run(task["requests"]) for _ in range(task["repeats"])]
    return {"runs": runs}


def main() -> None:
    """One task."""
    task = json.loads(sys.stdin.read())
    try:
        result = anyio.run(run, task)
    except (sg.ConfigError, sg.LoadError) as error:
        result = {"unable": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
