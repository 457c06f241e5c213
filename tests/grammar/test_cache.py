"""The compile cache: one compile for all who want it, bounded memory, failures that are remembered for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from msgspec import Struct

from streamgen.errors import SchemaError, StreamgenError
from streamgen.grammar.cache import CompileCache, Ticket
from streamgen.grammar.grammar import GrammarStats
from streamgen.grammar.source import RegexSource, source_key

if TYPE_CHECKING:
    from streamgen.grammar.source import GrammarSource


class Made(Struct, frozen=True):
    """Stands for a compiled grammar: the cache looks at its figures alone."""

    name: str
    stats: GrammarStats


def made(name: str, size: int = 0) -> Made:
    return Made(name, GrammarStats(backend="outlines", bytes=size))


def source(name: str) -> RegexSource:
    return RegexSource(pattern=name)


class Owner:
    """Writes down what the cache asks for and what it answers."""

    def __init__(self, *, max_bytes: int = 1 << 20, max_failures: int = 100) -> None:
        self.now = 0.0
        self.started: list[str] = []
        self.answers: list[tuple[str, Made | StreamgenError]] = []
        self.cache: CompileCache[Made] = CompileCache(
            self._start, max_bytes=max_bytes, max_failures=max_failures, failure_seconds=5.0, clock=lambda: self.now
        )

    def want(self, name: str, who: str = "") -> Ticket[Made]:
        return self.cache.want(source(name), lambda _key, found: self.answers.append((who, found)))

    def finish(self, name: str, found: Made | StreamgenError) -> None:
        self.cache.finished(source_key(source(name)), found)

    def _start(self, key: str, wanted: GrammarSource) -> None:
        assert isinstance(wanted, RegexSource) and key == source_key(wanted)
        self.started.append(wanted.pattern)


def test_all_who_want_it_share_one_compile() -> None:
    owner = Owner()
    for who in "abc":
        owner.want("x", who)
    assert owner.started == ["x"] and owner.answers == []
    assert owner.cache.stats.pending == 1 and owner.cache.stats.waiting == 3
    grammar = made("x")
    owner.finish("x", grammar)
    assert owner.answers == [("a", grammar), ("b", grammar), ("c", grammar)]
    stats = owner.cache.stats
    assert (stats.misses, stats.joined, stats.hits, stats.pending, stats.waiting) == (1, 2, 0, 0, 0)


def test_what_is_known_is_answered_at_once() -> None:
    owner = Owner()
    owner.want("x")
    grammar = made("x")
    owner.finish("x", grammar)
    ticket = owner.want("x", "later")
    assert ticket.is_done and owner.answers[-1] == ("later", grammar)
    assert owner.started == ["x"] and owner.cache.stats.hits == 1
    assert owner.cache.get(ticket.key) is grammar


def test_who_cancels_leaves_the_others_waiting() -> None:
    owner = Owner()
    first, second = owner.want("x", "first"), owner.want("x", "second")
    first.cancel()
    first.cancel()
    assert first.is_done and not second.is_done
    assert owner.cache.is_wanted(second.key)
    owner.finish("x", made("x"))
    assert [who for who, _ in owner.answers] == ["second"]
    second.cancel()


def test_work_that_nobody_wants_may_be_dropped_and_may_be_finished() -> None:
    owner = Owner()
    ticket = owner.want("x", "first")
    assert not owner.cache.drop(ticket.key)
    ticket.cancel()
    assert not owner.cache.is_wanted(ticket.key)
    assert owner.cache.drop(ticket.key)
    owner.want("x", "second")
    assert owner.started == ["x", "x"]
    owner.want("y", "third").cancel()
    owner.finish("y", made("y"))
    assert owner.answers == []
    owner.want("y", "fourth")
    assert [who for who, _ in owner.answers] == ["fourth"] and owner.started == ["x", "x", "y"]


def test_who_comes_after_all_have_cancelled_joins_the_work() -> None:
    owner = Owner()
    owner.want("x", "first").cancel()
    owner.want("x", "second")
    assert owner.started == ["x"]
    owner.finish("x", made("x"))
    assert [who for who, _ in owner.answers] == ["second"]


def test_a_failure_is_remembered_for_some_seconds() -> None:
    owner = Owner()
    owner.want("x", "first")
    owner.want("x", "second")
    owner.finish("x", SchemaError("wrong", pointer="/a", keyword="not"))
    owner.now = 4.9
    owner.want("x", "third")
    assert owner.started == ["x"] and len(owner.answers) == 3
    errors = [found for _, found in owner.answers]
    for error in errors:
        assert isinstance(error, SchemaError)
        assert (error.message, error.pointer, error.keyword) == ("wrong", "/a", "not")
    assert len(set(map(id, errors))) == 3, "each has an error of its own"
    owner.now = 5.0
    owner.want("x", "fourth")
    assert owner.started == ["x", "x"] and len(owner.answers) == 3
    owner.finish("x", made("x"))
    owner.want("x", "fifth")
    assert isinstance(owner.answers[-1][1], Made)


def test_the_least_recently_wanted_makes_room() -> None:
    owner = Owner(max_bytes=100_000)
    for name in "abc":
        owner.want(name)
        owner.finish(name, made(name, 30_000))
    owner.want("a")
    owner.want("d")
    owner.finish("d", made("d", 30_000))
    assert owner.cache.stats.entries == 3 and owner.cache.stats.evicted == 1
    owner.started.clear()
    for name in "acdb":
        owner.want(name)
    assert owner.started == ["b"]


def test_a_grammar_larger_than_the_cache_is_answered_and_not_kept() -> None:
    owner = Owner(max_bytes=10_000)
    owner.want("x")
    owner.finish("x", made("x", 10_001))
    assert len(owner.answers) == 1 and owner.cache.stats.entries == 0 and owner.cache.stats.bytes == 0


@pytest.mark.parametrize("fails", [False, True])
def test_ten_thousand_distinct_sources_stay_within_bounds(fails: bool) -> None:
    owner = Owner(max_bytes=1 << 20, max_failures=64)
    for number in range(10_000):
        owner.now += 0.001
        name = str(number)
        owner.want(name)
        owner.finish(name, SchemaError("no") if fails else made(name, number % 5_000))
        stats = owner.cache.stats
        assert stats.bytes <= 1 << 20 and stats.failures <= 64 and stats.pending == 0
    assert len(owner.answers) == 10_000
    stats = owner.cache.stats
    assert (stats.failures == 64) if fails else (stats.entries + stats.evicted == 10_000)
    for name in map(str, range(10_000)):  # what was kept is forgotten with its bytes
        owner.finish(name, made(name, 10))
    assert owner.cache.stats.bytes == owner.cache.stats.entries * (10 + 2_048)


def test_old_failures_make_way_for_new_ones() -> None:
    owner = Owner()
    for number in range(50):
        owner.want(str(number))
        owner.finish(str(number), SchemaError("no"))
    owner.now = 100.0
    owner.want("new")
    owner.finish("new", SchemaError("no"))
    assert owner.cache.stats.failures == 1


def test_an_answer_may_ask_for_more() -> None:
    owner = Owner()
    asked: list[object] = []
    owner.cache.want(source("x"), lambda _key, _found: asked.append(owner.want("x", "inner")))
    owner.want("x", "outer")
    owner.finish("x", made("x"))
    assert len(asked) == 1
    assert sorted(who for who, _ in owner.answers) == ["inner", "outer"]


def test_what_differs_in_meaning_has_another_key() -> None:
    assert source_key(source("a")) != source_key(source("b"))
    assert source_key(source("a")) != source_key(RegexSource(pattern="a", backend="llguidance"))
    assert source_key(source("a")) == source_key(RegexSource(pattern="a"))
