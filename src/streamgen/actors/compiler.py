"""Compiler actor: has the grammars of requests compiled, off the loop, each once, and keeps those that were made.

A request waits here between its ids being known and its admission. Who wants a grammar that is being compiled waits for
the same work; who is cancelled leaves the others waiting. A grammar that a request uses stands in the model's table,
where the executor finds it, until the request has ended.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias, assert_never

from msgspec import Struct

from streamgen.actors.actor import Actor
from streamgen.errors import SchemaError, StreamgenError
from streamgen.grammar.grammar import Grammar, GrammarStats, TokenGrammar  # noqa: TC001  # fields of a Struct
from streamgen.grammar.source import GrammarSource  # noqa: TC001  # likewise
from streamgen.messages import Cancel

if TYPE_CHECKING:
    from streamgen.actors.model import OpenModel
    from streamgen.actors.world import RunsCalls
    from streamgen.grammar.cache import CompileCache, Ticket
    from streamgen.grammar.child import CompileChild
    from streamgen.grammar.vocabulary import GrammarVocabulary

logger = logging.getLogger(__name__)


class CompiledGrammar(Struct, frozen=True):
    """A grammar, and the same over the model's tokens."""

    grammar: Grammar
    tokens: TokenGrammar

    @property
    def stats(self) -> GrammarStats:
        """Those of the grammar."""
        return self.grammar.stats


Answer: TypeAlias = Callable[[str, CompiledGrammar | None, StreamgenError | None], None]
"""Called on the loop with the grammar's key and the grammar, or what is wrong with it."""


class Compile(Struct, frozen=True, kw_only=True):
    """Somebody wants a grammar. With a `request_id` it is kept in the model's table until the request has ended."""

    source: GrammarSource
    answer: Answer
    request_id: int | None = None


class Compiled(Struct, frozen=True, kw_only=True):
    """A worker thread's answer."""

    key: str
    grammar: CompiledGrammar | None = None
    error: StreamgenError | None = None


class GrammarCompiler:
    """What the worker thread does. One thread calls `compile`."""

    def __init__(self, model: OpenModel) -> None:
        self._model = model
        self._child: CompileChild | None = None

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        """Blocks.

        Raises:
            SchemaError, SchemaTooComplex.
        """
        grammar = self._compile(source)
        return CompiledGrammar(grammar, grammar.bind(self._vocabulary))

    def close(self) -> None:
        """End the child, if there is one. Any thread; nothing is compiled any more."""
        if self._child is not None:
            self._child.close()

    def _compile(self, source: GrammarSource) -> Grammar:
        if source.is_trusted:
            from streamgen.grammar.compiler import compile_source

            return compile_source(source)
        from streamgen.grammar.child import CompileChild

        self._child = self._child or CompileChild()
        return self._child.compile(source)

    @cached_property
    def _vocabulary(self) -> GrammarVocabulary:
        from streamgen.grammar.vocabulary import GrammarVocabulary

        return GrammarVocabulary.from_tokenizer(self._model.tokenizer, vocab_size=self._model.config.vocab_size)


class CompilerActor(Actor[Compile | Cancel | Compiled]):
    """Owns the compiled grammars, and says in the model's table which of them requests use.

    table         key -> grammar; read by the executor
    make_worker   makes the thread, when the first grammar is wanted
    """

    name = "compiler"

    def __init__(
        self,
        compiler: GrammarCompiler,
        table: dict[str, TokenGrammar],
        *,
        make_worker: Callable[[], RunsCalls],
        clock: Callable[[], float],
        capacity: int,
    ) -> None:
        super().__init__(capacity=capacity)
        self._compiler = compiler
        self._table = table
        self._make_worker = make_worker
        self._worker: RunsCalls | None = None
        self._clock = clock
        self._queue: deque[tuple[str, GrammarSource]] = deque()
        self._is_busy = False
        self._tickets: dict[int, Ticket[CompiledGrammar]] = {}  # of requests that wait
        self._keys: dict[int, str] = {}  # of the grammars that requests use
        self._uses: Counter[str] = Counter()

    def handle(self, message: Compile | Cancel | Compiled) -> None:
        """Begin, give up or end a wait."""
        match message:
            case Compile():
                self._want(message)
            case Cancel():
                ticket = self._tickets.pop(message.request_id, None)
                if ticket is not None:
                    ticket.cancel()
                self.release(message.request_id)
            case Compiled():
                self._is_busy = False
                self._cache.finished(message.key, message.grammar or message.error or SchemaError("nothing came of it"))
                self._start_next()
            case _:
                assert_never(message)

    def release(self, request_id: int) -> None:
        """A request has ended; those that used no grammar are passed over."""
        key = self._keys.pop(request_id, None)
        if key is None:
            return
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key], self._table[key]

    def stop(self) -> None:
        """End the thread and the child; blocks until what they do is over. Any thread, once the actors are gone."""
        if self._worker is not None:
            self._compiler.close()
            self._worker.stop()

    @cached_property
    def _cache(self) -> CompileCache[CompiledGrammar]:
        from streamgen.grammar.cache import CompileCache  # most engines are never asked for a grammar

        return CompileCache(self._start, clock=self._clock)

    def _want(self, message: Compile) -> None:
        request_id = message.request_id
        ticket = self._cache.want(message.source, partial(self._answer, message))
        if request_id is not None and not ticket.is_done:
            self._tickets[request_id] = ticket

    def _answer(self, message: Compile, key: str, found: CompiledGrammar | StreamgenError) -> None:
        request_id = message.request_id
        if request_id is not None:
            self._tickets.pop(request_id, None)
        if isinstance(found, StreamgenError):
            message.answer(key, None, found)
            return
        if request_id is not None:
            self._keys[request_id] = key
            self._uses[key] += 1
            self._table[key] = found.tokens
        message.answer(key, found, None)

    def _start(self, key: str, source: GrammarSource) -> None:
        self._queue.append((key, source))
        self._start_next()

    def _start_next(self) -> None:
        """One at a time, so that what nobody waits for any more when its turn comes is never compiled."""
        while self._queue and not self._is_busy:
            key, source = self._queue.popleft()
            if not self._cache.drop(key):
                self._submit(key, source)

    def _submit(self, key: str, source: GrammarSource) -> None:
        self._is_busy = True
        if self._worker is None:
            self._worker = self._make_worker()
        self._worker.submit(partial(self._compiler.compile, source), partial(self._compiled, key))

    def _compiled(self, key: str, grammar: CompiledGrammar | None, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, StreamgenError):
            logger.debug("a grammar could not be compiled", exc_info=error)
            error = SchemaError(f"the grammar could not be compiled: {type(error).__name__}")
        self.post(Compiled(key=key, grammar=grammar, error=error))
