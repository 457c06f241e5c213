"""The open requests of an engine: where their output goes, and that each gets its one terminal.

Host threads enter requests here before they are posted; the engine thread closes them. So whatever happens to the
engine, no request that was accepted is forgotten. A request that had no output when its engine failed can be taken out
and entered into another engine thread.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Protocol

from streamgen.mailbox import End, Mailbox, Signal, Wakes

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from streamgen.actors.door import Door
    from streamgen.actors.supervisor import EngineThread
    from streamgen.messages import Submit
    from streamgen.scheduling.forecast import Forecast


class Owner(Protocol):
    """Who submitted a request, on the host's side."""

    id: str
    mailboxes: tuple[Mailbox, ...]
    processors: tuple[Callable[..., object], ...]

    def message(self, number: int) -> Submit:
        """The request, under this number."""
        ...

    def moved(self, thread: EngineThread, number: int) -> None:
        """The request is open in another engine thread, under another number."""
        ...


class Route:
    """An open request."""

    __slots__ = ("mailboxes", "message", "owner", "timers")

    def __init__(self, owner: Owner, message: Submit) -> None:
        self.owner = owner
        self.message = message
        self.mailboxes = owner.mailboxes
        self.timers: list[asyncio.TimerHandle] = []

    @property
    def has_tokens(self) -> bool:
        """Whether any of its sequences has output."""
        return any(mailbox.has_tokens for mailbox in self.mailboxes)


class Routes:
    """Requests by number. `enter` may be called by any thread; the rest belongs to the engine thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # NOTE: also held where the engine's state changes, so that both agree
        self.num_requests = 0
        self.token_counts = (0, 0)  # prompt and completion tokens of requests that ended
        self._routes: dict[int, Route] = {}
        self._numbers = itertools.count(1)
        self._idle: Signal | None = None
        self.door: Door | None = None  # there is one while requests can be taken
        self.on_idle: Callable[[], None] | None = None  # engine thread: the last request has ended
        self.on_taken: Callable[[int], object] | None = None  # engine thread: this one has

    def __len__(self) -> int:
        return len(self._routes)

    def enter(self, owner: Owner, *, check: Callable[[], None], forecast: Forecast | None) -> Submit:
        """Take a request; its message carries its number.

        Raises:
            AdmissionError: the door refuses it. Whatever `check`, called with the lock held, raises.
        """
        message = owner.message(next(self._numbers))
        with self.lock:
            check()
            assert self.door is not None, "an engine that takes requests has a door"
            refusal = self.door.refusal(message, forecast)
            if refusal is None:
                self._enter(owner, message)
        if refusal is not None:
            raise refusal
        return message

    def adopt(self, owner: Owner) -> Submit:
        """Take a request that another engine thread had accepted: nobody refuses it."""
        message = owner.message(next(self._numbers))
        with self.lock:
            self._enter(owner, message)
        return message

    def _enter(self, owner: Owner, message: Submit) -> None:
        assert self.door is not None, "an engine that takes requests has a door"
        self.door.enter(message)
        self._routes[message.request_id] = Route(owner, message)
        self.num_requests += 1

    def get(self, number: int) -> Route | None:
        """An open request; None where it is unknown or over."""
        return self._routes.get(number)

    def numbers(self) -> tuple[int, ...]:
        """Every open request."""
        return tuple(self._routes)

    def name_of(self, number: int) -> str:
        """The id that the host knows a request by."""
        route = self._routes.get(number)
        return "" if route is None else route.owner.id

    def mailboxes(self, request_id: int) -> tuple[Mailbox, ...] | None:
        """One mailbox per sequence; None where the request is unknown or over."""
        route = self._routes.get(request_id)
        return None if route is None else route.mailboxes

    def close(self, request_id: int) -> None:
        """Every sequence of the request has ended."""
        route = self.take(request_id)
        if route is None:
            return
        usages = [mailbox.usage for mailbox in route.mailboxes]
        prompt_tokens, completion_tokens = self.token_counts
        self.token_counts = (
            prompt_tokens + usages[0].prompt_tokens,
            completion_tokens + sum(usage.completion_tokens for usage in usages),
        )

    def take(self, request_id: int) -> Route | None:
        """Take a request out, without a terminal."""
        with self.lock:
            route = self._routes.pop(request_id, None)
            if route is None:
                return None
            if self.door is not None:
                self.door.leave(route.message)
            is_idle = not self._routes
            idle = self._idle if is_idle else None
        for timer in route.timers:
            timer.cancel()
        if self.on_taken is not None:
            self.on_taken(request_id)
        if idle is not None:
            idle.set()
        if is_idle and self.on_idle is not None:
            self.on_idle()
        return route

    def end(self, *numbers: int, end: End) -> None:
        """Give these requests their terminal, now."""
        wakes = Wakes()
        for number in numbers:
            mailboxes = self.mailboxes(number) or ()
            self.close(number)
            for mailbox in mailboxes:
                wakes.add(mailbox.finish(end))
        wakes.flush()

    def end_all(self, end: End) -> None:
        """Give every open request its terminal, now."""
        self.end(*self.numbers(), end=end)

    def idle_signal(self) -> Signal:
        """Set when no request is open any more. Call it when none can enter any more."""
        with self.lock:
            if self._idle is None:
                self._idle = Signal()
            idle, is_idle = self._idle, not self._routes
        if is_idle:
            idle.set()
        return idle
