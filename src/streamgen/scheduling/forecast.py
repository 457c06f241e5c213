"""When a request submitted now would start: a snapshot that any thread may ask, made in constant time.

While sequences wait, starts follow each other as running ones end; the mean time between starts, with old ones fading,
times the place in the queue is the wait. It knows nothing of lengths or tenants, and is meant for refusing early what
has no chance, not for promises.
"""

from __future__ import annotations

from msgspec import Struct

TURNS = 4  # of all slots, after which a start counts little


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
    """Measures the time between starts while there is a queue.

    Sequences that began together end together, so starts come in bursts: it takes the mean over several turns of all
    slots, with old turns fading.
    """

    def __init__(self, *, num_slots: int = 1) -> None:
        self._fading = 1 / (TURNS * num_slots)
        self._seconds = self._starts = 0.0
        self._last: float | None = None
        self._is_timed = False  # whether starts at this very time had to wait for something

    @property
    def seconds_per_start(self) -> float | None:
        """The mean; None until it is known."""
        return self._seconds / self._starts if self._starts else None

    def started(self, now: float, *, num_left: int) -> None:
        """A sequence started, and so many still wait."""
        interval = 0.0 if self._last is None else now - self._last
        self._is_timed = self._last is not None and (self._is_timed or interval > 0)
        if self._is_timed:
            self._seconds += interval - self._fading * self._seconds
            self._starts += 1 - self._fading * self._starts
        self._last = now if num_left else None
