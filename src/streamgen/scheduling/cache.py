"""The scheduler's pages: who gets which, what is found again, what is kept for sessions.

`PagePool` counts, `PrefixIndex` names and `Pins` keep; here is what the scheduler does with the three together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.scheduling.pages import PagePool
from streamgen.scheduling.pins import Pins
from streamgen.scheduling.prefix import PrefixIndex

if TYPE_CHECKING:
    from streamgen.scheduling.limits import Limits
    from streamgen.scheduling.sequence import Sequence


class PageCache:
    """Pages of sequences. Sequences' tables and names are changed here."""

    def __init__(self, limits: Limits, *, key: bytes) -> None:
        self._limits = limits
        self.pool = PagePool(limits.num_pages, page_size=limits.page_size)
        self.index = PrefixIndex(self.pool, page_size=limits.page_size, key=key)
        self.pins = Pins(self.pool)

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that the table lacks for so many tokens."""
        return self._limits.pages_for(num_tokens) - len(sequence.pages)

    def num_placeable(self, sequence: Sequence) -> int:
        """How many more rows the sequence's own pages and all that can be allocated would hold."""
        num_pages = len(sequence.pages) + self.pool.num_available
        return num_pages * self._limits.page_size - sequence.num_scheduled

    def extend(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        """Append pages to a table until it holds `num_tokens`, and return them. They must be there."""
        missing = self.num_missing(sequence, num_tokens)
        if missing <= 0:
            return ()
        pages = tuple([self.pool.allocate() for _ in range(missing)])
        sequence.pages.extend(pages)
        return pages

    def make_room(self, num_pages: int) -> bool:
        """Whether so many pages can be allocated, if need be at the cost of pins."""
        while self.pool.num_available < num_pages:
            if not self.pins.drop_oldest():
                return False
        return True

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The pages that are known already, held for the caller from now on."""
        if not self._limits.prefix_cache:
            return []
        most = sequence.max_reusable // self._limits.page_size
        self.index.extend_names(sequence.names, sequence.ids, most)
        return self.index.take(sequence.names, most)

    def offer(self, sequence: Sequence) -> None:
        """Index the pages of which every position was computed, by a sequence that still runs."""
        num_full = sequence.num_computed // self._limits.page_size
        if num_full <= sequence.num_offered or not self._limits.prefix_cache:
            return
        self.index.extend_names(sequence.names, sequence.ids, num_full)
        for i in range(sequence.num_offered, num_full):
            self.index.insert(sequence.names[i + 1], sequence.pages[i])
        sequence.num_offered = num_full

    def pin(self, sequence: Sequence) -> None:
        """Keep what is indexed of a sequence that is about to end well, if it asks for that."""
        if sequence.request.pin and sequence.num_offered:
            pages = self.index.take(sequence.names, sequence.num_offered)
            self.pins.hold(sequence.request.pin, pages)

    def release(self, sequence: Sequence) -> None:
        """A sequence gives its pages back."""
        self.pool.release_table(sequence.pages)
        sequence.pages = []

    def forget(self) -> None:
        """No idle page has content any more, nor is any pinned."""
        self.pins.drop_all()
        self.pool.forget_cached()
