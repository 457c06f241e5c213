"""The compiler actor, driven by hand: what is compiled, who hears of it, and what stands in the model's table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from streamgen.actors.compiler import Compile, CompiledGrammar, CompilerActor
from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.compiler import compile_source
from streamgen.grammar.source import GrammarSource, RegexSource
from streamgen.messages import Cancel

if TYPE_CHECKING:
    from collections.abc import Callable

A, B = RegexSource(pattern="a"), RegexSource(pattern="b")


class ByHand:
    """Calls that a worker thread was given, run when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]]] = []
        self.is_stopped = False

    def submit(self, call: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        self.calls.append((call, done))

    def stop(self) -> None:
        self.is_stopped = True


class Scene:
    """An actor, and what it answered."""

    def __init__(self) -> None:
        self.compiled: list[GrammarSource] = []
        self.error: BaseException | None = None
        self.table: dict[str, Any] = {}
        self.worker = ByHand()
        self.answers: list[tuple[int | None, CompiledGrammar | None, Exception | None]] = []
        compiler: Any = self
        self.actor = CompilerActor(
            compiler, self.table, make_worker=lambda: self.worker, clock=lambda: 0.0, capacity=100
        )

    def compile(self, source: GrammarSource) -> CompiledGrammar:
        self.compiled.append(source)
        if self.error is not None:
            raise self.error
        tokens: Any = object()
        return CompiledGrammar(compile_source(source), tokens)

    def close(self) -> None:
        """There is no child."""

    def want(self, source: GrammarSource, request_id: int | None = None) -> None:
        self.actor.handle(
            Compile(
                source=source,
                request_id=request_id,
                answer=lambda key, grammar, error: self.answers.append((request_id, grammar, error)),
            )
        )

    def work(self) -> None:
        """Run the call that waits, and hand over what came of it."""
        call, done = self.worker.calls.pop(0)
        try:
            result, error = call(), None
        except Exception as e:
            result, error = None, e
        done(result, error)
        while self.actor._inbox:
            self.actor.handle(self.actor._inbox.popleft())


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_who_wants_the_same_waits_for_the_same_work(scene: Scene) -> None:
    for request_id in (1, 2, None):
        scene.want(A, request_id)
    assert not scene.answers
    scene.work()
    assert [request_id for request_id, _, _ in scene.answers] == [1, 2, None]
    assert scene.compiled == [A]
    scene.want(A, 3)
    assert len(scene.answers) == 4, "it is known, and answered at once"


def test_a_grammar_stands_in_the_table_while_requests_use_it(scene: Scene) -> None:
    scene.want(A, 1)
    scene.want(A, 2)
    scene.work()
    assert len(scene.table) == 1
    scene.actor.release(1)
    scene.actor.release(1)
    assert len(scene.table) == 1
    scene.actor.release(2)
    assert not scene.table
    scene.want(A)
    assert not scene.table, "who has no request keeps nothing there"


def test_one_who_is_cancelled_leaves_the_others_waiting(scene: Scene) -> None:
    scene.want(A, 1)
    scene.want(A, 2)
    scene.actor.handle(Cancel(request_id=1))
    scene.work()
    assert [request_id for request_id, _, _ in scene.answers] == [2]
    scene.actor.handle(Cancel(request_id=2))
    assert not scene.table, "a cancel that comes later takes it out again"


def test_what_nobody_waits_for_when_its_turn_comes_is_not_compiled(scene: Scene) -> None:
    scene.want(A, 1)
    scene.want(B, 2)
    assert len(scene.worker.calls) == 1
    scene.actor.handle(Cancel(request_id=2))
    scene.work()
    assert scene.compiled == [A]
    assert not scene.worker.calls
    scene.want(B, 3)
    scene.work()
    assert scene.compiled == [A, B]
    assert [request_id for request_id, _, _ in scene.answers] == [1, 3]


@pytest.mark.parametrize("error", [SchemaTooComplex("too large", bound="max_states"), SystemError("broken")])
def test_what_is_wrong_with_a_grammar_is_told(scene: Scene, error: Exception) -> None:
    scene.error = error
    scene.want(A, 1)
    scene.work()
    ((_, grammar, told),) = scene.answers
    assert grammar is None
    assert isinstance(told, SchemaTooComplex if isinstance(error, SchemaTooComplex) else SchemaError)
    assert not scene.table
    scene.error = None
    scene.want(B, 2)
    scene.work()
    assert scene.answers[1][1] is not None, "the next one is compiled"


def test_the_thread_is_made_with_the_first_grammar(scene: Scene) -> None:
    scene.actor.stop()
    assert not scene.worker.is_stopped
    scene.want(A)
    scene.actor.stop()
    assert scene.worker.is_stopped
