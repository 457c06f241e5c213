"""Every type as the output of a real engine on random weights: what comes back is of the type, or was cut."""

from __future__ import annotations

import datetime as dt  # noqa: TC003  # an annotation that msgspec reads
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import outlines
import pytest
from msgspec import Meta, Struct
from pydantic import BaseModel, Field

from streamgen.contrib.outlines import from_streamgen
from streamgen.errors import IncompleteOutput
from streamgen.grammar.outputs import read_output
from streamgen.testing import tiny_engine
from streamgen.values import Outcome
from tests.grammar.output_types import EXAMPLES, Color, Invoice

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import streamgen as sg

pytestmark = pytest.mark.anyio


class Item(Struct):
    """What also random weights bring to an end."""

    name: Annotated[str, Meta(max_length=6)]
    count: Annotated[int, Meta(ge=1, le=99)]
    color: Color
    day: dt.date | None = None


class Small(BaseModel):
    name: str = Field(max_length=6)
    count: int = Field(ge=1, le=99)


@pytest.fixture
async def engine() -> AsyncIterator[sg.Engine]:
    async with tiny_engine(max_context=512) as engine:
        yield engine


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_every_type_comes_back_as_itself(engine: sg.Engine) -> None:
    whole = 0
    for tp, _ in EXAMPLES:
        for seed in range(2):
            async with engine.stream("x", output=tp, max_tokens=120, temperature=1.0, seed=seed) as stream:
                partials: list[Any] = []
                try:
                    async for partial in stream.partials():
                        partials.append(partial)  # noqa: PERF401  # what came before the error counts
                except IncompleteOutput as error:
                    assert error.partial.finish_reason == "length"
                    continue
                result = await stream.final()
            whole += 1
            assert result.parsed == read_output(tp).parse(result.text)
            assert partials[-1] == json.loads(result.text)
    assert whole > len(EXAMPLES)


async def test_items_and_fields_of_real_output(engine: sg.Engine) -> None:
    colors = Annotated[list[Color], Meta(max_length=9)]
    for seed in range(4):
        stream = engine.stream("x", output=colors, max_tokens=200, temperature=1.0, seed=seed)
        items = [item async for item in stream.items()]
        assert items == stream.result.parsed and all(isinstance(item, Color) for item in items)
    line = engine.stream("x", output=Item, max_tokens=200, temperature=1.0, seed=1)
    fields = dict([field async for field in line.fields()])
    assert line.result.parsed is not None and fields["/name"] == line.result.parsed.name


async def test_reading_values_does_not_change_them(engine: sg.Engine) -> None:
    options: dict[str, Any] = {"output": Item, "max_tokens": 200, "temperature": 1.0, "seed": 1}
    alone = await engine.generate("x", **options)
    stream = engine.stream("x", **options)
    partials = [partial async for partial in stream.partials()]
    assert stream.result.text == alone.text and partials[-1] == json.loads(alone.text)
    assert Outcome(stream._submission.output).check(stream.result).parsed == alone.parsed == stream.result.parsed


async def test_a_cut_value(engine: sg.Engine) -> None:
    with pytest.raises(IncompleteOutput) as caught:
        await engine.generate("x", output=Invoice, max_tokens=5)
    assert caught.value.partial.text.startswith("{") and caught.value.partial.parsed is None


async def test_as_a_model_of_outlines(engine: sg.Engine) -> None:
    model: Any = from_streamgen(engine)
    assert await model("yes or no?", Literal["yes", "no"]) in ("yes", "no")
    answers = await model.batch(["a", "b", "c"], Color, seed=3, temperature=1.0)
    assert set(answers) <= {"red", "green"}
    generator: Any = outlines.Generator(model, Small)
    text = "".join([piece async for piece in generator.stream("x", max_tokens=300, temperature=0.7, seed=5)])
    assert isinstance(Small.model_validate_json(text), Small)
