"""A trace of requests, replayed against the real scheduler and a cost model of a machine, in virtual time.

The scheduler does not know how long answers will be: requests may say as much as the context allows, and end at a stop
token when the trace says so, as in life. The device answers nothing but that; who is asked what is not simulated.
"""

from __future__ import annotations

import math
from array import array
from random import Random
from typing import TYPE_CHECKING

from msgspec import Struct, structs

from streamgen.errors import ConfigError
from streamgen.messages import Admit, StepDone
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.limits import Limits  # noqa: TC001  # decoding needs the type
from streamgen.scheduling.scheduler import Scheduler
from streamgen.testing.simulator.cost import DEMO_ON_TWO_CORES, CostModel
from streamgen.testing.simulator.driver import Driver
from streamgen.testing.simulator.fast_forward import FastForward
from streamgen.testing.simulator.series import Point, Series
from streamgen.testing.simulator.traces import Prompts, TraceRequest, repeat_trace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from streamgen.messages import StepPlan
    from streamgen.scheduling.sequence import Sequence as ScheduledSequence
    from streamgen.scheduling.step import Step

STOP, OTHER = 0, 1  # ids that the device answers
STOP_IDS = (STOP,)


class Quantiles(Struct, frozen=True):
    """Of some times in seconds; 0 where there were none."""

    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    mean: float = 0.0
    most: float = 0.0

    @classmethod
    def of(cls, values: array[float]) -> Quantiles:
        """The smallest values that so many percent do not exceed."""
        if not values:
            return cls()
        ordered = sorted(values)
        p50, p90, p99 = (ordered[max(0, math.ceil(q * len(ordered)) - 1)] for q in (0.5, 0.9, 0.99))
        return cls(p50, p90, p99, math.fsum(ordered) / len(ordered), ordered[-1])


class ReplayReport(Struct, frozen=True, kw_only=True):
    """How the trace went. Tokens and rates are of virtual time.

    requests           that came; refused: of them, by code
    seconds            from the first arrival to the last end
    busy               share of that in which the device ran steps
    output_per_second, computed_per_second   tokens drawn, and rows that ran
    cache_hits         share of the prompts' tokens that were found instead of computed, at each one's first start
    first_token        seconds from arrival to the first token
    per_token          seconds between later tokens of a request, its mean
    queue              seconds from arrival to the first slot
    mean_waiting, most_waiting, mean_running, mean_pages   over virtual time; pages are held ones, of num_pages
    points             the same over time, for plots
    """

    requests: int
    finished: int
    refused: dict[str, int]
    seconds: float
    busy: float
    steps: int
    rows_per_step: float
    prompt_tokens: int
    output_tokens: int
    output_per_second: float
    computed_per_second: float
    cache_hits: float
    preemptions: int
    first_token: Quantiles
    per_token: Quantiles
    queue: Quantiles
    mean_waiting: float
    most_waiting: int
    mean_running: float
    mean_pages: float
    limits: Limits
    cost: CostModel
    points: tuple[Point, ...]


def replay(
    trace: Sequence[TraceRequest],
    *,
    limits: Limits,
    cost: CostModel = DEMO_ON_TWO_CORES,
    scale: float = 1.0,
    repeat: int = 1,
    seed: int = 0,
    knows_lengths: bool = False,
    fast_forward: bool = True,
) -> ReplayReport:
    """Let a trace's requests come and see how they fare.

    limits         of the scheduler; without a prefix cache where the trace does not say what prompts have in common

    scale          arrivals come so many times as fast
    repeat         the trace comes so many times in a row, with jitter and fresh prefixes; see `repeat_trace`
    fast_forward   steps in which everybody only draws another token are not planned one by one; the report is the same
    knows_lengths  `max_tokens` is what the trace says, so that the scheduler knows how long each answer will be

    Raises:
        ConfigError: a value out of its range.
    """
    if not (math.isfinite(scale) and scale > 0.0):
        raise ConfigError(f"scale: expected > 0, got {scale}", option="scale")
    if not trace:
        raise ConfigError("trace: expected one request or more, got none", option="trace")
    if not any(request.blocks for request in trace):
        # Nothing would ever be found, and idle pages can be given away like free ones: only time would be lost.
        limits = structs.replace(limits, prefix_cache=False)
    coming = repeat_trace(list(trace), repeat, Random(seed))
    return Replay(coming, limits=limits, cost=cost, scale=scale, knows_lengths=knows_lengths).run(
        fast_forward=fast_forward
    )


class _Life:
    """When what happened to a request."""

    __slots__ = ("arrival", "first_token", "num_tokens", "started")

    def __init__(self, arrival: float) -> None:
        self.arrival = arrival
        self.started: float | None = None
        self.first_token = 0.0


class Replay:
    """One run. It is the scheduler's journal, too: that tells once for each request what steps would tell for each."""

    def __init__(
        self,
        coming: Iterator[tuple[int, TraceRequest]],
        *,
        limits: Limits,
        cost: CostModel,
        scale: float,
        knows_lengths: bool,
    ) -> None:
        self._coming, self._scale, self._knows_lengths = coming, scale, knows_lengths
        self._limits, self._cost = limits, cost
        self._driver = Driver(cost=cost, execute=self._execute, heard=self._heard)
        self._scheduler = Scheduler(limits, prefix_key=b"replay", clock=self._driver.clock, journal=self)
        self._prompts = Prompts()
        self._next: tuple[int, TraceRequest] | None = None
        self._num_requests = self._num_finished = 0
        self._refused: dict[str, int] = {}
        self._lives: dict[int, _Life] = {}
        self._lengths: dict[int, int] = {}  # of the answers of open requests
        self._ends = [0] * limits.max_running  # by slot: position of the row that samples the last token
        self._first_tokens, self._per_tokens, self._queues = array("d"), array("d"), array("d")
        self._prompt_tokens = self._cached_tokens = 0
        self._series = Series()

    def run(self, *, fast_forward: bool) -> ReplayReport:
        """To the end of the trace, and of everything in it."""
        self._expect()
        idle = FastForward(self._driver, self._scheduler, ends=self._ends, token=OTHER, over=self._note_decodes)
        while self._driver.turn(self._scheduler):
            if fast_forward:
                idle.skip()
        stats, seconds = self._scheduler.stats(), self._driver.now
        per_second = 1.0 / seconds if seconds else 0.0
        return ReplayReport(
            requests=self._num_requests,
            finished=self._num_finished,
            refused=self._refused,
            seconds=seconds,
            busy=self._driver.busy_seconds * per_second,
            steps=stats.steps,
            rows_per_step=stats.computed_tokens / max(1, stats.steps),
            prompt_tokens=self._prompt_tokens,
            output_tokens=stats.output_tokens,
            output_per_second=stats.output_tokens * per_second,
            computed_per_second=stats.computed_tokens * per_second,
            cache_hits=self._cached_tokens / max(1, self._prompt_tokens),
            preemptions=stats.preemptions,
            first_token=Quantiles.of(self._first_tokens),
            per_token=Quantiles.of(self._per_tokens),
            queue=Quantiles.of(self._queues),
            mean_waiting=self._series.mean("waiting"),
            most_waiting=self._series.most_waiting,
            mean_running=self._series.mean("running"),
            mean_pages=self._series.mean("pages"),
            limits=self._limits,
            cost=self._cost,
            points=self._series.points(),
        )

    # ---- requests -----------------------------------------------------------------------------------------------

    def _expect(self) -> None:
        """The next request of the trace comes when its time has come."""
        self._next = next(self._coming, None)
        if self._next is not None:
            self._driver.at(self._next[1].time / self._scale, self._arrive)

    def _arrive(self) -> None:
        assert self._next is not None, "an arrival without a request"
        turn, request = self._next
        now, number = self._driver.now, self._num_requests
        self._num_requests += 1
        prompt = self._prompts.make(request, turn)
        length = max(1, request.output_tokens)
        most = length if self._knows_lengths else self._limits.max_context
        # The seed is how the device knows whose answer it gives.
        admit = Admit(
            request_id=number,
            prompt_ids=prompt,
            sampling=ResolvedSampling(seed=number),
            max_tokens=most,
            stop_ids=STOP_IDS,
            arrival=now,
        )
        self._lengths[number] = length
        refused = self._scheduler.admit(admit)
        if refused is not None:
            del self._lengths[number]
            self._refused[refused.code] = self._refused.get(refused.code, 0) + 1
        self._expect()

    # ---- the device ---------------------------------------------------------------------------------------------

    def _execute(self, plan: StepPlan) -> StepDone:
        ends = self._ends
        for begin in plan.begins:
            ends[begin.slot] = begin.num_prompt + self._lengths.get(begin.sampling.seed, 0) - 2
        tokens = [
            (() if not samples else _LAST if start + count > ends[slot] else _NOT_LAST)
            for slot, start, count, samples in zip(plan.slots, plan.starts, plan.counts, plan.samples, strict=True)
        ]
        return StepDone(step=plan.step, tokens=tuple(tokens))

    def _heard(self, plan: StepPlan | None) -> None:
        if plan is None:
            return
        self._scheduler.take_progress()
        self._note(sum(plan.counts), sum(plan.samples), self._scheduler._cache.pool.num_held)

    def _note_decodes(self, num_rows: int, num_pages: int) -> None:
        """A step was left out."""
        self._note(num_rows, num_rows, num_pages)

    def _note(self, num_rows: int, num_outputs: int, num_pages: int) -> None:
        scheduler = self._scheduler
        self._series.add(
            self._driver.now,
            waiting=len(scheduler._queue),
            running=len(scheduler._batch),
            pages=num_pages,
            rows=num_rows,
            outputs=num_outputs,
        )

    # ---- journal ------------------------------------------------------------------------------------------------

    def admitted(self, request: Admit) -> None:
        """It waits."""
        self._lives[request.request_id] = _Life(self._driver.now)

    def started(self, sequence: ScheduledSequence) -> None:
        """It has a slot, maybe not for the first time."""
        life = self._lives[sequence.request.request_id]
        if life.started is None:
            life.started = self._driver.now
            self._queues.append(life.started - life.arrival)
            self._prompt_tokens += sequence.num_prompt
            self._cached_tokens += sequence.cached_tokens

    def planned(self, step: Step) -> None:
        """Nothing to note."""

    def completed(self, step: Step, seconds: float) -> None:
        """Nothing to note."""

    def first_token(self, sequence: ScheduledSequence) -> None:
        """Its wait is over."""
        life = self._lives[sequence.request.request_id]
        life.first_token = self._driver.now
        self._first_tokens.append(life.first_token - life.arrival)

    def preempted(self, sequence: ScheduledSequence) -> None:
        """The scheduler counts them."""

    def finished(self, sequence: ScheduledSequence, reason: str) -> None:
        """It has all its tokens."""
        number = sequence.request.request_id
        life = self._lives.pop(number)
        del self._lengths[number]
        self._num_finished += 1
        if sequence.num_outputs > 1:
            self._per_tokens.append((self._driver.now - life.first_token) / (sequence.num_outputs - 1))


_LAST, _NOT_LAST = (STOP,), (OTHER,)
