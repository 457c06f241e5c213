"""A model without arithmetic: what it answers is a hash of what it reads back through slots and page tables.

A page holds the ids whose keys and values were written to it, and the *base*: the hash of everything before the page.
The state at a position is the hash of its page's base and ids up to there, and a sampled token is the hash of that
state with the request's seed, the sample index and the position. So a wrong page, a stale prefix, a missed copy, a
chunk that starts too late and a page that was given away all change what is answered, or are noticed at once; and a row
costs one hash of at most a page's ids, however long the sequence is. `solo_output` says what a request must answer,
whoever else runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.messages import StepDone
from streamgen.scheduling.sequence import count_agreeing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamgen.messages import Admit, Begin, StepPlan

VOCABULARY = 4093
MAX_HOLDERS = 64  # remembered of a page before those that are gone are left out


class BrokenPlan(AssertionError):
    """A plan reads what is not there, or writes what others hold."""


class _Page:
    """Content of a page, and which runs of slots have it in their tables."""

    __slots__ = ("base", "holders", "ids")

    def __init__(self) -> None:
        self.base = 0
        self.ids: list[int] = []
        self.holders: list[tuple[_Slot, int]] = []

    def wipe(self) -> None:
        """Whatever was in it is gone."""
        self.base, self.ids = 0, []


class _Slot:
    """A sequence as the executor knows it. `run` grows with each sequence that takes the slot."""

    __slots__ = ("begin", "ids", "is_checked", "lost", "number", "run", "table")

    def __init__(self, number: int) -> None:
        self.number = number
        self.run = 0
        self.begin: Begin | None = None
        self.ids: list[int] = []
        self.table: list[int] = []
        self.is_checked = True
        self.lost: int | None = None  # a page of its table that others were given meanwhile


class HashModel:
    """Runs plans in order. It checks what it reads; the tokens are right only if everything before was.

    Raises:
        BrokenPlan: from `execute`, when a plan cannot be right whatever the tokens are.
    """

    def __init__(self, *, num_pages: int, page_size: int, num_slots: int) -> None:
        self._size = page_size
        self._pages = [_Page() for _ in range(num_pages)]
        self._slots = [_Slot(i) for i in range(num_slots)]

    def processors_of(self, plan: StepPlan) -> list[int | None]:
        """For each sequence of a plan the request under whose number its processors lie."""
        begins = {begin.slot: begin for begin in plan.begins}
        known = [begins.get(slot) or self._slots[slot].begin for slot in plan.slots]
        return [None if begin is None else begin.processors for begin in known]

    def execute(self, plan: StepPlan) -> StepDone:
        """Run a plan."""
        for begin in plan.begins:
            self._begin(begin)
        for source, target in plan.copies:
            page = self._pages[target]
            page.base, page.ids = self._pages[source].base, list(self._pages[source].ids)
        drafts = plan.drafts or ((),) * len(plan.slots)
        rows = zip(plan.slots, plan.starts, plan.counts, plan.samples, plan.pages, drafts, strict=True)
        return StepDone(step=plan.step, tokens=tuple([self._run(*row) for row in rows]))

    def _begin(self, begin: Begin) -> None:
        slot = self._slots[begin.slot]
        slot.run += 1
        slot.begin, slot.ids, slot.table = begin, list(begin.ids), list(begin.pages)
        slot.is_checked, slot.lost = not begin.pages, None
        for number in begin.pages:
            holders = self._pages[number].holders
            holders.append((slot, slot.run))
            if len(holders) > MAX_HOLDERS:
                holders[:] = [(holder, run) for holder, run in holders if holder.run == run]

    def _run(
        self, number: int, start: int, count: int, samples: int, pages: tuple[int, ...], drafts: tuple[int, ...]
    ) -> tuple[int, ...]:
        slot, end = self._slots[number], start + count
        if count == samples == 1 and not (pages or drafts) and slot.is_checked and slot.lost is None:
            return self._decode(slot, start)
        if pages:
            self._give(slot, pages)
        if not slot.is_checked:
            self._check_found(slot, start)
        if slot.begin is None or slot.lost is not None:
            raise BrokenPlan(f"slot {number}: rows without a sequence, or page {slot.lost} was given to another")
        if drafts:
            slot.ids[start + 1 : start + 1 + len(drafts)] = drafts
        self._write(slot, start, end)
        if not samples:
            return ()
        if samples == 1:
            token = draw(self._state(slot, end - 1), slot.begin, end - 1)
            slot.ids[end:] = (token,)
            return (token,)
        tokens = tuple([draw(self._state(slot, p), slot.begin, p) for p in range(end - samples, end)])
        kept = count_agreeing(tuple(drafts[1 - samples :]), tokens)
        # A plan that is under way already may go on behind all drafts; what it reads does not matter.
        slot.ids[end - samples + kept + 1 :] = (tokens[kept],) + (0,) * (samples - 1 - kept)
        return tokens

    def _decode(self, slot: _Slot, position: int) -> tuple[int, ...]:
        """One row behind the others in a page: nearly every step of every sequence. Like the rest of `_run`, faster."""
        i, offset = divmod(position, self._size)
        ids, begin = slot.ids, slot.begin
        if begin is None or position >= len(ids) or i >= len(slot.table):
            raise BrokenPlan(f"slot {slot.number}: no sequence, id or page for position {position}")
        page = self._pages[slot.table[i]]
        held = page.ids
        if len(held) != offset or not offset:
            self._write(slot, position, position + 1)
            held = held[: offset + 1]
        else:
            held.append(ids[position])
        token = draw(hash((page.base, *held)), begin, position)
        ids[position + 1 :] = (token,)
        return (token,)

    def _give(self, slot: _Slot, pages: tuple[int, ...]) -> None:
        """Pages are the slot's own from now on; who has them in its table must not run any more."""
        for number in pages:
            page = self._pages[number]
            for holder, run in page.holders:
                if holder.run == run:
                    holder.lost = number
            page.holders = [(slot, slot.run)]
            page.wipe()
        slot.table.extend(pages)

    def _check_found(self, slot: _Slot, start: int) -> None:
        """What the sequence was told to be computed already is there, and is that of its own ids."""
        slot.is_checked = True
        size, base = self._size, 0
        for i in range(-(-start // size)):
            page, wanted = self._pages[slot.table[i]], slot.ids[i * size : min((i + 1) * size, start)]
            if i:
                base = self._end_of(slot, i - 1)
            if page.ids[: len(wanted)] != wanted or page.base != base:
                raise BrokenPlan(
                    f"slot {slot.number}: page {slot.table[i]} does not hold its positions from {i * size}"
                )

    def _write(self, slot: _Slot, start: int, end: int) -> None:
        """Compute positions, page by page; each needs the one before it."""
        ids, table, size, position = slot.ids, slot.table, self._size, start
        if end > len(ids):
            raise BrokenPlan(f"slot {slot.number}: the id at position {end - 1} is not known")
        while position < end:
            i, offset = divmod(position, size)
            if i >= len(table):
                raise BrokenPlan(f"slot {slot.number}: no page for position {position}")
            page, stop = self._pages[table[i]], min(end, (i + 1) * size)
            if offset == 0:
                page.base = self._end_of(slot, i - 1) if i else 0
            elif len(page.ids) < offset:
                raise BrokenPlan(f"slot {slot.number}: position {position - 1} was not computed")
            page.ids[offset:] = ids[position:stop]
            position = stop

    def _end_of(self, slot: _Slot, i: int) -> int:
        """The base of the page behind a full one."""
        page = self._pages[slot.table[i]]
        if len(page.ids) != self._size:
            raise BrokenPlan(f"slot {slot.number}: page {slot.table[i]} is not full")
        return hash((page.base, *page.ids))

    def _state(self, slot: _Slot, position: int) -> int:
        i, offset = divmod(position, self._size)
        page = self._pages[slot.table[i]]
        ids = page.ids if len(page.ids) == offset + 1 else page.ids[: offset + 1]
        return hash((page.base, *ids))

    def fail(self, plan: StepPlan, *, is_lost: bool) -> None:
        """Stop in the middle of a plan: what it would have written is garbage; if `is_lost`, everything is."""
        if is_lost:
            written = set(range(len(self._pages)))
        else:
            written = {target for _, target in plan.copies}.union(*plan.pages)
            tables = {begin.slot: begin.pages for begin in plan.begins}
            for slot, start, count, pages in zip(plan.slots, plan.starts, plan.counts, plan.pages, strict=True):
                table = (*tables.get(slot, self._slots[slot].table), *pages)
                written.update(table[start // self._size : (start + count - 1) // self._size + 1])
        for number in written:
            self._pages[number].wipe()
        for state in self._slots:
            state.run += 1
            state.begin, state.ids, state.table = None, [], []


def draw(state: int, begin: Begin, position: int) -> int:
    """The token after the row at `position`; ids that may not be drawn yet are drawn again."""
    seed, index = begin.sampling.seed, begin.sample_index
    token = hash((state, seed, index, position)) % VOCABULARY
    if position + 1 < begin.min_length:
        attempt = 0
        while token in begin.stop_ids:
            attempt += 1
            token = hash((state, seed, index, position, attempt)) % VOCABULARY
    return token


def solo_output(request: Admit, index: int, max_tokens: int, *, page_size: int) -> list[int]:
    """The tokens that a request's sequence gives when it runs alone.

    max_tokens   as the scheduler cut it; see `scheduling.admission.output_limit`
    """
    ids, output = request.prompt_ids, list[int]()
    base, start = 0, (len(ids) - 1) // page_size * page_size
    for first in range(0, start, page_size):
        base = hash((base, *ids[first : first + page_size]))
    page, position = list(ids[start:]), len(ids) - 1
    minimum = len(ids) + request.sampling.min_tokens if request.sampling.min_tokens else 0
    seed, stop_ids = request.sampling.seed, request.stop_ids
    while len(output) < max_tokens:
        if len(page) > page_size:
            base, page = hash((base, *page[:page_size])), page[page_size:]
        state = hash((base, *page))
        token = hash((state, seed, index, position)) % VOCABULARY
        if position + 1 < minimum and token in stop_ids:
            token = _redraw(state, seed, index, position, stop_ids)
        output.append(token)
        if token in stop_ids:
            break
        page.append(token)
        position += 1
    return output


def _redraw(state: int, seed: int, index: int, position: int, banned: Sequence[int]) -> int:
    attempt = 1
    while (token := hash((state, seed, index, position, attempt)) % VOCABULARY) in banned:
        attempt += 1
    return token
