"""Who has a slot, who waits for one, and how sequences move between the two.

The scheduler, the planner and the starter share one batch; each change of a sequence's state is a method here.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from streamgen.scheduling.cache import PageCache
from streamgen.scheduling.sequence import Rank, Sequence, State
from streamgen.scheduling.tenants import Share, Tenants

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streamgen.config import Tenant
    from streamgen.scheduling.journal import Journal
    from streamgen.scheduling.limits import Limits
    from streamgen.scheduling.stats import Counters
    from streamgen.scheduling.step import Step


class Batch:
    """Running sequences by slot, waiting ones by tenant, and the pages of all.

    prefilling        by slot, in the order in which they started
    decoding          by slot, next to be planned first
    num_paused        sequences whose readers are behind, with or without a slot
    misfit            the next to start, if it did not fit since somebody last left
    is_start_barred   after a preemption for memory, until somebody leaves: else the victim would thrash
    """

    def __init__(
        self,
        limits: Limits,
        *,
        prefix_key: bytes,
        tenants: Mapping[str, Tenant],
        counters: Counters,
        journal: Journal | None,
    ) -> None:
        self.cache = PageCache(limits, key=prefix_key)
        self.queue = Tenants(tenants)
        self.free_slots = list(range(limits.max_running - 1, -1, -1))
        self.prefilling: dict[int, Sequence] = {}
        self.decoding: dict[int, Sequence] = {}
        self.num_paused = 0
        self.misfit: Sequence | None = None
        self.is_start_barred = False
        self._counters = counters
        self._journal = journal

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.decoding.values(), self.prefilling.values())

    def newest(self) -> Sequence:
        """The running sequence of the highest rank."""
        return max(self, key=rank_of)

    def newest_of(self, share: Share) -> Sequence:
        """A tenant's running sequence of the highest rank."""
        return max((s for s in self if s.share is share), key=rank_of)

    def newest_paused(self, share: Share | None = None) -> Sequence | None:
        """Of the running sequences whose readers are behind, the one of the highest rank; of one tenant, or of all."""
        if not self.num_paused:
            return None
        return max((s for s in self if s.is_paused and share in (None, s.share)), key=rank_of, default=None)

    # ---- into a slot, and on --------------------------------------------------------------------------------------

    def start(self, sequence: Sequence, pages: list[int], *, num_computed: int, num_shared: int) -> None:
        """A waiting sequence takes a slot, with these pages."""
        _detach(sequence)
        self.queue.remove(sequence)
        if not sequence.has_started:
            sequence.has_started = True
            self.queue.charge_prompt(sequence)
        slot = self.free_slots.pop()
        sequence.start(slot, pages, num_computed=num_computed, num_shared=num_shared)
        self.queue.take_slot(sequence)
        self.prefilling[slot] = sequence

    def to_decodes(self, sequence: Sequence) -> None:
        """Its whole prompt is planned."""
        assert sequence.slot is not None, "a sequence runs without a slot"
        del self.prefilling[sequence.slot]
        self.decoding[sequence.slot] = sequence
        self.misfit = None  # less is waiting to be computed than was predicted

    def move_back(self, slots: list[int]) -> None:
        """Who was planned waits behind who was not, for the next step."""
        for slot in slots:
            sequence = self.decoding.pop(slot, None)
            if sequence is not None:
                self.decoding[slot] = sequence

    # ---- out of it ------------------------------------------------------------------------------------------------

    def preempt(self, victim: Sequence, step: Step, *, bars_starts: bool) -> None:
        """Free a sequence's slot and pages, and let it wait to be computed again.

        Its rank puts it in front of those of its tenant that came later. Tokens under way are lost and will be drawn
        again, the same: a draw depends on seed, sample index and position alone.
        """
        step.drop(victim)
        self.requeue(victim)
        self._counters.preemptions += 1
        self.is_start_barred = bars_starts and not victim.is_paused

    def requeue(self, sequence: Sequence) -> None:
        """A running sequence waits again."""
        self._take_out(sequence)
        if sequence.is_paused:
            sequence.state = State.PARKED
        else:
            self._wait(sequence)
        if self._journal is not None:
            self._journal.preempted(sequence)

    def end(self, sequence: Sequence) -> None:
        """A sequence is over. What it had may be given away at once."""
        self._take_out(sequence)
        _detach(sequence)
        sequence.state = State.ENDED
        self.num_paused -= sequence.is_paused
        self.queue.leave(sequence)

    def _take_out(self, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self.queue.remove(sequence)
        elif sequence.slot is not None:
            self.prefilling.pop(sequence.slot, None)
            self.decoding.pop(sequence.slot, None)
            self.free_slots.append(sequence.slot)
            self.cache.release(sequence)
            self.queue.give_slot(sequence)
            self.is_start_barred = False
        self.misfit = None
        sequence.leave()

    def begin_anew(self) -> None:
        """Whatever runs waits to be computed again."""
        for sequence in list(self):
            self.requeue(sequence)
        self.is_start_barred = False

    # ---- waiting --------------------------------------------------------------------------------------------------

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        self.queue.push(sequence)

    def admit(self, sequences: list[Sequence]) -> None:
        """The first of a request's sequences waits; the others are held until its prompt is computed."""
        leader, *followers = sequences
        for sequence in sequences:
            self.queue.enter(sequence)
        for follower in followers:
            follower.state, follower.leader = State.HELD, leader
        leader.followers = followers
        self._wait(leader)

    def free_followers(self, leader: Sequence) -> None:
        """Those that were held until the leader's prompt was computed wait for slots and pages from now on."""
        for follower in leader.followers:
            if follower.state is State.HELD:
                self._wait(follower)

    def pause(self, sequence: Sequence) -> None:
        """It keeps slot and pages and gets no more rows; if it has none, it does not start."""
        sequence.is_paused = True
        self.num_paused += 1
        sequence.share.num_paused += sequence.state is State.RUNNING
        if sequence.state in (State.WAITING, State.HELD):
            self._take_out(sequence)
            sequence.state = State.PARKED
            _detach(sequence)  # no slot is kept for it
        if not sequence.is_prompt_computed:
            # Its followers cannot know when it will be: each computes the prompt for itself.
            self.free_followers(sequence)
            for follower in list(sequence.followers):
                _detach(follower)
        # Those that start may have waited for somebody to end, which who is paused does not.
        self.is_start_barred, self.misfit = False, None

    def resume(self, sequence: Sequence) -> None:
        """A paused sequence goes on."""
        sequence.is_paused = False
        self.num_paused -= 1
        sequence.share.num_paused -= sequence.state is State.RUNNING
        if sequence.state is State.PARKED:
            self._wait(sequence)


def _detach(sequence: Sequence) -> None:
    """The sequence does not start on its leader's pages any more."""
    if sequence.leader is not None:
        sequence.leader.followers.remove(sequence)
        sequence.leader = None


def rank_of(sequence: Sequence) -> Rank:
    """For sorting."""
    return sequence.rank
