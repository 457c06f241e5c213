"""Quantities over virtual time, in a bounded number of intervals however long it lasts."""

from __future__ import annotations

from msgspec import Struct

MAX_POINTS = 400  # then two intervals become one
NAMES = ("waiting", "running", "pages")


class Point(Struct, frozen=True, kw_only=True):
    """An interval. waiting, running, pages: means over its time; rows, outputs: tokens that ran, that were drawn."""

    time: float
    seconds: float
    waiting: float
    running: float
    pages: float
    rows: float
    outputs: float


class _Interval:
    __slots__ = ("outputs", "pages", "rows", "running", "seconds", "waiting")

    def __init__(self) -> None:
        self.seconds = 0.0
        self.waiting = self.running = self.pages = 0.0  # times seconds
        self.rows = self.outputs = 0.0

    def merge(self, other: _Interval) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Series:
    """Takes what is so at the ends of steps; each holds since the one before."""

    def __init__(self, width: float = 1.0 / 16) -> None:
        self.most_waiting = 0
        self._width = width
        self._last = 0.0
        self._intervals: list[_Interval] = [_Interval()]

    def add(self, now: float, *, waiting: int, running: int, pages: int, rows: int, outputs: int) -> None:
        """How it is now."""
        if waiting > self.most_waiting:
            self.most_waiting = waiting
        number = int(now / self._width)
        while number >= MAX_POINTS:
            self._halve()
            number = int(now / self._width)
        intervals = self._intervals
        while len(intervals) <= number:
            intervals.append(_Interval())
        interval, seconds = intervals[number], now - self._last
        self._last = now
        interval.seconds += seconds
        interval.waiting += waiting * seconds
        interval.running += running * seconds
        interval.pages += pages * seconds
        interval.rows += rows
        interval.outputs += outputs

    def _halve(self) -> None:
        merged = self._intervals[::2]
        for i, other in enumerate(self._intervals[1::2]):
            merged[i].merge(other)
        self._intervals = merged
        self._width *= 2

    def mean(self, name: str) -> float:
        """Of one of NAMES, over all the time."""
        seconds = sum(interval.seconds for interval in self._intervals)
        return sum(getattr(interval, name) for interval in self._intervals) / seconds if seconds else 0.0

    def points(self) -> tuple[Point, ...]:
        """The intervals in which anything was said."""
        return tuple(
            Point(
                time=(i + 0.5) * self._width,
                seconds=self._width,
                waiting=interval.waiting / interval.seconds,
                running=interval.running / interval.seconds,
                pages=interval.pages / interval.seconds,
                rows=interval.rows,
                outputs=interval.outputs,
            )
            for i, interval in enumerate(self._intervals)
            if interval.seconds
        )
