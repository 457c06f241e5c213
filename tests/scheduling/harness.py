"""Drives a scheduler with the hash model, checks every invariant after every call and every output at the end."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.messages import Admit, Cancel, Progress, Refused, StepPlan, StopFound, TokenLogprobs
from streamgen.scheduling.admission import output_limit
from streamgen.scheduling.scheduler import Scheduler
from streamgen.scheduling.sequence import Sequence, State
from tests.scheduling.hash_model import HashModel, logprobs_of, solo_output, solo_scores, solo_states

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamgen.config import Tenant
    from streamgen.scheduling.limits import Limits
    from streamgen.scheduling.speculation import Drafter

KEY = b"a key for tests"


class Outcome(Struct):
    """What the detokenizer heard of one sequence."""

    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    scores: list[TokenLogprobs] = []
    cached_tokens: int | None = None
    finish: str | None = None
    num_entries: int = 0


class Harness:
    """A scheduler, an executor that may lag behind it, and what came of every request."""

    def __init__(
        self, limits: Limits, *, tenants: Mapping[str, Tenant] | None = None, drafter: Drafter | None = None
    ) -> None:
        self.limits = limits
        self.now = 0.0
        self.scheduler = Scheduler(limits, prefix_key=KEY, clock=lambda: self.now, tenants=tenants, drafter=drafter)
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

    def cancel(self, request_id: int, reason: str = "cancelled") -> None:
        self.cancelled.add(request_id)
        self.scheduler.cancel(Cancel(request_id=request_id, reason=reason))
        self._check()

    def stop_found(self, request_id: int, index: int = 0) -> None:
        if self.outcomes[request_id, index].finish is None:
            self.stopped.add((request_id, index))
        self.scheduler.stop_found(StopFound(request_id=request_id, index=index))
        self._check()

    def plan(self) -> StepPlan | None:
        dead = self.scheduler._pool.free_pages()
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
        """Execute the oldest plan and give its results back."""
        plan, dead = self.plans.popleft()
        self.scheduler.complete(self.model.execute(plan, dead))
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
        """Run until idle, then check that nothing is left and every output is right."""
        for _ in range(max_steps):
            if not self.step(depth=depth):
                break
        else:
            raise AssertionError(f"not idle after {max_steps} steps")
        self.check_idle()
        self.check_outcomes()

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

    def _check_plan(self, plan: StepPlan) -> None:
        limits, pool = self.limits, self.scheduler._pool
        assert sum(plan.counts) <= limits.step_tokens, "over budget"
        assert len(set(plan.slots)) == len(plan.slots), "a slot twice"
        assert all(count >= 1 for count in plan.counts)
        assert len(self.scheduler._in_flight) == len(self.plans)
        for rows in self.scheduler._in_flight[-1].rows:
            sequence = rows.sequence
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
        waiting = [s for s in scheduler._prefilling.values() if not s.is_paused]
        assert not (waiting and scheduler._pool.num_available), "a prompt was left out of a step that is not full"
        if self.has_drafter:
            return  # sequences wait for their results
        planned = set(plan.slots) if plan is not None else set()
        for slot, sequence in scheduler._decoding.items():
            assert slot in planned or not sequence.can_decode or scheduler._queue.are_several, (
                "a decode was left out of a step that is not full"
            )
        if scheduler._queue and not scheduler._is_start_paused:
            head = scheduler._queue.head()
            if head is None:
                return
            reasons = [head is scheduler._misfit, not scheduler._has_slots_for(head), head.leader is not None]
            assert any(reasons), "a request was left out of a step that is not full"

    def check_idle(self) -> None:
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        assert self.scheduler.num_open == self.scheduler.num_in_flight == 0
        assert len(self.scheduler._free_slots) == self.limits.max_running

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
        else:
            ending = "stop" if expected and expected[-1] in request.stop_ids else "length"
            assert (outcome.ids, outcome.finish) == (expected, ending), f"request {key}"
            assert outcome.scores == (solo_scores(request) if index == 0 else []), f"scores of {key}"
        assert outcome.ids == expected[: len(outcome.ids)], f"request {key}"
        assert outcome.scores == solo_scores(request)[: len(outcome.scores)]
        states = solo_states([*request.prompt_ids, *outcome.ids])[len(request.prompt_ids) - 1 :]
        if request.sampling.logprobs is not None:
            wanted = [logprobs_of(s, t) for s, t in zip(states, outcome.ids, strict=False)]
            assert outcome.logprobs == wanted, f"logprobs of {key}"


def check_pages(scheduler: Scheduler) -> None:
    """Free + cached + held = total, and every reference count is the number of tables that have the page."""
    pool = scheduler._pool
    running: list[Sequence] = [*scheduler._running()]
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
    assert {sequence.slot for sequence in running} | set(scheduler._free_slots) == set(
        range(scheduler._limits.max_running)
    )
    assert all(sequence.state is State.RUNNING for sequence in running)
    assert not [s for s in scheduler._queue if s.state is not State.WAITING or s.pages]
    shares = scheduler._queue._open
    for share in shares.values():
        assert [s.rank for s in share.waiting] == sorted(s.rank for s in share.waiting)
        assert share.num_running == len([s for s in running if scheduler._queue.share_of(s) is share])
    assert len(scheduler._queue) == sum(len(share.waiting) for share in shares.values())
    alive = [s for sequences in scheduler._requests.values() for s in sequences]
    assert sum(share.num_open for share in shares.values()) == len(alive)
    assert scheduler._num_paused == len([s for s in alive if s.is_paused])
