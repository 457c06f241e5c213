"""`streamgen chat`: what is remembered, what the commands do, how a turn ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self, cast

import pytest

from streamgen.cli.chat import Conversation
from streamgen.errors import DeadlineExceeded, EngineClosed, EngineFailed, EngineOverloaded, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streamgen import sync


class ScriptedEngine:
    """Stands in for an engine: answers with the given pieces, an exception among them is raised."""

    def __init__(self, *pieces: str | BaseException) -> None:
        self.pieces = pieces
        self.asked: list[tuple[dict[str, Any], ...]] = []

    def stream(self, messages: list[dict[str, Any]], **sampling: Any) -> ScriptedStream:
        self.asked.append(tuple(messages))
        return ScriptedStream(self.pieces)


class ScriptedStream:
    def __init__(self, pieces: tuple[str | BaseException, ...]) -> None:
        self._pieces = pieces
        self._said = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def texts(self) -> Iterator[str]:
        for piece in self._pieces:
            if isinstance(piece, BaseException):
                raise piece
            self._said += piece
            yield piece

    @property
    def result(self) -> Any:
        return SimpleNamespace(message={"role": "assistant", "content": self._said})


def conversation(engine: ScriptedEngine, system: str | None = None) -> Conversation:
    return Conversation(cast("sync.Engine", engine), system, {})


def contents(talk: Conversation) -> list[str]:
    return [message["content"] for message in talk.messages]


def test_turns_are_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine("an ", "answer")
    talk = conversation(engine, "be brief")
    assert talk.take("first")
    assert talk.take("second")
    assert contents(talk) == ["be brief", "first", "an answer", "second", "an answer"]
    assert [len(asked) for asked in engine.asked] == [2, 4]
    assert capsys.readouterr().out == "an answer\nan answer\n"


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(ScriptedEngine("ok"), "one")
    talk.take("hello")
    assert talk.take("/reset")
    assert contents(talk) == ["one"]
    assert talk.take("/system  two words ")
    assert contents(talk) == ["two words"]
    assert talk.take("/system")
    assert contents(talk) == []
    assert talk.take("   ")
    assert talk.take("/dance")
    assert "/dance" in capsys.readouterr().err
    assert contents(talk) == []
    assert not talk.take("/quit")


def test_ctrl_c_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(ScriptedEngine("so f", "ar", KeyboardInterrupt()))
    assert talk.take("go on")
    assert contents(talk) == ["go on", "so far"]
    assert "(cancelled)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [InvalidRequest("no"), EngineOverloaded("full"), DeadlineExceeded("late")])
def test_a_turn_that_failed_is_forgotten(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(ScriptedEngine("some", error))
    assert talk.take("hello")
    assert contents(talk) == []
    assert str(error) in capsys.readouterr().err


@pytest.mark.parametrize("error", [EngineFailed("dead"), EngineClosed("closed")])
def test_an_engine_that_is_gone_ends_the_chat(error: Exception) -> None:
    with pytest.raises(type(error)):
        conversation(ScriptedEngine(error)).take("hello")


def test_piped_lines_are_turns(
    run: Callable[..., tuple[int, str, str]], demo_model_path: Path, pipe: Callable[[str], None]
) -> None:
    pipe("Say hello.\n/reset\nSay hello.\n/quit\nnever said\n")
    code, out, err = run("chat", demo_model_path, "--temperature", 0, "--max-tokens", 6, "--kv-memory", "64MiB")
    first, second = out.splitlines()
    assert first == second != ""
    assert (code, err) == (0, "")


def test_a_model_without_a_template_cannot_chat(
    run: Callable[..., tuple[int, str, str]], stories: Path, pipe: Callable[[str], None]
) -> None:
    pipe("hello\n")
    code, out, err = run("chat", stories, "--kv-memory", "16MiB")
    assert code == 4
    assert out == ""
    assert "template" in err
