"""The page pool and the prefix index: nothing leaks, nothing is given twice, leaves go first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamgen.errors import ConfigError
from streamgen.scheduling.pages import PagePool
from streamgen.scheduling.prefix import PrefixIndex

SIZE = 4


def make_index(num_pages: int = 8, key: bytes = b"key") -> tuple[PagePool, PrefixIndex]:
    pool = PagePool(num_pages, page_size=SIZE)
    return pool, PrefixIndex(pool, page_size=SIZE, key=key)


def names_of(index: PrefixIndex, ids: list[int], scope: str = "") -> list[bytes]:
    names = [index.root(scope)]
    index.extend_names(names, ids, len(ids) // SIZE)
    return names


def fill(pool: PagePool, index: PrefixIndex, ids: list[int], scope: str = "") -> list[int]:
    """Pages of a computed sequence, indexed and still held."""
    names = names_of(index, ids, scope)
    pages = [pool.allocate() for _ in names[1:]]
    for name, page in zip(names[1:], pages, strict=True):
        index.insert(name, page)
    return pages


def test_the_page_freed_last_is_given_first() -> None:
    pool = PagePool(4, page_size=SIZE)
    first, second = pool.allocate(), pool.allocate()
    pool.release(first)
    pool.release(second)
    assert [pool.allocate(), pool.allocate()] == [second, first]


def test_releasing_twice_is_an_error() -> None:
    pool = PagePool(2, page_size=SIZE)
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(page)


def test_allocating_from_an_empty_pool_is_an_error() -> None:
    pool = PagePool(1, page_size=SIZE)
    pool.allocate()
    with pytest.raises(AssertionError, match="all are held"):
        pool.allocate()


@pytest.mark.parametrize(
    ("num_tokens", "num_shared", "has_copy"), [(0, 0, False), (3, 0, True), (4, 1, False), (9, 2, True)]
)
def test_fork_shares_full_pages_and_copies_the_partial_one(num_tokens: int, num_shared: int, has_copy: bool) -> None:
    pool = PagePool(8, page_size=SIZE)
    pages = [pool.allocate() for _ in range(3)]
    fork = pool.fork(pages, num_tokens)
    assert fork.pages[:num_shared] == pages[:num_shared]
    assert len(fork.pages) == num_shared + 1
    assert fork.pages[-1] not in pages
    assert fork.copy == ((pages[num_shared], fork.pages[-1]) if has_copy else None)
    assert pool.num_shared == num_shared
    pool.release_table(pages)
    pool.release_table(fork.pages)
    assert pool.num_free == pool.num_total


def test_a_chain_is_found_as_far_as_it_agrees() -> None:
    pool, index = make_index()
    ids = list(range(12))
    pages = fill(pool, index, ids)
    assert index.take(names_of(index, [*ids[:8], 99, 99, 99, 99]), 3) == pages[:2]
    assert index.take(names_of(index, ids), 1) == pages[:1]
    assert index.take(names_of(index, [99, *ids[1:]]), 3) == []
    assert [pool.num_holders(page) for page in pages] == [3, 2, 1]


def test_a_page_is_named_by_all_before_it() -> None:
    _, index = make_index()
    same = [7, 7, 7, 7]
    assert names_of(index, [1, 2, 3, 4, *same])[2] != names_of(index, [4, 3, 2, 1, *same])[2]
    assert len(set(names_of(index, same * 3))) == 4


def test_scopes_never_meet() -> None:
    pool, index = make_index()
    ids = list(range(8))
    fill(pool, index, ids, scope="a")
    assert index.take(names_of(index, ids, scope="b"), 2) == []
    assert index.take(names_of(index, ids, scope=""), 2) == []


def test_names_depend_on_the_key() -> None:
    ids = list(range(8))
    assert names_of(make_index(key=b"one")[1], ids)[1:] != names_of(make_index(key=b"two")[1], ids)[1:]


@pytest.mark.parametrize("key", [b"", b"k" * 65])
def test_a_key_of_the_wrong_length_is_refused(key: bytes) -> None:
    with pytest.raises(ConfigError, match=f"1 to 64 bytes, got {len(key)}"):
        make_index(key=key)


def test_leaves_are_evicted_before_what_they_follow() -> None:
    pool, index = make_index(num_pages=4)
    pages = fill(pool, index, list(range(16)))
    pool.release_table(pages)
    assert pool.num_cached == 4
    assert [pool.allocate() for _ in range(4)] == pages[::-1]
    assert len(index) == 0


def test_the_chain_used_last_is_evicted_last() -> None:
    pool, index = make_index(num_pages=4)
    old, new = list(range(8)), list(range(50, 58))
    for ids in (old, new):
        pool.release_table(fill(pool, index, ids))
    pool.release_table(index.take(names_of(index, old), 2))
    pool.allocate()
    pool.allocate()
    found = index.take(names_of(index, old), 2)
    assert len(found) == 2
    assert index.take(names_of(index, new), 2) == []


def test_a_name_that_is_known_keeps_its_page() -> None:
    pool, index = make_index()
    ids = list(range(4))
    first, second = fill(pool, index, ids), fill(pool, index, ids)
    assert index.take(names_of(index, ids), 1) == first
    pool.release_table(second)
    assert second[0] in pool.free_pages()


class PagesMachine(RuleBasedStateMachine):
    """Tables over a small alphabet are made from the index, forked, freed; a model counts holders and content."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.index = make_index(num_pages=6)
        self.tables: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}  # page -> all ids up to its end

    @rule(letters=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def start(self, letters: list[int]) -> None:
        ids = [letter for letter in letters for _ in range(SIZE)]
        names = names_of(self.index, ids)
        pages = self.index.take(names, len(letters))
        for i, page in enumerate(pages):
            assert self.content[page] == tuple(ids[: (i + 1) * SIZE])
        while len(pages) < len(letters) and self.pool.num_available:
            page = self.pool.allocate()
            self.content[page] = tuple(ids[: (len(pages) + 1) * SIZE])
            pages.append(page)
            self.index.insert(names[len(pages)], page)
        self.tables.append(pages)

    @precondition(lambda self: self.tables and self.pool.num_available)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        num_tokens = data.draw(st.integers(0, max(0, len(table) * SIZE - 1)))
        fork = self.pool.fork(table, num_tokens)
        self.content[fork.pages[-1]] = (-1,)
        self.tables.append(fork.pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.pool.release_table(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def every_page_is_in_one_state(self) -> None:
        holders = Counter(page for table in self.tables for page in table)
        assert dict(self.pool.held_pages()) == dict(holders)
        states = [*self.pool.free_pages(), *self.pool.cached_pages(), *holders]
        assert sorted(states) == list(range(self.pool.num_total))
        assert self.pool.num_shared == sum(count > 1 for count in holders.values())

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release_table(table)
        assert self.pool.num_held == 0


TestPagesMachine = PagesMachine.TestCase
TestPagesMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
