"""An engine as a model of Outlines: everything that Outlines does with its models, over the real package."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import outlines
import outlines.inputs
import pydantic
import pytest
from outlines.types import CFG, Choice, Regex, dsl

import streamgen as sg
from streamgen.contrib.outlines import AsyncStreamgen, Streamgen, StreamgenTypeAdapter, from_streamgen
from streamgen.errors import IncompleteOutput, InvalidRequest, OutputInvalid, SchemaError
from streamgen.grammar.outputs import read_output
from streamgen.grammar.source import CfgSource, RegexSource, SchemaSource
from tests.fakes import FakeOpener, say

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio

SAID = '{"number": 7}'


class Invoice(pydantic.BaseModel):
    number: int


class Line(msgspec.Struct):
    number: int


@pytest.fixture
def opener() -> FakeOpener:
    return FakeOpener(say(SAID))


@pytest.fixture
async def model(opener: FakeOpener) -> Any:
    async with sg.Engine(_opener=opener) as engine:
        yield from_streamgen(engine)


@pytest.fixture
def plain_model(opener: FakeOpener) -> Iterator[Streamgen]:
    with sg.sync.Engine(_opener=opener) as engine:
        yield from_streamgen(engine)


# ---- an async engine -------------------------------------------------------------------------------------------------


async def test_generators(model: AsyncStreamgen) -> None:
    generator: Any = outlines.Generator(model, Invoice)  # it is typed as any of its kinds
    assert await generator("x") == SAID
    assert Invoice.model_validate_json(await generator("x", max_tokens=40)).number == 7
    assert await generator.batch(["x", "y", "z"]) == [SAID] * 3
    assert "".join([text async for text in generator.stream("x")]) == SAID


async def test_the_model_itself(model: AsyncStreamgen) -> None:
    assert isinstance(model, AsyncStreamgen)
    assert await model("x") == await model("x", Invoice) == await model("x", output_type=Line) == SAID
    assert await model.batch(["x", "y"], Invoice) == [SAID, SAID]
    assert "".join([text async for text in model.stream("x", Invoice)]) == SAID


async def test_templates_and_applications(model: AsyncStreamgen) -> None:
    template = outlines.Template.from_string("What is {{ what }}?")
    application: Any = outlines.Application(template, Invoice)  # it is typed for plain models
    assert await application(model, {"what": "x"}, max_tokens=30) == SAID


async def test_errors_of_the_engine_come_through(model: AsyncStreamgen) -> None:
    with pytest.raises(IncompleteOutput):
        await model("x", Invoice, max_tokens=3)
    with pytest.raises(IncompleteOutput):
        [text async for text in model.stream("x", Invoice, max_tokens=3)]
    with pytest.raises(InvalidRequest, match="did you mean 'max_tokens'"):
        await model("x", Invoice, max_token=3)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        await model.batch(["x", "y"], max_tokens=-1)
    assert await model("x", max_tokens=3) == SAID[:3], "without a type it may be cut"


# ---- a plain one -----------------------------------------------------------------------------------------------------


def test_plain_generators(plain_model: Streamgen) -> None:
    generator: Any = outlines.Generator(plain_model, Invoice)
    assert generator("x") == SAID
    assert generator.batch(["x", "y", "z"]) == [SAID] * 3
    assert "".join(generator.stream("x")) == SAID


def test_the_plain_model_itself(plain_model: Streamgen) -> None:
    assert isinstance(plain_model, Streamgen)
    assert plain_model("x") == plain_model("x", Invoice) == SAID
    assert plain_model.batch(["x", "y"], Invoice) == [SAID, SAID]
    assert "".join(plain_model.stream("x", Invoice)) == SAID
    application = outlines.Application(outlines.Template.from_string("{{ what }}"), Invoice)
    assert application(plain_model, {"what": "x"}) == SAID
    with pytest.raises(IncompleteOutput):
        plain_model("x", Invoice, max_tokens=3)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        plain_model.batch(["x", "y"], max_tokens=-1)


def test_output_that_is_not_of_its_type() -> None:
    class Checked(Invoice):
        @pydantic.field_validator("number")
        @classmethod
        def check(cls, number: int) -> int:
            raise ValueError("none is good enough")

    with sg.sync.Engine(_opener=FakeOpener(say(SAID))) as engine:
        model = from_streamgen(engine)
        with pytest.raises(OutputInvalid, match="Checked"):
            model("x", Checked)


def test_what_is_no_engine() -> None:
    thing: Any = object()
    with pytest.raises(InvalidRequest, match="expected an engine, got object"):
        from_streamgen(thing)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs() -> None:
    adapter = StreamgenTypeAdapter(chat_mode=True)
    assert adapter.format_input("hi") == [{"role": "user", "content": "hi"}]
    assert StreamgenTypeAdapter(chat_mode=False).format_input("hi") == "hi"
    chat = outlines.inputs.Chat()
    chat.add_system_message("be brief")
    chat.add_user_message(["one", "two"])
    assert adapter.format_input(chat) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    assert adapter.format_input(["one"]) == [{"role": "user", "content": [{"type": "text", "text": "one"}]}]


def test_other_inputs_are_refused_by_name() -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, format="PNG")
    image = outlines.inputs.Image(Image.open(buffer))
    adapter = StreamgenTypeAdapter(chat_mode=True)
    for given in (["what is it?", image], outlines.inputs.Chat([{"role": "user", "content": [image]}])):
        with pytest.raises(InvalidRequest, match="got Image"):
            adapter.format_input(given)
    with pytest.raises(InvalidRequest, match="got int"):
        adapter.format_input(3)


def test_what_the_engine_sees(opener: FakeOpener) -> None:
    with sg.sync.Engine(_opener=opener) as engine:
        chat = outlines.inputs.Chat([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}])
        seen = [
            engine.generate(StreamgenTypeAdapter(chat_mode=mode).format_input(given)).usage.prompt_tokens
            for mode, given in ((True, "hi"), (False, "hi"), (True, chat))
        ]
        rendered = [engine.render([sg.user("hi")]).ids, engine.tokenize("hi"), engine.render(chat.messages).ids]
    assert seen == [len(ids) for ids in rendered]


# ---- output types ----------------------------------------------------------------------------------------------------

FORMAT = StreamgenTypeAdapter(chat_mode=True).format_output_type


@pytest.mark.parametrize(
    ("output_type", "text"),
    [
        (Literal["yes", "no"], "yes"),  # without quotes, as everywhere in Outlines
        (bool, "True"),
        (int, "-12"),
        (Regex("[a-c]+"), "abc"),
        (Choice(["a", "b"]), "b"),
        (dsl.either("x", "yy"), "yy"),
        (list[Literal["a"]], '["a", "a"]'),
    ],
    ids=str,
)
def test_types_mean_what_they_mean_in_outlines(output_type: Any, text: str) -> None:
    plan = read_output(FORMAT(output_type))
    assert isinstance(plan.source, RegexSource) and dsl.Regex(plan.source.pattern).matches(text)
    assert plan.parse(text) == text


def test_json_types() -> None:
    assert FORMAT(None) is None and FORMAT(Invoice) is Invoice and FORMAT(Line) is Line
    assert isinstance(read_output(FORMAT(outlines.types.JsonSchema({"type": "array"}))).source, SchemaSource)
    assert isinstance(read_output(FORMAT(dict)).source, SchemaSource)
    assert read_output(FORMAT(CFG('start: "a"'))).source == CfgSource(text='start: "a"')
    assert FORMAT(sg.Choice("a")) == sg.Choice("a")


def test_a_type_that_nobody_knows() -> None:
    with pytest.raises(SchemaError, match="complex"):
        read_output(FORMAT(complex))
