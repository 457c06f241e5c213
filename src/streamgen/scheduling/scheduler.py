"""The scheduler: owns every sequence and every page, says what each step does, and takes the results.

It is a plain object without loop or randomness, and its clock is given: the same calls at the same times give the same
plans. The caller may have several plans under way, since a plan never needs the tokens of the one before; results come
back in the order of the plans.

A request's life here: `admit` queues it; `plan` starts its sequences, those of the least served tenant first and within
a tenant by rank, and gives them prompt chunks and decode rows; `complete` takes tokens, indexes full pages for the
prefix cache and ends what is at its end; `cancel` and `stop_found` end the rest at once. A step that failed comes back
through `fail`, and its sequences run again. Who does what: `tenants` orders, `starter` starts, `planner` makes steps,
`batch` knows where everybody is, `cache` has the pages, `suspects` finds who makes steps fail.

Why everyone gets to an end: let A be the sequence of the least rank that has not ended and is not paused. For memory
only those of lower rank preempt, so nobody preempts A for that; for fairness a tenant loses the highest rank of two or
more, which is not A. Output is cut so that A alone always fits (`output_limit`), so A never has to preempt itself. If A
waits, the counters of other tenants grow with what they are given until A's tenant is next, and then nothing starts
before A; the running ones end, or are paused and give way, or are preempted and wait behind A; and when nobody runs, A
starts without being asked whether it fits. If A runs, those ahead of it in the step end at last, and decodes that a
full step left out go first in the next. A step in which a less served tenant computes a prompt leaves out some rows,
but that tenant's counter grows with each of its prompts until it is not the less served one. Suspects run apart, and
others when those cannot run.
"""

from __future__ import annotations

from collections import deque
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
    Turn,
    Unpin,
)
from streamgen.scheduling.admission import Admission, output_limit, overload, refusal, tenant_overload
from streamgen.scheduling.batch import Batch
from streamgen.scheduling.forecast import Forecast, StartTimes
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.planner import Planner
from streamgen.scheduling.sequence import Rows, Sequence, State, count_agreeing
from streamgen.scheduling.starter import Starter
from streamgen.scheduling.stats import Counters, SchedulerStats
from streamgen.scheduling.suspects import DeviceBroken, Suspects

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamgen.config import Tenant
    from streamgen.scheduling.journal import Journal
    from streamgen.scheduling.speculation import Drafter
    from streamgen.scheduling.step import Step

__all__ = ["DeviceBroken", "Forecast", "Limits", "Scheduler", "SchedulerStats"]

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
        self._journal = journal
        self._counters = Counters()
        self._batch = Batch(
            limits, prefix_key=prefix_key, tenants=tenants or {}, counters=self._counters, journal=journal
        )
        self._cache = self._batch.cache
        self._queue = self._batch.queue
        self._admission = Admission(limits, self._cache.pool)
        self._starts = StartTimes(num_slots=limits.max_running)
        self._suspects = Suspects()
        starter = Starter(
            limits,
            self._batch,
            admission=self._admission,
            times=self._starts,
            counters=self._counters,
            clock=clock,
            journal=journal,
        )
        self._planner = Planner(limits, self._batch, starter=starter, suspects=self._suspects, drafter=drafter)
        self._requests: dict[int, list[Sequence]] = {}  # those of its sequences that have not ended
        self._in_flight: deque[Step] = deque()
        self._generation = 0
        self._num_arrivals = 0
        self._progress: list[Progress] = []

    # ---- requests -------------------------------------------------------------------------------------------------

    def admit(self, request: Admit) -> Refused | None:
        """Queue a request; or say why it cannot be taken."""
        assert request.request_id not in self._requests, f"request {request.request_id} was admitted twice"
        refused = self._refusal(request)
        if refused is not None:
            return refused
        self._requests[request.request_id] = sequences = self._make_sequences(request)
        self._batch.admit(list(sequences))
        if self._journal is not None:
            self._journal.admitted(request)
        return None

    def _refusal(self, request: Admit) -> Refused | None:
        tenant, num_open = self._queue.options(request.tenant), self._queue.num_open(request.tenant)
        return (
            refusal(request, self._limits)
            or overload(request, self._limits, num_waiting=len(self._queue), num_running=len(self._batch))
            or tenant_overload(request, self._limits, tenant, num_open=num_open)
        )

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
            self._suspects.forget(sequence)
            self._batch.end(sequence)
            self._report(sequence, finish=message.reason, message=message.message)

    def stop_found(self, message: StopFound) -> None:
        """End one sequence now; those that have ended are left as they are."""
        sequence = self._find(message.request_id, message.index)
        if sequence is not None:
            self._finish(sequence, "stopped")

    def pause(self, message: Pause) -> None:
        """A sequence keeps its pages and gets no more rows, until `resume`."""
        sequence = self._find(message.request_id, message.index)
        if sequence is not None and not sequence.is_paused:
            self._batch.pause(sequence)

    def resume(self, message: Resume) -> None:
        """A paused sequence goes on; others are left as they are."""
        sequence = self._find(message.request_id, message.index)
        if sequence is not None and sequence.is_paused:
            self._batch.resume(sequence)

    def unpin(self, message: Unpin) -> None:
        """Pages kept under this key may be evicted."""
        self._cache.pins.drop(message.key)

    def _find(self, request_id: int, index: int) -> Sequence | None:
        return next((s for s in self._requests.get(request_id, ()) if s.index == index), None)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step: decodes, then prompts that have begun, then new ones; None if there is nothing to run."""
        step = self._planner.plan(self._counters.steps, self._generation)
        if not step:
            return None
        self._counters.steps += 1
        self._in_flight.append(step)
        if self._journal is not None:
            self._journal.planned(step)
        return step.message()

    def complete(self, done: StepDone) -> None:
        """Take the results of the oldest plan under way. Those of sequences that lost their slot since are dropped."""
        step = self._in_flight.popleft()
        assert done.step == step.number, f"results of step {done.step} came, step {step.number} is the oldest under way"
        assert len(done.tokens) == len(step), f"results of {len(done.tokens)} sequences came, {len(step)} were planned"
        if self._journal is not None:
            self._journal.completed(step, done.seconds)
        faults = {fault.index: fault for fault in done.faults}
        turns = {turn.index: turn for turn in done.turns}
        for i, rows in enumerate(step.rows):
            if rows.is_void:
                continue
            if i in faults:
                self._end_faulty(rows.sequence, faults[i])
            else:
                logprobs = done.logprobs[i] if done.logprobs else ()
                scores = done.scores[i] if done.scores else ()
                self._advance(rows, done.tokens[i], logprobs, scores, turns.get(i))
        self._suspects.succeeded()

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
        turn: Turn | None,
    ) -> None:
        sequence = rows.sequence
        ids = sequence.take(rows, tokens, turn)
        self._count(rows, tokens, num_new=len(ids))
        self._cache.offer(sequence)
        if ids:
            self._queue.charge_output(sequence, len(ids))
            if self._journal is not None and sequence.num_outputs == len(ids):
                self._journal.first_token(sequence)
        finish = sequence.finish
        if scores and sequence.next_score is not None:
            sequence.next_score += len(scores)
        if sequence.followers and sequence.is_prompt_computed:
            self._batch.free_followers(sequence)
        if finish is not None:
            self._finish(sequence, finish, ids=ids, logprobs=logprobs[: len(ids)], scores=scores)
        elif ids or scores or not sequence.has_reported:
            self._report(sequence, ids=ids, logprobs=logprobs[: len(ids)], scores=scores)

    def _lose(self, step: Step) -> None:
        """The executor died, and with it every page."""
        present = [rows.sequence for rows in step.rows if rows.sequence.state is not State.ENDED]
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
        self._batch.begin_anew()

    def _count(self, rows: Rows, tokens: tuple[int, ...], *, num_new: int) -> None:
        counters = self._counters
        counters.computed_tokens += rows.count
        counters.output_tokens += num_new
        if rows.proposals:
            num_accepted = count_agreeing(rows.proposals, tokens)
            counters.drafted_tokens += len(rows.proposals)
            counters.accepted_tokens += num_accepted
            drafted, accepted = rows.sequence.drafts
            rows.sequence.drafts = drafted + len(rows.proposals), accepted + num_accepted

    # ---- ending ---------------------------------------------------------------------------------------------------

    def _finish(self, sequence: Sequence, finish: str, **gained: Any) -> None:
        """A sequence ends well."""
        self._admission.lengths.add(sequence.num_outputs)
        self._cache.pin(sequence)
        self._end(sequence)
        self._report(sequence, finish=finish, **gained)

    def _end_faulty(self, sequence: Sequence, fault: Fault) -> None:
        self._end(sequence)
        self._report(sequence, finish="error", code=fault.code, message=fault.message)

    def _end(self, sequence: Sequence) -> None:
        self._suspects.forget(sequence)
        self._batch.end(sequence)
        self._batch.free_followers(sequence)
        request_id = sequence.request.request_id
        alive = self._requests[request_id]
        alive.remove(sequence)
        if not alive:
            del self._requests[request_id]

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
                drafts=(0, 0) if finish is None else sequence.drafts,
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

    def stats(self) -> SchedulerStats:
        """Where it stands."""
        pool, num_pinned = self._cache.pool, self._cache.pins.num_alone()
        return SchedulerStats(
            running=len(self._batch),
            waiting=len(self._queue),
            paused=self._batch.num_paused,
            pages_used=pool.num_held - num_pinned,
            pages_cached=pool.num_cached,
            pages_pinned=num_pinned,
            pages_total=pool.num_total,
            predicted_peak_pages=self._admission.predicted_peak([*self._batch]),
            **structs.asdict(self._counters),
        )

    def forecast(self) -> Forecast:
        """When a request submitted now would start."""
        is_stuck = self._batch.misfit is not None or self._batch.is_start_barred
        return Forecast(
            num_waiting=len(self._queue),
            num_free=0 if is_stuck else len(self._batch.free_slots),
            seconds_per_start=self._starts.seconds_per_start,
        )

    def forget_prefixes(self) -> None:
        """No idle page has content any more, nor is any pinned. Nothing may run."""
        assert not len(self._batch), "pages were taken away while sequences run"
        self._cache.forget()
