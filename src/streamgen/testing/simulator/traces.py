"""Public traces of requests: who came when, with how long a prompt, and how long the answer was.

Two formats are read, told apart by the file's first line. Azure's (AzurePublicDataset, LLM inference 2023) is CSV with
`TIMESTAMP,ContextTokens,GeneratedTokens`; nothing is known of what prompts share, so they share nothing. Mooncake's is
one JSON object a line with `timestamp` (milliseconds), `input_length`, `output_length` and `hash_ids`: equal numbers
are equal blocks of 512 tokens with equal blocks before them.
"""

from __future__ import annotations

import csv
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from streamgen.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

BLOCK = 512  # tokens of a Mooncake block
AZURE_FIELDS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
JITTER = 0.5  # of the mean gap between requests, when a trace is repeated


class TraceRequest(Struct, frozen=True):
    """One request of a trace.

    time     seconds after the first one
    blocks   numbers of the 512-token blocks it begins with; two requests have those in common that are equal
    """

    time: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


class _MooncakeLine(Struct, frozen=True):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: str | Path) -> list[TraceRequest]:
    """The requests of a trace, in the order of their arrival.

    Raises:
        ConfigError: there is no such file, or a line is in neither of the formats; the text names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"trace: expected a CSV or JSONL file, could not read {path}: {error}", option="trace"
        ) from None
    first = next((line for line in lines if line.strip()), "")
    requests = _read_mooncake(lines, path) if first.startswith("{") else _read_azure(lines, path)
    if not requests:
        raise ConfigError(f"trace: expected one request or more, got none in {path}", option="trace")
    requests.sort(key=lambda request: request.time)
    start = requests[0].time
    return [msgspec.structs.replace(request, time=request.time - start) for request in requests]


def _read_azure(lines: list[str], path: Path) -> list[TraceRequest]:
    rows = csv.reader(lines)
    header = tuple(next(rows, ()))
    if header != AZURE_FIELDS:
        raise ConfigError(
            f"trace: expected JSONL, or CSV with the header {','.join(AZURE_FIELDS)}, got {','.join(header)[:60]!r} "
            f"in {path}",
            option="trace",
        )
    requests = []
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            time, prompt, output = row
            # Seven digits of a second come; datetime knows six.
            moment = datetime.fromisoformat(time[:26])
            requests.append(_checked(moment.timestamp(), int(prompt), int(output), ()))
        except ValueError as error:
            raise _bad_line(path, number, error) from None
    return requests


def _read_mooncake(lines: list[str], path: Path) -> list[TraceRequest]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = decoder.decode(line)
            requests.append(_checked(item.timestamp / 1000, item.input_length, item.output_length, item.hash_ids))
        except (msgspec.DecodeError, ValueError) as error:
            raise _bad_line(path, number, error) from None
    return requests


def _checked(time: float, prompt: int, output: int, blocks: tuple[int, ...]) -> TraceRequest:
    if prompt < 1 or output < 0:
        raise ValueError(f"expected a prompt >= 1 and an output >= 0 tokens, got {prompt} and {output}")
    return TraceRequest(time, prompt, output, blocks)


def _bad_line(path: Path, number: int, error: Exception) -> ConfigError:
    return ConfigError(f"trace: {path}, line {number}: {error}", option="trace")


def repeat_trace(requests: list[TraceRequest], times: int, random: Random) -> Iterator[tuple[int, TraceRequest]]:
    """The trace, `times` times one after the other, with the number of the round; made as it is read.

    From the second round on arrivals are shifted by a little, and blocks are others, so that rounds share no prefix.
    """
    if times < 1:
        raise ConfigError(f"repeat: expected >= 1, got {times}", option="repeat")
    gap = requests[-1].time / max(1, len(requests) - 1)
    length = requests[-1].time + gap
    for turn in range(times):
        moved = [(r.time + (random.random() - 0.5) * 2 * JITTER * gap if turn else r.time, r) for r in requests]
        moved.sort(key=lambda item: item[0])
        for time, request in moved:
            yield turn, msgspec.structs.replace(request, time=max(0.0, turn * length + time))


class Prompts:
    """Makes ids out of a trace: equal blocks give equal ids, and nothing else is equal.

    A prompt is put together from a few tuples that exist once, so that long ones cost copying, not computing. Ids are
    no token's of any model, since only their equality matters.
    """

    def __init__(self) -> None:
        self._filler = tuple(range(BLOCK))
        self._num_made = 0

    def make(self, request: TraceRequest, turn: int) -> tuple[int, ...]:
        """The ids of a request's prompt."""
        self._num_made += 1
        num_shared = min(len(request.blocks), request.prompt_tokens // BLOCK)
        parts = [self._block(block, turn) for block in request.blocks[:num_shared]]
        rest = request.prompt_tokens - num_shared * BLOCK
        if rest:
            # A last block that is not full is compared as a whole, too: its number says whether it is the same.
            last = request.blocks[num_shared : num_shared + 1]
            parts.append(self._block(last[0], turn)[:rest] if last and rest < BLOCK else self._own(rest))
        return parts[0] if len(parts) == 1 else tuple(chain.from_iterable(parts))

    def _block(self, number: int, turn: int) -> tuple[int, ...]:
        # One id of each page would do for equality; the first does, since a page's name contains those before it.
        return (-1 - (turn << 32 | number), *self._filler[1:])

    def _own(self, length: int) -> tuple[int, ...]:
        while len(self._filler) < length:
            self._filler += self._filler
        return ((self._num_made << 20) + BLOCK, *self._filler[1:length])
