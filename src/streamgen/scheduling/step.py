"""A step while it is being planned, and after that until its results arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.messages import Begin, StepPlan

if TYPE_CHECKING:
    from streamgen.scheduling.sequence import Rows, Sequence


class Step:
    """Collects who runs in a step, within its budget of rows."""

    def __init__(self, number: int, budget: int, generation: int = 0) -> None:
        self.number = number
        self.generation = generation
        self.budget = budget  # rows that are left
        self.guests_budget: int | None = None  # rows left for tenants that were served more than the favoured one
        self._begins: list[Begin] = []
        self._copies: list[tuple[int, int]] = []
        self._rows: dict[int, Rows] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __contains__(self, slot: object) -> bool:
        return slot in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Rows]:
        """One entry per sequence, in the order of the plan."""
        return list(self._rows.values())

    def begin(self, sequence: Sequence, copy: tuple[int, int] | None = None) -> None:
        """The sequence takes its slot before this step; `copy` is (source page, target page)."""
        self._begins.append(sequence.describe())
        if copy is not None:
            self._copies.append(copy)

    def add(self, rows: Rows, *, is_guest: bool = False) -> None:
        """The sequence runs in this step."""
        self._rows[rows.slot] = rows
        self.budget -= rows.count
        if is_guest and self.guests_budget is not None:
            self.guests_budget -= rows.count

    def drop(self, sequence: Sequence) -> None:
        """The sequence does not run after all: it has just been preempted."""
        rows = self._rows.pop(sequence.slot, None) if sequence.slot is not None else None
        if rows is not None:
            self.budget += rows.count

    def message(self) -> StepPlan:
        """The plan for the executor."""
        rows = self._rows.values()
        drafts = tuple([r.drafts for r in rows]) if any(r.drafts for r in rows) else ()
        return StepPlan(
            step=self.number,
            begins=tuple(self._begins),
            copies=tuple(self._copies),
            slots=tuple(self._rows),
            starts=tuple([r.start for r in rows]),
            counts=tuple([r.count for r in rows]),
            samples=tuple([r.samples for r in rows]),
            pages=tuple([r.pages for r in rows]),
            drafts=drafts,
            generation=self.generation,
        )
