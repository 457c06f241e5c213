"""The engine thread: loads the model, runs the actors in one task group, and sees to it that everything ends.

Host threads call `submit`, `cancel`, `call` and `stop`; all of them return at once. Whatever happens to the thread,
every request that was accepted gets its one terminal, because it is entered in `_routes` before it is posted, and
the routes are closed after the state has changed, under one lock.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

from streamgen.actors.detokenizer import Detokenizer, DetokenizerActor
from streamgen.actors.device import Device
from streamgen.actors.executor import ExecutorActor
from streamgen.actors.scheduler import PLANS_IN_FLIGHT, DeviceFailed, SchedulerActor
from streamgen.actors.tokenizer import PromptEncoder, TokenizerActor
from streamgen.actors.workers import EngineOwnedThread, Workers, host_has_ended
from streamgen.config import EngineState
from streamgen.errors import EngineClosed, EngineFailed, EngineOverloaded, StreamgenError
from streamgen.mailbox import End, Mailbox, Signal, Wakes
from streamgen.messages import Cancel, Submit
from streamgen.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.actors.actor import Actor
    from streamgen.actors.model import ModelOpener, OpenModel
    from streamgen.actors.scheduler import StepTimes
    from streamgen.config import EngineOptions, LoadProgress
    from streamgen.scheduling.stats import SchedulerStats

logger = logging.getLogger(__name__)

T = TypeVar("T")

TOKENIZER_THREADS = 2
HOST_CHECK_SECONDS = 0.25
MAX_SEQUENCES = 16  # of one request
MESSAGES_PER_SEQUENCE = 8  # more than one can have in any inbox: submission, two cancels, an answer, its end


class Call(Generic[T]):
    """A call that runs in a tokenizer thread; `done` is set when `result` can be had."""

    def __init__(self) -> None:
        self.done = Signal()
        self._result: T | None = None
        self._error: BaseException | None = None

    def finish(self, result: T | None, error: BaseException | None) -> None:
        """The outcome; only the first one counts."""
        if not self.done.is_set():
            self._result, self._error = result, error
            self.done.set()

    def result(self) -> T:
        """What the call returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # set by finish


class _Route:
    """An open request: where its output goes, and the timer that ends it."""

    __slots__ = ("mailboxes", "timer")

    def __init__(self, mailboxes: tuple[Mailbox, ...]) -> None:
        self.mailboxes = mailboxes
        self.timer: asyncio.TimerHandle | None = None


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
    ) -> None:
        self.state = EngineState.LOADING
        self.opened = Signal()  # loaded and ready, or failed to: then `load_error`
        self.closed = Signal()  # nothing of the engine is left
        self.load_error: BaseException | None = None
        self.failure: str | None = None
        self.num_requests = 0
        self.token_counts = (0, 0)  # prompt and completion tokens of requests that ended
        self._opener = opener
        self._options = options
        self._on_progress = on_progress
        self._name = name
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._routes: dict[int, _Route] = {}
        self._num_open = 0  # sequences
        self._numbers = itertools.count(1)
        self._idle: Signal | None = None
        self._calls: set[Call[Any]] = set()
        self._model: OpenModel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._tokenizer_actor: TokenizerActor | None = None
        self._scheduler_actor: SchedulerActor | None = None
        self._device: Device | None = None
        self._text_workers: Workers | None = None
        self.encoder: PromptEncoder | None = None
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
        if model is None or self.state not in (EngineState.READY, EngineState.DRAINING):
            raise self._not_open()
        return model

    def check_ready(self) -> None:
        """Raise if no request can be taken now.

        Raises:
            EngineClosed, EngineFailed: the engine is not open, or not any more.
        """
        if self.state is not EngineState.READY:
            raise self._not_open()

    def submit(self, make: Callable[[int], Submit], mailboxes: tuple[Mailbox, ...]) -> int:
        """Take a request; `make` gets its number. Returns the number.

        Raises:
            EngineOverloaded: too many wait.
            EngineClosed, EngineFailed: the engine is not open, or not any more.
        """
        limit = self.model.limits.max_running + self._options.max_queued
        number = next(self._numbers)
        message = make(number)
        with self._lock:
            self.check_ready()
            is_full = self._num_open + len(mailboxes) > limit and self._num_open > 0
            if not is_full:
                self._routes[number] = _Route(mailboxes)
                self._num_open += len(mailboxes)
                self.num_requests += 1
        if is_full:
            raise EngineOverloaded(
                f"expected <= {limit} open requests (max_running + max_queued), got one more; try again later",
                retry_after=1.0,
            )
        self._post(self._accept, message)
        return number

    def cancel(self, number: int, reason: str = "cancelled") -> None:
        """End a request soon. Takes no lock: it may run in a garbage collection, anywhere."""
        self._post(self._cancel, number, reason)

    def call(self, function: Callable[[], T]) -> Call[T]:
        """Run a function in a tokenizer thread."""
        call: Call[T] = Call()
        with self._lock:
            if self.state not in (EngineState.READY, EngineState.DRAINING):
                raise self._not_open()
            self._calls.add(call)
        self._post(self._start_call, call, function)
        return call

    def drain(self) -> Signal:
        """Take no more requests; the signal is set when the last one has ended."""
        with self._lock:
            if self.state is EngineState.READY:
                self.state = EngineState.DRAINING
            if self._idle is None:
                self._idle = Signal()
            idle, is_idle = self._idle, not self._routes
        if is_idle:
            idle.set()
        return idle

    def cancel_all(self) -> None:
        """End every open request soon, as closing would."""
        self._post(self._close_routes, _closed_end())

    def stop(self) -> None:
        """Close, whatever the state. Returns at once; `closed` tells when."""
        self._stopping.set()
        self._post(self._set_stop)

    def scheduler_stats(self) -> SchedulerStats | None:
        """The scheduler's last snapshot; None before and after."""
        actor = self._scheduler_actor
        return None if actor is None else actor.stats

    def step_times(self) -> StepTimes | None:
        """Where the time of steps goes; None before and after."""
        actor = self._scheduler_actor
        return None if actor is None else actor.times

    @property
    def num_open_requests(self) -> int:
        """Submitted and not ended."""
        return len(self._routes)

    def _post(self, call: Callable[..., None], *arguments: object) -> None:
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
            self._model = self._opener.open(self._options, self._on_progress, self._is_given_up)
            anyio.run(self._serve, self._model, backend="asyncio")
        except BaseException as e:
            state = self._fail(e)
        finally:
            self._finish(state)

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
        # A device's words are about the device; those of a bug may quote a prompt.
        why = str(cause) if isinstance(cause, DeviceFailed) else f"{type(cause).__name__} in the engine thread"
        self.failure = f"the engine failed: {why}"
        return EngineState.FAILED

    def _finish(self, state: EngineState) -> None:
        with self._lock:
            self.state = state
        end = _closed_end()
        if state is EngineState.FAILED:
            end = End(finish_reason="error", code="engine_failed", message=self.failure or "the engine failed")
        self._close_routes(end)
        for call in tuple(self._calls):
            call.finish(None, self._not_open())
        self._calls.clear()
        try:
            self._free()
        finally:  # whatever freeing did, nobody may wait for ever
            self.opened.set()
            self.closed.set()

    def _free(self) -> None:
        for threads in (self._device, self._text_workers):
            if threads is not None:
                threads.stop()
        if self._model is not None:
            self._model.close()
        self._model, self.encoder, self._device, self._text_workers = None, None, None, None
        self._scheduler_actor, self._tokenizer_actor = None, None

    async def _serve(self, model: OpenModel) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        if self._stopping.is_set():
            return
        actors = self._make_actors(model, self._loop)
        async with anyio.create_task_group() as group:
            for actor in actors:
                await group.start(partial(_run_actor, actor), name=actor.name)
            with self._lock:
                self.state = EngineState.READY
            self.opened.set()
            group.start_soon(self._watch_host, self._stop)
            await self._stop.wait()
            group.cancel_scope.cancel()

    async def _watch_host(self, stop: asyncio.Event) -> None:
        while not host_has_ended():  # noqa: ASYNC110  # Python tells nobody when its main thread ends
            await anyio.sleep(HOST_CHECK_SECONDS)
        stop.set()

    def _make_actors(self, model: OpenModel, loop: asyncio.AbstractEventLoop) -> list[Actor[Any]]:
        """The four actors; receivers before their senders."""
        limits = model.limits
        capacity = MESSAGES_PER_SEQUENCE * (limits.max_running + self._options.max_queued + MAX_SEQUENCES)
        text = Workers(TOKENIZER_THREADS, name=f"{self._name}-tokenizer", loop=loop)
        device = Device(model.runner, name=f"{self._name}-device", loop=loop, deliver=lambda m: scheduler.post(m))
        self._device, self._text_workers = device, text
        self.encoder = PromptEncoder(model.tokenizer, model.chat_template, max_context=model.plan.max_context)
        # The scheduler and its neighbours post to each other, hence the late-bound `to_scheduler`.
        scheduler: SchedulerActor
        executor = ExecutorActor(device, capacity=PLANS_IN_FLIGHT + 1)
        detokenizer = DetokenizerActor(
            Detokenizer(model.tokenizer, self), to_scheduler=lambda m: scheduler.post(m), capacity=capacity
        )
        scheduler = SchedulerActor(
            Scheduler(limits, prefix_key=os.urandom(32)),
            to_executor=executor.post,
            to_detokenizer=detokenizer.post,
            clock=time.perf_counter,
            capacity=capacity,
        )
        tokenizer = TokenizerActor(
            self.encoder,
            text,
            eos_ids=tuple(sorted(model.tokenizer.eos_ids)),
            max_context=model.plan.max_context,
            to_scheduler=scheduler.post,
            to_detokenizer=detokenizer.post,
            capacity=capacity,
        )
        self._scheduler_actor, self._tokenizer_actor = scheduler, tokenizer
        return [detokenizer, executor, scheduler, tokenizer]

    def _accept(self, message: Submit) -> None:
        route = self._routes.get(message.request_id)
        if route is None or self._tokenizer_actor is None or self._loop is None:
            return  # it got its terminal while the post was under way
        if message.timeout is not None:
            route.timer = self._loop.call_later(message.timeout, self._cancel, message.request_id, "deadline")
        self._tokenizer_actor.post(message)

    def _cancel(self, number: int, reason: str) -> None:
        if number in self._routes and self._tokenizer_actor is not None:
            self._tokenizer_actor.post(Cancel(request_id=number, reason=reason))

    def _start_call(self, call: Call[T], function: Callable[[], T]) -> None:
        def done(result: T | None, error: BaseException | None) -> None:
            self._calls.discard(call)
            call.finish(result, error)

        assert self._text_workers is not None, "a call was accepted while nothing is open"
        self._text_workers.submit(function, done)

    def _set_stop(self) -> None:
        if self._stop is not None:
            self._stop.set()

    # ---- Routes, for the detokenizer ----

    def mailboxes(self, request_id: int) -> tuple[Mailbox, ...] | None:
        """One mailbox per sequence; None where the request is unknown or over."""
        route = self._routes.get(request_id)
        return None if route is None else route.mailboxes

    def close(self, request_id: int) -> None:
        """Every sequence of the request has ended."""
        with self._lock:
            route = self._routes.pop(request_id, None)
            if route is None:
                return
            self._num_open -= len(route.mailboxes)
            idle = self._idle if not self._routes else None
        if route.timer is not None:
            route.timer.cancel()
        usages = [mailbox.usage for mailbox in route.mailboxes]
        prompt_tokens, completion_tokens = self.token_counts
        self.token_counts = (
            prompt_tokens + usages[0].prompt_tokens,
            completion_tokens + sum(usage.completion_tokens for usage in usages),
        )
        if idle is not None:
            idle.set()

    def _close_routes(self, end: End) -> None:
        """Give every open request its terminal, and tell the scheduler where it still runs."""
        wakes = Wakes()
        for number in tuple(self._routes):
            mailboxes = self.mailboxes(number) or ()
            self._cancel(number, "cancelled")
            self.close(number)
            for mailbox in mailboxes:
                wakes.add(mailbox.finish(end))
        wakes.flush()


async def _run_actor(actor: Actor[Any], *, task_status: anyio.abc.TaskStatus[None]) -> None:
    await actor.run(task_status=task_status)


def _closed_end() -> End:
    return End(finish_reason="cancelled", code="engine_closed", message="the engine was closed while the request ran")


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
