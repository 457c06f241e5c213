"""Tools with a real model: twenty functions called under their schemas, and the loop from question to answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

import streamgen as sg
from streamgen.completion import Finished, Started, ToolCall, ToolDelta
from streamgen.tool_loop import run_tools
from tests.real_models import QWEN_0_5B, real_model_path
from tests.text.test_calls_grammar import invent_functions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

# What is asked of the functions that have no example; the model answers it with a call, right or wrong.
QUESTION = "Use the function with values that you make up."


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def engine() -> AsyncIterator[sg.Engine]:
    async with sg.Engine(real_model_path(QWEN_0_5B), max_context=4096) as engine:
        yield engine


def real_definitions(folder: Path) -> list[dict[str, Any]]:
    """Functions whose schemas people gave to models, other real objects, and functions as programs have them."""
    found: list[dict[str, Any]] = []
    for path in sorted(
        (folder / "schemas").glob("*.json"), key=lambda p: (p.stem[:4].lower() not in ("bfcl", "glai"), p)
    ):
        file = json.loads(path.read_text())
        schema = file.get("schema") if isinstance(file, dict) else None
        if isinstance(schema, dict) and schema.get("type") == "object" and len(path.read_bytes()) < 3_000:
            name = f"function_{len(found)}"
            function = {"name": name, "description": "Does it.", "parameters": schema, "strict": True}
            found.append({"type": "function", "function": function})
    invented = [{**d, "function": {**d["function"], "strict": True}} for d in invent_functions()]
    return [*found, *invented][:20]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", "name"])
async def test_twenty_real_functions_are_called_under_their_schemas(
    engine: sg.Engine, shared_data: Path, choice: str
) -> None:
    definitions = real_definitions(shared_data)
    assert len(definitions) == 20
    num_whole = 0
    for definition in definitions:
        name, schema = definition["function"]["name"], definition["function"]["parameters"]
        done = await engine.generate(
            [sg.user(QUESTION)],
            tools=[definition],
            tool_choice=name if choice == "name" else choice,
            max_tokens=200,
            temperature=0,
        )
        assert done.text == "" and done.tool_calls[0].name == name
        for call in done.tool_calls[:-1] if done.finish_reason == "length" else done.tool_calls:
            jsonschema.Draft202012Validator(schema).validate(call.parsed)
            num_whole += 1
    assert num_whole >= 15, "the others were cut off"


async def test_a_required_call_streams_and_is_valid(engine: sg.Engine) -> None:
    def book(time: str, people: int) -> str:
        """Book a table.

        Args:
            time: as in 19:30
            people: how many
        """
        return f"{time} for {people}"

    ask = [sg.user("A table for 4 at 19:30, please.")]
    async with engine.stream(ask, tools=[book], tool_choice="book", max_tokens=80, temperature=0) as stream:
        events = [event async for event in stream.events()]
    kinds = [type(event) for event in events]
    assert (kinds[0], kinds[-1]) == (Started, Finished) and set(kinds[1:-1]) == {ToolDelta, ToolCall}
    (call,) = stream.result.tool_calls
    assert call.parsed == {"time": "19:30", "people": 4} and stream.result.finish_reason == "tool_calls"
    assert "".join(e.arguments for e in events if isinstance(e, ToolDelta)) == call.arguments
    assert stream.result.text == ""


async def test_a_loop_calls_and_answers(engine: sg.Engine) -> None:
    made: list[int] = []

    async def weight(animal: str) -> str:
        """The weight of an animal.

        Args:
            animal: which
        """
        made.append(1)
        return "4 kg"

    ask = [sg.user("How heavy is a cat? Use the function, then say it in one sentence.")]
    done = await run_tools(
        engine, ask, tools=[weight], tool_choice="weight", max_tokens=60, temperature=0, max_rounds=4
    )
    assert made, "what it then says, or that it calls until it is cut off, is the model's affair"
    assert done.finish_reason in ("stop", "length") and done.usage.prompt_tokens > 200, "that of both rounds"


async def test_without_tools_nothing_changes(engine: sg.Engine) -> None:
    def f(a: int) -> int:
        return a

    ask = [sg.user("Say hello.")]
    plain = await engine.generate(ask, max_tokens=12, temperature=0)
    none = await engine.generate(ask, max_tokens=12, temperature=0, tools=[f], tool_choice="none")
    assert plain.ids == none.ids and plain.text == none.text and plain.tool_calls == ()
