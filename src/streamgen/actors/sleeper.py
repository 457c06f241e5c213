"""Sleep: an idle engine gives its memory back, and takes it again when somebody wants something.

`Sleeper` is one task of the engine's loop. Requests that come while it sleeps are held, wake it, and go on in the order
in which they came.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from streamgen.config import EngineState

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.actors.core import Core
    from streamgen.actors.model import OpenModel
    from streamgen.actors.routes import Routes
    from streamgen.messages import Submit

T = TypeVar("T")


class Sleeper:
    """Decides nothing but the order of things; everything runs on the engine's loop.

    set_state   called with ASLEEP and READY
    idle_sleep  seconds without an open request after which it sleeps by itself; None: never
    """

    def __init__(
        self,
        model: OpenModel,
        core: Core,
        routes: Routes,
        *,
        loop: asyncio.AbstractEventLoop,
        set_state: Callable[[EngineState], None],
        is_cancelled: Callable[[], bool],
        idle_sleep: float | None,
    ) -> None:
        self._model = model
        self._core = core
        self._routes = routes
        self._loop = loop
        self._set_state = set_state
        self._is_cancelled = is_cancelled
        self._idle_sleep = idle_sleep
        self._timer: asyncio.TimerHandle | None = None
        self._keep_weights = False
        self._wants_sleep = asyncio.Event()
        self._wants_wake = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_resting = False  # from giving memory back to having it again
        self._is_asleep = False
        self._held: list[Submit] = []
        self._sleepers: list[Callable[[], None]] = []
        self._wakers: list[Callable[[], None]] = []
        routes.on_idle = self._on_idle
        self._arm()

    # ---- the engine's loop ----

    def accept(self, message: Submit) -> bool:
        """Whether the request has to wait until the engine is awake."""
        self._disarm()
        if not self._is_resting:
            return False
        self._held.append(message)
        self._wants_wake.set()
        return True

    def is_held(self, number: int) -> bool:
        """Whether this request waits for the engine to wake, unknown to the actors."""
        return any(message.request_id == number for message in self._held)

    def sleep(self, *, keep_weights: bool, done: Callable[[], None]) -> None:
        """Sleep as soon as nothing is open; `done` is called then."""
        if self._is_asleep:
            done()
            return
        self._sleepers.append(done)
        self._keep_weights = keep_weights
        self._wants_sleep.set()

    def wake(self, done: Callable[[], None]) -> None:
        """Be awake; `done` is called then. A sleep that has not begun is given up."""
        if self._is_resting:
            self._wakers.append(done)
            self._wants_wake.set()
            return
        self._wants_sleep.clear()
        self._is_idle.set()  # whoever waits to fall asleep looks again
        _call_all(self._sleepers)
        done()

    async def run(self) -> None:
        """Sleep and wake, for ever."""
        while True:
            await self._wants_sleep.wait()
            while self._routes and self._wants_sleep.is_set():
                self._is_idle.clear()
                await self._is_idle.wait()
            if self._wants_sleep.is_set():
                await self._rest()
            self._arm()

    async def _rest(self) -> None:
        self._disarm()
        self._is_resting = True
        self._wants_sleep.clear()
        self._wants_wake.clear()
        await self._core.scheduler.quiet()  # rows of requests that were cancelled may still run
        self._core.scheduler.forget_prefixes()
        await self._off_loop(lambda: self._model.sleep(keep_weights=self._keep_weights))
        self._is_asleep = True
        self._set_state(EngineState.ASLEEP)
        _call_all(self._sleepers)
        await self._wants_wake.wait()
        await self._off_loop(lambda: self._model.wake(self._is_cancelled))
        self._is_resting = self._is_asleep = False
        self._set_state(EngineState.READY)
        held, self._held = self._held, []
        for message in held:
            if self._routes.get(message.request_id) is not None:
                self._core.post(message)
        _call_all(self._wakers)

    async def _off_loop(self, call: Callable[[], T]) -> T:
        """Run a blocking call in a thread of the engine."""
        future: asyncio.Future[T] = self._loop.create_future()

        def done(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]  # what the call returned

        self._core.workers.submit(call, done)
        return await future

    # ---- the timer ----

    def _on_idle(self) -> None:
        self._is_idle.set()
        self._arm()

    def _arm(self) -> None:
        self._disarm()
        if self._idle_sleep is not None and not self._routes:
            self._timer = self._loop.call_later(self._idle_sleep, self._doze)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _doze(self) -> None:
        self._timer = None
        if not self._routes and not self._wants_sleep.is_set():
            self._keep_weights = False
            self._wants_sleep.set()


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
    calls.clear()
