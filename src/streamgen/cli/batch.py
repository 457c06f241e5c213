"""Many prompts at once: a bounded number of requests under way, answers in order or as they finish."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import msgspec
from msgspec import Struct

import streamgen as sg
from streamgen.cli import exit_codes
from streamgen.cli.options import loading_bar
from streamgen.cli.output import ProgressBar, complain
from streamgen.cli.prompts import Request, as_prompt, use_template
from streamgen.completion import Completion
from streamgen.errors import StreamgenError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

Answer = Completion[None] | StreamgenError


class BatchOptions(Struct, frozen=True, kw_only=True):
    """How a batch runs and is printed.

    engine     keyword arguments of `Engine`
    sampling   fields for every request; a request's own win
    ordered    print answers in the order of the prompts, not as they finish
    """

    model: Any
    engine: dict[str, Any]
    sampling: dict[str, Any]
    system: str | None
    raw: bool
    concurrency: int
    ordered: bool
    as_json: bool


def run_batch(options: BatchOptions, requests: Iterator[Request]) -> int:
    """Run every request; the exit code is that of the first prompt that failed, 0 if none did."""
    return anyio.run(_Batch(options, requests).run)


class _Batch:
    """The state of one batch: what was printed, what waits for its turn, what failed first."""

    def __init__(self, options: BatchOptions, requests: Iterator[Request]) -> None:
        self._options = options
        self._requests = requests
        self._reading = anyio.Lock()
        self._held: dict[int, Answer] = {}
        self._next_index = 0
        self._failures: dict[int, int] = {}

    async def run(self) -> int:
        options = self._options
        with ProgressBar("loading") as bar:
            async with sg.Engine(options.model, on_progress=loading_bar(bar), **options.engine) as engine:
                bar.clear()
                await self._run_all(engine)
        return self._failures[min(self._failures)] if self._failures else exit_codes.OK

    async def _run_all(self, engine: sg.Engine) -> None:
        templated = use_template(engine, raw=self._options.raw, system=self._options.system)
        async with anyio.create_task_group() as group:
            for _ in range(self._options.concurrency):
                group.start_soon(self._work, engine, templated)

    async def _work(self, engine: sg.Engine, templated: bool) -> None:
        async for request in self._next_requests():
            self._take(request.index, await self._answer(engine, request, templated))

    async def _next_requests(self) -> AsyncIterator[Request]:
        while True:
            async with self._reading:  # an iterator is one reader's at a time; stdin may block, hence the thread
                request = await anyio.to_thread.run_sync(next, self._requests, None, abandon_on_cancel=True)
            if request is None:
                return
            yield request

    async def _answer(self, engine: sg.Engine, request: Request, templated: bool) -> Answer:
        if request.refusal is not None:
            return request.refusal
        prompt = as_prompt(request, system=self._options.system, templated=templated)
        try:
            fields = {**self._options.sampling, **request.sampling}
            answer: Completion[None] = await engine.generate(prompt, **fields)
            return answer
        except StreamgenError as error:
            return error

    def _take(self, index: int, answer: Answer) -> None:
        if isinstance(answer, StreamgenError):
            self._failures[index] = exit_codes.exit_code(answer)
        if not self._options.ordered:
            self._print(index, answer)
            return
        self._held[index] = answer
        while self._next_index in self._held:
            self._print(self._next_index, self._held.pop(self._next_index))
            self._next_index += 1

    def _print(self, index: int, answer: Answer) -> None:
        write: Callable[[int, Answer], None] = print_json if self._options.as_json else print_text
        write(index, answer)


def print_json(index: int, answer: Answer) -> None:
    """One line: the fields of the `Completion`, or `error`; and the prompt's index."""
    if isinstance(answer, StreamgenError):
        line: dict[str, Any] = {"index": index, "error": {"code": answer.code, "message": str(answer)}}
    else:
        line = {"index": index, **msgspec.to_builtins(answer)}
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()


def print_text(index: int, answer: Answer) -> None:
    """The answer's text, a blank line between answers."""
    if isinstance(answer, StreamgenError):
        complain(f"prompt {index}: {answer}")
        return
    print(f"\n{answer.text}" if index else answer.text, flush=True)
