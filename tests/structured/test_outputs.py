"""Whole requests with `output=`: what comes back obeys, whatever the sampling, and nobody else notices."""

from __future__ import annotations

import json
import random
from datetime import date  # noqa: TC003  # a type that is read
from decimal import Decimal  # noqa: TC003  # likewise
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
import jsonschema
import pytest
from msgspec import Meta, Struct

import streamgen as sg
from streamgen.testing import tiny_engine
from tests.structured.schemas import random_schema

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 40},
    {"temperature": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
    {"temperature": 1.0, "typical_p": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 0.7, "min_tokens": 30, "ignore_eos": True},
    {"temperature": 1.0, "logprobs": 2},
]


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Line(Struct):
    item: Annotated[str, Meta(max_length=12)]
    quantity: Annotated[int, Meta(ge=1, le=99)]


class Invoice(Struct):
    number: Annotated[int, Meta(ge=0, le=9999)]
    issued: date
    colour: Colour
    kind: Literal["in", "out"]
    total: Decimal
    lines: Annotated[list[Line], Meta(max_length=3)]
    note: Annotated[str, Meta(max_length=10)] | None = None


@pytest.fixture
async def engine() -> AsyncIterator[sg.Engine]:
    async with tiny_engine(max_running=16) as engine:
        yield engine


async def test_a_typed_value(engine: sg.Engine) -> None:
    for seed in range(4):
        reply = await engine.generate("x", output=Invoice, max_tokens=600, seed=seed)
        assert isinstance(reply.parsed, Invoice)
        assert reply.finish_reason == "stop"
        assert reply.stop is None or reply.ids[-1] == reply.stop


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
async def test_every_way_of_sampling_obeys(engine: sg.Engine, sampling: dict[str, Any]) -> None:
    reply = await engine.generate("x", output=sg.Regex(r"[a-f]{3}-\d{2,4}(x|xyz)?"), max_tokens=40, seed=3, **sampling)
    assert jsonschema.validate(reply.text, {"pattern": r"^[a-f]{3}-\d{2,4}(x|xyz)?$"}) is None
    assert reply.parsed == reply.text


async def test_choices(engine: sg.Engine) -> None:
    choice, answers = sg.Choice("cat", "category", "dog"), set()
    for i in range(40):
        answers.add((await engine.generate(f"x{i}", output=choice, seed=i, temperature=2)).parsed)
    assert answers == {"cat", "category", "dog"}


async def test_grammars_of_both_kinds(engine: sg.Engine) -> None:
    gbnf = await engine.generate("x", output=sg.Grammar('root ::= "(" [ab]{2,5} ")" | "-"'), max_tokens=20, seed=1)
    assert gbnf.text == "-" or (gbnf.text[0] + gbnf.text[-1] == "()" and set(gbnf.text[1:-1]) <= {"a", "b"})
    lark = await engine.generate("x", output=sg.Grammar('start: "<" /[0-9]{1,3}/ ">"'), max_tokens=20, seed=1)
    assert lark.text[0] == "<"
    assert lark.text[1:-1].isdigit()


async def test_who_is_not_constrained_notices_nothing(engine: sg.Engine) -> None:
    free: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True, "logprobs": 1}
    alone = [await engine.generate(f"free {i}", seed=i, **free) for i in range(4)]
    bound_alone = [await engine.generate(f"bound {i}", output=Invoice, seed=i, max_tokens=400) for i in range(4)]
    found: dict[str, sg.Completion[Any]] = {}

    async def run(name: str, prompt: str, **fields: Any) -> None:
        found[name] = await engine.generate(prompt, **fields)

    async with anyio.create_task_group() as group:
        for i in range(4):
            group.start_soon(partial(run, f"free {i}", f"free {i}", seed=i, **free))
            group.start_soon(partial(run, f"bound {i}", f"bound {i}", output=Invoice, seed=i, max_tokens=400))
    for i in range(4):
        assert (found[f"free {i}"].ids, found[f"free {i}"].logprobs) == (alone[i].ids, alone[i].logprobs)
        assert (found[f"bound {i}"].ids, found[f"bound {i}"].parsed) == (bound_alone[i].ids, bound_alone[i].parsed)


async def test_logprobs_change_no_token(engine: sg.Engine) -> None:
    plain = await engine.generate("x", output=Invoice, seed=5, max_tokens=400)
    told = await engine.generate("x", output=Invoice, seed=5, max_tokens=400, logprobs=1)
    assert plain.ids == told.ids
    assert told.logprobs is not None
    assert len(told.logprobs) == len(told.ids)


async def test_preempted_in_the_middle_of_a_value() -> None:
    async with tiny_engine(max_running=8) as engine:
        alone = [await engine.generate("y" * 30, output=Invoice, seed=i, max_tokens=300) for i in range(8)]
    async with tiny_engine(max_running=8, max_context=512, kv_memory=str(40 * 8192)) as engine:
        assert engine.plan().num_pages == 40
        admission: Any = engine._open_thread()._core.scheduler._scheduler._admission  # type: ignore[union-attr]
        admission.fits = lambda *a, **k: True  # a wrong prediction, which leads to preemption
        found: list[Any] = [None] * 8

        async def run(i: int) -> None:
            found[i] = await engine.generate("y" * 30, output=Invoice, seed=i, max_tokens=300)

        async with anyio.create_task_group() as group:
            for i in range(8):
                group.start_soon(run, i)
        assert engine.stats().preemptions > 0
    assert [reply.ids for reply in found] == [reply.ids for reply in alone]


async def test_cut_before_the_end(engine: sg.Engine) -> None:
    with pytest.raises(sg.IncompleteOutput) as caught:
        await engine.generate("x", output=Invoice, max_tokens=5)
    assert caught.value.partial.finish_reason == "length"
    assert caught.value.partial.parsed is None
    assert caught.value.partial.text
    async with engine.stream("x", output=Invoice, max_tokens=5) as stream:
        deltas = [delta async for delta in stream]
    assert stream.result.text == "".join(delta.text for delta in deltas)


async def test_several_of_one_prompt(engine: sg.Engine) -> None:
    replies = await engine.sample("x", n=4, output=Line, max_tokens=100, seed=7, temperature=2)
    assert all(isinstance(reply.parsed, Line) for reply in replies)
    assert len({reply.text for reply in replies}) > 1


async def test_many_prompts(engine: sg.Engine) -> None:
    async with engine.map([f"prompt {i}" for i in range(6)], output=Line, max_tokens=100) as results:
        found = [result async for result in results]
    assert all(isinstance(result, sg.Ok) and isinstance(result.completion.parsed, Line) for result in found)


async def test_a_session_takes_turns(engine: sg.Engine) -> None:
    async with engine.session() as session:
        first = await session.ask("one", output=Line, max_tokens=100)
        second = await session.ask("two", max_tokens=10)
    assert isinstance(first.parsed, Line)
    assert second.parsed is None


async def test_in_a_process_of_its_own() -> None:
    async with tiny_engine() as engine:
        here = await engine.generate("x", output=Invoice, seed=2, max_tokens=400)
        grammar = await engine.generate("x", output=sg.Grammar('root ::= "a"{1,9} "b"'), seed=2, max_tokens=100)
    async with tiny_engine(isolation="process") as engine:
        there = await engine.generate("x", output=Invoice, seed=2, max_tokens=400)
        other = await engine.generate("x", output=sg.Grammar('root ::= "a"{1,9} "b"'), seed=2, max_tokens=100)
    assert (here.ids, grammar.ids) == (there.ids, other.ids)


async def test_compiled_outputs_answer_without_a_model(engine: sg.Engine) -> None:
    compiled = await engine.compile(Line)
    text = '{"item": "é\\u00e9", "quantity": 7}'
    assert compiled.accepts(text)
    assert compiled.parse(text) == Line("éé", 7)
    assert compiled.prefix_ok(text[:12])
    assert not compiled.accepts(text[:-1])
    assert not compiled.prefix_ok('{"item": 3')
    assert not compiled.accepts('{"item": "x", "quantity": 100}')
    assert compiled.stats.backend == "outlines"
    assert compiled.stats.states


async def test_warmed_at_open() -> None:
    async with tiny_engine(grammars=[Line, sg.Regex("a+")]) as engine:
        assert (await engine.compile(Line)).stats.bytes > 0
    with pytest.raises(sg.SchemaError):
        async with tiny_engine(grammars=[sg.Regex("(a")]):
            pass


BAD: list[tuple[Any, type[Exception]]] = [
    (sg.JsonSchema({"type": "objekt"}), sg.SchemaError),
    (sg.JsonSchema({"type": "integer", "minimum": 5, "maximum": 4}), sg.SchemaError),
    (sg.JsonSchema({"enum": []}), sg.SchemaError),
    (sg.JsonSchema({"$ref": "https://example.com/schema.json"}), sg.SchemaError),
    (sg.JsonSchema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), sg.SchemaError),
    (sg.JsonSchema({"type": "array", "items": {"type": "string"}, "uniqueItems": True}), sg.SchemaError),
    (sg.JsonSchema({"type": "string", "maxLength": 5, "minLength": 9}), sg.SchemaError),
    (sg.Regex("a(?=b)"), sg.SchemaError),
    (sg.Regex(r"(a)\1"), sg.SchemaError),
    (sg.Regex("a{1000000}"), sg.SchemaTooComplex),
    (sg.Regex("(a|b)*a(a|b){20}"), sg.SchemaTooComplex),
    (sg.Grammar("root ::= undefined"), sg.SchemaError),
    (sg.Grammar('root ::= "a'), sg.SchemaError),
    (print, sg.RequestError),
]


@pytest.mark.parametrize(("output", "error"), BAD, ids=lambda value: repr(value)[:60])
async def test_refused_before_any_token(engine: sg.Engine, output: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        async with engine.stream("x", output=output, max_tokens=5):
            pass
    with pytest.raises(error):
        await engine.compile(output)
    assert (await engine.generate("x", max_tokens=3, ignore_eos=True)).usage.completion_tokens == 3
    assert engine.stats().pages_used == 0


async def test_stop_strings_contradict_a_grammar(engine: sg.Engine) -> None:
    with pytest.raises(sg.InvalidRequest, match="stop"):
        engine.stream("x", output=Line, stop="}")


async def _validate(engine: sg.Engine, seed: int) -> bool:
    """One random pair; whether the output came to its end."""
    rng = random.Random(seed)
    schema = random_schema(rng)
    sampling = rng.choice(SAMPLINGS)
    try:
        reply = await engine.generate(
            f"JSON {seed}", output=sg.JsonSchema(schema), max_tokens=300, seed=seed, **sampling
        )
    except sg.IncompleteOutput:
        return False
    value = json.loads(reply.text)
    jsonschema.validate(value, schema, format_checker=jsonschema.FormatChecker())
    assert reply.parsed == value
    assert reply.finish_reason == "stop"
    return True


async def _validate_many(engine: sg.Engine, seeds: range) -> int:
    found: list[bool] = []

    async def run(seed: int) -> None:
        found.append(await _validate(engine, seed))

    for start in range(seeds.start, seeds.stop, 16):
        async with anyio.create_task_group() as group:
            for seed in range(start, min(start + 16, seeds.stop)):
                group.start_soon(run, seed)
    return sum(found)


async def test_random_schemas_hold(engine: sg.Engine) -> None:
    assert await _validate_many(engine, range(32)) > 20


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_random_schemas_hold_on_the_demo_model(demo_model_path: Path, anyio_backend: str) -> None:
    async with sg.Engine(demo_model_path) as engine:
        assert await _validate_many(engine, range(1000, 1500)) > 350
