"""The engine thread: loads the model, runs the actors in one task group, and sees to it that everything ends.

Host threads call `submit`, `cancel`, `call` and `stop`; all of them return at once. Whatever happens to the thread,
every request that was accepted gets its one terminal, because it is entered in `routes` before it is posted, and
the routes are closed after the state has changed, under one lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from streamgen.actors import deadlines
from streamgen.actors.call import Call
from streamgen.actors.compiler import Compile
from streamgen.actors.core import Core
from streamgen.actors.detokenizer import refused_end
from streamgen.actors.door import Door
from streamgen.actors.routes import Route, Routes
from streamgen.actors.scheduler import DeviceFailed
from streamgen.actors.sleeper import Sleeper
from streamgen.actors.workers import EngineOwnedThread, host_has_ended
from streamgen.config import EngineState, LoadProgress
from streamgen.errors import EngineClosed, EngineFailed, LoadError, StreamgenError
from streamgen.mailbox import End, Signal
from streamgen.messages import Cancel, Resume, Submit, Unpin

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.actors.compiler import CompiledGrammar
    from streamgen.actors.model import ModelOpener, OpenModel
    from streamgen.actors.recorder import Recorder
    from streamgen.actors.routes import Owner
    from streamgen.actors.scheduler import SchedulerActor
    from streamgen.actors.tokenizer import PromptEncoder
    from streamgen.actors.world import World
    from streamgen.config import EngineOptions
    from streamgen.grammar.source import GrammarSource

logger = logging.getLogger(__name__)

T = TypeVar("T")

HOST_CHECK_SECONDS = 0.25
RESTART_GRACE = 0.08  # seconds in which a restart saves requests that had no output when the engine failed

TAKES_REQUESTS = (EngineState.READY, EngineState.ASLEEP)
_OPEN = (*TAKES_REQUESTS, EngineState.DRAINING)


class EngineThread:
    """One life of an engine, from loading to closed.

    A host that exits without closing is not held up: the engine notices within HOST_CHECK_SECONDS and closes itself.
    """

    def __init__(
        self,
        opener: ModelOpener,
        options: EngineOptions,
        on_progress: Callable[[LoadProgress], None] | None,
        *,
        name: str,
        world: World,
        recorder: Recorder,
    ) -> None:
        self.state = EngineState.LOADING
        self.progress: LoadProgress | None = None
        self.opened = Signal()  # loaded and ready, or failed to: then `load_error`
        self.closed = Signal()  # nothing of the engine is left
        self.load_error: BaseException | None = None
        self.failure: str | None = None
        self.routes = Routes()
        self.world = world
        self.recorder = recorder
        self._opener = opener
        self._options = options
        self._on_progress = on_progress
        self._name = name
        self._stopping = threading.Event()
        self._rescued = threading.Event()  # after a failure: somebody took the requests that can go on
        self._calls: set[Call[Any]] = set()
        self._signals: set[Signal] = set()  # of those who wait for sleep or waking
        self._model: OpenModel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._core: Core | None = None
        self._sleeper: Sleeper | None = None
        self._is_wedged = False
        self.thread = EngineOwnedThread(self._run, name=name)

    # ---- any thread ----

    def start(self) -> None:
        """Begin to load."""
        self.thread.start()

    @property
    def model(self) -> OpenModel:
        """The open model.

        Raises:
            EngineClosed, EngineFailed: there is none.
        """
        model = self._model
        if model is None or self.state not in _OPEN:
            raise self._not_open()
        return model

    @property
    def encoder(self) -> PromptEncoder:
        """Prompt -> ids.

        Raises:
            EngineClosed, EngineFailed: the engine is not open.
        """
        core = self._core
        if core is None:
            raise self._not_open()
        return core.encoder

    def check_ready(self) -> None:
        """Raise if no request can be taken now.

        Raises:
            EngineClosed, EngineFailed: the engine is not open, or not any more.
        """
        if self.state not in TAKES_REQUESTS:
            raise self._not_open()

    def submit(self, owner: Owner) -> int:
        """Take a request. Returns its number.

        Raises:
            EngineOverloaded, RateLimited: too many wait, or it would start too late.
            EngineClosed, EngineFailed: the engine is not open, or not any more.
        """
        actor = self._scheduler_actor
        message = self.routes.enter(owner, check=self.check_ready, forecast=None if actor is None else actor.forecast)
        self._post(self._accept, message)
        return message.request_id

    def adopt(self, owner: Owner) -> None:
        """Take over a request from an engine thread that failed."""
        message = self.routes.adopt(owner)
        self._post(self._accept, message)
        owner.moved(self, message.request_id)  # NOTE: it may post a cancel, which must come second

    def cancel(self, number: int, reason: str = "cancelled") -> None:
        """End a request soon. Takes no lock: it may run in a garbage collection, anywhere."""
        self._post(self._cancel, number, reason)

    def resume(self, number: int, index: int) -> None:
        """The reader of a sequence has caught up."""
        self._post(self._post_aside, Resume(request_id=number, index=index))

    def unpin(self, key: str) -> None:
        """Pages kept under this key may go. Takes no lock."""
        self._post(self._post_aside, Unpin(key=key))

    def call(self, function: Callable[[], T]) -> Call[T]:
        """Run a function in a tokenizer thread."""
        call: Call[T] = Call()
        with self.routes.lock:
            if self.state not in _OPEN:
                raise self._not_open()
            self._calls.add(call)
        self._post(self._start_call, call, function)
        return call

    def compile(self, source: GrammarSource) -> Call[CompiledGrammar]:
        """Have a grammar compiled, or find it compiled already."""
        call: Call[CompiledGrammar] = Call()
        with self.routes.lock:
            if self.state not in _OPEN:
                raise self._not_open()
            self._calls.add(call)
        self._post(self._compile, call, source)
        return call

    def drain(self) -> Signal:
        """Take no more requests; the signal is set when the last one has ended."""
        with self.routes.lock:
            was_open = self.state in TAKES_REQUESTS
            if was_open:
                self.state = EngineState.DRAINING
        if was_open:
            self.recorder.state_changed(EngineState.DRAINING)
            # Nobody need read any more: who paused goes on to the end.
            for number in self.routes.numbers():
                for mailbox in self.routes.mailboxes(number) or ():
                    mailbox.collect()
        return self.routes.idle_signal()

    def sleep(self, *, keep_weights: bool) -> Signal:
        """Give the memory back once nothing is open; the signal is set then, or when the engine ends."""
        done = self._new_signal()
        self._post(self._sleep, keep_weights, done)
        return done

    def wake(self) -> Signal:
        """Take the memory again; the signal is set then, or when the engine ends."""
        done = self._new_signal()
        self._post(self._wake, done)
        return done

    def _new_signal(self) -> Signal:
        signal = Signal()
        with self.routes.lock:
            self.check_ready()
            self._signals.add(signal)
        return signal

    def cancel_all(self) -> None:
        """End every open request soon, as closing would."""
        self._post(self._close_routes, _closed_end())

    def stop(self) -> None:
        """Close, whatever the state. Returns at once; `closed` tells when."""
        self._stopping.set()
        self._rescued.set()
        self._post(self._set_stop)

    def rescue(self) -> list[Owner]:
        """After a failure: the requests that had no output yet, to be adopted by another thread."""
        owners: list[Owner] = []
        for number in self.routes.numbers():
            route = self.routes.get(number)
            if route is not None and _can_go_on(route) and self.routes.take(number) is not None:
                owners.append(route.owner)
        self._rescued.set()
        return owners

    @property
    def scheduler(self) -> SchedulerActor | None:
        """The scheduler's actor, for its snapshots; None before and after."""
        return self._scheduler_actor

    @property
    def _scheduler_actor(self) -> SchedulerActor | None:
        core = self._core
        return None if core is None else core.scheduler

    def _post(self, call: Callable[..., object], *arguments: object) -> None:
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            return  # the loop is closed: every route got its terminal, or is about to

    def _not_open(self) -> StreamgenError:
        match self.state:
            case EngineState.FAILED:
                return EngineFailed(self.failure or "the engine failed")
            case EngineState.LOADING:
                return EngineClosed("the engine is still loading: await open(), or use `async with`")
            case EngineState.DRAINING:
                return EngineClosed("the engine is draining and takes no more requests")
            case _:
                return EngineClosed("the engine is closed: open it with `async with`")

    # ---- engine thread ----

    def _run(self) -> None:
        state = EngineState.CLOSED
        try:
            self._model = self._opener.open(self._options, self._report_progress, self._is_given_up)
            anyio.run(
                self._serve,
                self._model,
                backend="asyncio",
                backend_options={"loop_factory": self.world.loop_factory},
            )
        except BaseException as e:
            state = self._fail(e)
        finally:
            self._finish(state)

    def _report_progress(self, progress: LoadProgress) -> None:
        self.progress = progress
        if self._on_progress is not None:
            self._on_progress(progress)

    def _is_given_up(self) -> bool:
        return self._stopping.is_set() or host_has_ended()

    def _fail(self, error: BaseException) -> EngineState:
        if not self.opened.is_set():
            self.load_error = _first_cause(error)
            if self._stopping.is_set():
                self.load_error = EngineClosed("the engine was closed while it was loading")
                self.load_error.__cause__ = error
            return EngineState.CLOSED
        cause = _first_cause(error)
        logger.error("engine %s failed: %s", self._name, type(cause).__name__)
        logger.debug("engine %s failed", self._name, exc_info=error)
        # Words of a device, or of loading, are about those; those of a bug may quote a prompt.
        why = (
            str(cause)
            if isinstance(cause, DeviceFailed | LoadError)
            else f"{type(cause).__name__} in the engine thread"
        )
        self.failure = f"the engine failed: {why}"
        return EngineState.FAILED

    def _finish(self, state: EngineState) -> None:
        self._set_state(state)
        self.routes.on_idle = None  # requests may be taken out by other threads from here on
        end = _closed_end()
        if state is EngineState.FAILED:
            end = End(finish_reason="error", code="engine_failed", message=self.failure or "the engine failed")
            self._await_rescue(end)
        self.routes.end_all(end)
        for call in tuple(self._calls):
            call.finish(None, self._not_open())
        self._calls.clear()
        for signal in tuple(self._signals):
            signal.set()
        try:
            self._free()
        finally:  # whatever freeing did, nobody may wait for ever
            self.opened.set()
            self.closed.set()

    def _await_rescue(self, end: End) -> None:
        """End what cannot go on at once; what had no output yet waits a moment for a restart."""
        routes = [(number, self.routes.get(number)) for number in self.routes.numbers()]
        self.routes.end(*[n for n, route in routes if route is not None and not _can_go_on(route)], end=end)
        if len(self.routes):
            self._rescued.wait(RESTART_GRACE)

    def _free(self) -> None:
        core, model = self._core, self._model
        self._core, self._model, self._sleeper = None, None, None
        if core is not None and self._is_wedged:
            # NOTE: a step may still be in the model's memory. It is freed when that step comes back, if ever.
            core.workers.stop()
            core.compiler.stop()
            core.device.abandon(model.close if model is not None else lambda: None)
            return
        if core is not None:
            core.stop()
        if model is not None:
            model.close()

    async def _serve(self, model: OpenModel) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        if self._stopping.is_set():
            return
        self._core = core = Core(
            model,
            self._options,
            routes=self.routes,
            world=self.world,
            loop=loop,
            name=self._name,
            journal=self.recorder.attach(self.routes.name_of),
            on_wedged=self._note_wedged,
        )
        self.routes.on_taken = self._forget
        self._sleeper = sleeper = Sleeper(
            model,
            core,
            self.routes,
            loop=loop,
            set_state=self._set_state,
            is_cancelled=self._is_given_up,
            idle_sleep=self._options.idle_sleep,
        )
        async with anyio.create_task_group() as group:
            await core.start(group)
            group.start_soon(sleeper.run)
            self.routes.door = Door(
                max_running=model.limits.max_running,
                max_queued=self._options.max_queued,
                tenants=self._options.tenants,
            )
            self._set_state(EngineState.READY)
            self.opened.set()
            group.start_soon(self._watch_host, self._stop)
            await self._stop.wait()
            group.cancel_scope.cancel()

    async def _watch_host(self, stop: asyncio.Event) -> None:
        while not host_has_ended():  # noqa: ASYNC110  # Python tells nobody when its main thread ends
            await anyio.sleep(HOST_CHECK_SECONDS)
        stop.set()

    def _set_state(self, state: EngineState) -> None:
        with self.routes.lock:
            if self.state is EngineState.DRAINING and state in TAKES_REQUESTS:
                return
            self.state = state
        self.recorder.state_changed(state)

    def _note_wedged(self) -> None:
        self._is_wedged = True

    def _accept(self, message: Submit) -> None:
        route = self.routes.get(message.request_id)
        if route is None or self._core is None or self._sleeper is None or self._loop is None:
            return  # it got its terminal while the post was under way
        deadlines.arm(route, loop=self._loop, now=self.world.clock(), cancel=self._cancel)
        if message.has_processors:
            self.model.processors[message.request_id] = route.owner.processors
        if not self._sleeper.accept(message):
            self._core.post(message)

    def _cancel(self, number: int, reason: str) -> None:
        if self.routes.get(number) is None or self._core is None or self._sleeper is None:
            return
        if self._sleeper.is_held(number):
            self.routes.end(number, end=refused_end(reason))
        else:
            self._core.post(Cancel(request_id=number, reason=reason))

    def _sleep(self, keep_weights: bool, done: Signal) -> None:
        if self._sleeper is not None:
            self._sleeper.sleep(keep_weights=keep_weights, done=self._forgotten(done))

    def _wake(self, done: Signal) -> None:
        if self._sleeper is not None:
            self._sleeper.wake(self._forgotten(done))

    def _forgotten(self, done: Signal) -> Callable[[], None]:
        def set_it() -> None:
            self._signals.discard(done)
            done.set()

        return set_it

    def _post_aside(self, message: Resume | Unpin) -> None:
        if self._core is not None:
            self._core.post_aside(message)

    def _start_call(self, call: Call[T], function: Callable[[], T]) -> None:
        def done(result: T | None, error: BaseException | None) -> None:
            self._calls.discard(call)
            call.finish(result, error)

        assert self._core is not None, "a call was accepted while nothing is open"
        self._core.workers.submit(function, done)

    def _compile(self, call: Call[CompiledGrammar], source: GrammarSource) -> None:
        def answer(key: str, grammar: CompiledGrammar | None, error: StreamgenError | None) -> None:
            self._calls.discard(call)
            call.finish(grammar, error)

        if self._core is not None:  # else closing has given the call its end
            self._core.compiler.post(Compile(source=source, answer=answer))

    def _forget(self, number: int) -> None:
        """A request has ended: what it has in the model's tables goes."""
        core, model = self._core, self._model
        if core is not None and model is not None:
            model.processors.pop(number, None)
            core.compiler.release(number)

    def _set_stop(self) -> None:
        if self._stop is not None:
            self._stop.set()

    def _close_routes(self, end: End) -> None:
        """Give every open request its terminal, and tell the scheduler where it still runs."""
        for number in self.routes.numbers():
            self._cancel(number, "cancelled")
        self.routes.end_all(end)


def _can_go_on(route: Route) -> bool:
    """Whether a restart may run it again: nobody has seen anything of it."""
    return not route.has_tokens


def _closed_end() -> End:
    return End(finish_reason="cancelled", code="engine_closed", message="the engine was closed while the request ran")


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
