"""llama.cpp: llama-bench for prefill and one sequence, llama-batched-bench for several, llama-server for the rest.

Its benchmarks draw no tokens and answer nobody, which its server does: they show it at its best.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..figures import OVERALL, RATE, START, STEADY, Incomplete, Outcome, Timeline, quantile
from ..figures import outcome_of as outcome_of_runs
from ..sse import Events, post, wait_until_up
from ..works import DECODE_IN, DECODE_OUT, Request, Work
from .base import TURN_SECONDS, Setting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..models import Model

FOLDERS = ("llama.cpp/build/bin", "llama.cpp/bin", "llama.cpp")
BATCH, MICRO_BATCH = 2048, 512  # its defaults
SERVER_SLOTS = 16
DECODE_REPEATS = 3


class LlamaCpp:
    """See `Engine`."""

    name = "llama.cpp"

    def __init__(self, setting: Setting) -> None:
        self._threads = setting.threads
        self.folder = find_folder(setting.root)

    def unavailable(self) -> str | None:
        """Whether its programs are there."""
        return None if self.folder else f"no llama-bench in ROOT/{FOLDERS[0]}"

    def version(self) -> str:
        """As `--version` says."""
        done = subprocess.run([self._program("llama-server"), "--version"], capture_output=True, text=True, check=False)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
        return lines[0].partition(":")[2].strip() if lines else "unknown"

    def run(self, work: Work, model: Model) -> Outcome:
        """With the program that does such a work best."""
        path = str(model.gguf)
        match work.kind:
            case "prefill":
                return Outcome(values={RATE.name: self._bench(path, prompt=len(work.requests[0].ids))})
            case "decode" if len(work.requests) == 1:
                return self._decode_one(path)
            case "decode":
                return self._decode_many(path, len(work.requests))
            case "start":
                return Outcome(values={START.name: self._start(path, work)})
            case _:
                return asyncio.run(self._serve(path, work))

    def _program(self, name: str) -> str:
        assert self.folder is not None, "it is not available"
        return str(self.folder / name)

    def _bench(self, path: str, *, prompt: int = 0, output: int = 0, repeats: int = DECODE_REPEATS) -> float:
        """Tokens a second, the median of the repeats, after its own warm-up."""
        command = ["llama-bench", "-m", path, "-p", str(prompt), "-n", str(output), "-r", str(repeats), "-o", "json"]
        (entry,) = json.loads(self._call([*command, "-t", str(self._threads)]))
        return quantile(sorted(entry["samples_ts"]), 0.5)

    def _decode_one(self, path: str) -> Outcome:
        """The better of its two benchmarks: one decodes from an empty context on, the other after a prompt."""
        outcome = self._decode_many(path, 1)
        alone = self._bench(path, output=DECODE_OUT, repeats=2)
        return Outcome(values={**outcome.values, STEADY.name: max(alone, outcome.values[STEADY.name])})

    def _decode_many(self, path: str, count: int) -> Outcome:
        context = count * (DECODE_IN + DECODE_OUT) + 256
        command = ["llama-batched-bench", "-m", path, "-c", str(context), "-b", str(BATCH), "-ub", str(MICRO_BATCH)]
        command += ["-npp", str(DECODE_IN), "-ntg", str(DECODE_OUT), "-npl", str(count), "--output-format", "jsonl"]
        said = self._call([*command, "-t", str(self._threads), "-tb", str(self._threads)])
        (entry,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        return Outcome(values={STEADY.name: entry["speed_tg"], OVERALL.name: count * DECODE_OUT / entry["t"]})

    def _call(self, command: list[str]) -> str:
        command = [self._program(command[0]), *command[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TURN_SECONDS, check=False)
        if done.returncode != 0:
            raise Incomplete(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
        return done.stdout

    def _start(self, path: str, work: Work) -> float:
        """From the start of the server to the first token that it sends; one slot, no warm-up run."""
        port, began = free_port(), time.perf_counter()
        with self.server(path, port, slots=1, context=4 * work.longest + 64, more=["--no-warmup"]):
            return asyncio.run(_first_token(port, work)) - began

    async def _serve(self, path: str, work: Work) -> Outcome:
        """All requests through the server, each from when it arrives."""
        port = free_port()
        longest = -(-(work.longest + 8) // 64) * 64
        with self.server(path, port, slots=SERVER_SLOTS, context=SERVER_SLOTS * longest):
            async with asyncio.timeout(TURN_SECONDS):
                await wait_until_up(port, "/health", TURN_SECONDS)
                await _warm(port, work.requests[0])
                began = time.perf_counter()
                runs = await asyncio.gather(*(_read(port, request, began) for request in work.requests))
        return outcome_of_runs(work, [runs])

    @contextmanager
    def server(
        self, path: str, port: int, *, slots: int, context: int, more: list[str] | None = None
    ) -> Iterator[None]:
        """Its server, for as long as the block runs."""
        command = [self._program("llama-server"), "-m", path, "--host", "127.0.0.1", "--port", str(port)]
        command += ["-np", str(slots), "-c", str(context), "-b", str(BATCH), "-ub", str(MICRO_BATCH)]
        command += ["-t", str(self._threads), "-tb", str(self._threads), "--no-webui", *(more or [])]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                yield
            except TimeoutError as error:
                log.seek(0)
                raise Incomplete(f"llama-server took more than {TURN_SECONDS:.0f} s: {log.read()[-400:]}") from error
            finally:
                process.kill()
                process.wait()


def find_folder(root: Path | None) -> Path | None:
    """Where the programs are: below the root."""
    folders = [root / folder for folder in FOLDERS] if root else []
    return next((folder for folder in folders if (folder / "llama-bench").is_file()), None)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _body(ids: tuple[int, ...], max_tokens: int) -> dict[str, Any]:
    """A request with the leanest sampler, the likeliest token."""
    return {
        "prompt": list(ids),
        "n_predict": max_tokens,
        "stream": True,
        "ignore_eos": True,
        "cache_prompt": False,
        "samplers": ["top_k"],
        "top_k": 1,
        "return_tokens": True,
    }


async def _warm(port: int, request: Request) -> None:
    await asyncio.gather(*(post(port, "/completion", _body(request.ids[:32], 4)) for _ in range(2)))


async def _first_token(port: int, work: Work) -> float:
    await wait_until_up(port, "/health", TURN_SECONDS)
    (request,) = work.requests
    events = await post(port, "/completion", _body(request.ids, request.max_tokens))
    return _timeline(events, 0.0).times[0]


async def _read(port: int, request: Request, began: float) -> Timeline:
    if request.arrival:
        await asyncio.sleep(began + request.arrival - time.perf_counter())
    events = await post(port, "/completion", _body(request.ids, request.max_tokens))
    return _timeline(events, began + request.arrival)


def _timeline(events: Events, submitted: float) -> Timeline:
    """Events as tokens. Each says how many there are so far; text that is not whole yet is held back, without one."""
    timeline = Timeline(submitted=submitted, times=[], counts=[])
    known = 0
    for at, line in zip(events.times, events.lines, strict=True):
        total = int(json.loads(line).get("tokens_predicted", known))
        if total > known:
            timeline.times.append(at)
            timeline.counts.append(total - known)
            known = total
    return timeline
