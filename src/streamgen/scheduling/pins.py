"""Pinned pages: what sessions want kept although nothing runs on it.

A pin is a holder of pages like a sequence, but the first to give way: it never costs a running sequence anything, and
all pins together hold at most half of the pages.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamgen.scheduling.pages import PagePool


class Pins:
    """Pages by key, oldest pin first."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[str, list[int]] = {}
        self._max_pages = pool.num_total // 2
        self.num_pages = 0  # over all pins; a page counts for each that holds it

    def __len__(self) -> int:
        return len(self._pages)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._pages.values())

    def num_alone(self) -> int:
        """Pages that nobody but pins holds."""
        counts = Counter(page for pages in self._pages.values() for page in pages)
        return len([page for page, count in counts.items() if self._pool.num_holders(page) == count])

    def hold(self, key: str, pages: list[int]) -> None:
        """Keep these pages, each retained by the caller for this, in place of the key's earlier ones.

        More than all pins may hold are not kept at all: they would drive out everybody else's.
        """
        self.drop(key)
        if not 0 < len(pages) <= self._max_pages:
            self._pool.release_table(pages)
            return
        self._pages[key] = pages
        self.num_pages += len(pages)
        while self.num_pages > self._max_pages:
            self.drop_oldest()

    def drop(self, key: str) -> None:
        """Let a key's pages go; unknown keys are ignored."""
        pages = self._pages.pop(key, None)
        if pages is not None:
            self.num_pages -= len(pages)
            self._pool.release_table(pages)

    def drop_oldest(self) -> bool:
        """Let the oldest pin go; False if there is none."""
        if not self._pages:
            return False
        self.drop(next(iter(self._pages)))
        return True

    def drop_all(self) -> None:
        """Let all go."""
        while self.drop_oldest():
            pass
