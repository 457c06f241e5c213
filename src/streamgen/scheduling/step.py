"""A step while it is being planned, and after that until its results arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.messages import Begin, StepPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.scheduling.sequence import Rows, Sequence
    from streamgen.scheduling.tenants import Share


class Step:
    """Collects who runs in a step, within its budget of rows.

    members   the only ones that may run in it; None: whoever is not suspected of making steps fail
    budget    rows that are left
    favoured  the tenant for whose prompts the rows of others are limited, if there is one. Those not served less than
              are *guests*, and `guests_budget` is what is left for them
    """

    def __init__(self, number: int, budget: int, generation: int = 0, *, members: set[Sequence] | None = None) -> None:
        self.number = number
        self.generation = generation
        self.members = members
        self.budget = budget
        self.favoured: Share | None = None
        self._guests_budget = 0
        self._favoured_counter = 0.0
        self._begins: list[Begin] = []
        self._copies: list[tuple[int, int]] = []
        self._rows: dict[int, Rows] = {}
        self.has_rows_at: Callable[[int], bool] = self._rows.__contains__  # a slot; asked once for each that decodes

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[Rows]:
        """One entry per sequence, in the order of the plan."""
        return list(self._rows.values())

    def has_rows_of(self, share: Share) -> bool:
        """Whether a tenant's sequences run in it."""
        return any(rows.sequence.share is share for rows in self._rows.values())

    def favour(self, share: Share, *, guests_budget: int) -> None:
        """Limit the rows of tenants that were served more than this one."""
        # The counter is kept as it is now, since it grows when the tenant's sequences start in this step.
        self.favoured, self._favoured_counter, self._guests_budget = share, share.counter, guests_budget

    def is_guest(self, sequence: Sequence) -> bool:
        """Whether the sequence's rows are limited in this step."""
        share = sequence.share
        return self.favoured is not None and share is not self.favoured and share.counter >= self._favoured_counter

    def room(self, sequence: Sequence) -> int:
        """Rows that are left for this sequence."""
        if self.favoured is None or not self.is_guest(sequence):
            return self.budget
        return min(self.budget, self._guests_budget)

    def has_begun(self, sequence: Sequence) -> bool:
        """Whether the sequence takes its slot in this very step."""
        return any(begin.slot == sequence.slot for begin in self._begins)

    def begin(self, sequence: Sequence, copy: tuple[int, int] | None = None) -> None:
        """The sequence takes its slot before this step; `copy` is (source page, target page)."""
        self._begins.append(sequence.describe())
        if copy is not None:
            self._copies.append(copy)

    def add(self, rows: Rows) -> None:
        """The sequence runs in this step."""
        self._rows[rows.slot] = rows
        self.budget -= rows.count
        if self.favoured is not None and self.is_guest(rows.sequence):
            self._guests_budget -= rows.count

    def drop(self, sequence: Sequence) -> None:
        """The sequence does not run after all: it has just been preempted."""
        rows = self._rows.pop(sequence.slot, None) if sequence.slot is not None else None
        if rows is None:
            return
        self.budget += rows.count
        if self.favoured is not None and self.is_guest(sequence):
            self._guests_budget += rows.count

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
