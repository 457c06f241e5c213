"""Tools: what signatures and docstrings become, what is refused by name, what arguments come back as; and the loop."""

from __future__ import annotations

import functools
import gc
import json
import threading
import weakref
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import anyio
import jsonschema
import msgspec
import pydantic
import pytest

import streamgen as sg
from streamgen.completion import Completion, ToolCall, Usage
from streamgen.errors import DeadlineExceeded, IncompleteOutput, InvalidRequest, OutputInvalid
from streamgen.tool_loop import run_tools, run_tools_blocking
from streamgen.tools import MAX_TOOLS, ToolPlan, read_tools

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Unit(Enum):
    C = "celsius"
    F = "fahrenheit"


class Place(msgspec.Struct):
    """A place on earth."""

    city: str
    country: Annotated[str, msgspec.Meta(min_length=2, max_length=2)] = "CH"


class Order(pydantic.BaseModel):
    """An order."""

    item: str
    count: int = pydantic.Field(ge=1, description="how many")


class Note(TypedDict):
    text: str


@dataclass
class Point:
    x: int
    y: int = 0


def forecast(
    place: Place,
    days: Annotated[int, msgspec.Meta(ge=1, le=14)],
    unit: Unit = Unit.C,
    detail: Literal["low", "high"] | None = None,
    tags: list[str] = ["a"],  # noqa: B006  # what somebody may write
    *,
    start: date | None = None,
) -> dict[str, Any]:
    """Forecast the weather.

    It looks at several models.

    Args:
        place: where
        days (int): how many days,
            today included
        unit: of temperatures

    Returns:
        One line per day.
    """
    return {"place": place, "days": days, "unit": unit, "detail": detail, "tags": tags, "start": start}


async def book(time: str, people: int) -> str:
    """Book a table."""
    return f"{time} for {people}"


def definition(tool: object) -> dict[str, Any]:
    (found,) = read_tools([tool]).definitions
    function: dict[str, Any] = found["function"]
    jsonschema.Draft202012Validator.check_schema(function["parameters"])
    return function


def test_a_signature_becomes_a_schema() -> None:
    found = definition(forecast)
    assert (found["name"], found["strict"]) == ("forecast", None)
    assert found["description"] == "Forecast the weather.\n\nIt looks at several models."
    schema = found["parameters"]
    assert list(schema["properties"]) == ["place", "days", "unit", "detail", "tags", "start"]
    assert (schema["required"], schema["additionalProperties"]) == (["place", "days"], False)
    assert schema["properties"]["place"] == {"$ref": "#/$defs/Place", "description": "where"}
    assert schema["properties"]["days"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 14,
        "description": "how many days, today included",
    }
    assert set(schema["$defs"]) == {"Place", "Unit"} and "title" not in schema


NUMPY = """Do it.

    Parameters
    ----------
    a : int
        the first
        of two
    b : int, optional
        the second

    Returns
    -------
    int
    """
REST = """Do it.

    :param a: the first
        of two
    :param int b: the second
    :returns: nothing
    """
GOOGLE = """Do it.

    Args:
        a (int): the first
            of two
        b: the second
    Raises:
        ValueError: b: never
    """


@pytest.mark.parametrize("doc", [NUMPY, REST, GOOGLE])
def test_docstrings_describe_parameters(doc: str) -> None:
    def f(a: int, b: int = 0) -> None: ...

    f.__doc__ = doc
    found = definition(f)
    assert found["description"] == "Do it."
    described = {name: p.get("description") for name, p in found["parameters"]["properties"].items()}
    assert described == {"a": "the first of two", "b": "the second"}


def test_a_docstring_that_describes_nothing_is_the_description() -> None:
    def f(a: Annotated[int, msgspec.Meta(description="own")]) -> None:
        """One: two.

        Note that a: is not described here.
        """

    assert definition(f)["description"] == "One: two.\n\nNote that a: is not described here."
    assert definition(f)["parameters"]["properties"]["a"]["description"] == "own"
    assert definition(lambda_named())["description"] == ""


def lambda_named() -> Callable[[], int]:
    def nothing() -> int:
        return 1

    return nothing


def test_arguments_come_as_the_signature_says() -> None:
    plan = read_tools([forecast])
    text = '{"place": {"city": "Bern"}, "days": 3, "unit": "fahrenheit", "start": "2024-05-01"}'
    arguments = plan.parse_arguments("forecast", text)
    assert forecast(**arguments) == {
        "place": Place(city="Bern"),
        "days": 3,
        "unit": Unit.F,
        "detail": None,
        "tags": ["a"],
        "start": date(2024, 5, 1),
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "place"),
        ('{"place": {"city": "Bern"}, "days": 15}', r"\$\.days"),
        ('{"place": {"city": "Bern"}, "days": "3"}', r"\$\.days"),
        ('{"place": {"city": "Bern"}, "days": 3, "more": 1}', "more"),
        ('{"place"', "truncated"),
        ("[]", "object"),
        ("", "truncated"),
        ("[" * 100_000, "do not fit"),
    ],
)
def test_arguments_that_do_not_fit(text: str, reason: str) -> None:
    with pytest.raises(OutputInvalid, match=reason) as caught:
        read_tools([forecast]).parse_arguments("forecast", text)
    assert "'forecast'" in caught.value.message and "Bern" not in caught.value.message


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(OutputInvalid, match="the tools are book, forecast"):
        read_tools([book, forecast]).parse_arguments("cook", "{}")


@pytest.mark.parametrize(
    ("tool", "text", "value"),
    [
        (Place, '{"city": "Bern"}', Place(city="Bern")),
        (Order, '{"item": "tea", "count": 2}', Order(item="tea", count=2)),
        (Note, '{"text": "x"}', {"text": "x"}),
        (Point, '{"x": 1}', Point(1)),
    ],
)
def test_classes_are_calls_with_their_fields(tool: type, text: str, value: object) -> None:
    plan = read_tools([tool])
    assert definition(tool)["parameters"]["type"] == "object"
    assert definition(tool)["description"] == {Place: "A place on earth.", Order: "An order."}.get(tool, "")
    assert plan.parse_arguments(tool.__name__, text) == value and plan.functions == {}
    with pytest.raises(OutputInvalid, match=tool.__name__):
        plan.parse_arguments(tool.__name__, '{"x": "secret"}')


def test_pydantic_types_in_a_signature() -> None:
    def place_order(order: Order, note: str = "-") -> str:
        """Order.

        Args:
            order: what
        """
        return f"{order.item} {order.count} {note}"

    found = definition(place_order)
    assert found["parameters"]["required"] == ["order"] and found["parameters"]["additionalProperties"] is False
    plan = read_tools([place_order])
    assert place_order(**plan.parse_arguments("place_order", '{"order": {"item": "tea", "count": 2}}')) == "tea 2 -"
    with pytest.raises(OutputInvalid, match=r"greater than or equal to 1 - at `order\.count`"):
        plan.parse_arguments("place_order", '{"order": {"item": "secret", "count": 0}}')


def test_a_function_is_read_once_and_not_kept_alive() -> None:
    def f(a: int) -> int:
        return a

    first, second = read_tools([f]), read_tools([f])
    assert first.definitions[0] is second.definitions[0] and second.functions["f"] is f
    alive = weakref.ref(f)
    del f, first, second
    gc.collect()
    assert alive() is None


def test_methods_and_partials_are_functions() -> None:
    class Desk:
        def open(self, key: str) -> str:
            return key

    plan = read_tools([Desk().open, functools.partial(book, people=2)])
    assert plan.functions["open"](**plan.parse_arguments("open", '{"key": "k"}')) == "k"
    assert plan.parse_arguments("book", '{"time": "8"}') == {"time": "8", "people": 2}


def test_openai_dicts() -> None:
    given = {
        "type": "function",
        "function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}, "strict": True},
    }
    plan = read_tools([given, {"type": "function", "function": {"name": "g"}}])
    first, second = (d["function"] for d in plan.definitions)
    assert first["parameters"] == {"type": "object", "properties": {"a": {"type": "integer"}}} and first["strict"]
    assert second == {"name": "g", "parameters": {"type": "object", "properties": {}}, "strict": False}
    assert plan.parse_arguments("f", '{"a": "not checked here"}') == {"a": "not checked here"}
    with pytest.raises(OutputInvalid):
        plan.parse_arguments("f", "[1]")


def untyped(a) -> None:  # type: ignore[no-untyped-def]
    ...


def variadic(*a: int) -> None: ...
def positional(a: int, /) -> None: ...
def keywords(**a: int) -> None: ...
def strange(a: threading.Lock) -> None: ...
def required() -> None: ...


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("book", "expected a sequence"),
        ([3], r"tools\[0\]: expected a function, a class or a dict, got int"),
        ([untyped], r"tools\[0\] 'untyped': parameter 'a': expected a type annotation"),
        ([variadic], "'variadic': parameter 'a': expected one that is passed by name"),
        ([positional], "'positional': parameter 'a'"),
        ([keywords], "'keywords': parameter 'a'"),
        ([strange], "'strange': parameter 'a'"),
        ([required], "choose another name"),
        ([lambda: 1], "expected a name"),
        ([book, book], r"tools\[1\]: there is another tool 'book'"),
        ([int], "'int': expected a msgspec Struct"),
        ([{"name": "f"}], r'expected \{"type": "function"'),
        ([{"type": "function", "function": {"name": "a b"}}], "expected a name of 1 to 64"),
        ([{"type": "function", "function": {"name": "f", "args": {}}}], "unknown field 'args'"),
        ([{"type": "function", "function": {"name": "f", "description": 3}}], "'f': description: expected text"),
        ([{"type": "function", "function": {"name": "f", "strict": "yes"}}], "'f': strict"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            "'f': parameters: expected a JSON schema",
        ),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "dict"}}}], 'of type "object"'),
        ([{"type": "function", "function": {"name": "f", "parameters": {"a": object()}}}], "expected JSON data"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}], "properties"),
        ([book] * (MAX_TOOLS + 1), "expected <= 128"),
        ([{"type": "function", "function": {"name": "f", "description": "x" * 1_100_000}}], "bytes of definitions"),
    ],
)
def test_refusals_say_which_tool_and_which_parameter(tools: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        read_tools(tools)
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        ("book", "book"),
        ({"type": "function", "function": {"name": "book"}}, "book"),
    ],
)
def test_choices(choice: object, expected: str) -> None:
    assert read_tools([book], choice).choice == expected


@pytest.mark.parametrize(
    ("tools", "choice", "reason"),
    [
        ([book, forecast], "boook", "did you mean 'book'"),
        ([book, forecast], "zzz", "the tools are book, forecast"),
        ([book], "require", "did you mean 'required'"),
        ([book], 3, "got int"),
        ([book], {"type": "auto"}, "got NoneType"),
        ([], "required", "there are no tools"),
        ([], "book", "there are no tools"),
    ],
)
def test_choices_that_cannot_be(tools: Any, choice: object, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        read_tools(tools, choice)
    assert caught.value.param == "tool_choice"


def schemas_of_functions(folder: Path) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    for path in sorted(folder.glob("*.json")):
        file = json.loads(path.read_text())
        schema = file.get("schema") if isinstance(file, dict) else None
        if isinstance(schema, dict) and schema.get("type") == "object":
            yield path.stem, schema, [case["data"] for case in file["tests"] if case["valid"]]


def test_real_schemas_are_read_and_their_calls_come_back(shared_data: Path) -> None:
    """Valid instances as calls, through Qwen's format; the schema of the call holds for the call."""
    from streamgen.text.calls.hermes import HermesCalls
    from streamgen.text.calls.schemas import call_source
    from tests.text.test_calls import BY_ID, cut, read, run, symbols

    num_calls = 0
    for index, (_, schema, values) in enumerate(schemas_of_functions(shared_data / "schemas")):
        name = f"tool_{index}"
        given = {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
        plan = read_tools([given])
        call_schema = json.loads(call_source(plan.definitions).text)
        jsonschema.Draft202012Validator.check_schema(call_schema)
        for value in values:
            if not isinstance(value, dict):
                continue
            call = {"name": name, "arguments": value}
            assert jsonschema.Draft202012Validator(call_schema).is_valid(call)
            output = f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
            found = symbols(HermesCalls, output, by_id=True)
            text, calls = read(run(HermesCalls(BY_ID).parser(), cut(found, range(0, len(found), 7))))
            assert (text, len(calls), calls[0][2]) == ("", 1, True)
            assert plan.parse_arguments(name, calls[0][1]) == value
            num_calls += 1
    assert num_calls >= 20


# ---- the loop -------------------------------------------------------------------------------------------------------


class Script:
    """An engine whose answers are written down; it keeps what it was asked."""

    def __init__(self, *answers: Completion[Any] | BaseException) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[list[Any], dict[str, Any]]] = []

    async def generate(self, prompt: Any, /, **fields: Any) -> Completion[Any]:
        return self.answer(prompt, fields)

    def answer(self, prompt: Any, fields: dict[str, Any]) -> Completion[Any]:
        self.asked.append((list(prompt), fields))
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


class BlockingScript(Script):
    def generate(self, prompt: Any, /, **fields: Any) -> Completion[Any]:  # type: ignore[override]
        return self.answer(prompt, fields)


def calls(*made: tuple[str, str], reason: Any = "tool_calls") -> Completion[Any]:
    tool_calls = tuple(ToolCall(id=f"id{i}", name=n, arguments=a) for i, (n, a) in enumerate(made))
    return Completion(
        id="r", tool_calls=tool_calls, finish_reason=reason, usage=Usage(prompt_tokens=10, completion_tokens=3)
    )


def answer(text: str) -> Completion[Any]:
    return Completion(
        id="r", text=text, finish_reason="stop", usage=Usage(prompt_tokens=20, completion_tokens=5, reasoning_tokens=2)
    )


ASK = [sg.user("A table, please.")]


def results(script: Script) -> list[str]:
    return [message["content"] for message in script.asked[-1][0] if message["role"] == "tool"]


@pytest.mark.anyio
async def test_calls_are_made_and_their_results_go_back() -> None:
    script = Script(
        calls(("book", '{"time": "8", "people": 2}'), ("forecast", '{"place": {"city": "Bern"}, "days": 1}')),
        answer("Done."),
    )
    done = await run_tools(
        script, ASK, tools=[book, forecast], temperature=0, tool_choice="required", request_id="mine"
    )
    assert (done.text, done.finish_reason) == ("Done.", "stop")
    assert done.usage == Usage(prompt_tokens=30, completion_tokens=8, reasoning_tokens=2)
    (first, fields), (second, later) = script.asked
    assert first == ASK and fields["tool_choice"] == "required" and fields["temperature"] == 0
    assert later["tool_choice"] == "auto" and later["temperature"] == 0
    assert fields["request_id"] == "mine" and "request_id" not in later
    roles = [(m["role"], m.get("tool_call_id"), m.get("name")) for m in second]
    assert roles == [
        ("user", None, None),
        ("assistant", None, None),
        ("tool", "id0", "book"),
        ("tool", "id1", "forecast"),
    ]
    assert second[2]["content"] == "8 for 2" and json.loads(second[3]["content"])["unit"] == "celsius"
    assert ASK == [sg.user("A table, please.")], "the caller's list stays as it is"


@pytest.mark.anyio
async def test_what_goes_wrong_in_a_call_is_told_to_the_model() -> None:
    def fails(a: int) -> int:
        raise KeyError("x" * 10_000)

    def odd() -> object:
        return object()

    script = Script(
        calls(("fails", '{"a": 1}'), ("fails", '{"a": "1"}'), ("nobody", "{}"), ("odd", "{}"), ("fails", "{")),
        answer("-"),
    )
    await run_tools(script, ASK, tools=[fails, odd])
    told = results(script)
    assert all(text.startswith("error: ") and len(text) <= 2_000 for text in told)
    for text, reason in zip(told, ["KeyError", "$.a", "none of this name", "TypeError", "truncated"], strict=True):
        assert reason in text


@pytest.mark.anyio
async def test_functions_of_one_answer_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=10)
    started = anyio.Event()
    threads = []

    def wait() -> int:
        threads.append(threading.get_ident())
        return both.wait()

    async def begin() -> bool:
        started.set()
        return True

    async def follow() -> bool:
        await started.wait()
        return threading.get_ident() not in threads

    made = calls(("wait", "{}"), ("wait", "{}"), ("follow", "{}"), ("begin", "{}"))
    script = Script(made, answer("-"))
    with anyio.fail_after(10):
        await run_tools(script, ASK, tools=[wait, begin, follow])
    assert sorted(results(script)[:2]) == ["0", "1"] and results(script)[2:] == ["true", "true"]
    assert threading.get_ident() not in threads


@pytest.mark.anyio
async def test_a_function_may_take_too_long() -> None:
    async def sleeps() -> None:
        await anyio.sleep_forever()

    script = Script(calls(("sleeps", "{}")), answer("-"))
    await run_tools(script, ASK, tools=[sleeps], tool_timeout=0.01)
    assert results(script) == ["error: it took more than 0.01 s"]


@pytest.mark.anyio
async def test_the_timeout_is_for_the_whole() -> None:
    async def sleeps() -> None:
        await anyio.sleep_forever()

    script = Script(calls(("sleeps", "{}")))
    with pytest.raises(DeadlineExceeded, match=r"the timeout of 0\.05 s passed in round 2") as caught:
        await run_tools(script, ASK, tools=[sleeps], timeout=0.05)
    assert caught.value.partial.usage.completion_tokens == 3
    assert 0 < script.asked[0][1]["timeout"] <= 0.05


@pytest.mark.anyio
async def test_cancelling_is_never_caught() -> None:
    entered = anyio.Event()

    async def sleeps() -> None:
        entered.set()
        await anyio.sleep_forever()

    script = Script(calls(("sleeps", "{}")), answer("never"))
    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(functools.partial(run_tools, script, ASK, tools=[sleeps]))
            await entered.wait()
            group.cancel_scope.cancel()
    assert len(script.asked) == 1


@pytest.mark.anyio
async def test_errors_of_the_engine_are_its_own() -> None:
    error = DeadlineExceeded("the request's timeout passed")
    with pytest.raises(DeadlineExceeded) as caught:
        await run_tools(Script(error), ASK, tools=[book], timeout=5)
    assert caught.value is error


@pytest.mark.anyio
async def test_rounds_are_limited_and_the_last_calls_are_not_made() -> None:
    made: list[int] = []

    def count() -> int:
        made.append(1)
        return len(made)

    script = Script(*[calls(("count", "{}"))] * 3)
    with pytest.raises(IncompleteOutput, match="still calls functions after 3 rounds") as caught:
        await run_tools(script, ASK, tools=[count], max_rounds=3)
    assert len(made) == 2 and caught.value.partial.tool_calls[0].name == "count"
    assert caught.value.partial.usage.prompt_tokens == 30


@pytest.mark.anyio
async def test_a_call_that_was_cut_off_is_not_made() -> None:
    script = Script(calls(("book", '{"time": "8", "peo'), reason="length"))
    done = await run_tools(script, ASK, tools=[book])
    assert done.finish_reason == "length" and len(script.asked) == 1


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("prompt", "fields", "reason"),
    [
        ("text", {}, "expected messages"),
        ([1, 2], {}, "expected messages"),
        (ASK, {"tools": [Place]}, "Place: expected a function"),
        (ASK, {"max_rounds": 0}, "max_rounds"),
        (ASK, {"max_rounds": True}, "max_rounds"),
        (ASK, {"tool_timeout": -1}, "tool_timeout"),
        (ASK, {"timeout": "1"}, "timeout"),
        (ASK, {"tool_choice": "cook"}, "there is no tool 'cook'"),
    ],
)
async def test_bad_arguments_are_refused_before_anything_runs(prompt: Any, fields: dict[str, Any], reason: str) -> None:
    script = Script()
    with pytest.raises(InvalidRequest, match=reason):
        await run_tools(script, prompt, **{"tools": [book], **fields})
    assert script.asked == []


def test_the_loop_for_plain_code() -> None:
    def double(a: int) -> int:
        return 2 * a

    script = BlockingScript(calls(("double", '{"a": 2}'), ("double", "{}")), answer("4"))
    done = run_tools_blocking(script, ASK, tools=[double])
    assert done.text == "4" and results(script)[0] == "4" and results(script)[1].startswith("error: ")
    with pytest.raises(InvalidRequest, match="book: an async function"):
        run_tools_blocking(script, ASK, tools=[book])


@pytest.mark.parametrize(
    "name", ["Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "mistralai-Mistral-Nemo-Instruct-2407"]
)
def test_the_conversation_renders(shared_data: Path, name: str) -> None:
    """The messages of a loop go through real templates, with ids as the detokenizer makes them."""
    from streamgen.actors.detokenizer import _call_id
    from streamgen.prompt import parse_prompt, tool_result
    from streamgen.text.chat import ChatTemplate

    call = ToolCall(id=_call_id("r", 0, 0), name="book", arguments='{"time": "8"}')
    made: Completion[Any] = Completion(id="r", reasoning="Hm.", tool_calls=(call,))
    parsed = parse_prompt([*ASK, made.message, tool_result("booked", tool_call_id=call.id, name="book")])
    assert parsed.chat is not None
    source = (shared_data / "chat_templates/templates" / f"{name}.jinja").read_text()
    plan: ToolPlan = read_tools([book])
    text = ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}).render(
        parsed.chat, tools=plan.definitions
    )
    assert '"name": "book"' in text and '"arguments": {"time": "8"}' in text and "booked" in text
    assert ("<think>\nHm.\n</think>" in text) == (name == "Qwen-Qwen3-0.6B")
