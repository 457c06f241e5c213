"""Who guesses the next tokens of a sequence, so that one step can check several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from streamgen.scheduling.sequence import Sequence


class Drafter(Protocol):
    """Guesses what comes next. Guesses change how fast a sequence goes, never what it says."""

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        """Tokens that may follow `sequence.ids`; empty where no guess is worth a row. Reads only."""
        ...
