"""Compiled grammars by what they mean: each is compiled once, whoever asks, and kept while there is room.

A plain object without threads: its owner drives it on one loop, does the work that `start` asks for, and says when it
is `finished`.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from msgspec import Struct

from streamgen.grammar.source import source_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.errors import StreamgenError
    from streamgen.grammar.grammar import GrammarStats
    from streamgen.grammar.source import GrammarSource


class Sized(Protocol):
    """What is kept: a grammar, or something around one."""

    @property
    def stats(self) -> GrammarStats:
        """The grammar's figures."""
        ...


T = TypeVar("T", bound=Sized)

MAX_BYTES = 256 << 20
_ENTRY_BYTES = 2_048  # of an entry beside its grammar: key, objects


class CacheStats(Struct, frozen=True, kw_only=True):
    """What a cache holds, and how it was used since it was made.

    entries, bytes   grammars kept, and their memory
    failures         errors kept
    pending          keys that are compiled now
    waiting          tickets that wait for them
    hits, joined, misses   of `want`: known already, compiled already, started
    evicted          grammars that had to make room
    """

    entries: int
    bytes: int
    failures: int
    pending: int
    waiting: int
    hits: int
    joined: int
    misses: int
    evicted: int


class Ticket(Generic[T]):
    """One who waits for a grammar."""

    def __init__(self, key: str, done: Callable[[str, T | StreamgenError], None]) -> None:
        self.key = key
        self._done: Callable[[str, T | StreamgenError], None] | None = done

    @property
    def is_done(self) -> bool:
        """Answered, or cancelled."""
        return self._done is None

    def cancel(self) -> None:
        """Do not call back. Others who wait for the same are not touched."""
        self._done = None

    def answer(self, found: T | StreamgenError) -> None:
        """Call back, unless that was done or cancelled."""
        done, self._done = self._done, None
        if done is not None:
            # Each request writes its own id and traceback into its error.
            done(self.key, copy.copy(found) if isinstance(found, Exception) else found)


class _Failure(Struct, frozen=True):
    error: StreamgenError
    until: float


class CompileCache(Generic[T]):
    """Grammars by key, bounded in bytes, with failures kept for a moment. Not thread-safe.

    A grammar that was evicted lives on with those who use it. `done` is called with the key and a grammar or an error,
    exactly once for each ticket that is not cancelled, and at once if the answer is known; it may ask for more.

    start            called with a key and its source for what has to be compiled; must lead to `finished` or `drop`
    failure_seconds  for which a failure is remembered
    """

    def __init__(
        self,
        start: Callable[[str, GrammarSource], None],
        *,
        max_bytes: int = MAX_BYTES,
        max_failures: int = 1_024,
        failure_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._max_bytes = max_bytes
        self._max_failures = max_failures
        self._failure_seconds = failure_seconds
        self._clock = clock
        self._grammars: OrderedDict[str, T] = OrderedDict()  # the least recently wanted first
        self._failures: OrderedDict[str, _Failure] = OrderedDict()  # the oldest first
        self._pending: dict[str, list[Ticket[T]]] = {}
        self._bytes = 0
        self._hits = self._joined = self._misses = self._evicted = 0

    def want(self, source: GrammarSource, done: Callable[[str, T | StreamgenError], None]) -> Ticket[T]:
        """Ask for the grammar of a source."""
        key = source_key(source)
        ticket: Ticket[T] = Ticket(key, done)
        if key in self._pending:
            self._joined += 1
            self._pending[key].append(ticket)
        elif not self._answer_at_once(ticket):
            self._misses += 1
            self._pending[key] = [ticket]
            self._start(key, source)
        return ticket

    def get(self, key: str) -> T | None:
        """The grammar of a key, if it is kept."""
        return self._grammars.get(key)

    def is_wanted(self, key: str) -> bool:
        """Whether anybody still waits for it."""
        return any(not ticket.is_done for ticket in self._pending.get(key, ()))

    def drop(self, key: str) -> bool:
        """Forget work that was not done since nobody waits for it any more; False if somebody does."""
        if self.is_wanted(key):
            return False
        self._pending.pop(key, None)
        return True

    def finished(self, key: str, found: T | StreamgenError) -> None:
        """What came of it; everyone who waits is told, and the next ones will be."""
        tickets = self._pending.pop(key, [])
        if isinstance(found, Exception):
            self._keep_failure(key, found)
        else:
            self._keep(key, found)
        for ticket in tickets:
            ticket.answer(found)

    @property
    def stats(self) -> CacheStats:
        """Its figures."""
        return CacheStats(
            entries=len(self._grammars),
            bytes=self._bytes,
            failures=len(self._failures),
            pending=len(self._pending),
            waiting=sum(not ticket.is_done for tickets in self._pending.values() for ticket in tickets),
            hits=self._hits,
            joined=self._joined,
            misses=self._misses,
            evicted=self._evicted,
        )

    def _answer_at_once(self, ticket: Ticket[T]) -> bool:
        grammar = self._grammars.get(ticket.key)
        if grammar is not None:
            self._grammars.move_to_end(ticket.key)
            self._hits += 1
            ticket.answer(grammar)
            return True
        failure = self._failures.get(ticket.key)
        if failure is None:
            return False
        if failure.until <= self._clock():
            del self._failures[ticket.key]
            return False
        self._hits += 1
        ticket.answer(failure.error)
        return True

    def _keep(self, key: str, grammar: T) -> None:
        self._forget(key)
        size = _size(grammar)
        if size > self._max_bytes:
            return
        self._grammars[key] = grammar
        self._bytes += size
        while self._bytes > self._max_bytes:
            self._forget(next(iter(self._grammars)))
            self._evicted += 1

    def _forget(self, key: str) -> None:
        self._failures.pop(key, None)
        grammar = self._grammars.pop(key, None)
        if grammar is not None:
            self._bytes -= _size(grammar)

    def _keep_failure(self, key: str, error: StreamgenError) -> None:
        now = self._clock()
        self._failures.pop(key, None)
        self._failures[key] = _Failure(copy.copy(error), now + self._failure_seconds)
        while self._failures:
            oldest = next(iter(self._failures))
            if len(self._failures) <= self._max_failures and self._failures[oldest].until > now:
                break
            del self._failures[oldest]


def _size(grammar: Sized) -> int:
    return grammar.stats.bytes + _ENTRY_BYTES
