"""Who starts next, and whether it may: slots, the predicted peak of pages, and what others give back for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.scheduling.batch import rank_of
from streamgen.scheduling.sequence import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamgen.scheduling.admission import Admission
    from streamgen.scheduling.batch import Batch
    from streamgen.scheduling.forecast import StartTimes
    from streamgen.scheduling.journal import Journal
    from streamgen.scheduling.limits import Limits
    from streamgen.scheduling.sequence import Sequence
    from streamgen.scheduling.stats import Counters
    from streamgen.scheduling.step import Step
    from streamgen.scheduling.tenants import Share


class Starter:
    """Takes sequences out of the queue into slots."""

    def __init__(
        self,
        limits: Limits,
        batch: Batch,
        *,
        admission: Admission,
        times: StartTimes,
        counters: Counters,
        clock: Callable[[], float],
        journal: Journal | None,
    ) -> None:
        self._limits = limits
        self._batch = batch
        self._cache = batch.cache
        self._admission = admission
        self._times = times
        self._counters = counters
        self._clock = clock
        self._journal = journal

    def start_waiting(self, step: Step, may_run: Callable[[Sequence, Step], bool]) -> Iterator[tuple[Sequence, int]]:
        """Start sequences in the order of the queue, up to the first that does not fit; the caller plans their rows.

        With each comes how many rows it may have: its start is charged to its tenant, which could make it a guest.
        """
        while step.budget > 0:
            sequence = self.next_to_start(step)
            if sequence is None or not may_run(sequence, step) or _waits_for_leader(sequence):
                return
            room = step.room(sequence)
            if room <= 0:
                return
            while not self._start(sequence, step):
                if not self._make_way(sequence, step):
                    return
            yield sequence, room

    def next_to_start(self, step: Step) -> Sequence | None:
        """Who would start in this step; None where nobody can now."""
        batch = self._batch
        if not batch.queue or batch.is_start_barred:
            return None
        if step.members is None:
            head = batch.queue.head()
        else:
            head = min((s for s in step.members if s.state is State.WAITING), key=rank_of, default=None)
        if head is None or head is batch.misfit:
            return None
        has_way = batch.free_slots or batch.newest_paused() or self._overserved(head)
        return head if has_way else None

    # ---- starting -------------------------------------------------------------------------------------------------

    def _start(self, sequence: Sequence, step: Step) -> bool:
        if sequence.share.is_full:
            return False
        leader = sequence.leader
        if leader is not None and leader.state is State.RUNNING and leader.is_prompt_computed:
            return self._start_forked(sequence, leader, step)
        if not self._has_slots_for(sequence):
            return False
        sequence.pages = self._cache.find_prefix(sequence)
        while not self._fits(sequence):
            if not self._cache.pins.drop_oldest():
                self._cache.release(sequence)
                return False
        num_pages = len(sequence.pages)
        self._take_slot(sequence, sequence.pages, num_pages * self._limits.page_size, num_shared=num_pages)
        step.begin(sequence)
        return True

    def _start_forked(self, sequence: Sequence, leader: Sequence, step: Step) -> bool:
        """Start a further continuation on the leader's pages; only the prompt's last token is computed again."""
        if not self._batch.free_slots or not self._cache.make_room(1):
            return False
        num_computed = sequence.num_prompt - 1
        fork = self._cache.pool.fork(leader.pages, num_computed)
        sequence.pages = fork.pages
        # All followers were counted when the leader started, unless it started alone, asking nobody.
        if not self._admission.fits(self._batch, sequence, with_followers=False):
            self._cache.release(sequence)
            return False
        sequence.names = leader.names[: len(fork.pages)]
        self._take_slot(sequence, fork.pages, num_computed, num_shared=len(fork.pages) - 1)
        step.begin(sequence, fork.copy)
        return True

    def _take_slot(self, sequence: Sequence, pages: list[int], num_computed: int, *, num_shared: int) -> None:
        is_first = not sequence.has_started
        self._batch.start(sequence, pages, num_computed=num_computed, num_shared=num_shared)
        if is_first:
            self._times.started(self._clock(), num_left=len(self._batch.queue))
        self._counters.cached_tokens += num_computed
        if self._journal is not None:
            self._journal.started(sequence)

    # ---- room -----------------------------------------------------------------------------------------------------

    def _has_slots_for(self, sequence: Sequence) -> bool:
        """Whether slots are free for it and its followers, beside those kept for the followers of running leaders."""
        needed = min(1 + len(sequence.followers), self._limits.max_running, sequence.share.num_startable)
        kept: dict[Share, int] = {}
        for other in self._batch:
            if other.followers:
                kept[other.share] = kept.get(other.share, 0) + len(other.followers)
        num_kept = sum(min(count, share.num_startable) for share, count in kept.items()) if kept else 0
        return len(self._batch.free_slots) - num_kept >= needed

    def _fits(self, sequence: Sequence) -> bool:
        """Whether it may start, holding its prefix pages: alone always, else if the predicted peak fits."""
        # The first chunk needs a page now, which pins hold, or drafted rows although nobody counted them.
        if not self._cache.pool.num_available:
            return False
        if not self._batch:
            return True
        pins = self._cache.pins
        if self._admission.fits(self._batch, sequence, num_pinned=pins.num_pages):
            return True
        # What is pinned twice, or held by those that run, was counted twice. To know better costs more.
        return bool(pins) and self._admission.fits(self._batch, sequence, num_pinned=pins.num_alone())

    def _make_way(self, sequence: Sequence, step: Step) -> bool:
        """Take a slot and pages back, for the next to start, from who reads too slowly or has more than its share.

        Where there is nobody like that, it is asked again when somebody has left, or a prompt is done.
        """
        victim = self._victim_for(sequence)
        if victim is None:
            self._batch.misfit = sequence
            return False
        if step.has_begun(victim):
            return False
        self._batch.preempt(victim, step, bars_starts=False)
        return True

    def _victim_for(self, sequence: Sequence) -> Sequence | None:
        if sequence.share.is_full:
            return self._batch.newest_paused(sequence.share)  # nobody else's slot would help
        victim = self._batch.newest_paused()
        if victim is None:
            share = self._overserved(sequence)
            victim = None if share is None else self._batch.newest_of(share)
        return victim

    def _overserved(self, sequence: Sequence) -> Share | None:
        if not self._batch.queue.are_several:
            return None
        # As many as run now is what slots and pages allow; the sequence takes one of those places.
        return self._batch.queue.overserved(sequence.share, num_places=len(self._batch))


def _waits_for_leader(sequence: Sequence) -> bool:
    """After a preemption the leader may still be computing: what it computes is worth waiting for."""
    leader = sequence.leader
    return leader is not None and leader.state is State.RUNNING and not leader.is_prompt_computed
