"""Figures of a run, from when each request's tokens came."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.cli.benchmark.engine import Clocked, steady_rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .works import Work

NUM_QUANTILES = 100


class Timeline(Struct, kw_only=True):
    """One request, in seconds of one clock: when it was handed over, and when how many of its tokens came."""

    submitted: float
    times: list[float]
    counts: list[int]


class Figure(Struct, frozen=True, kw_only=True):
    """What is compared: a name, its unit, and whether more of it is better."""

    name: str
    unit: str
    more_is_better: bool = True


RATE = Figure(name="prompt tok/s", unit="tok/s")
STEADY = Figure(name="decode tok/s", unit="tok/s")
OVERALL = Figure(name="out tok/s, prompts included", unit="tok/s")
FIRST_P50 = Figure(name="first token p50", unit="ms", more_is_better=False)
FIRST_P99 = Figure(name="first token p99", unit="ms", more_is_better=False)
BETWEEN_P50 = Figure(name="between tokens p50", unit="ms", more_is_better=False)
BETWEEN_P99 = Figure(name="between tokens p99", unit="ms", more_is_better=False)
START = Figure(name="start to first token", unit="s", more_is_better=False)
SHARE = Figure(name="share of quiet", unit="")
QUIET = Figure(name="decode tok/s, quiet", unit="tok/s")
BUSY = Figure(name="decode tok/s, beside a busy process", unit="tok/s")
SERVING = (OVERALL, FIRST_P50, FIRST_P99, BETWEEN_P50, BETWEEN_P99)
FIGURES = {
    "prefill": (RATE,),
    "decode": (STEADY, OVERALL),
    "burst": SERVING,
    "poisson": SERVING,
    "start": (START,),
    "foreign": (SHARE, QUIET, BUSY),
}


class Outcome(Struct, kw_only=True):
    """What one turn of one engine gave.

    values      figures by name
    between     quantiles 0..100 of the milliseconds between a request's tokens, for the plot of latencies
    """

    values: dict[str, float]
    between: list[float] = []


class Incomplete(RuntimeError):
    """An engine did not do the work: it gave fewer or more tokens than were asked for."""


def outcome_of(work: Work, runs: Sequence[Sequence[Timeline]]) -> Outcome:
    """The figures of all repeats of a work: medians, or of its one run.

    Raises:
        Incomplete: a request did not get the tokens it asked for.
    """
    for run in runs:
        check_complete(work, run)
    if work.kind == "prefill":
        (request,) = work.requests
        seconds = median(run[0].times[0] - run[0].submitted for run in runs)
        return Outcome(values={RATE.name: len(request.ids) / seconds})
    (run,) = runs
    if work.kind == "decode":
        return Outcome(values={STEADY.name: _steady(run), OVERALL.name: _overall(run)})
    return _serving(run)


def check_complete(work: Work, run: Sequence[Timeline]) -> None:
    """Every request got exactly what it asked for, or Incomplete."""
    for i, (request, timeline) in enumerate(zip(work.requests, run, strict=True)):
        got = sum(timeline.counts)
        if got != request.max_tokens:
            raise Incomplete(f"{work.name}: request {i}: expected {request.max_tokens} tokens, got {got}")


def _steady(run: Sequence[Timeline]) -> float:
    return steady_rate([Clocked(timeline.times, timeline.counts) for timeline in run])


def _overall(run: Sequence[Timeline]) -> float:
    began, ended = min(t.submitted for t in run), max(t.times[-1] for t in run)
    return sum(sum(t.counts) for t in run) / (ended - began)


def _serving(run: Sequence[Timeline]) -> Outcome:
    first = sorted(1e3 * (t.times[0] - t.submitted) for t in run)
    between = sorted(1e3 * gap for t in run for gap in gaps(t))
    values = {
        OVERALL.name: _overall(run),
        FIRST_P50.name: quantile(first, 0.5),
        FIRST_P99.name: quantile(first, 0.99),
        BETWEEN_P50.name: quantile(between, 0.5),
        BETWEEN_P99.name: quantile(between, 0.99),
    }
    return Outcome(values=values, between=[quantile(between, i / NUM_QUANTILES) for i in range(NUM_QUANTILES + 1)])


def gaps(timeline: Timeline) -> list[float]:
    """Seconds a reader waited between deliveries. Tokens that came together are one delivery."""
    return [later - earlier for earlier, later in zip(timeline.times, timeline.times[1:], strict=False)]


def quantile(ordered: Sequence[float], share: float) -> float:
    """Between the neighbours of that place in an ascending list."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
