"""Drives a scheduler with the hash model, checks every invariant after every call and every output at the end."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from streamgen.messages import (
    Admit,
    Cancel,
    Fault,
    Pause,
    Progress,
    Refused,
    Resume,
    StepFailed,
    StepPlan,
    StopFound,
    TokenLogprobs,
    Unpin,
)
from streamgen.scheduling.admission import output_limit
from streamgen.scheduling.scheduler import Scheduler
from streamgen.scheduling.sequence import Sequence, State
from streamgen.scheduling.tenants import MAX_IDLE
from tests.scheduling.hash_model import Forcing, HashModel, logprobs_of, solo_output, solo_scores, solo_states

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamgen.config import Tenant
    from streamgen.scheduling.limits import Limits
    from streamgen.scheduling.speculation import Drafter
    from streamgen.scheduling.step import Step

    Key = tuple[int, int]  # of a sequence: request, index

KEY = b"a key for tests"


class Outcome(Struct):
    """What the detokenizer heard of one sequence."""

    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    scores: list[TokenLogprobs] = []
    cached_tokens: int | None = None
    finish: str | None = None
    code: str | None = None
    message: str = ""
    num_entries: int = 0


class Lives:
    """A journal that checks the order of what it hears, and counts it."""

    def __init__(self) -> None:
        self._phases: dict[Key, str] = {}
        self.counts: Counter[str] = Counter()

    def _move(self, key: Key, old: tuple[str, ...], new: str) -> None:
        assert self._phases[key] in old, f"{key}: {new} after {self._phases[key]}"
        self._phases[key] = new
        self.counts[new] += 1

    def admitted(self, request: Admit) -> None:
        for index in range(request.num_sequences):
            self._phases[request.request_id, index] = "waiting"

    def started(self, sequence: Sequence) -> None:
        self._move(key_of(sequence), ("waiting",), "running")

    def planned(self, step: Step) -> None:
        assert all(self._phases[key_of(rows.sequence)] == "running" for rows in step.rows)

    def completed(self, step: Step, seconds: float) -> None:
        self.counts["completed"] += 1

    def first_token(self, sequence: Sequence) -> None:
        assert sequence.num_outputs
        self.counts["first_token"] += 1

    def preempted(self, sequence: Sequence) -> None:
        self._move(key_of(sequence), ("running",), "waiting")

    def finished(self, sequence: Sequence, reason: str) -> None:
        del self._phases[key_of(sequence)]
        self.counts[reason] += 1

    @property
    def num_open(self) -> int:
        return len(self._phases)


class Harness:
    """A scheduler, an executor that may lag behind it, and what came of every request."""

    def __init__(
        self, limits: Limits, *, tenants: Mapping[str, Tenant] | None = None, drafter: Drafter | None = None
    ) -> None:
        self.limits = limits
        self.now = 0.0
        self.lives = Lives()
        self.scheduler = Scheduler(
            limits, prefix_key=KEY, clock=lambda: self.now, tenants=tenants, drafter=drafter, journal=self.lives
        )
        self.model = HashModel(
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            num_slots=limits.max_running,
            max_context=limits.max_context,
        )
        self.requests: dict[int, Admit] = {}
        self.outcomes: dict[tuple[int, int], Outcome] = {}
        self.stopped: set[tuple[int, int]] = set()
        self.cancelled: set[int] = set()
        self.fails: Callable[[Sequence], bool] = lambda sequence: False  # whether a step with it in it fails
        self.faults: dict[Key, str] = {}  # sequences whose next rows fail alone, and with what code
        self.may_fail: set[Key] = set()
        self.most_sequences = limits.max_running  # with more in it a step fails
        self.num_failures = 0  # of steps
        self._failed_generation = -1
        self.plans: deque[tuple[StepPlan, tuple[int, ...]]] = deque()
        self.num_plans = 0
        self.has_drafter = drafter is not None

    # ---- calls ----------------------------------------------------------------------------------------------------

    def admit(self, request: Admit) -> Refused | None:
        refused = self.scheduler.admit(request)
        if refused is None:
            self.requests[request.request_id] = request
            for index in range(request.num_sequences):
                self.outcomes[request.request_id, index] = Outcome()
        self._check()
        return refused

    def cancel(self, request_id: int, reason: str = "cancelled", message: str = "") -> None:
        self.cancelled.add(request_id)
        self.scheduler.cancel(Cancel(request_id=request_id, reason=reason, message=message))
        self._check()

    def stop_found(self, request_id: int, index: int = 0) -> None:
        if self.outcomes[request_id, index].finish is None:
            self.stopped.add((request_id, index))
        self.scheduler.stop_found(StopFound(request_id=request_id, index=index))
        self._check()

    def pause(self, request_id: int, index: int = 0) -> None:
        self.scheduler.pause(Pause(request_id=request_id, index=index))
        self._check()

    def resume(self, request_id: int, index: int = 0) -> None:
        self.scheduler.resume(Resume(request_id=request_id, index=index))
        self._check()

    def unpin(self, key: str) -> None:
        self.scheduler.unpin(Unpin(key=key))
        self._check()

    def plan(self) -> StepPlan | None:
        dead = self.scheduler._cache.pool.free_pages()
        preemptions = self.scheduler._counters.preemptions
        plan = self.scheduler.plan()
        if plan is not None:
            self.num_plans += 1
            self.plans.append((plan, dead))
            self._check_plan(plan)
        if self.scheduler._counters.preemptions == preemptions:
            self._check_backlog(plan)
        self._check()
        return plan

    def complete(self) -> None:
        """Execute the oldest plan and give its results back, or have it fail where something in it fails."""
        if self.plans[0][0].generation == self._failed_generation:
            self.fail("skipped")
            return
        sequences = [rows.sequence for rows in self.scheduler._in_flight[0].rows]
        if len(sequences) > self.most_sequences or any(self.fails(sequence) for sequence in sequences):
            self.fail("error")
            return
        plan, dead = self.plans.popleft()
        done = self.model.execute(plan, dead)
        found = [(i, self.faults.pop(key_of(s))) for i, s in enumerate(sequences) if key_of(s) in self.faults]
        self.may_fail |= {key_of(sequences[i]) for i, _ in found}
        faults = tuple(Fault(i, code, "it failed alone") for i, code in found)
        self.scheduler.complete(structs.replace(done, faults=faults))
        self._check()

    @property
    def can_fail(self) -> bool:
        """Whether there is a plan, and a device that would try it."""
        return bool(self.plans) and self.plans[0][0].generation != self._failed_generation

    def fail(self, kind: str) -> None:
        """The oldest plan has no results; half of it may have been done."""
        plan, dead = self.plans.popleft()
        if kind != "skipped":
            self.model.fail(plan, dead, is_lost=kind == "lost")
            self._failed_generation = plan.generation
            self.num_failures += 1
            self.may_fail |= {key_of(rows.sequence) for rows in self.scheduler._in_flight[0].rows}
        self.scheduler.fail(StepFailed(step=plan.step, message="the step failed", kind=kind))
        self._check()

    def step(self, *, depth: int = 1) -> bool:
        """Plan until `depth` plans are under way, then complete one; False when there is nothing to do."""
        while len(self.plans) < depth and self.plan() is not None:
            pass
        if not self.plans:
            return False
        self.complete()
        return True

    def run(self, *, depth: int = 1, max_steps: int = 100_000) -> None:
        """Run until idle, paused ones at last too, then check that nothing is left and every output is right."""
        for _ in range(max_steps):
            if not self.step(depth=depth) and not self.resume_all():
                break
        else:
            raise AssertionError(f"not idle after {max_steps} steps")
        self.check_idle()
        self.check_outcomes()

    def resume_all(self) -> bool:
        """Everybody reads again; False if everybody did."""
        paused = [s for sequences in self.scheduler._requests.values() for s in sequences if s.is_paused]
        for sequence in paused:
            self.resume(*key_of(sequence))
        return bool(paused)

    # ---- checks ---------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        for entry in self.scheduler.take_progress():
            self._take(entry)
        check_pages(self.scheduler)

    def _take(self, entry: Progress) -> None:
        key = entry.request_id, entry.index
        outcome = self.outcomes[key]
        assert outcome.finish is None, f"{key}: progress after the end"
        assert (key in self.stopped) == (entry.finish == "stopped"), f"{key}: progress after its stop string was found"
        assert (entry.cached_tokens is not None) == (outcome.num_entries == 0), f"{key}: cached_tokens"
        if entry.cached_tokens is not None:
            outcome.cached_tokens = entry.cached_tokens
        outcome.num_entries += 1
        outcome.ids += entry.ids
        outcome.logprobs += entry.logprobs
        outcome.scores += entry.scores
        outcome.finish = entry.finish
        outcome.code, outcome.message = entry.code, entry.message

    def _check_plan(self, plan: StepPlan) -> None:
        limits, pool = self.limits, self.scheduler._cache.pool
        assert sum(plan.counts) <= limits.step_tokens, "over budget"
        assert len(set(plan.slots)) == len(plan.slots), "a slot twice"
        assert all(count >= 1 for count in plan.counts)
        assert len({begin.slot for begin in plan.begins} & {*plan.slots}) == len(plan.begins), (
            "a slot taken for nothing"
        )
        assert len(self.scheduler._in_flight) == len(self.plans)
        for rows in self.scheduler._in_flight[-1].rows:
            sequence = rows.sequence
            assert not sequence.is_paused, "rows of a paused sequence"
            assert rows.start + rows.count <= limits.max_context
            assert rows.start + rows.count < sequence.num_prompt + max(sequence.max_tokens, 1)
            first, last = rows.start // limits.page_size, (rows.start + rows.count - 1) // limits.page_size
            for page in sequence.pages[first : last + 1]:
                assert pool.num_holders(page) == 1, f"page {page} is written while shared"
                assert not pool.is_indexed(page), f"page {page} is written while others may find it"

    def _check_backlog(self, plan: StepPlan | None) -> None:
        """A step that is not full leaves out only what cannot run."""
        num_rows = sum(plan.counts) if plan is not None else 0
        if num_rows == self.limits.step_tokens:
            return
        scheduler = self.scheduler
        if scheduler._queue.are_several or scheduler._suspects:
            return  # who was served more may have to wait
        waiting = [s for s in scheduler._batch.prefilling.values() if not s.is_paused]
        assert not (waiting and scheduler._cache.pool.num_available), "a prompt was left out of a step that is not full"
        if self.has_drafter:
            return  # sequences wait for their results
        planned = set(plan.slots) if plan is not None else set()
        for slot, sequence in scheduler._batch.decoding.items():
            has_room = num_rows + sequence.num_decode_rows <= self.limits.step_tokens
            assert slot in planned or not (sequence.can_decode and has_room), (
                "a decode was left out of a step that is not full"
            )
        if scheduler._queue and not scheduler._batch.is_start_barred:
            head = scheduler._queue.head()
            if head is None:
                return
            has_slots = scheduler._planner._starter._has_slots_for(head)
            reasons = [head is scheduler._batch.misfit, not has_slots, head.leader is not None]
            assert any(reasons), "a request was left out of a step that is not full"

    def check_idle(self) -> None:
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.paused, stats.pages_used) == (0, 0, 0, 0)
        assert not self.scheduler._suspects
        assert self.lives.num_open == 0
        shares = self.scheduler._queue
        assert not shares._open
        assert len(shares._idle) <= MAX_IDLE
        assert self.scheduler.num_open == self.scheduler.num_in_flight == 0
        assert len(self.scheduler._batch.free_slots) == self.limits.max_running

    def check_outcomes(self) -> None:
        for (request_id, index), outcome in self.outcomes.items():
            self._check_outcome(self.requests[request_id], index, outcome)

    def _check_outcome(self, request: Admit, index: int, outcome: Outcome) -> None:
        key = request.request_id, index
        expected = solo_output(request, index, output_limit(request, self.limits))
        if key in self.stopped:
            assert outcome.finish == "stopped"
        elif outcome.finish in ("cancelled", "deadline"):
            assert request.request_id in self.cancelled
        elif outcome.finish == "error":
            assert key in self.may_fail
            assert outcome.message
        else:
            ending = "stop" if expected and expected[-1] in request.stop_ids else "length"
            if ending == "length" and request.grammar is not None and Forcing(request.grammar).end == len(expected):
                ending = "complete"
            assert (outcome.ids, outcome.finish) == (expected, ending), f"request {key}"
            assert outcome.scores == (solo_scores(request) if index == 0 else []), f"scores of {key}"
        assert outcome.ids == expected[: len(outcome.ids)], f"request {key}"
        assert outcome.scores == solo_scores(request)[: len(outcome.scores)]
        states = solo_states([*request.prompt_ids, *outcome.ids])[len(request.prompt_ids) - 1 :]
        if request.sampling.logprobs is not None:
            wanted = [logprobs_of(s, t) for s, t in zip(states, outcome.ids, strict=False)]
            assert outcome.logprobs == wanted, f"logprobs of {key}"


def key_of(sequence: Sequence) -> Key:
    return sequence.request.request_id, sequence.index


def check_pages(scheduler: Scheduler) -> None:
    """Free + cached + held = total, and every reference count is the number of tables that have the page."""
    pool, batch = scheduler._cache.pool, scheduler._batch
    running: list[Sequence] = [*batch]
    tables = [*(sequence.pages for sequence in running), *scheduler._cache.pins]
    holders = Counter(page for pages in tables for page in pages)
    assert dict(pool.held_pages()) == dict(holders)
    free, cached = pool.free_pages(), pool.cached_pages()
    everywhere = [*free, *cached, *holders]
    assert len(everywhere) == len(set(everywhere)) == pool.num_total
    assert pool.num_free + pool.num_cached + pool.num_held == pool.num_total
    assert pool.num_shared == len([count for count in holders.values() if count > 1])
    indexed = pool._is_indexed
    assert not [page for page in cached if not indexed[page]] and not [page for page in free if indexed[page]]
    assert {sequence.slot for sequence in running} | set(scheduler._batch.free_slots) == set(
        range(scheduler._limits.max_running)
    )
    assert all(sequence.state is State.RUNNING for sequence in running)
    assert not [s for s in scheduler._queue if s.state is not State.WAITING or s.pages or s.is_paused]
    assert scheduler._cache.pins.num_pages == sum(map(len, scheduler._cache.pins)) <= pool.num_total // 2
    in_use = {page for sequence in running for page in sequence.pages}
    pinned = {page for pages in scheduler._cache.pins for page in pages}
    assert scheduler._cache.pins.num_alone() == len(pinned - in_use)
    shares = scheduler._queue._open
    for share in shares.values():
        assert [s.rank for s in share.waiting] == sorted(s.rank for s in share.waiting)
        mine = [s for s in running if s.share is share]
        assert (share.num_running, share.num_paused) == (len(mine), len([s for s in mine if s.is_paused]))
        assert share.max_running is None or share.num_running <= share.max_running
    assert len(scheduler._queue) == sum(len(share.waiting) for share in shares.values())
    alive = [s for sequences in scheduler._requests.values() for s in sequences]
    assert sum(share.num_open for share in shares.values()) == len(alive)
    assert batch.num_paused == len([s for s in alive if s.is_paused])
