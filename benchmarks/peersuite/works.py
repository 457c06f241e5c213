"""What is measured: each work is a list of requests, the same ids for every engine.

prefill-N    one request of N ids, until its first token
decode-N     N requests at once, 128 ids in and 128 out
burst        32 requests of mixed lengths at once
poisson      the same requests as they would come by chance, 1.5 a second
start        process start to first token, the file's pages in memory
foreign      decode-1, alone and beside another busy process
"""

from __future__ import annotations

import random

from msgspec import Struct

SEED = 2306  # of the burst's lengths: 7,261 ids in, 2,455 out
DECODE_IN, DECODE_OUT = 128, 128
PREFILL_REPEATS = 3
BURST_REQUESTS = 32
BURST_PROMPTS, BURST_OUTPUTS = (16, 512), (16, 128)
POISSON_RATE = 1.5
START_IN, START_OUT = 8, 2
KINDS = ("prefill", "decode", "burst", "poisson", "start", "foreign")
DEFAULT_WORKS = ("prefill-512", "decode-1", "decode-8", "decode-32", "burst", "poisson", "start", "foreign")


class Request(Struct, frozen=True, kw_only=True):
    """One prompt as ids; exactly `max_tokens` are generated. It arrives so many seconds after the work began."""

    ids: tuple[int, ...]
    max_tokens: int
    arrival: float = 0.0


class Work(Struct, frozen=True, kw_only=True):
    """Requests, run `repeats` times in one process after a warm-up."""

    name: str
    kind: str
    requests: tuple[Request, ...]
    repeats: int = 1

    @property
    def tokens_in(self) -> int:
        """Prompt ids of all requests."""
        return sum(len(request.ids) for request in self.requests)

    @property
    def tokens_out(self) -> int:
        """Ids that all requests generate."""
        return sum(request.max_tokens for request in self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(request.ids) + request.max_tokens for request in self.requests)


def make_work(name: str, vocab: int) -> Work:
    """The work of that name, for a model with so many ids.

    Raises:
        ValueError: there is none of that name.
    """
    kind, _, number = name.partition("-")
    if kind not in KINDS or (number and (kind not in ("prefill", "decode") or not number.isdecimal())):
        raise ValueError(f"work: expected prefill-N, decode-N, burst, poisson, start or foreign, got {name!r}")
    if kind in ("prefill", "decode") and not (number and 1 <= int(number) <= 65536):
        raise ValueError(f"work: expected a number of 1..65536 after {kind}-, got {name!r}")
    draw = random.Random(f"{SEED} {kind}")
    requests: tuple[Request, ...]
    match kind:
        case "prefill":
            requests = (_request(draw, vocab, int(number), 1),)
            return Work(name=name, kind=kind, requests=requests, repeats=PREFILL_REPEATS)
        case "decode" | "foreign":
            count = int(number or 1)
            requests = tuple(_request(draw, vocab, DECODE_IN, DECODE_OUT) for _ in range(count))
        case "start":
            requests = (_request(draw, vocab, START_IN, START_OUT),)
        case _:
            requests = _mixed(vocab, POISSON_RATE if kind == "poisson" else None)
    return Work(name=name, kind=kind, requests=requests)


def _mixed(vocab: int, rate: float | None) -> tuple[Request, ...]:
    """The burst's requests, lengths drawn evenly; with a rate they arrive one after the other, by chance."""
    draw, draw_ids, at = random.Random(SEED), random.Random(f"{SEED} ids"), 0.0
    requests = []
    for _ in range(BURST_REQUESTS):
        tokens_in, tokens_out = draw.randint(*BURST_PROMPTS), draw.randint(*BURST_OUTPUTS)
        gap = draw.expovariate(1.0)  # drawn in any case: lengths are the same with and without a rate
        requests.append(_request(draw_ids, vocab, tokens_in, tokens_out, at))
        at += gap / rate if rate else 0.0
    return tuple(requests)


def _request(draw: random.Random, vocab: int, tokens_in: int, tokens_out: int, arrival: float = 0.0) -> Request:
    """Ids from the middle of the vocabulary, where no special tokens are."""
    low, high = vocab // 8, vocab // 2
    return Request(
        ids=tuple(draw.randrange(low, high) for _ in range(tokens_in)), max_tokens=tokens_out, arrival=arrival
    )
