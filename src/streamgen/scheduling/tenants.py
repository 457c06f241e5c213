"""Who is next: a queue for each tenant, and a virtual counter of the tokens it was given.

The tenant with the least counter goes first (the virtual token counter of Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024): its counter grows by the tokens of its prompts and outputs, divided by its weight, so over
time those that want more than they get have equal shares. What is not used cannot be saved up: whose queue was empty is
lifted to the least counter of those that wait, less a small credit, so that who wants little need not wait until the
last request of who wants much is paid for. A prompt costs the same whether it was cached or not: nobody can tell from
his share what others have asked.

Within a tenant a sequence's rank decides: priority, raised by waiting, then deadline, then arrival.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from typing import TYPE_CHECKING

from streamgen.config import Tenant

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streamgen.scheduling.sequence import Rank, Sequence

PROMPT_COST, OUTPUT_COST = 1, 2  # of a token; a decode costs a step more than its share of a prompt does
MAX_CREDIT = 1024.0  # of tokens that a tenant left to others, for its weight: so its next requests start at once
MAX_IDLE = 1024  # tenants whose counters are remembered while they have nothing open

_DEFAULT = Tenant()


class Share:
    """One tenant: its queue, what of it runs, and what it was given."""

    __slots__ = ("counter", "max_running", "num_open", "num_paused", "num_running", "waiting", "weight")

    def __init__(self, tenant: Tenant, counter: float) -> None:
        self.weight = float(tenant.weight)
        self.max_running = tenant.max_running
        self.counter = counter
        self.waiting: list[Sequence] = []  # by rank
        self.num_running = 0
        self.num_paused = 0  # of those that run
        self.num_open = 0  # sequences that have not ended

    @property
    def can_start(self) -> bool:
        """Whether its own limit lets another of its sequences run, if need be in place of one that is paused."""
        return self.max_running is None or self.num_running - self.num_paused < self.max_running

    @property
    def is_full(self) -> bool:
        """Whether as many of its sequences have slots as its own limit allows."""
        return self.max_running is not None and self.num_running >= self.max_running

    @property
    def num_startable(self) -> float:
        """How many more of its sequences its own limit lets have slots."""
        return math.inf if self.max_running is None else self.max_running - self.num_running

    @property
    def urgency(self) -> tuple[float, float, Rank]:
        """The smaller, the sooner its next sequence starts. It must have one that waits."""
        return self.counter, self.num_running / self.weight, self.waiting[0].rank


class Tenants:
    """The queues. Counters exist for tenants with something open, and for a bounded number of those that left."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._tenants = tenants
        self._open: dict[str, Share] = {}
        self._floor = 0.0  # the highest that the least counter of those that wait has been
        self._idle: dict[str, float] = {}  # counters, least recently left first
        self._last: Share | None = None  # whose queue emptied last
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        for share in self._open.values():
            yield from share.waiting

    @property
    def are_several(self) -> bool:
        """Whether more than one tenant has something open."""
        return len(self._open) > 1

    def options(self, name: str) -> Tenant:
        """What was said of a tenant when the engine opened."""
        return self._tenants.get(name, _DEFAULT)

    def num_open(self, name: str) -> int:
        """Sequences of a tenant that have not ended."""
        share = self._open.get(name)
        return 0 if share is None else share.num_open

    def enter(self, sequence: Sequence) -> None:
        """A sequence exists from now on."""
        name = sequence.request.tenant
        share = self._open.get(name)
        if share is None:
            share = self._open[name] = Share(self.options(name), self._idle.pop(name, 0.0))
        share.num_open += 1
        sequence.share = share

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended; it neither waits nor runs."""
        share, name = sequence.share, sequence.request.tenant
        share.num_open -= 1
        if share.num_open:
            return
        del self._open[name]
        self._idle[name] = share.counter
        if len(self._idle) > MAX_IDLE:
            del self._idle[next(iter(self._idle))]

    def push(self, sequence: Sequence) -> None:
        """It waits from now on."""
        share = sequence.share
        if not share.waiting:
            self._lift(share)
        insort(share.waiting, sequence, key=_rank)
        self._num_waiting += 1

    def _lift(self, share: Share) -> None:
        """It wants something again, or may have it again: what it left to others meanwhile is theirs."""
        counters = [other.counter for other in self._open.values() if other.waiting and other.can_start]
        if counters:
            floor = min(counters)
        else:
            floor = self._last.counter if self._last is not None else 0.0
        # NOTE: never lower than it was: else each newcomer would have its credit on top of that of the one before.
        self._floor = max(self._floor, floor)
        share.counter = max(share.counter, self._floor - MAX_CREDIT)

    def remove(self, sequence: Sequence) -> None:
        """It does not wait any more."""
        share = sequence.share
        del share.waiting[bisect_left(share.waiting, sequence.rank, key=_rank)]
        self._num_waiting -= 1
        if not share.waiting:
            self._last = share

    def head(self) -> Sequence | None:
        """Who starts next: the first of the tenant that was given least, of those that may run another."""
        startable = [share for share in self._open.values() if share.waiting and share.can_start]
        if not startable:
            return None
        least = startable[0] if len(startable) == 1 else min(startable, key=_urgency)
        return least.waiting[0]

    def take_slot(self, sequence: Sequence) -> None:
        """It runs from now on."""
        sequence.share.num_running += 1

    def give_slot(self, sequence: Sequence) -> None:
        """It does not run any more."""
        share = sequence.share
        if share.waiting and not share.can_start:
            self._lift(share)
        share.num_running -= 1
        share.num_paused -= sequence.is_paused

    def charge_prompt(self, sequence: Sequence) -> None:
        """A sequence starts for the first time. Further continuations share the first one's prompt."""
        if sequence.index == 0:
            sequence.share.counter += PROMPT_COST * sequence.num_prompt / sequence.share.weight

    def charge_output(self, sequence: Sequence, count: int) -> None:
        """A sequence was given so many tokens."""
        sequence.share.counter += OUTPUT_COST * count / sequence.share.weight

    def overserved(self, share: Share, *, num_places: int) -> Share | None:
        """The tenant that runs most beyond its fair part of the places, if `share` runs less than its own.

        A fair part is one place at least. Only tenants that were served more and run two or more are named: nobody
        loses the last sequence that runs for him.
        """
        wanting = [other for other in self._open.values() if other.waiting or other.num_running]
        per_weight = num_places / sum(other.weight for other in wanting)
        if share.num_running + 1 > max(1.0, share.weight * per_weight):
            return None
        most = max(wanting, key=lambda other: other.num_running - other.weight * per_weight)
        is_over = most.num_running > max(1.0, most.weight * per_weight)
        return most if is_over and most.counter > share.counter else None


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank


def _urgency(share: Share) -> tuple[float, float, Rank]:
    return share.urgency
