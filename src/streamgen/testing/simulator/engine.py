"""A whole engine in virtual time: its four actors, mailboxes, doors and time limits, and the hosts that read, as tasks
of one loop. Only weights, threads and the system's clock are missing, so a seed fixes every interleaving.

Each host submits a request and reads it at its own pace, or gives up: by a cancel from elsewhere, by leaving its scope,
by a time limit, or because it reads too slowly. A cancel ends a request in the very moment. In the end everybody has
one terminal, what was read is what the request says alone, or a beginning of that, and nothing is held.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import anyio
from msgspec import Struct

from streamgen.actors import deadlines
from streamgen.actors.core import Core
from streamgen.actors.door import Door
from streamgen.actors.routes import Routes
from streamgen.config import EngineOptions, MemoryPlan
from streamgen.errors import AdmissionError, ConfigError
from streamgen.mailbox import Mailbox
from streamgen.messages import Admit, Cancel, Fault, Resume, StepDone, StepPlan, Submit
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.limits import Limits
from streamgen.testing.simulator.checks import check_books, check_idle, require
from streamgen.testing.simulator.cost import DEMO_ON_TWO_CORES
from streamgen.testing.simulator.hash_model import VOCABULARY, HashModel, solo_output
from streamgen.testing.simulator.simulation import SimulationFailed
from streamgen.testing.simulator.virtual_loop import VirtualLoop
from streamgen.testing.simulator.virtual_world import SimulatedWorld

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from streamgen.completion import Delta

LIMITS = Limits(num_pages=48, max_running=6, step_tokens=48, max_context=256, max_queued=64)
WAYS = ("reads", "reads", "reads", "cancel", "scope", "timeout", "first_token_timeout", "pause", "slow")
SETTLE_SECONDS = 5.0
MOMENT = 1e-6
SLOW_SECONDS = 8.0  # between two looks of a reader that is behind


class EngineFaults(Struct, frozen=True, kw_only=True):
    """What goes wrong at the device: chances of a step to raise, of a sequence's rows to fail alone in a step."""

    step_errors: float = 0.01
    faults: float = 0.002


class EngineReport(Struct, frozen=True, kw_only=True):
    """What came of it; equal for equal seeds.

    endings   requests by how they ended: a finish reason, an error's code, or the code with which they were refused
    digest    hash of what each host read, and when
    """

    seed: int
    requests: int
    seconds: float
    steps: int
    endings: dict[str, int]
    digest: str


class NumberTokenizer:
    """Token 17 is " 17"."""

    vocab_size = VOCABULARY
    bos_id = None
    eos_ids: tuple[int, ...] = ()
    add_bos = False
    drops_leading_space = False
    special_ids = frozenset[int]()

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = True) -> list[int]:
        """Ids of a text."""
        return [int(part) for part in text.split()]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, at_start: bool = True) -> str:
        """The text of ids."""
        return text_of(ids)

    def byte_table(self, *, skip_special: bool) -> Mapping[int, bytes]:
        """Id -> bytes."""
        return {i: f" {i}".encode() for i in range(VOCABULARY)}

    def token_text(self, token_id: int) -> str:
        """A token as text to show."""
        return str(token_id)

    def is_special(self, token_id: int) -> bool:
        """None is."""
        return False


def text_of(ids: Iterable[int]) -> str:
    """What ids stand for."""
    return "".join(f" {i}" for i in ids)


class HashRunner:
    """The hash model, with faults."""

    def __init__(self, limits: Limits, random: Random, faults: EngineFaults) -> None:
        self._model = HashModel(num_pages=limits.num_pages, page_size=limits.page_size, num_slots=limits.max_running)
        self._random, self.faults = random, faults
        self.num_steps = 0

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        """One step."""
        self.num_steps += 1
        if self._random.random() < self.faults.step_errors:
            self._model.fail(plan, is_lost=False)
            raise RuntimeError("it was foreseen")
        done = self._model.execute(plan)
        chance = self.faults.faults
        found = [i for i in range(len(plan.slots)) if self._random.random() < chance]
        return StepDone(
            step=done.step,
            tokens=done.tokens,
            seconds=0.01,
            faults=tuple([Fault(i, "processor_error", "it was foreseen") for i in found]),
        )


class SimulatedModel:
    """What `Core` needs of a model."""

    chat_template = None
    supports_processors = False

    def __init__(self, limits: Limits, runner: HashRunner) -> None:
        self.limits, self.runner = limits, runner
        self.tokenizer = NumberTokenizer()
        self.processors: dict[int, tuple[Callable[..., object], ...]] = {}
        self.plan = MemoryPlan(
            weights=0,
            cache=0,
            workspace=0,
            headroom=0,
            page_bytes=0,
            num_pages=limits.num_pages,
            max_context=limits.max_context,
            max_running=limits.max_running,
        )


class Host:
    """One request and its reader."""

    processors: tuple[Callable[..., object], ...] = ()

    def __init__(self, number: int, random: Random, clock: Callable[[], float]) -> None:
        self.id = str(number)
        self.way = random.choice(WAYS)
        self.arrival = random.random() * 0.04 * number
        self.give_up_after = random.random() ** 2 * 1.5
        self.pace = random.choice((0.0, 0.0, 0.01, 0.1))
        self.prompt = tuple(random.randrange(VOCABULARY) for _ in range(random.randint(1, 70)))
        if random.random() < 0.3:
            self.prompt = (*range(32), *self.prompt)
        self.as_text = random.random() < 0.5
        # Slow readers have to be able to fall behind, by more than the detokenizer allows.
        self.max_tokens = 150 if self.way in ("pause", "slow") else random.randint(1, 40)
        self.sampling = ResolvedSampling(seed=number)
        self.mailboxes: tuple[Mailbox, ...] = (Mailbox(self.id, clock=clock),)
        self.deltas: list[tuple[float, Delta]] = []
        self.refused: str | None = None
        self.entered = self.cancelled = math.inf  # when

    def message(self, number: int) -> Submit:
        """The request."""
        now = self.mailboxes[0]._clock()
        return Submit(
            request_id=number,
            sampling=ResolvedSampling(seed=self.sampling.seed, max_tokens=self.max_tokens),
            text=text_of(self.prompt) if self.as_text else None,
            ids=None if self.as_text else self.prompt,
            on_slow={"pause": "pause", "slow": "cancel"}.get(self.way, "coalesce"),
            arrival=now,
            timeout=self.give_up_after if self.way == "timeout" else None,
            first_token_timeout=self.give_up_after / 4 if self.way == "first_token_timeout" else None,
        )

    def moved(self, thread: object, number: int) -> None:
        """There is only one thread."""


class EngineSimulation:
    """One run of an engine and its hosts. Everything runs on `loop`."""

    def __init__(self, seed: int, *, requests: int, limits: Limits, faults: EngineFaults) -> None:
        self.random = Random(seed)
        self.loop = VirtualLoop(seed)
        self.runner = HashRunner(limits, Random(seed + 1), faults)
        self._limits = limits
        self._model = SimulatedModel(limits, self.runner)
        self._world = SimulatedWorld(self.loop, self.random, DEMO_ON_TWO_CORES)
        self.routes = Routes()
        self.hosts = [Host(i, self.random, self._world.clock) for i in range(1, requests + 1)]
        self.core: Core | None = None

    def run(self) -> None:
        """From the first request until nothing is left."""
        anyio.run(self._main, backend="asyncio", backend_options={"loop_factory": lambda: self.loop})

    async def _main(self) -> None:
        options = EngineOptions()
        self.core = core = Core(
            self._model,  # type: ignore[arg-type]  # the part of a model that Core uses
            options,
            routes=self.routes,
            world=self._world,
            loop=asyncio.get_running_loop(),
            name="simulated",
        )
        self.routes.door = Door(max_running=self._limits.max_running, max_queued=self._limits.max_queued, tenants={})
        async with anyio.create_task_group() as actors:
            await core.start(actors)
            async with anyio.create_task_group() as group:
                for host in self.hosts:
                    group.start_soon(self._live, host)
            self.runner.faults = EngineFaults(step_errors=0.0, faults=0.0)
            await anyio.sleep(SETTLE_SECONDS)  # rows that were planned ahead
            self._check_all_free(core)
            actors.cancel_scope.cancel()
        core.stop()

    async def _live(self, host: Host) -> None:
        await anyio.sleep(host.arrival)
        assert self.core is not None, "hosts live while the core does"
        try:
            message = self.routes.enter(host, check=lambda: None, forecast=self.core.scheduler.forecast)
        except AdmissionError as error:
            host.refused = error.code
            return
        number, mailbox, host.entered = message.request_id, host.mailboxes[0], self._world.clock()
        mailbox.when_caught_up(partial(self._post_aside, number))
        self.loop.call_soon_threadsafe(self._accept, message)
        async with anyio.create_task_group() as group:
            if host.way == "cancel":
                group.start_soon(self._cancel_later, host, number)
            await self._read_scoped(host, number)
            group.cancel_scope.cancel()

    async def _read_scoped(self, host: Host, number: int) -> None:
        with anyio.move_on_after(host.give_up_after if host.way == "scope" else None):
            try:
                await self._read(host)
            finally:
                self._give_up(host, number)
                with anyio.move_on_after(SETTLE_SECONDS, shield=True):
                    await host.mailboxes[0].wait_end()

    async def _read(self, host: Host) -> None:
        mailbox = host.mailboxes[0]
        while True:
            await mailbox.wait_output()
            delta = mailbox.take()
            if delta is not None:
                host.deltas.append((self._world.clock(), delta))
            elif mailbox.end is not None:
                return
            await anyio.sleep(SLOW_SECONDS if host.way in ("pause", "slow") else host.pace)

    async def _cancel_later(self, host: Host, number: int) -> None:
        await anyio.sleep(host.give_up_after)
        self._give_up(host, number)

    def _give_up(self, host: Host, number: int) -> None:
        if host.mailboxes[0].end is None:
            host.cancelled = min(host.cancelled, self._world.clock())
            self._cancel(number, "cancelled")

    def _accept(self, message: Submit) -> None:
        route = self.routes.get(message.request_id)
        if route is not None and self.core is not None:
            deadlines.arm(route, loop=self.loop, now=self._world.clock(), cancel=self._cancel)
            self.core.post(message)

    def _cancel(self, number: int, reason: str) -> None:
        if self.core is not None:
            self.loop.call_soon_threadsafe(self.core.post, Cancel(request_id=number, reason=reason))

    def _post_aside(self, number: int) -> None:
        if self.core is not None:
            self.loop.call_soon_threadsafe(self.core.post_aside, Resume(request_id=number, index=0))

    # ---- checks -------------------------------------------------------------------------------------------------

    def _check_all_free(self, core: Core) -> None:
        scheduler = core.scheduler._scheduler
        check_books(scheduler)
        check_idle(scheduler)
        require(not len(self.routes), f"requests {self.routes.numbers()} are open after everybody has left")

    def check_host(self, host: Host) -> str:
        """What a host read is right; how it ended."""
        if host.refused is not None:
            return host.refused
        end, result = host.mailboxes[0].end, host.mailboxes[0].completion()
        if end is None:
            raise SimulationFailed(f"request {host.id} has no end")
        admit = Admit(request_id=0, prompt_ids=host.prompt, sampling=host.sampling, max_tokens=host.max_tokens)
        most = min(host.max_tokens, self._limits.max_context - len(host.prompt))
        alone = solo_output(admit, 0, most, page_size=self._limits.page_size)
        ids = list(result.ids)
        require(ids == alone[: len(ids)], f"request {host.id}: said something else than alone")
        require(result.text == text_of(ids), f"request {host.id}: its text is not that of its ids")
        require(result.usage.completion_tokens == len(ids), f"request {host.id}: tokens were counted wrongly")
        read = [i for _, delta in host.deltas for i in delta.ids]
        require(read == ids[: len(read)], f"request {host.id}: its reader got something else")
        ending = end.code or str(end.finish_reason)
        if ending == "length":
            require(ids == alone, f"request {host.id}: ended early")
        else:
            require(
                ending in ("cancelled", *ENDS.get(host.way, ()), *FAULTS), f"request {host.id}: ended with {ending}"
            )
        self._check_times(host, result.timings.finished or 0.0)
        require(ending != "cancelled" or host.way in ("cancel", "scope"), f"request {host.id}: cancelled by nobody")
        return ending

    def _check_times(self, host: Host, ended: float) -> None:
        """Whoever is cancelled ends then, and nobody lives longer than his time limit."""
        require(
            ended <= host.cancelled + MOMENT, f"request {host.id}: ended {ended - host.cancelled} s after its cancel"
        )
        limit = host.entered + host.give_up_after if host.way == "timeout" else math.inf
        require(ended <= limit + MOMENT, f"request {host.id}: ended {ended - limit} s after its time limit")


ENDS = {
    "timeout": ("deadline", "deadline_exceeded"),
    "first_token_timeout": ("deadline", "deadline_exceeded"),
    "slow": ("slow_consumer",),
}
FAULTS = ("processor_error", "generation_error")


def simulate_engine(
    seed: int, *, requests: int = 100, limits: Limits = LIMITS, faults: EngineFaults | None = None
) -> EngineReport:
    """Run an engine and its hosts in virtual time, on one loop whose order the seed shuffles.

    limits   of the engine; max_queued is the door's

    Raises:
        SimulationFailed: a promise was broken; the text says which, and how to see it again.
    """
    if requests < 1:
        raise ConfigError(f"requests: expected >= 1, got {requests}", option="requests")
    simulation = EngineSimulation(seed, requests=requests, limits=limits, faults=faults or EngineFaults())
    try:
        simulation.run()
        endings = Counter(simulation.check_host(host) for host in simulation.hosts)
    except Exception as error:
        raise SimulationFailed(
            f"{type(error).__name__}: {error}\n"
            f'python -c "from streamgen.testing.simulator import simulate_engine; '
            f'simulate_engine({seed}, requests={requests})"'
        ) from error
    digest = 0
    for host in simulation.hosts:
        for time, delta in host.deltas:
            digest = hash((digest, time, delta.ids))
    return EngineReport(
        seed=seed,
        requests=requests,
        seconds=simulation.loop.time(),
        steps=simulation.runner.num_steps,
        endings=dict(sorted(endings.items())),
        digest=f"{digest & (1 << 64) - 1:016x}",
    )
