"""The five actors of one engine, wired: what runs on the engine's loop, without the thread around it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from streamgen.actors.compiler import CompilerActor, GrammarCompiler
from streamgen.actors.detokenizer import Detokenizer, DetokenizerActor
from streamgen.actors.executor import ExecutorActor
from streamgen.actors.scheduler import PLANS_IN_FLIGHT, SchedulerActor
from streamgen.actors.tokenizer import PromptEncoder, TokenizerActor
from streamgen.actors.watchdog import StepDeadlines, Watchdog
from streamgen.messages import StepFailed
from streamgen.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    import anyio

    from streamgen.actors.actor import Actor
    from streamgen.actors.detokenizer import Routes
    from streamgen.actors.model import OpenModel
    from streamgen.actors.world import World
    from streamgen.config import EngineOptions
    from streamgen.messages import Cancel, Resume, StepDone, StepPlan, Submit, Unpin
    from streamgen.scheduling.journal import Journal

TOKENIZER_THREADS = 2
MAX_SEQUENCES = 16  # of one request
MESSAGES_PER_SEQUENCE = 12  # more than one can have in any inbox: submission, cancels, answers, pauses, its end


def _nothing() -> None:
    """Default of `Core.on_wedged`."""


class Core:
    """One engine's actors over an open model. Everything but `stop` runs on `loop`.

    routes   where outputs go
    world    clock, threads and randomness
    on_wedged   called when a step is over its deadline and nothing can end it; the engine fails then
    """

    def __init__(
        self,
        model: OpenModel,
        options: EngineOptions,
        *,
        routes: Routes,
        world: World,
        loop: asyncio.AbstractEventLoop,
        name: str,
        journal: Journal | None = None,
        on_wedged: Callable[[], None] = _nothing,
    ) -> None:
        limits = model.limits
        capacity = MESSAGES_PER_SEQUENCE * (limits.max_running + options.max_queued + MAX_SEQUENCES)
        self.workers = world.make_workers(TOKENIZER_THREADS, name=f"{name}-tokenizer", loop=loop)
        self.device = world.make_device(model.runner, name=f"{name}-device", loop=loop, deliver=self._deliver)
        self._runner = model.runner
        self._on_wedged = on_wedged
        self._watchdog = Watchdog(
            StepDeadlines(world.min_step_deadline),
            loop=loop,
            clock=world.clock,
            running=lambda: self.device.running,
            on_overdue=self._end_overdue,
        )
        self.encoder = PromptEncoder(
            model.tokenizer, model.chat_template, model.formats, max_context=model.plan.max_context
        )
        self._executor = executor = ExecutorActor(self.device, capacity=PLANS_IN_FLIGHT + 1)
        # The scheduler and its neighbours post to each other, hence the late-bound `self.scheduler`.
        detokenizer = DetokenizerActor(
            Detokenizer(model.tokenizer, routes, formats=model.formats),
            to_scheduler=lambda m: self.scheduler.post(m),
            capacity=capacity,
        )
        self.scheduler = SchedulerActor(
            Scheduler(
                limits,
                prefix_key=world.random_bytes(32),
                clock=world.clock,
                tenants=options.tenants,
                journal=journal,
            ),
            to_executor=self._send,
            to_detokenizer=detokenizer.post,
            clock=world.clock,
            capacity=capacity,
        )
        self.compiler = CompilerActor(
            GrammarCompiler(model),
            model.grammars,
            make_worker=lambda: world.make_workers(1, name=f"{name}-compiler", loop=loop),
            clock=world.clock,
            capacity=capacity,
        )
        self.tokenizer = TokenizerActor(
            self.encoder,
            self.workers,
            eos_ids=tuple(sorted(model.tokenizer.eos_ids)),
            max_context=model.plan.max_context,
            to_scheduler=self.scheduler.post,
            to_detokenizer=detokenizer.post,
            to_compiler=self.compiler.post,
            capacity=capacity,
        )
        # Receivers first.
        self._actors: list[Actor[Any]] = [detokenizer, executor, self.scheduler, self.compiler, self.tokenizer]

    async def start(self, group: anyio.abc.TaskGroup) -> None:
        """Run the actors as tasks of `group`; returns when each is ready."""
        for actor in self._actors:
            await group.start(partial(_run_actor, actor), name=actor.name)

    def post(self, message: Submit | Cancel) -> None:
        """A request, or the end of one: what a request's own messages may not overtake."""
        self.tokenizer.post(message)

    def post_aside(self, message: Resume | Unpin) -> None:
        """What needs no place behind a request's submission."""
        self.scheduler.post(message)

    def _send(self, plan: StepPlan) -> None:
        self._watchdog.sent(plan)
        self._executor.post(plan)

    def _deliver(self, result: StepDone | StepFailed) -> None:
        self._watchdog.ended(result)
        self.scheduler.post(result)

    def _end_overdue(self, step: int, seconds: float) -> None:
        """A process can be killed, and another takes its place; of a thread nothing is left but to give it up."""
        kill = getattr(self._runner, "kill", None)
        if kill is not None:
            kill()
            return
        self._on_wedged()
        why = f"step {step} has been running for {seconds:.1f} s, far over its deadline"
        self.scheduler.post(StepFailed(step=step, message=why, kind="dead"))

    def stop(self) -> None:
        """End the threads; blocks until what they run is over. Any thread, once the actors are gone."""
        self.device.stop()
        self.workers.stop()
        self.compiler.stop()


async def _run_actor(actor: Actor[Any], *, task_status: anyio.abc.TaskStatus[None]) -> None:
    await actor.run(task_status=task_status)
