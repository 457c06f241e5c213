"""What the scheduler tells of its decisions, for events and traces: a call per happening, none where nobody listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from streamgen.messages import Admit
    from streamgen.scheduling.sequence import Sequence
    from streamgen.scheduling.step import Step


class Journal(Protocol):
    """Hears of each decision when it is taken, on the scheduler's thread; is quick, and keeps no sequences."""

    def admitted(self, request: Admit) -> None:
        """A request waits from now on."""
        ...

    def started(self, sequence: Sequence) -> None:
        """A sequence took a slot; `cached_tokens` of it were found."""
        ...

    def planned(self, step: Step) -> None:
        """A step is on its way to the executor."""
        ...

    def completed(self, step: Step, seconds: float) -> None:
        """A step's results came, before they are accounted for; the forward took `seconds`."""
        ...

    def first_token(self, sequence: Sequence) -> None:
        """A sequence has its first output token."""
        ...

    def preempted(self, sequence: Sequence) -> None:
        """A sequence lost its slot and waits again."""
        ...

    def finished(self, sequence: Sequence, reason: str) -> None:
        """A sequence ended, with the `finish` of its last Progress."""
        ...
