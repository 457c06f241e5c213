"""What an actor is: a name, a bounded inbox, and one loop that handles what is in it.

Actors run as tasks of one task group on the engine thread. An actor that raises ends the group; the supervisor then
ends every open request. Handling is synchronous, so an actor never holds half of a change while another runs.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

M = TypeVar("M")


class Actor(ABC, Generic[M]):
    """Receives messages of type M, in order, one at a time. Everything but `__init__` runs on the engine thread.

    The inbox is a plain queue and a future, not a memory stream of anyio's: three actors take a turn in every step, and
    a stream's price for each (events, checks for cancellation) is several times that of what the actors do.
    """

    name: str

    def __init__(self, *, capacity: int) -> None:
        self._capacity = capacity
        self._inbox: deque[M] = deque()
        self._wake: asyncio.Future[None] | None = None  # that `run` waits for, if it does
        self._has_ended = False

    def post(self, message: M) -> None:
        """Put a message into the inbox; dropped once the actor has ended.

        NOTE: never waits, so actors that post to each other cannot lock each other out. Capacities follow from the most
        requests that may be open, hence a full inbox is a bug, and WouldBlock may end the engine.
        """
        if self._has_ended:
            return  # the engine is closing; open requests are ended by the supervisor
        if len(self._inbox) >= self._capacity:
            raise anyio.WouldBlock
        self._inbox.append(message)
        wake, self._wake = self._wake, None
        if wake is not None and not wake.done():  # it is done where the actor is being cancelled
            wake.set_result(None)

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Handle messages until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            task_status.started()
            while True:
                if self._inbox:
                    await asyncio.sleep(0)  # the others have their turn between two of this one
                else:
                    self._wake = loop.create_future()
                    await self._wake
                self._handle_waiting()
                self.settle()
        finally:
            self._has_ended = True
            self._inbox.clear()

    def _handle_waiting(self) -> None:
        # What waits belongs to the same turn. The count is taken before, so that a turn ends.
        for _ in range(len(self._inbox)):
            self.handle(self._inbox.popleft())

    @abstractmethod
    def handle(self, message: M) -> None:
        """Take one message."""

    def settle(self) -> None:
        """Send what a turn brought. Called when the inbox has been emptied."""
