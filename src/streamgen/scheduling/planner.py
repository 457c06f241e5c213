"""What the next step does: decodes first, then prompts that have begun, then new ones, within one budget of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.scheduling.step import Step

if TYPE_CHECKING:
    from streamgen.scheduling.batch import Batch
    from streamgen.scheduling.limits import Limits
    from streamgen.scheduling.sequence import Sequence
    from streamgen.scheduling.speculation import Drafter
    from streamgen.scheduling.starter import Starter
    from streamgen.scheduling.suspects import Suspects
    from streamgen.scheduling.tenants import Share

MIN_GUEST_ROWS = 16  # rows that others keep in a step in which a less served tenant computes a prompt ...
GUEST_PART = 4  # ... or as many as that tenant's divided by this, where that is more
MAX_GUESSING = 2  # sequences that decode: with more, rows cost what tokens do, and those that are wrong are lost
MIN_SHARED_ROWS = 64  # of a step while several tenants have something open ...
SHARED_PART = 4  # ... or what a step may have divided by this, where that is more


class Planner:
    """Makes steps out of the batch."""

    def __init__(
        self, limits: Limits, batch: Batch, *, starter: Starter, suspects: Suspects, drafter: Drafter | None
    ) -> None:
        self._limits = limits
        self._batch = batch
        self._cache = batch.cache
        self._starter = starter
        self._suspects = suspects
        self._drafter = drafter

    def plan(self, number: int, generation: int) -> Step:
        """The next step: of one group of suspects if there is one that can run, else of all others."""
        budget = self._limits.step_tokens
        if self._batch.queue.are_several:
            # Who comes next has to wait for two steps that are planned already: they had better be short.
            budget = min(budget, max(MIN_SHARED_ROWS, budget // SHARED_PART))
        for group in self._suspects.groups:
            step = self._fill(Step(number, budget, generation, members=group))
            if step:
                return step
        return self._fill(Step(number, budget, generation))

    def _fill(self, step: Step) -> Step:
        if self._batch.queue.are_several:
            self._favour(step)
        self._plan_running(step)
        for sequence, room in self._starter.start_waiting(step, self._may_run):
            # NOTE: for memory nothing is preempted here, so that a sequence never loses its slot in the step in which
            # it took it.
            count = min(sequence.num_unplanned, room)
            if not self._cache.make_room(self._cache.num_missing(sequence, sequence.num_scheduled + count)):
                count = min(count, self._cache.num_placeable(sequence))
            self._plan_chunk(sequence, count, step)
        if step.favoured is not None and not step.has_rows_of(step.favoured):
            # Its next sequence could not start, or had no room: what was left out for it runs after all.
            step.favoured = None
            self._plan_running(step)
        return step

    def _plan_running(self, step: Step) -> None:
        self._plan_decodes(step)
        self._plan_prompts(step)

    def _may_run(self, sequence: Sequence, step: Step) -> bool:
        if step.members is not None:
            return sequence in step.members
        return not self._suspects or sequence not in self._suspects

    # ---- tenants --------------------------------------------------------------------------------------------------

    def _favour(self, step: Step) -> None:
        """Limit the rows of tenants that were served more than one with prompts to compute, to a part of its own.

        So a step is hardly longer than it would be for that tenant alone, however much the others want.
        """
        prompts = [s for s in self._batch.prefilling.values() if not s.is_paused and self._may_run(s, step)]
        head = self._starter.next_to_start(step)
        if head is not None and self._may_run(head, step):
            prompts.append(head)
        if not prompts:
            return
        share = min((s.share for s in prompts), key=_counter_of)
        num_rows = self._count_rows(share, prompts, step.budget)
        step.favour(share, guests_budget=min(max(MIN_GUEST_ROWS, num_rows // GUEST_PART), step.budget // 2))

    def _count_rows(self, share: Share, prompts: list[Sequence], most: int) -> int:
        """Prompt rows that a tenant could use in this step, at most `most`."""
        num_rows = sum(s.num_unplanned for s in prompts if s.share is share)
        for sequence in share.waiting[: len(self._batch.free_slots)]:
            if num_rows >= most:
                break
            num_rows += sequence.num_unplanned
        return min(num_rows, most)

    # ---- decodes --------------------------------------------------------------------------------------------------

    def _plan_decodes(self, step: Step) -> None:
        planned: list[int] = []
        is_short = False
        is_free = step.members is None and not self._suspects  # nobody has to be asked for
        for slot, sequence in list(self._batch.decoding.items()):
            # A sequence planned earlier in this loop may have preempted this one.
            if sequence.slot is None or not sequence.can_decode or (self._drafter and sequence.num_pending):
                continue
            if step.has_rows_at(slot) or not (is_free or self._may_run(sequence, step)):
                continue
            if (step.budget if step.favoured is None else step.room(sequence)) < sequence.num_decode_rows:
                is_short = True
                continue
            self._plan_decode(sequence, step)
            planned.append(slot)
        if is_short:
            self._batch.move_back(planned)

    def _plan_decode(self, sequence: Sequence, step: Step) -> None:
        end = sequence.num_scheduled + sequence.num_decode_rows
        has_place = end <= len(sequence.pages) * self._limits.page_size  # for nearly every step
        if not has_place and not self._make_room(sequence, end, step):
            self._batch.preempt(sequence, step, bars_starts=True)
            return
        guesses = bool(sequence.likely[1]) and len(self._batch.decoding) <= MAX_GUESSING
        proposals = self._propose(sequence, step.room(sequence)) if self._drafter or guesses else ()
        pages = () if has_place and not proposals else self._cache.extend(sequence, end + len(proposals))
        step.add(sequence.plan_decode(pages, proposals))

    def _propose(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """Drafted tokens: as many as output, budget and available pages allow; they are never worth a preemption."""
        likely = sequence.take_likely()
        room_in_output = sequence.max_tokens - (sequence.num_tokens - sequence.num_prompt) - 1
        room_in_pages = self._cache.num_placeable(sequence) - sequence.num_decode_rows
        most = min(room - sequence.num_decode_rows, room_in_output, room_in_pages)
        if most <= 0:
            return ()
        if not likely and self._drafter is not None:
            likely = tuple(self._drafter.propose(sequence))
        return likely[:most]

    # ---- prompts --------------------------------------------------------------------------------------------------

    def _plan_prompts(self, step: Step) -> None:
        sequences = list(self._batch.prefilling.values())
        if step.favoured is not None:
            sequences.sort(key=step.is_guest)
        for sequence in sequences:
            if step.budget <= 0:
                return
            # It may have been preempted by one before it.
            if sequence.slot is None or sequence.is_paused or not self._may_run(sequence, step):
                continue
            if step.has_rows_at(sequence.slot):
                continue
            room = step.room(sequence)
            if room > 0:
                self._plan_prompt(sequence, min(sequence.num_unplanned, room), step)

    def _plan_prompt(self, sequence: Sequence, count: int, step: Step) -> None:
        if not self._make_room(sequence, sequence.num_scheduled + count, step):
            count = min(count, self._cache.num_placeable(sequence))
        if count:
            self._plan_chunk(sequence, count, step)
        else:
            self._batch.preempt(sequence, step, bars_starts=True)

    def _plan_chunk(self, sequence: Sequence, count: int, step: Step) -> None:
        pages = self._cache.extend(sequence, sequence.num_scheduled + count)
        step.add(sequence.plan_chunk(count, pages))
        if not sequence.num_unplanned:
            self._batch.to_decodes(sequence)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """Preempt until this one's table can grow to `num_tokens`: who is paused, then the newest and least important.

        False if that would take one which is more important than itself.
        """
        missing = self._cache.num_missing(sequence, num_tokens)
        while not self._cache.make_room(missing):
            victim = self._batch.newest_paused() or self._batch.newest()
            if victim is sequence:
                return False
            self._batch.preempt(victim, step, bars_starts=True)
        return True


def _counter_of(share: Share) -> float:
    return share.counter
