"""Histograms of waiting times: fixed buckets that fill as requests run, and cost nothing to keep or to read."""

from __future__ import annotations

from bisect import bisect_left

from msgspec import Struct

WAIT_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
STEP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)


class Histogram(Struct, frozen=True, kw_only=True):
    """How many values fell where.

    bounds   upper bounds of the buckets, in seconds, each included in its bucket; one more bucket has none
    counts   one per bucket, len(bounds) + 1 of them, or () of a histogram nobody filled
    total    sum of the values, in seconds
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    total: float = 0.0

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Their mean in seconds; 0.0 of none."""
        return self.total / self.count if self.count else 0.0


class Latencies(Struct, frozen=True, kw_only=True):
    """Where requests spend their time, since the engine object was made.

    queue            from submission until a sequence has a slot for the first time
    first_token      from submission until a sequence has its first token
    per_token        of a sequence that ended: mean time between its tokens, from the first to the last
    step             the device's time for one step
    """

    queue: Histogram = Histogram()
    first_token: Histogram = Histogram()
    per_token: Histogram = Histogram()
    step: Histogram = Histogram()


class Buckets:
    """A histogram that fills. One thread adds; `histogram` may be called by any."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def histogram(self) -> Histogram:
        """What there is so far."""
        return Histogram(bounds=self._bounds, counts=tuple(self._counts), total=self._total)
