"""Finding the sequence that makes a step fail: halves of the failed step run apart, and halves of the half that fails.

A group is cleared once all its sequences have got past the rows that they had in the step that failed. A sequence that
fails alone, a second time, is guilty. Everybody else goes on as if nothing had happened.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamgen.scheduling.sequence import Rows, Sequence

MAX_GUILTY = 8  # found in a row without a step that went well: then it is the device
MAX_FAILURES = 64  # likewise, of steps


class DeviceBroken(Exception):
    """Steps fail whoever is in them, or there is no device any more; the engine cannot go on."""


class Suspects:
    """Groups of sequences to be run apart, and where each of them has to get to."""

    def __init__(self) -> None:
        self._groups: deque[list[Sequence]] = deque()
        self._targets: dict[Sequence, int] = {}
        self._num_failures = 0
        self._num_guilty = 0

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._targets

    @property
    def group(self) -> list[Sequence]:
        """Those that run now, and nobody else in their steps."""
        return self._groups[0]

    def failed(self, rows: Iterable[Rows], message: str) -> Sequence | None:
        """A step with these rows failed. The guilty one, if that is clear now.

        Raises:
            DeviceBroken: it does not depend on who is in the step.
        """
        self._num_failures += 1
        ends = {r.sequence: r.start + r.count for r in rows if r.run == r.sequence.run}
        was_suspected = any(sequence in self._targets for sequence in ends)
        for sequence in ends:
            self.forget(sequence)
        if len(ends) == 1 and was_suspected:
            self._num_guilty += 1
            self._check(message)
            return next(iter(ends))
        self._check(message)
        self._targets.update(ends)
        members = list(ends)
        # The first time a lone sequence is simply tried once more.
        middle = len(members) // 2
        self._groups.extendleft(half for half in (members[middle:], members[:middle]) if half)
        return None

    def succeeded(self) -> None:
        """A step went well: those that have got far enough are cleared."""
        self._num_failures = self._num_guilty = 0
        while self._groups:
            self._groups[0] = [s for s in self._groups[0] if s.num_computed < self._targets[s]]
            if self._groups[0]:
                break
            self._groups.popleft()
        if self._targets:
            left = {s for group in self._groups for s in group}
            self._targets = {s: end for s, end in self._targets.items() if s in left}

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        if self._targets.pop(sequence, None) is not None:
            self._groups = deque(kept for group in self._groups if (kept := [s for s in group if s is not sequence]))

    def _check(self, message: str) -> None:
        if self._num_guilty >= MAX_GUILTY or self._num_failures >= MAX_FAILURES:
            raise DeviceBroken(f"steps fail whoever is in them: {message}")
