"""What an actor is: a name, a bounded inbox, and one loop that handles what is in it.

Actors run as tasks of one task group on the engine thread. An actor that raises ends the group; the supervisor then
ends every open request. Handling is synchronous, so an actor never holds half of a change while another runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

M = TypeVar("M")


class Actor(ABC, Generic[M]):
    """Receives messages of type M, in order, one at a time. Everything but `__init__` runs on the engine thread."""

    name: str

    def __init__(self, *, capacity: int) -> None:
        self._sender, self._inbox = anyio.create_memory_object_stream[M](capacity)

    def post(self, message: M) -> None:
        """Put a message into the inbox; dropped once the actor has ended.

        NOTE: never waits, so actors that post to each other cannot lock each other out. Capacities follow from the most
        requests that may be open, hence a full inbox is a bug, and WouldBlock may end the engine.
        """
        try:
            self._sender.send_nowait(message)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass  # the engine is closing; open requests are ended by the supervisor

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Handle messages until cancelled."""
        with self._sender, self._inbox:
            task_status.started()
            async for message in self._inbox:
                self.handle(message)
                self._handle_waiting()
                self.settle()

    def _handle_waiting(self) -> None:
        # What came meanwhile belongs to the same turn. The count is taken before, so that a turn ends.
        for _ in range(self._inbox.statistics().current_buffer_used):
            self.handle(self._inbox.receive_nowait())

    @abstractmethod
    def handle(self, message: M) -> None:
        """Take one message."""

    def settle(self) -> None:
        """Send what a turn brought. Called when the inbox has been emptied."""
