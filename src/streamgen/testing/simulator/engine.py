"""A whole engine in virtual time: its four actors, mailboxes, doors and time limits, and the hosts that read, as tasks
of one loop. Only weights, threads and the system's clock are missing, so a seed fixes every interleaving.

Each host submits a request and reads it at its own pace, or gives up: by a cancel from elsewhere, by leaving its scope,
by a time limit, or because it reads too slowly. A cancel ends a request in the very moment. In the end everybody has
one terminal, what was read is what the request says alone, or a beginning of that, and nothing is held.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from itertools import chain
from random import Random
from typing import TYPE_CHECKING, Any

import anyio
from msgspec import Struct

from streamgen.actors import deadlines
from streamgen.actors.core import Core
from streamgen.actors.door import Door
from streamgen.actors.routes import Routes
from streamgen.config import EngineOptions, MemoryPlan, Tenant
from streamgen.errors import AdmissionError, ConfigError
from streamgen.faults import ExecutorLost
from streamgen.messages import Cancel, Fault, Resume, StepDone, Unpin
from streamgen.scheduling.limits import Limits
from streamgen.testing.simulator.checks import check_books, check_idle, require
from streamgen.testing.simulator.cost import DEMO_ON_TWO_CORES
from streamgen.testing.simulator.hash_model import VOCABULARY, HashModel
from streamgen.testing.simulator.hosts import PINS, Host, text_of
from streamgen.testing.simulator.simulation import SimulationFailed
from streamgen.testing.simulator.virtual_loop import VirtualLoop
from streamgen.testing.simulator.virtual_world import SimulatedWorld

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from streamgen.messages import StepPlan, Submit

LIMITS = Limits(num_pages=48, max_running=6, step_tokens=48, max_context=256, max_queued=64)
TENANT_OPTIONS = {"small": Tenant(max_running=2, max_queued=20), "heavy": Tenant(weight=3.0)}
SETTLE_SECONDS = 5.0
SLOW_SECONDS = 8.0  # between two looks of a reader that is behind


class EngineFaults(Struct, frozen=True, kw_only=True):
    """What goes wrong at the device.

    step_errors   chance of a step to raise; losses: that the executor dies in it, with all pages
    faults        chance of a sequence's rows to fail alone in a step
    """

    step_errors: float = 0.01
    losses: float = 0.003
    faults: float = 0.002


CALM = EngineFaults(step_errors=0.0, losses=0.0, faults=0.0)


class EngineReport(Struct, frozen=True, kw_only=True):
    """What came of it; equal for equal seeds.

    losses    times the executor died
    endings   requests by how they ended: a finish reason, an error's code, or the code with which they were refused
    digest    hash of what each host read, and when
    """

    seed: int
    requests: int
    seconds: float
    steps: int
    losses: int
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


class HashRunner:
    """The hash model, with faults."""

    def __init__(self, limits: Limits, random: Random, faults: EngineFaults) -> None:
        self._model = HashModel(num_pages=limits.num_pages, page_size=limits.page_size, num_slots=limits.max_running)
        self._random, self.given, self.faults = random, faults, faults
        self.num_steps = self.num_losses = 0

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        """One step."""
        self.num_steps += 1
        random = self._random.random()
        if random < self.faults.losses:
            self.num_losses += 1
            self._model.fail(plan, is_lost=True)
            raise ExecutorLost("it was foreseen")
        if random < self.faults.losses + self.faults.step_errors:
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
        self.grammars: dict[str, Any] = {}
        self.formats = None
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
        options = EngineOptions(tenants=TENANT_OPTIONS)
        self.core = core = Core(
            self._model,  # type: ignore[arg-type]  # the part of a model that Core uses
            options,
            routes=self.routes,
            world=self._world,
            loop=asyncio.get_running_loop(),
            name="simulated",
        )
        self.routes.door = Door(
            max_running=self._limits.max_running, max_queued=self._limits.max_queued, tenants=TENANT_OPTIONS
        )
        async with anyio.create_task_group() as actors:
            await core.start(actors)
            async with anyio.create_task_group() as group:
                for host in self.hosts:
                    group.start_soon(self._live, host)
            self.runner.faults = CALM
            for pin in PINS:
                core.post_aside(Unpin(key=pin))
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
        number, host.entered = message.request_id, self._world.clock()
        for index, mailbox in enumerate(host.mailboxes):
            mailbox.when_caught_up(partial(self._post_aside, number, index))
        self.loop.call_soon_threadsafe(self._accept, message)
        async with anyio.create_task_group() as group:
            if host.way == "cancel":
                group.start_soon(self._cancel_later, host, number)
            await self._read_scoped(host, number)
            group.cancel_scope.cancel()

    async def _read_scoped(self, host: Host, number: int) -> None:
        with anyio.move_on_after(host.give_up_after if host.way == "scope" else None) as host.scope:
            try:
                async with anyio.create_task_group() as group:
                    for index in range(len(host.mailboxes)):
                        group.start_soon(self._read, host, index)
            finally:
                self._give_up(host, number)
                with anyio.move_on_after(SETTLE_SECONDS, shield=True):
                    for mailbox in host.mailboxes:
                        await mailbox.wait_end()

    async def _read(self, host: Host, index: int) -> None:
        mailbox = host.mailboxes[index]
        while True:
            await mailbox.wait_output()
            delta = mailbox.take()
            if delta is not None:
                host.deltas[index].append((self._world.clock(), delta))
            elif mailbox.end is not None:
                return
            await anyio.sleep(SLOW_SECONDS if host.way in ("pause", "slow") else host.pace)

    async def _cancel_later(self, host: Host, number: int) -> None:
        await anyio.sleep(host.give_up_after)
        self._give_up(host, number)

    def _give_up(self, host: Host, number: int) -> None:
        if any(mailbox.end is None for mailbox in host.mailboxes):
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

    def _post_aside(self, number: int, index: int) -> None:
        if self.core is not None:
            self.loop.call_soon_threadsafe(self.core.post_aside, Resume(request_id=number, index=index))

    # ---- checks -------------------------------------------------------------------------------------------------

    def _check_all_free(self, core: Core) -> None:
        scheduler = core.scheduler._scheduler
        check_books(scheduler)
        check_idle(scheduler)
        require(scheduler.stats().pages_pinned == 0, "pages are pinned under no key")
        require(not len(self.routes), f"requests {self.routes.numbers()} are open after everybody has left")

    def check_host(self, host: Host) -> str:
        """What a host read is right; how it ended."""
        return host.check(self._limits)


def _command(seed: int, requests: int, limits: Limits, faults: EngineFaults) -> str:
    """What does it again; sizes are named only where they are not the usual ones."""
    names, options = ["simulate_engine"], [f"{seed}", f"requests={requests}"]
    for name, value, default in (("limits", limits, LIMITS), ("faults", faults, EngineFaults())):
        if value != default:
            names.append(type(value).__name__)
            options.append(f"{name}={value!r}")
    imports = f"from streamgen.testing.simulator import {', '.join(sorted({*names} - {'Limits'}))}"
    if "Limits" in names:
        imports += "; from streamgen.scheduling.limits import Limits"
    return f'python -c "{imports}; simulate_engine({", ".join(options)})"'


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
        command = _command(seed, requests, limits, simulation.runner.given)
        raise SimulationFailed(f"{type(error).__name__}: {error}\n{command}") from error
    digest = 0
    for host in simulation.hosts:
        for time, delta in chain.from_iterable(host.deltas):
            digest = hash((digest, time, delta.ids))
    return EngineReport(
        seed=seed,
        requests=requests,
        seconds=simulation.loop.time(),
        steps=simulation.runner.num_steps,
        losses=simulation.runner.num_losses,
        endings=dict(sorted(endings.items())),
        digest=f"{digest & (1 << 64) - 1:016x}",
    )
