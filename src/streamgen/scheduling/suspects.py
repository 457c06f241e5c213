"""Finding the sequence that makes a step fail: halves of the failed step run apart, and halves of the half that fails.

A sequence is cleared once it has got past the rows that it had in the step that failed. A sequence that fails alone, a
second time, is guilty. Everybody else goes on as if nothing had happened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.scheduling.sequence import State

if TYPE_CHECKING:
    from streamgen.scheduling.sequence import Rows, Sequence

MAX_GUILTY = 8  # found in a row without a step that went well: then it is the device
MAX_FAILURES = 64  # likewise, of steps


class DeviceBroken(Exception):
    """Steps fail whoever is in them, or there is no device any more; the engine cannot go on."""


class Suspects:
    """Groups of sequences to be run apart, and where each of them has to get to."""

    def __init__(self) -> None:
        self._groups: list[dict[Sequence, int]] = []  # position to get past, by sequence
        self._num_failures = 0
        self._guilty: set[int] = set()  # requests, since a step last went well

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __contains__(self, sequence: Sequence) -> bool:
        return any(sequence in group for group in self._groups)

    @property
    def groups(self) -> list[set[Sequence]]:
        """Those that may run together, and with nobody else, next to run first."""
        return [set(group) for group in self._groups]

    def failed(self, rows: list[Rows], message: str) -> Sequence | None:
        """A step with these rows failed. The guilty one, if that is clear now.

        Those that were preempted since, while it was under way, were in it all the same.

        Raises:
            DeviceBroken: it does not depend on who is in the step.
        """
        self._num_failures += 1
        ends = {r.sequence: r.start + r.count for r in rows if r.sequence.state is not State.ENDED}
        were_suspected = any(sequence in self for sequence in ends)
        for sequence in ends:
            self.forget(sequence)
        is_guilty = len(rows) == len(ends) == 1 and were_suspected
        if is_guilty:
            self._guilty.update(sequence.request.request_id for sequence in ends)
        if len(self._guilty) >= MAX_GUILTY or self._num_failures >= MAX_FAILURES:
            raise DeviceBroken(f"steps fail whoever is in them: {message}")
        if is_guilty:
            return next(iter(ends))
        # The first time a lone sequence is simply tried once more.
        members, middle = list(ends.items()), len(ends) // 2
        halves = dict(members[:middle]), dict(members[middle:])
        self._groups = [*(half for half in halves if half), *self._groups]
        return None

    def succeeded(self) -> None:
        """A step went well: those that have got far enough are cleared."""
        self._num_failures = 0
        self._guilty.clear()
        if self._groups:
            left = ({s: end for s, end in group.items() if s.num_computed < end} for group in self._groups)
            self._groups = [group for group in left if group]

    def forget(self, sequence: Sequence) -> None:
        """It has ended, or is in a new group soon."""
        for group in self._groups:
            group.pop(sequence, None)
        self._groups = [group for group in self._groups if group]
