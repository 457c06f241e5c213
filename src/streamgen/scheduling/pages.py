"""Who holds which page: a free list, reference counts, and the idle pages that the prefix cache keeps.

Every page is in exactly one of three states: *free* (nobody wants its content), *held* (its reference count says by
how many sequences), or *cached* (held by nobody, but its content is indexed and may be found again). Only this class
changes that; everyone else has page numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


class Fork(NamedTuple):
    """Page table of a forked sequence, and the (source, target) page to copy before it writes, if there is one."""

    pages: list[int]
    copy: tuple[int, int] | None


def _forget_nothing(page: int) -> None:
    """Default of `PagePool.on_evict`: no index to tell."""


class PagePool:
    """The pages of one KV cache, numbered 0 .. num_pages - 1."""

    def __init__(self, num_pages: int, *, page_size: int, on_evict: Callable[[int], None] = _forget_nothing) -> None:
        self._page_size = page_size
        self._refs = [0] * num_pages
        # The page freed last is given away first: its memory is likeliest to be in a CPU cache.
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_indexed = [False] * num_pages
        # Idle indexed pages, least recently used first. A plain dict would walk past all it has lost to find its first.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_shared = 0
        self.on_evict = on_evict

    @property
    def num_total(self) -> int:
        """All pages."""
        return len(self._refs)

    @property
    def num_free(self) -> int:
        """Pages without content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds, with content worth keeping."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages that at least one sequence holds."""
        return len(self._refs) - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def num_shared(self) -> int:
        """Pages that two or more sequences hold."""
        return self._num_shared

    def num_holders(self, page: int) -> int:
        """How many sequences hold the page."""
        return self._refs[page]

    def is_indexed(self, page: int) -> bool:
        """Whether the page is kept for the prefix cache when nobody holds it."""
        return self._is_indexed[page]

    def allocate(self) -> int:
        """Take a page for one holder: a free one, else the least recently used cached one."""
        assert self.num_available, "a page was asked for while all are held"
        page = self._free.pop() if self._free else self._evict()
        self._refs[page] = 1
        return page

    def retain(self, page: int) -> None:
        """Add a holder to a page that is held or cached."""
        refs = self._refs[page]
        if refs == 0:
            del self._cached[page]
        elif refs == 1:
            self._num_shared += 1
        self._refs[page] = refs + 1

    def release(self, page: int) -> None:
        """Remove a holder; the last one leaves the page cached if it is indexed, else free."""
        refs = self._refs[page]
        assert refs > 0, f"page {page} was released more often than it was taken"
        self._refs[page] = refs - 1
        if refs == 2:
            self._num_shared -= 1
        elif refs == 1:
            if self._is_indexed[page]:
                self._cached[page] = None
            else:
                self._free.append(page)

    def release_table(self, pages: Sequence[int]) -> None:
        """Release a sequence's pages, last one first.

        NOTE: the order makes eviction take leaves first: who holds a page of a chain holds all before it, so every page
        becomes idle no later than the page it follows.
        """
        for page in reversed(pages):
            self.release(page)

    def mark_indexed(self, page: int) -> None:
        """Keep a held page's content from now on, also when nobody holds it."""
        assert self._refs[page] > 0, f"page {page} is indexed while nobody holds it"
        self._is_indexed[page] = True

    def fork(self, pages: Sequence[int], num_tokens: int) -> Fork:
        """A second table with the content of the first `num_tokens` positions, to be written from there on.

        Full pages are shared. The next page is always a new one, since it will be written; it must be copied if some of
        its positions are wanted.
        """
        num_whole, num_partial = divmod(num_tokens, self._page_size)
        target = self.allocate()
        shared = list(pages[:num_whole])
        for page in shared:
            self.retain(page)
        return Fork([*shared, target], (pages[num_whole], target) if num_partial else None)

    def held_pages(self) -> Iterable[tuple[int, int]]:
        """(page, number of holders) of every held page."""
        return ((page, refs) for page, refs in enumerate(self._refs) if refs)

    def free_pages(self) -> tuple[int, ...]:
        """The free pages, next to be given last."""
        return tuple(self._free)

    def cached_pages(self) -> tuple[int, ...]:
        """The cached pages, next to be evicted first."""
        return tuple(self._cached)

    def forget_cached(self) -> None:
        """Every cached page becomes a free one."""
        while self._cached:
            self._free.append(self._evict())

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._is_indexed[page] = False
        self.on_evict(page)
        return page
