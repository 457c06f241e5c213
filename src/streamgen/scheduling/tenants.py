"""Who is next: a queue for each tenant, and a virtual counter of the tokens it was given.

The tenant with the least counter goes first (the virtual token counter of Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024): its counter grows by the tokens of its prompts and outputs, divided by its weight, so over
time those that want more than they get have equal shares. Who comes back after a pause is lifted to the least counter of
the others, since what was not used cannot be saved up. A prompt costs the same whether it was cached or not: nobody can
tell from his share what others have asked.

Within a tenant a sequence's rank decides: priority, raised by waiting, then deadline, then arrival.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

from streamgen.config import Tenant

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from streamgen.scheduling.sequence import Rank, Sequence

PROMPT_COST, OUTPUT_COST = 1, 2  # of a token; a decode costs a step more than its share of a prompt does
MAX_IDLE = 1024  # tenants whose counters are remembered while they have nothing open

_DEFAULT = Tenant()


class Share:
    """One tenant: its queue, what of it runs, and what it was given."""

    __slots__ = ("counter", "max_running", "num_open", "num_running", "waiting", "weight")

    def __init__(self, tenant: Tenant) -> None:
        self.weight = float(tenant.weight)
        self.max_running = tenant.max_running
        self.counter = 0.0
        self.waiting: list[Sequence] = []  # by rank
        self.num_running = 0
        self.num_open = 0  # sequences that have not ended

    @property
    def can_start(self) -> bool:
        """Whether its limits let another of its sequences run."""
        return self.max_running is None or self.num_running < self.max_running


class Tenants:
    """The queues. Counters exist for tenants with something open, and for a bounded number of those that left."""

    def __init__(self, tenants: Mapping[str, Tenant]) -> None:
        self._tenants = tenants
        self._open: dict[str, Share] = {}
        self._idle: dict[str, float] = {}  # counters, least recently left first
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

    def share_of(self, sequence: Sequence) -> Share:
        """The tenant of a sequence that has not ended."""
        return self._open[sequence.request.tenant]

    def enter(self, sequence: Sequence) -> None:
        """A sequence exists from now on."""
        name = sequence.request.tenant
        share = self._open.get(name)
        if share is None:
            share = Share(self._tenants.get(name, _DEFAULT))
            least = min((other.counter for other in self._open.values()), default=0.0)
            share.counter = max(self._idle.pop(name, 0.0), least)
            self._open[name] = share
        share.num_open += 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended; it neither waits nor runs."""
        name = sequence.request.tenant
        share = self._open[name]
        share.num_open -= 1
        if share.num_open:
            return
        del self._open[name]
        self._idle[name] = share.counter
        if len(self._idle) > MAX_IDLE:
            del self._idle[next(iter(self._idle))]

    def push(self, sequence: Sequence) -> None:
        """It waits from now on."""
        insort(self.share_of(sequence).waiting, sequence, key=_rank)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """It does not wait any more."""
        waiting = self.share_of(sequence).waiting
        del waiting[bisect_left(waiting, sequence.rank, key=_rank)]
        self._num_waiting -= 1

    def head(self) -> Sequence | None:
        """Who starts next: the first of the tenant that was given least, of those that may run another."""
        startable = [share for share in self._open.values() if share.waiting and share.can_start]
        if not startable:
            return None
        least = min(startable, key=lambda share: (share.counter, share.waiting[0].rank))
        return least.waiting[0]

    def charge_prompt(self, sequence: Sequence) -> None:
        """A sequence starts for the first time."""
        share = self.share_of(sequence)
        share.counter += PROMPT_COST * sequence.num_prompt / share.weight

    def charge_output(self, sequence: Sequence, count: int) -> None:
        """A sequence was given so many tokens."""
        share = self.share_of(sequence)
        share.counter += OUTPUT_COST * count / share.weight

    def least_served(self, sequences: Iterable[Sequence]) -> Share | None:
        """The tenant that was given least, among those of these sequences."""
        return min((self.share_of(s) for s in sequences), key=lambda share: share.counter, default=None)

    def overserved(self, share: Share, num_slots: int) -> Share | None:
        """The tenant that runs most beyond its fair part of the slots, if `share` runs less than its own.

        Only tenants that run two or more are named: nobody loses the last sequence that runs for him.
        """
        wanting = [other for other in self._open.values() if other.waiting or other.num_running]
        per_weight = num_slots / sum(other.weight for other in wanting)
        if share.num_running + 1 > share.weight * per_weight:
            return None
        most = max(wanting, key=lambda other: other.num_running - other.weight * per_weight)
        is_over = most.num_running > max(1.0, most.weight * per_weight)
        return most if is_over and most is not share else None


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
