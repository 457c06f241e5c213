"""Values of a stream while it runs, and how they end: real streams and mailboxes, over requests that are a script."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import msgspec
import pydantic
import pytest

from streamgen import sync
from streamgen.errors import DeadlineExceeded, IncompleteOutput, InvalidRequest, OutputInvalid
from streamgen.grammar.outputs import Choice, JsonSchema, Regex, read_output
from streamgen.mailbox import End, Mailbox
from streamgen.stream import Stream
from streamgen.values import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streamgen.completion import FinishReason

pytestmark = pytest.mark.anyio


class Line(msgspec.Struct):
    name: str
    count: Annotated[int, msgspec.Meta(ge=1)] = 1


class Invoice(msgspec.Struct):
    number: int
    lines: list[Line]
    note: str | None = None


class Checked(pydantic.BaseModel):
    low: int
    high: int

    @pydantic.model_validator(mode="after")
    def check_order(self) -> Checked:
        if self.low > self.high:
            raise ValueError(f"{self.low} is above {self.high}")
        return self


INVOICE = '{"number": 12, "lines": [{"name": "größe 🙂", "count": 2}, {"name": "b"}], "note": "né\\n"}'
LINES = '[{"name": "a, ]", "count": 2}, {"name": "\\"b\\""}, {"name": "🙂", "count": 30}]'


class Script:
    """A request whose output comes a piece at each look: what a `Submission` is to a stream."""

    def __init__(
        self,
        pieces: Iterable[str],
        output: object = None,
        *,
        finish: FinishReason = "stop",
        code: str | None = None,
    ) -> None:
        self.id = "req"
        self.output = None if output is None else read_output(output)
        self.mailboxes = (Mailbox("req", clock=time.monotonic),)
        self.is_submitted = False
        self.is_running = False
        self._pieces = list(pieces)
        self._end = End(finish_reason=finish, code=code)

    def submit(self) -> None:
        """The next piece, or the end."""
        self.is_submitted = True
        if self._pieces:
            self.mailboxes[0].put(self._pieces.pop(0), [1], ())
        else:
            self.mailboxes[0].finish(self._end)

    def cancel(self) -> None:
        """The end, now."""
        self.mailboxes[0].finish(End(finish_reason="cancelled"))

    def run(self) -> None:
        """All that is left."""
        while self.mailboxes[0].end is None:
            self.submit()


def stream_of(script: Any) -> Stream[Any]:
    return Stream(None, script)


def sync_stream_of(script: Any) -> sync.Stream[Any]:
    return sync.Stream(None, script)


def split(text: str, cut: int) -> list[str]:
    return [piece for piece in (text[:cut], text[cut:]) if piece]


async def both(name: str, make: Any) -> list[Any]:
    """All values of an iterator, which are the same for the two kinds of streams."""
    values = [value async for value in getattr(stream_of(make()), name)()]
    assert list(getattr(sync_stream_of(make()), name)()) == values
    return values


# ---- what they are ---------------------------------------------------------------------------------------------------


async def test_partials_grow_to_the_whole() -> None:
    partials = await both("partials", lambda: Script(INVOICE, Invoice))
    assert partials[0] == {} and partials[-1] == json.loads(INVOICE)
    assert {"number": 12} in partials and {"number": 1} not in partials
    assert {"number": 12, "lines": [{"name": "größ"}]} in partials
    assert all(a != b for a, b in pairwise(partials))


@pytest.mark.parametrize("name", ["partials", "fields"])
async def test_partials_and_fields_at_every_split_point(name: str) -> None:
    fields = [
        ("/number", 12),
        ("/lines/0/name", "größe 🙂"),
        ("/lines/0/count", 2),
        ("/lines/1/name", "b"),
        ("/lines", [{"name": "größe 🙂", "count": 2}, {"name": "b"}]),
        ("/note", "né\n"),
    ]
    for cut in range(len(INVOICE) + 1):
        values = list(getattr(sync_stream_of(Script(split(INVOICE, cut), Invoice)), name)())
        assert values == fields if name == "fields" else values[-1] == json.loads(INVOICE)


async def test_items_at_every_split_point() -> None:
    expected = [Line("a, ]", 2), Line('"b"'), Line("🙂", 30)]
    assert await both("items", lambda: Script(LINES, list[Line])) == expected
    for cut in range(len(LINES) + 1):
        assert list(sync_stream_of(Script(split(LINES, cut), list[Line])).items()) == expected


@pytest.mark.parametrize(
    ("output", "text", "items"),
    [
        (list[int], "[1, 22]", [1, 22]),
        (set[str], '["a", "a"]', ["a", "a"]),
        (frozenset[int], "[]", []),
        (tuple[Line, ...], '[{"name":"x"}]', [Line("x")]),
        (list, '[1, "a", [2]]', [1, "a", [2]]),
        (Annotated[list[float], msgspec.Meta(min_length=1)], "[1]", [1.0]),
        (list[Checked], '[{"low":1,"high":2}]', [Checked(low=1, high=2)]),
        (pydantic.RootModel[list[int]], "[3]", [3]),
        (JsonSchema({"type": "array"}), '[{"a": 1}, 2]', [{"a": 1}, 2]),
    ],
    ids=str,
)
async def test_items_are_of_their_type(output: Any, text: str, items: list[Any]) -> None:
    found = await both("items", lambda: Script([text], output))
    assert found == items and [type(item) for item in found] == [type(item) for item in items]


async def test_an_item_comes_when_it_closes() -> None:
    script = Script(LINES, list[Line])
    stream = stream_of(script)
    items = stream.items()
    assert await anext(items) == Line("a, ]", 2)
    assert stream.result.text == LINES[: LINES.index("}") + 2], "with the comma after it"
    stream.cancel()


@pytest.mark.parametrize(("output", "text", "partials"), [(int, "42", [42]), (str | None, "null", [None])])
async def test_a_scalar_is_there_at_the_end(output: Any, text: str, partials: list[Any]) -> None:
    assert await both("partials", lambda: Script(text, output)) == partials


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "text", "value"),
    [
        (Invoice, INVOICE, Invoice(12, [Line("größe 🙂", 2), Line("b")], "né\n")),
        (Checked, '{"low": 1, "high": 2}', Checked(low=1, high=2)),
        (Choice("yes", "no"), "yes", "yes"),
        (Regex("a+"), "aaa", "aaa"),
        (JsonSchema({}), '{"a": [1]}', {"a": [1]}),
        (str, '"as it stands"', '"as it stands"'),
        (None, "any", None),
    ],
    ids=str,
)
async def test_parsed_is_the_typed_value(output: object, text: str, value: object) -> None:
    stream, plain = stream_of(Script(text, output)), sync_stream_of(Script(text, output))
    assert stream.result.parsed is None, "it has not begun"
    for either in (stream, plain):
        either._submission.run()  # type: ignore[attr-defined]  # it is a script
    assert (await stream.final()).parsed == plain.final().parsed == stream.result.parsed == plain.result.parsed == value
    assert stream.result.text == text
    assert stream.result.parsed is stream.result.parsed, "it is read once"


@pytest.mark.parametrize(("output", "text"), [(Checked, '{"low": 3, "high": 2}'), (Invoice, '{"number": 0}')])
async def test_what_does_not_validate(output: type, text: str) -> None:
    stream, plain = stream_of(Script([text], output)), sync_stream_of(Script([text], output))
    for either in (stream, plain):
        either._submission.run()  # type: ignore[attr-defined]  # it is a script
    for _ in range(2):
        with pytest.raises(OutputInvalid, match=f"does not validate as {output.__name__}") as caught:
            await stream.final()
        assert caught.value.partial == stream.result and caught.value.partial.text == text
        assert caught.value.request_id == "req" and caught.value.__cause__ is not None
        with pytest.raises(OutputInvalid):
            plain.final()
    assert stream.result.parsed is None and stream.result.finish_reason == "stop"
    assert "3" not in str(caught.value)


async def test_validators_of_the_whole_run_after_its_partials() -> None:
    for name in ("partials", "fields"):
        seen = []
        with pytest.raises(OutputInvalid, match="Checked"):
            async for value in getattr(stream_of(Script('{"low": 3, "high": 2}', Checked)), name)():
                seen.append(value)  # noqa: PERF401  # what came before the error
        assert seen[-1] in ({"low": 3, "high": 2}, ("/high", 2))


async def test_a_bad_item_ends_the_items() -> None:
    text = '[{"name": "a"}, {"name": "b", "count": 0}, {"name": "c"}]'
    stream = stream_of(Script(text, list[Line]))
    items = stream.items()
    assert await anext(items) == Line("a")
    with pytest.raises(OutputInvalid, match="items") as caught:
        await anext(items)
    assert caught.value.partial.text == text[: text.index("0}") + 3]
    with pytest.raises(StopAsyncIteration):
        await anext(items)
    stream.cancel()


async def test_cut_output_gives_what_there_is() -> None:
    def cut() -> Script:
        return Script(INVOICE[:40], Invoice, finish="length")

    seen = []
    with pytest.raises(IncompleteOutput, match="raise max_tokens") as caught:
        async for partial in stream_of(cut()).partials():
            seen.append(partial)  # noqa: PERF401  # what came before the error
    assert seen[-1] == {"number": 12, "lines": [{"name": "größe"}]}
    assert caught.value.partial.text == INVOICE[:40] and caught.value.partial.finish_reason == "length"
    stream = stream_of(cut())
    stream._submission.run()  # type: ignore[attr-defined]  # it is a script
    with pytest.raises(IncompleteOutput):
        await stream.final()
    assert stream.result.parsed is None
    items = sync_stream_of(Script(LINES[:35], list[Line], finish="length")).items()
    assert next(items) == Line("a, ]", 2)
    with pytest.raises(IncompleteOutput):
        next(items)
    assert list(items) == []


async def test_plain_text_may_be_cut() -> None:
    stream = stream_of(Script(["abc"], str, finish="length"))
    stream._submission.run()  # type: ignore[attr-defined]  # it is a script
    assert (await stream.final()).parsed == "abc"


async def test_a_cancelled_output_ends_quietly() -> None:
    stream = stream_of(Script(INVOICE, Invoice))
    seen = []
    async for partial in stream.partials():
        seen.append(partial)
        if partial == {"number": 12}:
            stream.cancel()
    assert seen[-1] == {"number": 12}
    assert (await stream.final()).parsed is None and stream.result.finish_reason == "cancelled"


async def test_an_error_of_the_request_comes_after_the_values() -> None:
    partials = stream_of(Script(INVOICE[:15], Invoice, finish="deadline", code="deadline_exceeded")).partials()
    seen = []
    with pytest.raises(DeadlineExceeded):
        async for partial in partials:
            seen.append(partial)  # noqa: PERF401  # what came before the error
    assert seen[-1] == {"number": 12}


async def test_what_is_no_json_is_output_that_is_invalid() -> None:
    for name in ("partials", "fields"):
        with pytest.raises(OutputInvalid, match="not JSON: expected a comma at character 6") as caught:
            await both(name, lambda: Script(["[1, 2 secret"], JsonSchema({})))
        assert caught.value.partial.text == "[1, 2 secret"


# ---- what has no values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["partials", "items", "fields"])
@pytest.mark.parametrize("output", [None, Choice("a"), Regex("a"), str], ids=str)
async def test_other_outputs_are_refused_by_name(name: str, output: object) -> None:
    for stream in (stream_of(Script([], output)), sync_stream_of(Script([], output))):
        with pytest.raises(InvalidRequest, match=rf"{name}.*texts\(\)") as caught:
            getattr(stream, name)()
        assert caught.value.param == name


@pytest.mark.parametrize("output", [Invoice, int, tuple[int, str], dict[str, int], list[int] | None, Checked], ids=str)
async def test_what_is_no_list_has_no_items(output: object) -> None:
    with pytest.raises(InvalidRequest, match="items: expected an output like"):
        stream_of(Script([], output)).items()


async def test_a_schema_may_turn_out_to_be_no_array() -> None:
    with pytest.raises(InvalidRequest, match=r"not an array; read partials"):
        await both("items", lambda: Script(['{"a": [1]}'], JsonSchema({})))


# ---- several readers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", range(0, len(LINES), 7))
async def test_who_comes_late_misses_nothing(late: int) -> None:
    stream = stream_of(Script(LINES, list[Line]))
    for _ in range(late):
        await anext(stream)
    assert [item async for item in stream.items()] == [Line("a, ]", 2), Line('"b"'), Line("🙂", 30)]
    assert [partial async for partial in stream.partials()] == [json.loads(LINES)]
    assert len([field async for field in stream.fields()]) == 5


async def test_readers_side_by_side() -> None:
    stream = stream_of(Script(LINES, list[Line]))
    found: dict[str, list[Any]] = {"partials": [], "items": [], "fields": [], "texts": []}

    async def read(name: str) -> None:
        async for value in getattr(stream, name)():
            found[name].append(value)

    async with anyio.create_task_group() as group:
        for name in found:
            group.start_soon(read, name)
    assert found["items"] == [Line("a, ]", 2), Line('"b"'), Line("🙂", 30)]
    assert found["partials"][-1] == json.loads(LINES) and len(found["fields"]) == 5


async def test_an_iterator_may_be_left_and_another_begun() -> None:
    stream = stream_of(Script(LINES, list[Line]))
    async for item in stream.items():
        assert item == Line("a, ]", 2)
        break
    assert len([item async for item in stream.items()]) == 3


async def test_partials_stay_as_they_were() -> None:
    kept = [(partial, repr(partial)) async for partial in stream_of(Script(INVOICE, Invoice)).partials()]
    assert all(repr(partial) == before for partial, before in kept)


# ---- cost ------------------------------------------------------------------------------------------------------------


def _work(text: str, output: object) -> tuple[float, int]:
    """Seconds for all partials of a text that comes in small pieces, and their number."""
    stream = sync_stream_of(Script(_cut(text, 8), output))
    start = time.perf_counter()
    count = sum(1 for _ in stream.partials())
    return time.perf_counter() - start, count


def _cut(text: str, size: int) -> Sequence[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("kind", ["long list", "long text"])
def test_all_partials_together_are_linear(kind: str) -> None:
    def text(size: int) -> str:
        return json.dumps(list(range(size)) if kind == "long list" else {"a": "xyz " * size})

    _work(text(100), JsonSchema({}))
    small = min(_work(text(2_000), JsonSchema({}))[0] for _ in range(2))
    large = min(_work(text(32_000), JsonSchema({}))[0] for _ in range(2))
    assert large < 16 * small * 4, f"{small:.3f} s, then {large:.3f} s for 16 times as much"


def test_a_short_value_is_shown_with_every_change() -> None:
    text = json.dumps({"a": "x" * 2000, "b": list(range(100))})
    assert _work(text, JsonSchema({}))[1] >= len(text) // 8 - 2


# ---- beside streams --------------------------------------------------------------------------------------------------


def test_an_outcome_without_a_plan_changes_nothing() -> None:
    script = Script(["x"], None)
    script.run()
    completion = script.mailboxes[0].completion()
    assert Outcome(None).check(completion) is completion and Outcome(None).fill(completion) is completion
