"""The real scheduler against a hash model, in virtual time, from one seed, with every promise checked while it runs.

In a run everybody gets exactly one end; survivors say what they say alone, and the others a beginning of that; after
every step free + cached + held pages are all pages; when nothing is open nothing is held; and once nothing more
comes and nothing goes wrong any more, everything ends within a bound. The same seed gives the same run, step for step.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.errors import ConfigError
from streamgen.messages import Cancel, Fault, Pause, Refused, Resume, StepDone, StepFailed, StopFound, Unpin
from streamgen.scheduling.admission import output_limit
from streamgen.scheduling.scheduler import Scheduler
from streamgen.testing.simulator.checks import (
    InvariantBroken,
    check_books,
    check_idle,
    check_plan,
    check_sums,
    require,
)
from streamgen.testing.simulator.driver import Driver
from streamgen.testing.simulator.hash_model import HashModel, solo_output
from streamgen.testing.simulator.scenario import Scenario, scenario_named
from streamgen.testing.simulator.workload import NUM_PINS, Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.messages import Admit, Progress, StepPlan
    from streamgen.testing.simulator.workload import Fate

CHECK_BOOKS_EVERY = 64  # steps
MAX_STEPS_PER_TOKEN = 20  # in the last phase: preempted ones are computed again
CODES = {name: i for i, name in enumerate(("stop", "length", "stopped", "error", "cancelled", "deadline"), 1)}
RESTART_SECONDS = 1.0  # until an executor that died has a successor


class SimulationReport(Struct, frozen=True, kw_only=True):
    """What came of a simulation; equal for equal seeds.

    endings    sequences by `finish`, and requests by the code with which they were refused
    seconds    of virtual time; busy_seconds: of them, those in which the device ran steps
    failures   steps that failed, by kind
    digest     hash of everything that happened, in order
    """

    scenario: str
    seed: int
    requests: int
    seconds: float
    busy_seconds: float
    steps: int
    endings: dict[str, int]
    failures: dict[str, int]
    output_tokens: int
    computed_tokens: int
    cached_tokens: int
    preemptions: int
    digest: str


class SimulationFailed(AssertionError):
    """A promise was broken; the last line of the text is the command that does it again."""


class _Open:
    """A request that has not ended: what was heard of it."""

    __slots__ = ("ended", "fate", "heard", "num_failures", "outputs", "request", "was_stopped")

    def __init__(self, request: Admit, fate: Fate) -> None:
        self.request = request
        self.fate = fate
        self.outputs: list[list[int]] = [[] for _ in range(request.num_sequences)]
        self.heard = self.ended = 0  # bits by index
        self.was_stopped = False
        self.num_failures = 0


def simulate(
    seed: int,
    *,
    requests: int = 1000,
    scenario: str | Scenario = "mixed",
    check_books_every: int = CHECK_BOOKS_EVERY,
    log: Callable[[str], object] | None = None,
) -> SimulationReport:
    """Run a scenario to its end.

    seed       everything that is random comes from it
    requests   how many come
    scenario   one of SCENARIOS, or your own
    check_books_every   steps between two looks at every single page
    log        is given a line for everything that happens

    Raises:
        SimulationFailed: the scheduler broke a promise; the text ends with the command that shows it again.
        ConfigError: there is no such scenario, or no request is to be made.
    """
    if requests < 1 or check_books_every < 1:
        raise ConfigError(f"requests, check_books_every: expected >= 1, got {requests}, {check_books_every}")
    name = scenario if isinstance(scenario, str) else "custom"
    chosen = scenario_named(scenario) if isinstance(scenario, str) else scenario
    simulation = Simulation(chosen, seed, requests=requests, check_books_every=check_books_every, log=log)
    try:
        simulation.run()
    except Exception as error:
        raise SimulationFailed(_describe(error, simulation, name)) from error
    return simulation.report(name)


def _describe(error: Exception, simulation: Simulation, name: str) -> str:
    shown = f"--scenario {name!r}" if " " in name else f"--scenario {name}"
    if name == "custom":
        shown = "--scenario <the same Scenario, from code>"
    return (
        f"{type(error).__name__}: {error} (at {simulation.driver.now:.6f} s, step {simulation.num_steps})\n"
        f"streamgen simulate --seed {simulation.seed} --requests {simulation.num_requests} {shown}"
    )


class Simulation:
    """One run. `driver.now` and `num_steps` tell how far it is."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        *,
        requests: int,
        check_books_every: int = CHECK_BOOKS_EVERY,
        log: Callable[[str], object] | None = None,
    ) -> None:
        limits = scenario.limits
        self.seed, self.num_requests, self.num_steps = seed, requests, 0
        self.driver = Driver(cost=scenario.cost, execute=self._execute, heard=self._heard)
        self.scheduler = Scheduler(limits, prefix_key=b"simulation", clock=self.driver.clock, tenants=scenario.tenants)
        self.model = HashModel(num_pages=limits.num_pages, page_size=limits.page_size, num_slots=limits.max_running)
        self._scenario, self._limits = scenario, limits
        self._random = Random(seed)  # of what comes; faults have their own, so that one does not shift the other
        self._faults = Random(seed + 1)
        self._workload = Workload(scenario, self._random)
        self._check_books_every = check_books_every
        self._log = log
        self._open: dict[int, _Open] = {}
        self._special: set[int] = set()  # open requests to which something happens at the device
        self._has_failures = scenario.has_failures
        self._failed_generation = -1
        self._num_left = requests
        self._num_outputs = 0
        self._endings: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._digest = 0

    # ---- the run ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """From the first arrival until nothing is left."""
        self.driver.at(0.0, self._arrive)
        while self._num_left and self.driver.turn(self.scheduler):
            pass
        self._run_to_the_end()
        check_books(self.scheduler)
        check_idle(self.scheduler)
        require(not self._open, f"requests {sorted(self._open)[:8]} have no end")
        require(self.scheduler.stats().output_tokens == self._num_outputs, "tokens counted are not tokens given")
        for i in range(NUM_PINS):
            self.scheduler.unpin(Unpin(key=f"pin {i}"))
        require(self.scheduler.stats().pages_pinned == 0, "pages are pinned under no key")

    def _run_to_the_end(self) -> None:
        """Nothing more comes and nothing goes wrong: all must end, within steps in proportion to what is open."""
        self.driver.forget_coming()
        self._has_failures = False
        for request_id, entry in self._open.items():
            for index in range(entry.request.num_sequences):
                self.scheduler.resume(Resume(request_id=request_id, index=index))
        self._heard(None)
        num_tokens = sum(
            e.request.num_sequences * (len(e.request.prompt_ids) + e.request.max_tokens) for e in self._open.values()
        )
        bound = self.num_steps + 1000 + MAX_STEPS_PER_TOKEN * num_tokens
        while self.driver.turn(self.scheduler):
            require(self.num_steps < bound, f"{len(self._open)} requests have not ended within the bound: no progress")

    def report(self, name: str) -> SimulationReport:
        """What came of it."""
        stats = self.scheduler.stats()
        return SimulationReport(
            scenario=name,
            seed=self.seed,
            requests=self.num_requests,
            seconds=self.driver.now,
            busy_seconds=self.driver.busy_seconds,
            steps=stats.steps,
            endings=dict(sorted(self._endings.items())),
            failures=dict(sorted(self._failures.items())),
            output_tokens=stats.output_tokens,
            computed_tokens=stats.computed_tokens,
            cached_tokens=stats.cached_tokens,
            preemptions=stats.preemptions,
            digest=f"{self._digest & (1 << 64) - 1:016x}",
        )

    # ---- requests -----------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        now = self.driver.now
        request, fate = self._workload.next_request(now)
        self._num_left -= 1
        if self._num_left:
            self.driver.at(now + self._random.expovariate(self._scenario.requests_per_second), self._arrive)
        refused = self.scheduler.admit(request)
        if self._log is not None:
            self._log(f"{now:.6f} arrives {request.request_id} {len(request.prompt_ids)}+{request.max_tokens}")
        if refused is not None:
            self._refuse(refused)
            return
        self._open[request.request_id] = _Open(request, fate)
        if fate.is_guilty or fate.faults_at is not None:
            self._special.add(request.request_id)
        self._foresee(request, fate, now)

    def _foresee(self, request: Admit, fate: Fate, now: float) -> None:
        """Say when what happens to a request happens."""
        number, index = request.request_id, request.num_sequences - 1
        if fate.cancel is not None:
            cancel = Cancel(request_id=number, reason=fate.reason)
            self.driver.at(now + fate.cancel, lambda: self._tell(cancel, self.scheduler.cancel))
        if fate.stop is not None:
            stop = StopFound(request_id=number, index=index)
            self.driver.at(now + fate.stop, lambda: self._stop(stop))
        if fate.pause is not None and fate.resume is not None:
            pause, resume = Pause(request_id=number, index=index), Resume(request_id=number, index=index)
            self.driver.at(now + fate.pause, lambda: self._tell(pause, self.scheduler.pause))
            self.driver.at(now + fate.resume, lambda: self._tell(resume, self.scheduler.resume))

    def _tell(self, message: Cancel | Pause | Resume | StopFound, call: Callable[..., None]) -> None:
        if self._log is not None:
            self._log(f"{self.driver.now:.6f} {type(message).__name__.lower()} {message.request_id}")
        call(message)

    def _stop(self, message: StopFound) -> None:
        entry = self._open.get(message.request_id)
        if entry is not None:
            entry.was_stopped = True
        self._tell(message, self.scheduler.stop_found)

    def _refuse(self, refused: Refused) -> None:
        known = refused.code in ("engine_overloaded", "prompt_too_long", "rate_limited")
        require(known, f"request {refused.request_id} was refused with {refused.code}: {refused.message}")
        self._endings[refused.code] += 1

    # ---- the device ---------------------------------------------------------------------------------------------

    def _execute(self, plan: StepPlan) -> StepDone | StepFailed:
        check_plan(plan, self._limits)
        if plan.generation == self._failed_generation:
            return self._fail(plan, "skipped")
        if not self._has_failures:
            return self.model.execute(plan)
        ids = self.model.processors_of(plan)
        chance = self._faults.random()
        if chance < self._scenario.losses:
            self.driver.stall(RESTART_SECONDS)
            return self._fail(plan, "lost", ids)
        special = self._special.intersection(ids)
        is_guilty = any(self._open[number].fate.is_guilty for number in special if number in self._open)
        if is_guilty or chance < self._scenario.losses + self._scenario.step_errors:
            return self._fail(plan, "error", ids)
        done = self.model.execute(plan)
        faults = self._find_faults(ids) if special else ()
        return StepDone(step=done.step, tokens=done.tokens, faults=faults) if faults else done

    def _find_faults(self, ids: list[int | None]) -> tuple[Fault, ...]:
        """Sequences whose time has come."""
        faults = []
        for i, number in enumerate(ids):
            entry = self._open.get(number) if number in self._special and number is not None else None
            if entry is None or entry.fate.faults_at is None:
                continue
            if self._faults.randrange(8) <= entry.fate.faults_at:
                entry.num_failures = 2
                faults.append(Fault(i, "processor_error", "it was foreseen"))
        return tuple(faults)

    def _fail(self, plan: StepPlan, kind: str, ids: list[int | None] | None = None) -> StepFailed:
        self._failures[kind] += 1
        if kind != "skipped":
            self._failed_generation = plan.generation
            self.model.fail(plan, is_lost=kind == "lost")
            for number in ids or ():
                if number in self._open:
                    self._open[number].num_failures += 1
        return StepFailed(step=plan.step, message="it was foreseen", kind=kind)

    # ---- what the scheduler says --------------------------------------------------------------------------------

    def _heard(self, plan: StepPlan | None) -> None:
        if plan is not None:
            self._digest = hash((self._digest, self.driver.now, plan.step, plan.slots, plan.starts, plan.counts))
            if self._log is not None:
                self._log(f"{self.driver.now:.6f} step {plan.step}: {sum(plan.counts)} rows, slots {plan.slots}")
            self.num_steps += 1
            check_sums(self.scheduler)
            if self.num_steps % self._check_books_every == 0:
                check_books(self.scheduler)
                if not self._open:
                    check_idle_but_plans(self.scheduler)
        for entry in self.scheduler.take_progress():
            self._take(entry)

    def _take(self, entry: Progress) -> None:
        number, index = entry.request_id, entry.index
        request, bit = self._open.get(number), 1 << index
        if request is None or request.ended & bit:
            raise InvariantBroken(f"request {number}, {index}: something was said after its end")
        if (entry.cached_tokens is None) != bool(request.heard & bit):
            raise InvariantBroken(f"request {number}, {index}: cached tokens were told twice, or not first")
        request.heard |= bit
        if entry.ids:
            request.outputs[index] += entry.ids
            self._num_outputs += len(entry.ids)
        if entry.finish is not None:
            self._end(request, index, entry)

    def _end(self, request: _Open, index: int, entry: Progress) -> None:
        number, output, finish = entry.request_id, request.outputs[index], entry.finish or "none"
        self._endings[finish] += 1
        self._digest = hash((self._digest, number, index, tuple(output), CODES.get(finish, 0)))
        if self._log is not None:
            self._log(f"{self.driver.now:.6f} ends {number},{index}: {finish}, {len(output)} tokens")
        self._check_output(request, index, finish)
        request.ended |= 1 << index
        if request.ended == (1 << request.request.num_sequences) - 1:
            del self._open[number]
            self._special.discard(number)

    def _check_output(self, entry: _Open, index: int, finish: str) -> None:
        request, output, fate = entry.request, entry.outputs[index], entry.fate
        most = output_limit(request, self._limits)
        expected = solo_output(request, index, most, page_size=self._limits.page_size)
        name = f"request {request.request_id}, {index}"
        if finish in ("stop", "length"):
            require(output == expected, f"{name}: said something else than alone")
            is_stop = bool(output) and output[-1] in request.stop_ids
            require(is_stop == (finish == "stop"), f"{name}: ended with {finish}")
            return
        require(output == expected[: len(output)], f"{name}: said something else than alone, before {finish}")
        if finish == "stopped":
            require(entry.was_stopped, f"{name}: was stopped by nobody")
        elif finish == "error":
            require(fate.is_guilty or entry.num_failures >= 2, f"{name}: failed without a reason")
        else:
            require(fate.cancel is not None and finish == fate.reason, f"{name}: ended as {finish}")


def check_idle_but_plans(scheduler: Scheduler) -> None:
    """Nothing is open, though rows that nobody needs may be under way: nothing is held but pins."""
    require(scheduler.stats().pages_used == 0, "pages are held while nothing is open")
