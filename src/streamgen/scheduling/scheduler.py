"""The scheduler: owns every sequence and every page, says what each step does, and takes the results.

It is a plain object without loop or randomness, and its clock is given: the same calls at the same times give the same
plans. The caller may have several plans under way, since a plan never needs the tokens of the one before; results come
back in the order of the plans.

A request's life here: `admit` queues it; `plan` starts its sequences, those of the least served tenant first and within a
tenant by rank, and gives them prompt chunks and decode rows; `complete` takes tokens, indexes full pages for the prefix
cache and ends what is at its end; `cancel` and `stop_found` end the rest at once. A step that failed comes back through
`fail`, and its sequences run again.

Why everyone gets to an end: let A be the sequence of the least rank that has not ended and is not paused. For memory only
lower ranks preempt, so for memory nobody preempts A; for fairness a tenant loses the highest rank of two or more, which is
not A. Output is cut so that A alone always fits (`output_limit`), so A never has to preempt itself. If A waits, the
counters of other tenants grow with what they are given until A's tenant is next, and then nothing starts before A; the
running ones end, or are preempted by their like and wait behind A; and when nobody runs, A starts without being asked
whether it fits. If A runs, those ahead of it in the step end at last, and decodes that a full step left out go first in
the next; a step in which a less served tenant computes a prompt has room for some of the others' rows.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any

from msgspec import structs

from streamgen.messages import (
    Admit,
    Cancel,
    Fault,
    Pause,
    Progress,
    Refused,
    Resume,
    StepDone,
    StepFailed,
    StepPlan,
    StopFound,
    TokenLogprobs,
    Unpin,
)
from streamgen.scheduling.admission import Admission, output_limit, overload, refusal
from streamgen.scheduling.cache import PageCache
from streamgen.scheduling.forecast import Forecast, StartTimes
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.sequence import Rank, Rows, Sequence, State, count_agreeing
from streamgen.scheduling.stats import Counters, SchedulerStats
from streamgen.scheduling.step import Step
from streamgen.scheduling.suspects import DeviceBroken, Suspects
from streamgen.scheduling.tenants import Share, Tenants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from streamgen.config import Tenant
    from streamgen.scheduling.journal import Journal
    from streamgen.scheduling.speculation import Drafter

__all__ = ["DeviceBroken", "Forecast", "Limits", "Scheduler", "SchedulerStats"]

MIN_GUEST_ROWS = 16  # rows that others keep in a step in which a less served tenant computes a prompt
MAX_LOSSES = 2  # executors that may die under a sequence before it is held to be the reason


class Scheduler:
    """Decides what each step does.

    limits      the sizes to plan within
    prefix_key  secret of the prefix cache's hashes, 1 to 64 bytes
    clock       seconds; the one on which requests' arrivals and deadlines are
    tenants     options of tenants by name; others have the defaults
    journal     hears of every decision
    drafter     guesses tokens for steps to verify. It has to see the last token, so that with one a sequence is planned
                again only when its results are known
    """

    def __init__(
        self,
        limits: Limits,
        *,
        prefix_key: bytes,
        clock: Callable[[], float],
        tenants: Mapping[str, Tenant] | None = None,
        journal: Journal | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._journal = journal
        self._drafter = drafter
        self._cache = PageCache(limits, key=prefix_key)
        self._pool = self._cache.pool
        self._admission = Admission(limits, self._pool)
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._requests: dict[int, list[Sequence]] = {}  # those of its sequences that have not ended
        self._queue = Tenants(tenants or {})
        self._num_paused = 0
        self._prefilling: dict[int, Sequence] = {}  # by slot, in the order in which they started
        self._decoding: dict[int, Sequence] = {}  # by slot, next to be planned first
        self._in_flight: deque[Step] = deque()
        self._generation = 0
        self._suspects = Suspects()
        self._progress: list[Progress] = []
        self._misfit: Sequence | None = None  # the head of the queue, if it did not fit since somebody last left
        self._is_start_paused = False  # after a preemption, until somebody ends: else the victim would thrash
        self._num_arrivals = 0
        self._counters = Counters()
        self._starts = StartTimes()

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
        for sequence in sequences:
            self._queue.enter(sequence)
        self._queue.push(leader)
        if self._journal is not None:
            self._journal.admitted(request)
        return None

    def _make_sequences(self, request: Admit) -> list[Sequence]:
        arrival, self._num_arrivals = self._num_arrivals, self._num_arrivals + 1
        max_tokens, root = output_limit(request, self._limits), self._cache.index.root(request.scope)
        return [
            Sequence(request, index=i, arrival=arrival, max_tokens=max_tokens, root=root)
            for i in range(request.num_sequences)
        ]

    def cancel(self, message: Cancel) -> None:
        """End a request now. Its slots and pages may be given away by the next plan; unknown requests are ignored."""
        for sequence in self._requests.pop(message.request_id, ()):
            self._leave(sequence, State.ENDED)
            self._report(sequence, finish=message.reason, message=message.message)
            self._queue.leave(sequence)

    def stop_found(self, message: StopFound) -> None:
        """End one sequence now; those that have ended are left as they are."""
        sequence = self._find(message.request_id, message.index)
        if sequence is not None:
            self._finish(sequence, "stopped")

    def pause(self, message: Pause) -> None:
        """A sequence keeps its pages and gets no more rows, until `resume`."""
        sequence = self._find(message.request_id, message.index)
        if sequence is None or sequence.is_paused:
            return
        sequence.is_paused = True
        self._num_paused += 1
        if sequence.state is State.WAITING:
            self._queue.remove(sequence)
            sequence.state = State.PARKED
        # Those that start may have waited for somebody to end, which who is paused does not.
        self._is_start_paused, self._misfit = False, None

    def resume(self, message: Resume) -> None:
        """A paused sequence goes on; others are left as they are."""
        sequence = self._find(message.request_id, message.index)
        if sequence is None or not sequence.is_paused:
            return
        sequence.is_paused = False
        self._num_paused -= 1
        if sequence.state is State.PARKED:
            sequence.state = State.WAITING
            self._queue.push(sequence)

    def unpin(self, message: Unpin) -> None:
        """Pages kept under this key may be evicted."""
        self._cache.pins.drop(message.key)
        self._misfit = None

    def _find(self, request_id: int, index: int) -> Sequence | None:
        return next((s for s in self._requests.get(request_id, ()) if s.index == index), None)

    # ---- planning -------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step: decodes, then prompts that have begun, then new ones; None if there is nothing to run."""
        step = None
        if self._suspects:
            group = {*self._suspects.group}
            step = self._plan_step(lambda sequence: sequence in group, group)
        if not step:
            step = self._plan_step(lambda sequence: sequence not in self._suspects)
        if not step:
            return None
        self._counters.steps += 1
        self._in_flight.append(step)
        if self._journal is not None:
            self._journal.planned(step)
        return step.message()

    def _plan_step(self, may_run: Callable[[Sequence], bool], group: set[Sequence] | None = None) -> Step:
        """Plan those that may run; `group` alone may start if it is given."""
        step = Step(self._counters.steps, self._limits.step_tokens, self._generation)
        favoured = self._favour(step)
        self._plan_decodes(step, may_run, favoured)
        self._plan_prompts(step, may_run, favoured)
        self._start_waiting(step, may_run, group)
        return step

    # ---- tenants ---------------------------------------------------------------------------------------------------

    def _favour(self, step: Step) -> Share | None:
        """The least served tenant with a prompt to compute. Rows of those served more are limited to about its own.

        So a step is at most about twice as long as it would be for that tenant alone, however much the others want.
        """
        if not self._queue.are_several:
            return None
        head = self._queue.head() if self._free_slots or self._queue else None
        prompts = [s for s in self._prefilling.values() if not s.is_paused]
        favoured = self._queue.least_served([*prompts, *([head] if head is not None else [])])
        if favoured is None:
            return None
        own = [s for s in [*prompts, *favoured.waiting] if self._queue.share_of(s) is favoured]
        num_rows = sum(s.num_unplanned for s in own)
        step.guests_budget = max(MIN_GUEST_ROWS, min(num_rows, step.budget))
        return favoured

    def _is_guest(self, sequence: Sequence, favoured: Share | None) -> bool:
        return favoured is not None and self._queue.share_of(sequence).counter > favoured.counter

    def _room(self, sequence: Sequence, step: Step, favoured: Share | None) -> int:
        """Rows that the step has left for this sequence."""
        if step.guests_budget is None or not self._is_guest(sequence, favoured):
            return step.budget
        return min(step.budget, step.guests_budget)

    def _make_way(self, sequence: Sequence, step: Step) -> bool:
        """Take a slot and pages back, for the next to start, from who reads too slowly or has more than its share."""
        victim = self._find_paused()
        if victim is None:
            tenant = self._queue.overserved(self._queue.share_of(sequence), self._limits.max_running)
            if tenant is None:
                return False
            victim = max((s for s in self._running() if self._queue.share_of(s) is tenant), key=_rank)
            if victim.slot in step:
                return False  # it has just started: not twice in a step
        self._preempt(victim, step, pauses_starts=False)
        return True

    def _find_paused(self) -> Sequence | None:
        if not self._num_paused:
            return None
        return max((s for s in self._running() if s.is_paused), key=_rank, default=None)

    # ---- rows ------------------------------------------------------------------------------------------------------

    def _plan_decodes(self, step: Step, may_run: Callable[[Sequence], bool], favoured: Share | None) -> None:
        planned: list[int] = []
        is_short = False
        for slot, sequence in list(self._decoding.items()):
            # A sequence planned earlier in this loop may have preempted this one.
            if sequence.slot is None or not sequence.can_decode or (self._drafter and sequence.num_pending):
                continue
            if not may_run(sequence):
                continue
            if self._room(sequence, step, favoured) < sequence.num_decode_rows:
                is_short = True
                continue
            self._plan_decode(sequence, step, is_guest=self._is_guest(sequence, favoured))
            planned.append(slot)
        if is_short:
            self._move_back(planned)

    def _plan_decode(self, sequence: Sequence, step: Step, *, is_guest: bool) -> None:
        end = sequence.num_scheduled + 1
        if not self._make_room(sequence, end, step):
            self._preempt(sequence, step)
            return
        proposals = self._propose(sequence, step.budget) if self._drafter else ()
        pages = self._cache.extend(sequence, end + len(proposals))
        step.add(sequence.plan_decode(pages, proposals), is_guest=is_guest)

    def _propose(self, sequence: Sequence, budget: int) -> tuple[int, ...]:
        """Drafted tokens: as many as output, budget and available pages allow; they are never worth a preemption."""
        assert self._drafter is not None, "drafting without a drafter"
        # NOTE: drafts mean a budget of two rows or more, which the step after them needs too; see `num_decode_rows`.
        room_in_output = sequence.max_tokens - sequence.num_outputs - 1
        room_in_pages = self._cache.num_placeable(sequence) - 1
        most = min(budget - sequence.num_decode_rows, room_in_output, room_in_pages)
        return tuple(self._drafter.propose(sequence)[:most]) if most > 0 else ()

    def _move_back(self, slots: list[int]) -> None:
        """Who was planned waits behind who was not, for the next step."""
        for slot in slots:
            sequence = self._decoding.pop(slot, None)
            if sequence is not None:
                self._decoding[slot] = sequence

    def _plan_prompts(self, step: Step, may_run: Callable[[Sequence], bool], favoured: Share | None) -> None:
        sequences = list(self._prefilling.values())
        if favoured is not None:
            sequences.sort(key=lambda s: self._is_guest(s, favoured))
        for sequence in sequences:
            if step.budget <= 0:
                return
            if sequence.slot is None or sequence.is_paused or not may_run(sequence):
                continue  # preempted by one before it, or not to run
            room = self._room(sequence, step, favoured)
            if room <= 0:
                continue
            count = min(sequence.num_unplanned, room)
            if not self._make_room(sequence, sequence.num_scheduled + count, step):
                count = min(count, self._cache.num_placeable(sequence))
            if count:
                self._plan_chunk(sequence, count, step, is_guest=self._is_guest(sequence, favoured))
            else:
                self._preempt(sequence, step)

    def _plan_chunk(self, sequence: Sequence, count: int, step: Step, *, is_guest: bool = False) -> None:
        pages = self._cache.extend(sequence, sequence.num_scheduled + count)
        step.add(sequence.plan_chunk(count, pages), is_guest=is_guest)
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

    # ---- preemption -------------------------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """Preempt the newest of the least important sequences until this one's table can grow to `num_tokens`.

        False if that would take one which is more important than itself.
        """
        missing = self._cache.num_missing(sequence, num_tokens)
        while not self._cache.make_room(missing):
            victim = self._find_paused() or max(self._running(), key=_rank)
            if victim is sequence:
                return False
            self._preempt(victim, step)
        return True

    def _preempt(self, victim: Sequence, step: Step, *, pauses_starts: bool = True) -> None:
        """Free a sequence's slot and pages, and queue it to be computed again.

        Its rank puts it in front of those of its tenant that never ran. Tokens under way are lost and will be drawn again, the same:
        a draw depends on seed, sample index and position alone.
        """
        step.drop(victim)
        self._requeue(victim)
        self._counters.preemptions += 1
        self._is_start_paused = pauses_starts and not victim.is_paused
        if self._journal is not None:
            self._journal.preempted(victim)

    def _requeue(self, sequence: Sequence) -> None:
        self._leave(sequence, State.PARKED if sequence.is_paused else State.WAITING)
        if not sequence.is_paused:
            self._queue.push(sequence)

    # ---- starting -------------------------------------------------------------------------------------------------

    def _start_waiting(
        self, step: Step, may_run: Callable[[Sequence], bool], group: set[Sequence] | None = None
    ) -> None:
        """Start sequences in the order of the queue, up to the first that does not fit.

        NOTE: for memory nothing is preempted here, so that a sequence never loses its slot in the step in which it took
        it; who is paused or has more than its share may be.
        """
        while self._queue and step.budget > 0 and not self._is_start_paused:
            sequence = self._next_to_start(group)
            if sequence is None or not may_run(sequence) or sequence is self._misfit:
                return
            if not self._start(sequence, step) and not (self._make_way(sequence, step) and self._start(sequence, step)):
                return
            count = min(sequence.num_unplanned, step.budget, self._cache.num_placeable(sequence))
            self._plan_chunk(sequence, count, step)

    def _next_to_start(self, group: set[Sequence] | None) -> Sequence | None:
        if group is None:
            return self._queue.head()
        return min((s for s in group if s.state is State.WAITING), key=_rank, default=None)

    def _start(self, sequence: Sequence, step: Step) -> bool:
        leader = sequence.leader
        if leader is not None and leader.state is State.RUNNING:
            # After a preemption the leader may still be computing: what it computes is worth waiting for.
            return leader.is_prompt_computed and self._start_forked(sequence, leader, step)
        if not self._has_slots_for(sequence):
            return False
        sequence.pages = self._cache.find_prefix(sequence)
        while not self._fits(sequence):
            if not self._cache.pins.drop_oldest():
                self._give_up(sequence)
                return False
        num_pages = len(sequence.pages)
        self._take_slot(sequence, sequence.pages, num_pages * self._limits.page_size, num_shared=num_pages)
        step.begin(sequence)
        return True

    def _start_forked(self, sequence: Sequence, leader: Sequence, step: Step) -> bool:
        """Start a further continuation on the leader's pages; only the prompt's last token is computed again."""
        if not self._free_slots or not self._cache.make_room(1):
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
        self._cache.release(sequence)
        self._misfit = sequence

    def _take_slot(self, sequence: Sequence, pages: list[int], num_computed: int, *, num_shared: int) -> None:
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
        self._queue.remove(sequence)
        share = self._queue.share_of(sequence)
        share.num_running += 1
        if not sequence.has_started:
            sequence.has_started = True
            self._queue.charge_prompt(sequence)
            self._starts.started(self._clock(), num_left=len(self._queue))
        slot = self._free_slots.pop()
        sequence.start(slot, pages, num_computed=num_computed, num_shared=num_shared)
        self._prefilling[slot] = sequence
        self._counters.cached_tokens += num_computed
        if self._journal is not None:
            self._journal.started(sequence)

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
        num_pinned = self._cache.pins.num_pages
        return self._pool.num_available > 0 and self._admission.fits(self._running(), sequence, num_pinned=num_pinned)

    # ---- results --------------------------------------------------------------------------------------------------

    def complete(self, done: StepDone) -> None:
        """Take the results of the oldest plan under way. Those of sequences that lost their slot since are dropped."""
        step = self._in_flight.popleft()
        assert done.step == step.number, f"results of step {done.step} came, step {step.number} is the oldest under way"
        assert len(done.tokens) == len(step), f"results of {len(done.tokens)} sequences came, {len(step)} were planned"
        if self._journal is not None:
            self._journal.completed(step, done.seconds)
        faults = {fault.index: fault for fault in done.faults}
        for i, rows in enumerate(step.rows):
            if rows.run != rows.sequence.run:
                continue
            if i in faults:
                self._end_faulty(rows.sequence, faults[i])
            else:
                logprobs = done.logprobs[i] if done.logprobs else ()
                scores = done.scores[i] if done.scores else ()
                self._advance(rows, done.tokens[i], logprobs, scores)
        self._suspects.succeeded()

    def _end_faulty(self, sequence: Sequence, fault: Fault) -> None:
        self._end(sequence)
        self._report(sequence, finish="error", code=fault.code, message=fault.message)

    def fail(self, failed: StepFailed) -> None:
        """The oldest plan under way has no results.

        Raises:
            DeviceBroken: no step can be run any more.
        """
        if failed.kind == "dead":
            raise DeviceBroken(failed.message)
        step = self._in_flight.popleft()
        assert failed.step == step.number, f"step {failed.step} failed, step {step.number} is the oldest under way"
        match failed.kind:
            case "error":
                guilty = self._suspects.failed(step.rows, failed.message)
                self._begin_anew()
                if guilty is not None:
                    self._end_faulty(guilty, Fault(0, "generation_error", f"its step failed: {failed.message}"))
            case "lost":
                self._lose(step)
            case "skipped":
                pass
            case _:
                raise AssertionError(f"a step failed in an unknown way: {failed.kind}")

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
        self._cache.offer(sequence)
        if ids:
            self._queue.charge_output(sequence, len(ids))
            if self._journal is not None and sequence.num_outputs == len(ids):
                self._journal.first_token(sequence)
        finish = sequence.finish
        if scores and sequence.next_score is not None:
            sequence.next_score += len(scores)
        if sequence.followers and sequence.is_prompt_computed:
            self._queue_followers(sequence)
        if finish is not None:
            self._finish(sequence, finish, ids=ids, logprobs=logprobs[: len(ids)], scores=scores)
        elif ids or scores or not sequence.has_reported:
            self._report(sequence, ids=ids, logprobs=logprobs[: len(ids)], scores=scores)

    def _lose(self, step: Step) -> None:
        """The executor died, and with it every page."""
        present = [rows.sequence for rows in step.rows if rows.run == rows.sequence.run]
        self._begin_anew()
        self._cache.forget()
        for sequence in present:
            sequence.num_losses += 1
            if sequence.num_losses >= MAX_LOSSES:
                why = f"{MAX_LOSSES} executors died while it ran"
                self._end_faulty(sequence, Fault(0, "generation_error", why))

    def _begin_anew(self) -> None:
        """Whatever runs waits to be computed again, and plans under way are void."""
        self._generation += 1
        for sequence in list(self._running()):
            self._requeue(sequence)
        self._is_start_paused = False

    def _count(self, rows: Rows, ids: tuple[int, ...]) -> None:
        counters = self._counters
        counters.computed_tokens += rows.count
        counters.output_tokens += len(ids)
        if rows.proposals:
            counters.drafted_tokens += len(rows.proposals)
            counters.accepted_tokens += count_agreeing(rows.proposals, ids)

    def _queue_followers(self, leader: Sequence) -> None:
        """Those that waited for the leader's prompt wait for slots and pages from now on."""
        for follower in leader.followers:
            if follower.state is State.HELD:
                follower.state = State.WAITING
                self._queue.push(follower)

    # ---- ending ---------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, finish: str, **gained: Any) -> None:
        """A sequence ends well."""
        self._admission.lengths.add(sequence.num_outputs)
        self._cache.pin(sequence)
        self._end(sequence)
        self._report(sequence, finish=finish, **gained)

    def _end(self, sequence: Sequence) -> None:
        self._leave(sequence, State.ENDED)
        self._queue.leave(sequence)
        self._queue_followers(sequence)
        request_id = sequence.request.request_id
        alive = self._requests[request_id]
        alive.remove(sequence)
        if not alive:
            del self._requests[request_id]

    def _leave(self, sequence: Sequence, state: State) -> None:
        """Take a sequence out of whatever it is in, and free what it has."""
        if sequence.state is State.WAITING:
            self._queue.remove(sequence)
        elif sequence.slot is not None:
            slot = sequence.slot
            self._queue.share_of(sequence).num_running -= 1
            self._prefilling.pop(slot, None)
            self._decoding.pop(slot, None)
            self._free_slots.append(slot)
            self._cache.release(sequence)
            self._is_start_paused = False
        if sequence.leader is not None:
            sequence.leader.followers.remove(sequence)
            sequence.leader = None
        self._misfit = None
        if state is State.ENDED:
            self._num_paused -= sequence.is_paused
            self._suspects.forget(sequence)
        sequence.leave(state)

    def _report(
        self,
        sequence: Sequence,
        *,
        ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        scores: tuple[TokenLogprobs, ...] = (),
        finish: str | None = None,
        code: str | None = None,
        message: str = "",
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
                code=code,
                message=message,
            )
        )
        if finish is not None and self._journal is not None:
            self._journal.finished(sequence, finish)

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
            paused=self._num_paused,
            pages_used=self._pool.num_held - self._cache.pins.num_alone(),
            pages_cached=self._pool.num_cached,
            pages_pinned=self._cache.pins.num_alone(),
            pages_total=self._pool.num_total,
            predicted_peak_pages=self._admission.predicted_peak([*self._running()]),
            **structs.asdict(self._counters),
        )

    def forecast(self) -> Forecast:
        """When a request submitted now would start."""
        is_stuck = self._misfit is not None or self._is_start_paused
        return Forecast(
            num_waiting=len(self._queue),
            num_free=0 if is_stuck else len(self._free_slots),
            seconds_per_start=self._starts.seconds_per_start,
        )

    def forget_prefixes(self) -> None:
        """No idle page has content any more, nor is any pinned. Nothing may run."""
        assert not self._num_running, "pages were taken away while sequences run"
        self._cache.forget()


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
