"""The scheduler: owns every sequence and every page, says what each step does, and takes the results.

It is a plain object without loop, clock or randomness: the same calls give the same plans. The caller may have several
plans under way, since a plan never needs the tokens of the one before; results come back in the order of the plans.

A request's life here: `admit` queues it; `plan` starts its sequences, most important first (larger `priority`, then
earlier arrival), and gives them prompt chunks and decode rows; `complete` takes tokens, indexes full pages for the
prefix cache and ends what is at its end; `cancel` and `stop_found` end the rest at once.

Why everyone gets to an end: let A be the most important sequence that has not ended. Only more important ones preempt,
so nobody preempts A; output is cut so that A alone always fits (`output_limit`), so A never has to preempt itself. If A
waits, nothing behind it starts; the running ones end, or are preempted by their like and wait behind A; and when nobody
runs, A starts without being asked whether it fits. If A runs, those ahead of it in the step end at last, and decodes
that a full step left out go first in the next.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

from msgspec import structs

from streamgen.messages import Admit, Cancel, Progress, Refused, StepDone, StepPlan, StopFound, TokenLogprobs
from streamgen.scheduling.admission import Admission, output_limit, overload, refusal
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.pages import PagePool
from streamgen.scheduling.prefix import PrefixIndex
from streamgen.scheduling.sequence import Rows, Sequence, State, count_agreeing
from streamgen.scheduling.stats import Counters, SchedulerStats
from streamgen.scheduling.step import Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamgen.scheduling.speculation import Drafter

__all__ = ["Limits", "Scheduler", "SchedulerStats"]


class Scheduler:
    """Decides what each step does.

    limits      the sizes to plan within
    prefix_key  secret of the prefix cache's hashes, 1 to 64 bytes
    drafter     guesses tokens for steps to verify. It has to see the last token, so that with one a sequence is planned
                again only when its results are known
    """

    def __init__(self, limits: Limits, *, prefix_key: bytes, drafter: Drafter | None = None) -> None:
        self._limits = limits
        self._drafter = drafter
        self._pool = PagePool(limits.num_pages, page_size=limits.page_size)
        self._index = PrefixIndex(self._pool, page_size=limits.page_size, key=prefix_key)
        self._admission = Admission(limits, self._pool)
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._requests: dict[int, list[Sequence]] = {}  # those of its sequences that have not ended
        self._queue: list[Sequence] = []  # by rank
        self._prefilling: dict[int, Sequence] = {}  # by slot, in the order in which they started
        self._decoding: dict[int, Sequence] = {}  # by slot, next to be planned first
        self._in_flight: deque[Step] = deque()
        self._progress: list[Progress] = []
        self._misfit: Sequence | None = None  # the head of the queue, if it did not fit since somebody last left
        self._is_start_paused = False  # after a preemption, until somebody ends: else the victim would thrash
        self._num_arrivals = 0
        self._counters = Counters()

    # ---- requests -------------------------------------------------------------------------------------------------

    def admit(self, request: Admit) -> Refused | None:
        """Queue a request; or say why it cannot be taken."""
        assert request.request_id not in self._requests, f"request {request.request_id} was admitted twice"
        refused = refusal(request, self._limits) or overload(
            request, self._limits, num_waiting=len(self._queue), num_running=self._num_running
        )
        if refused is not None:
            return refused
        leader, *followers = sequences = self._make_sequences(request)
        for follower in followers:
            follower.state, follower.leader = State.HELD, leader
        leader.followers = followers
        self._requests[request.request_id] = sequences
        insort(self._queue, leader, key=_rank)
        return None

    def _make_sequences(self, request: Admit) -> list[Sequence]:
        arrival, self._num_arrivals = self._num_arrivals, self._num_arrivals + 1
        max_tokens, root = output_limit(request, self._limits), self._index.root(request.scope)
        return [
            Sequence(request, index=i, arrival=arrival, max_tokens=max_tokens, root=root)
            for i in range(request.num_sequences)
        ]

    def cancel(self, message: Cancel) -> None:
        """End a request now. Its slots and pages may be given away by the next plan; unknown requests are ignored."""
        for sequence in self._requests.pop(message.request_id, ()):
            self._leave(sequence, State.ENDED)
            self._report(sequence, finish=message.reason)

    def stop_found(self, message: StopFound) -> None:
        """End one sequence now, without a Progress: who found the stop string has told the host."""
        for sequence in self._requests.get(message.request_id, ()):
            if sequence.index == message.index:
                self._admission.lengths.add(sequence.num_outputs)
                self._end(sequence)
                return

    # ---- planning -------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step: decodes, then prompts that have begun, then new ones; None if there is nothing to run."""
        step = Step(self._counters.steps, self._limits.step_tokens)
        self._plan_decodes(step)
        self._plan_prompts(step)
        self._start_waiting(step)
        if not step:
            return None
        self._counters.steps += 1
        self._in_flight.append(step)
        return step.message()

    def _plan_decodes(self, step: Step) -> None:
        planned: list[int] = []
        is_short = False
        for slot, sequence in list(self._decoding.items()):
            # A sequence planned earlier in this loop may have preempted this one.
            if sequence.slot is None or not sequence.can_decode or (self._drafter and sequence.num_pending):
                continue
            if step.budget < sequence.num_decode_rows:
                is_short = True
                continue
            self._plan_decode(sequence, step)
            planned.append(slot)
        if is_short:
            self._move_back(planned)

    def _plan_decode(self, sequence: Sequence, step: Step) -> None:
        end = sequence.num_scheduled + 1
        if not self._make_room(sequence, end, step):
            self._preempt(sequence, step)
            return
        proposals = self._propose(sequence, step.budget) if self._drafter else ()
        pages = self._extend(sequence, end + len(proposals))
        step.add(sequence.plan_decode(pages, proposals))

    def _propose(self, sequence: Sequence, budget: int) -> tuple[int, ...]:
        """Drafted tokens: as many as output, budget and available pages allow; they are never worth a preemption."""
        assert self._drafter is not None, "drafting without a drafter"
        # NOTE: drafts mean a budget of two rows or more, which the step after them needs too; see `num_decode_rows`.
        room_in_output = sequence.max_tokens - sequence.num_outputs - 1
        room_in_pages = self._num_placeable(sequence) - 1
        most = min(budget - sequence.num_decode_rows, room_in_output, room_in_pages)
        return tuple(self._drafter.propose(sequence)[:most]) if most > 0 else ()

    def _move_back(self, slots: list[int]) -> None:
        """Who was planned waits behind who was not, for the next step."""
        for slot in slots:
            sequence = self._decoding.pop(slot, None)
            if sequence is not None:
                self._decoding[slot] = sequence

    def _plan_prompts(self, step: Step) -> None:
        for sequence in list(self._prefilling.values()):
            if step.budget <= 0:
                return
            if sequence.slot is None:
                continue  # preempted by one before it
            count = min(sequence.num_unplanned, step.budget)
            if not self._make_room(sequence, sequence.num_scheduled + count, step):
                count = min(count, self._num_placeable(sequence))
            if count:
                self._plan_chunk(sequence, count, step)
            else:
                self._preempt(sequence, step)

    def _plan_chunk(self, sequence: Sequence, count: int, step: Step) -> None:
        pages = self._extend(sequence, sequence.num_scheduled + count)
        step.add(sequence.plan_chunk(count, pages))
        self._sort_in(sequence)

    def _sort_in(self, sequence: Sequence) -> None:
        """Move a sequence whose whole prompt is planned from the prompts to the decodes."""
        slot = sequence.slot
        assert slot is not None, "a sequence runs without a slot"
        if sequence.num_unplanned:
            return
        del self._prefilling[slot]
        self._decoding[slot] = sequence
        self._misfit = None  # less is waiting to be computed than was predicted

    # ---- pages ----------------------------------------------------------------------------------------------------

    def _num_placeable(self, sequence: Sequence) -> int:
        """How many more rows the sequence's own pages and all that can be allocated would hold."""
        num_pages = len(sequence.pages) + self._pool.num_available
        return num_pages * self._limits.page_size - sequence.num_scheduled

    def _extend(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        """Append pages to a table until it holds `num_tokens`, and return them. They must be there."""
        missing = self._limits.pages_for(num_tokens) - len(sequence.pages)
        if missing <= 0:
            return ()
        pages = tuple([self._pool.allocate() for _ in range(missing)])
        sequence.pages.extend(pages)
        return pages

    def _make_room(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """Preempt the newest of the least important sequences until this one's table can grow to `num_tokens`.

        False if that would take one which is more important than itself.
        """
        missing = self._limits.pages_for(num_tokens) - len(sequence.pages)
        while self._pool.num_available < missing:
            victim = max(self._running(), key=_rank)
            if victim is sequence:
                return False
            self._preempt(victim, step)
        return True

    def _preempt(self, victim: Sequence, step: Step) -> None:
        """Free a sequence's slot and pages, and queue it to be computed again.

        Its rank puts it in front of all that never ran. Tokens under way are lost and will be drawn again, the same:
        a draw depends on seed, sample index and position alone.
        """
        step.drop(victim)
        self._leave(victim, State.WAITING)
        insort(self._queue, victim, key=_rank)
        self._counters.preemptions += 1
        self._is_start_paused = True

    # ---- starting -------------------------------------------------------------------------------------------------

    def _start_waiting(self, step: Step) -> None:
        """Start sequences in the order of the queue, up to the first that does not fit.

        NOTE: nothing is preempted here, so that a sequence never loses its slot in the step in which it took it.
        """
        while self._queue and step.budget > 0 and self._free_slots and not self._is_start_paused:
            sequence = self._queue[0]
            if sequence is self._misfit or not self._start(sequence, step):
                return
            count = min(sequence.num_unplanned, step.budget, self._num_placeable(sequence))
            self._plan_chunk(sequence, count, step)

    def _start(self, sequence: Sequence, step: Step) -> bool:
        leader = sequence.leader
        if leader is not None and leader.state is State.RUNNING:
            # After a preemption the leader may still be computing: what it computes is worth waiting for.
            return leader.is_prompt_computed and self._start_forked(sequence, leader, step)
        if not self._has_slots_for(sequence):
            return False
        sequence.pages = self._find_prefix(sequence)
        if not self._fits(sequence):
            self._give_up(sequence)
            return False
        num_pages = len(sequence.pages)
        self._take_slot(sequence, sequence.pages, num_pages * self._limits.page_size, num_shared=num_pages)
        step.begin(sequence)
        return True

    def _start_forked(self, sequence: Sequence, leader: Sequence, step: Step) -> bool:
        """Start a further continuation on the leader's pages; only the prompt's last token is computed again."""
        if not self._pool.num_available:
            return False
        num_computed = sequence.num_prompt - 1
        fork = self._pool.fork(leader.pages, num_computed)
        sequence.pages = fork.pages
        # All followers were counted when the leader started, unless it started alone, asking nobody.
        if not self._admission.fits(self._running(), sequence, with_followers=False):
            self._give_up(sequence)
            return False
        sequence.names = leader.names[: len(fork.pages)]
        self._take_slot(sequence, fork.pages, num_computed, num_shared=len(fork.pages) - 1)
        step.begin(sequence, fork.copy)
        return True

    def _give_up(self, sequence: Sequence) -> None:
        """The head of the queue does not fit: it is asked again when somebody has left, or a prompt is done."""
        self._pool.release_table(sequence.pages)
        sequence.pages = []
        self._misfit = sequence

    def _take_slot(self, sequence: Sequence, pages: list[int], num_computed: int, *, num_shared: int) -> None:
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
        del self._queue[0]
        slot = self._free_slots.pop()
        sequence.start(slot, pages, num_computed=num_computed, num_shared=num_shared)
        self._prefilling[slot] = sequence
        self._counters.cached_tokens += num_computed

    def _has_slots_for(self, sequence: Sequence) -> bool:
        """Whether slots are free for it and its followers, beside those kept for the followers of running leaders."""
        needed = min(1 + len(sequence.followers), self._limits.max_running)
        kept = sum(len(s.followers) for s in self._running())
        return len(self._free_slots) - kept >= needed

    def _fits(self, sequence: Sequence) -> bool:
        """Whether it may start, holding its prefix pages: alone always, else if the predicted peak fits."""
        if not self._num_running:
            return True
        # The first chunk needs a page now, which drafted rows may hold although nobody counted them.
        return self._pool.num_available > 0 and self._admission.fits(self._running(), sequence)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        if not self._limits.prefix_cache:
            return []
        most = sequence.max_reusable // self._limits.page_size
        self._index.extend_names(sequence.names, sequence.ids, most)
        return self._index.take(sequence.names, most)

    # ---- results --------------------------------------------------------------------------------------------------

    def complete(self, done: StepDone) -> None:
        """Take the results of the oldest plan under way. Those of sequences that lost their slot since are dropped."""
        step = self._in_flight.popleft()
        assert done.step == step.number, f"results of step {done.step} came, step {step.number} is the oldest under way"
        assert len(done.tokens) == len(step), f"results of {len(done.tokens)} sequences came, {len(step)} were planned"
        for i, rows in enumerate(step.rows):
            if rows.run == rows.sequence.run:
                logprobs = done.logprobs[i] if done.logprobs else ()
                scores = done.scores[i] if done.scores else ()
                self._advance(rows, done.tokens[i], logprobs, scores)

    def _advance(
        self,
        rows: Rows,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        scores: tuple[TokenLogprobs, ...],
    ) -> None:
        sequence = rows.sequence
        ids = sequence.take(rows, tokens)
        self._count(rows, ids)
        self._index_pages(sequence)
        finish = sequence.finish
        if scores and sequence.next_score is not None:
            sequence.next_score += len(scores)
        if ids or scores or finish or not sequence.has_reported:
            self._report(sequence, ids=ids, logprobs=logprobs[: len(ids)], scores=scores, finish=finish)
        if sequence.followers and sequence.is_prompt_computed:
            self._queue_followers(sequence)
        if finish is not None:
            self._admission.lengths.add(sequence.num_outputs)
            self._end(sequence)

    def _count(self, rows: Rows, ids: tuple[int, ...]) -> None:
        counters = self._counters
        counters.computed_tokens += rows.count
        counters.output_tokens += len(ids)
        if rows.proposals:
            counters.drafted_tokens += len(rows.proposals)
            counters.accepted_tokens += count_agreeing(rows.proposals, ids)

    def _index_pages(self, sequence: Sequence) -> None:
        """Offer the prefix cache the pages of which every position was computed, by a sequence that still runs."""
        num_full = sequence.num_final // self._limits.page_size
        if num_full <= sequence.num_offered or not self._limits.prefix_cache:
            return
        self._index.extend_names(sequence.names, sequence.ids, num_full)
        for i in range(sequence.num_offered, num_full):
            self._index.insert(sequence.names[i + 1], sequence.pages[i])
        sequence.num_offered = num_full

    def _queue_followers(self, leader: Sequence) -> None:
        """Those that waited for the leader's prompt wait for slots and pages from now on."""
        for follower in leader.followers:
            if follower.state is State.HELD:
                follower.state = State.WAITING
                insort(self._queue, follower, key=_rank)

    # ---- ending ---------------------------------------------------------------------------------------------------

    def _end(self, sequence: Sequence) -> None:
        self._leave(sequence, State.ENDED)
        self._queue_followers(sequence)
        request_id = sequence.request.request_id
        alive = self._requests[request_id]
        alive.remove(sequence)
        if not alive:
            del self._requests[request_id]

    def _leave(self, sequence: Sequence, state: State) -> None:
        """Take a sequence out of whatever it is in, and free what it has."""
        if sequence.state is State.WAITING:
            del self._queue[bisect_left(self._queue, sequence.rank, key=_rank)]
        elif sequence.slot is not None:
            slot = sequence.slot
            self._prefilling.pop(slot, None)
            self._decoding.pop(slot, None)
            self._free_slots.append(slot)
            self._pool.release_table(sequence.pages)
            self._is_start_paused = False
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
        self._misfit = None
        sequence.leave(state)

    def _report(
        self,
        sequence: Sequence,
        *,
        ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        scores: tuple[TokenLogprobs, ...] = (),
        finish: str | None = None,
    ) -> None:
        cached_tokens = None if sequence.has_reported else sequence.cached_tokens
        sequence.has_reported = True
        self._progress.append(
            Progress(
                request_id=sequence.request.request_id,
                index=sequence.index,
                ids=ids,
                logprobs=logprobs,
                scores=scores,
                cached_tokens=cached_tokens,
                finish=finish,
            )
        )

    def take_progress(self) -> tuple[Progress, ...]:
        """What sequences gained, and how they ended, since the last call."""
        progress, self._progress = tuple(self._progress), []
        return progress

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        """Plans whose results have not come."""
        return len(self._in_flight)

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def _num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    def _running(self) -> Iterator[Sequence]:
        return chain(self._decoding.values(), self._prefilling.values())

    def stats(self) -> SchedulerStats:
        """Where it stands."""
        return SchedulerStats(
            running=self._num_running,
            waiting=len(self._queue),
            pages_used=self._pool.num_held,
            pages_cached=self._pool.num_cached,
            pages_total=self._pool.num_total,
            predicted_peak_pages=self._admission.predicted_peak([*self._running()]),
            **structs.asdict(self._counters),
        )


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank
