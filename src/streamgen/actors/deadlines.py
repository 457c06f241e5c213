"""Time limits of requests: timers of the engine's loop that end a request as a cancel does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from streamgen.actors.routes import Route


def arm(
    route: Route,
    *,
    loop: asyncio.AbstractEventLoop,
    now: float,
    cancel: Callable[[int, str], None],
) -> None:
    """Start the timers that a request asks for; they are the route's, and end with it.

    now      on the clock that the request's arrival is on
    cancel   called with the request's number and the `Cancel.reason`
    """
    message = route.message
    limits = (
        ("deadline", message.timeout),
        ("queue_deadline", message.queue_timeout),
        ("first_token_deadline", message.first_token_timeout),
    )
    for reason, seconds in limits:
        if seconds is not None:
            delay = message.arrival + seconds - now
            route.timers.append(loop.call_later(delay, _expire, route, reason, cancel))


def _expire(route: Route, reason: str, cancel: Callable[[int, str], None]) -> None:
    is_met = {
        "queue_deadline": any(mailbox.is_started for mailbox in route.mailboxes),
        "first_token_deadline": route.has_tokens,
    }
    if not is_met.get(reason, False):
        cancel(route.message.request_id, reason)
