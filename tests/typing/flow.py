"""What a type checker knows of outputs. Nothing here runs: `test_typing` gives it to mypy."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, assert_type

import msgspec
import pydantic

import streamgen as sg


class Line(msgspec.Struct):
    name: str


class Invoice(msgspec.Struct):
    lines: list[Line]


class Model(pydantic.BaseModel):
    a: int


@dataclasses.dataclass
class Data:
    a: int


class Options(TypedDict):
    a: int


class Point(NamedTuple):
    x: int


class Color(enum.Enum):
    RED = "red"


async def whole(engine: sg.Engine) -> None:
    assert_type(await engine.generate("x"), sg.Completion[None])
    assert_type(await engine.generate("x", output=None), sg.Completion[None])
    assert_type(await engine.generate("x", output=Invoice), sg.Completion[Invoice])
    assert_type((await engine.generate("x", output=Invoice, max_tokens=5)).parsed, Invoice | None)
    assert_type(await engine.generate("x", output=Model), sg.Completion[Model])
    assert_type(await engine.generate("x", output=Data), sg.Completion[Data])
    assert_type(await engine.generate("x", output=Options), sg.Completion[Options])
    assert_type(await engine.generate("x", output=Point), sg.Completion[Point])
    assert_type(await engine.generate("x", output=Color), sg.Completion[Color])
    assert_type(await engine.generate("x", output=int), sg.Completion[int])
    assert_type(await engine.generate("x", output=list[Line]), sg.Completion[list[Line]])
    assert_type(await engine.generate("x", output=dict[str, Line]), sg.Completion[dict[str, Line]])
    assert_type(await engine.generate("x", output=tuple[int, str]), sg.Completion[tuple[int, str]])


async def specs(engine: sg.Engine) -> None:
    assert_type(await engine.generate("x", output=sg.Choice("yes", "no")), sg.Completion[str])
    assert_type(await engine.generate("x", output=sg.Regex("a+")), sg.Completion[str])
    assert_type(await engine.generate("x", output=sg.Grammar("start: /a/")), sg.Completion[str])
    assert_type(await engine.generate("x", output=sg.JsonSchema({})), sg.Completion[Any])
    assert_type(sg.Choice("yes").parse("yes"), str)


async def forms_that_type_checkers_have_no_word_for(engine: sg.Engine) -> None:
    assert_type(await engine.generate("x", output=int | str), sg.Completion[Any])
    assert_type(await engine.generate("x", output=Literal["a", "b"]), sg.Completion[Any])
    assert_type(await engine.generate("x", output=Annotated[int, msgspec.Meta(ge=1)]), sg.Completion[Any])


async def streams(engine: sg.Engine) -> None:
    assert_type(engine.stream("x"), sg.Stream[None])
    async with engine.stream("x", output=Invoice) as stream:
        assert_type(stream, sg.Stream[Invoice])
        assert_type(stream.result, sg.Completion[Invoice])
        assert_type(await stream.final(), sg.Completion[Invoice])
        assert_type(stream.partials(), AsyncIterator[Any])
        assert_type(stream.fields(), AsyncIterator[tuple[str, Any]])
    assert_type(engine.stream("x", output=list[Line]).items(), AsyncIterator[Line])
    assert_type(engine.stream("x", output=set[int]).items(), AsyncIterator[int])
    assert_type(engine.stream("x", output=frozenset[int]).items(), AsyncIterator[int])
    assert_type(engine.stream("x", output=tuple[Line, ...]).items(), AsyncIterator[Line])
    assert_type(engine.stream("x", output=sg.JsonSchema({})).items(), AsyncIterator[Any])
    async for line in engine.stream("x", output=list[Line]).items():
        assert_type(line.name, str)


def plain(engine: sg.sync.Engine) -> None:
    assert_type(engine.generate("x"), sg.Completion[None])
    assert_type(engine.generate("x", output=Invoice).parsed, Invoice | None)
    assert_type(engine.generate("x", output=sg.Choice("a")), sg.Completion[str])
    assert_type(engine.stream("x", output=list[Line]), sg.sync.Stream[list[Line]])
    assert_type(engine.stream("x", output=list[Line]).items(), Iterator[Line])
    assert_type(engine.generate("x", output=int | None), sg.Completion[Any])


async def wrong(engine: sg.Engine) -> None:
    """Each `type: ignore` here is needed: mypy warns of those that are not."""
    number: int = (await engine.generate("x", output=int)).parsed  # type: ignore[assignment]  # it may be None
    lines = await engine.generate("x", output=list[Line])
    text: str = lines  # type: ignore[assignment]
    number.upper()  # type: ignore[attr-defined]
    sg.Choice(1)  # type: ignore[arg-type]
    sg.Grammar("x", syntax="bnf")  # type: ignore[arg-type]
    assert number and text
