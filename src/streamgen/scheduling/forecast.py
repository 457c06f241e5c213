"""When a request submitted now would start: a snapshot that any thread may ask, made in constant time.

While sequences wait, starts follow each other as running ones end; the mean time between starts, with old ones fading,
times the place in the queue is the wait. It knows nothing of lengths or tenants, and is meant for refusing early what
has no chance, not for promises.
"""

from __future__ import annotations

from msgspec import Struct

FADING = 0.1  # weight of the newest interval


class Forecast(Struct, frozen=True, kw_only=True):
    """What the queue looked like.

    num_waiting        sequences in the queue
    num_free           slots that a new sequence could take at once; 0 where the head of the queue does not fit
    seconds_per_start  mean time between starts while there was a queue; None until it is known
    """

    num_waiting: int = 0
    num_free: int = 0
    seconds_per_start: float | None = None

    def start_in(self, num_more: int = 0) -> float:
        """Seconds until a sequence behind the queue, and behind `num_more` others, has a slot; 0 where unknown."""
        place = self.num_waiting + num_more + 1 - self.num_free
        return place * self.seconds_per_start if place > 0 and self.seconds_per_start is not None else 0.0

    def retry_after(self) -> float:
        """Seconds until a place in the queue is likely to be free; 1 where unknown."""
        return 1.0 if self.seconds_per_start is None else self.seconds_per_start


class StartTimes:
    """Measures the time between starts while there is a queue."""

    def __init__(self) -> None:
        self.seconds_per_start: float | None = None
        self._last: float | None = None

    def started(self, now: float, *, num_left: int) -> None:
        """A sequence started, and so many still wait."""
        if self._last is not None:
            interval, mean = now - self._last, self.seconds_per_start
            self.seconds_per_start = interval if mean is None else mean + FADING * (interval - mean)
        self._last = now if num_left else None
