"""What may be given as `output=`: the specs, terms of outlines, and what is refused and how."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Union

import msgspec
import outlines.types
import pydantic
import pytest
from outlines.types import dsl

import streamgen
from streamgen.errors import InvalidRequest, OutputInvalid, SchemaError, SchemaTooComplex
from streamgen.grammar import outputs
from streamgen.grammar.outputs import Choice, Grammar, JsonSchema, OutputSpec, Regex, read_output
from streamgen.grammar.source import CfgSource, GrammarSource, RegexSource, SchemaSource
from tests.grammar.output_types import Circle, Data, Invoice, Line, Model


class Untagged(msgspec.Struct):
    a: int


class PydanticInStruct(msgspec.Struct):
    a: Annotated[int, pydantic.Field(ge=1)]


class StructInModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    a: Untagged


class Unresolved(msgspec.Struct):
    a: "Nowhere"  # type: ignore[name-defined]  # noqa: F821, UP037  # on purpose


class Raising(pydantic.BaseModel):
    @classmethod
    def __get_pydantic_json_schema__(cls, *arguments: Any) -> dict[str, Any]:
        raise ZeroDivisionError("on purpose")


class StrictCount(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    count: int


class Guarded(msgspec.Struct):
    code: str

    def __post_init__(self) -> None:
        if self.code == "secret":
            raise ValueError(f"{self.code} - at `$.door` is taken")


def source_of(output: object) -> GrammarSource | None:
    return read_output(output).source


# ---- specs -----------------------------------------------------------------------------------------------------------


def test_choice() -> None:
    plan = read_output(Choice("yes", "no (never)", "a.b|c\n", "größe 🙂"))
    assert isinstance(plan.source, RegexSource) and plan.source.is_trusted
    for value in ("yes", "no (never)", "a.b|c\n", "größe 🙂"):
        assert re.fullmatch(plan.source.pattern, value) and plan.parse(value) == value
    assert not re.fullmatch(plan.source.pattern, "a-b|c\n")
    with pytest.raises(OutputInvalid, match="none of the choices"):
        plan.parse("secret")
    assert not plan.is_json and plan.item is None


@pytest.mark.parametrize("text", ["", *map(chr, range(1, 300)), "\u2028", "\U0010ffff", "a\\Qb\\E"])
def test_a_choice_is_taken_literally(text: str) -> None:
    source = source_of(Choice(text))
    assert isinstance(source, RegexSource)
    assert re.fullmatch(source.pattern, text)
    assert not re.fullmatch(source.pattern, text + "x") and (not text or not re.fullmatch(source.pattern, ""))


def test_regex() -> None:
    assert source_of(Regex(r"\d{4}")) == RegexSource(pattern=r"\d{4}")
    assert source_of(Regex("a", is_trusted=False)) == RegexSource(pattern="a", is_trusted=False)
    assert read_output(Regex("a+")).parse("aa") == "aa" and not read_output(Regex("a+")).is_json


def test_json_schema_keeps_the_order_of_keys() -> None:
    schema = {"type": "object", "properties": {"z": {"type": "integer"}, "ä": {"const": "🙂"}}}
    spec = JsonSchema(schema, on_unsupported="warn", backend="llguidance", is_trusted=False)
    assert spec.schema == '{"type":"object","properties":{"z":{"type":"integer"},"ä":{"const":"🙂"}}}'
    assert source_of(spec) == SchemaSource(
        text=spec.schema, on_unsupported="warn", backend="llguidance", is_trusted=False, is_closed=False
    )
    schema["type"] = "array"  # what was given may change; the spec does not
    assert "array" not in spec.schema
    assert JsonSchema({"a": 1, "b": 2}) != JsonSchema({"b": 2, "a": 1})


def test_json_schema_as_text_is_left_as_it_is() -> None:
    text = ' {"type":\n"array"} '
    source = source_of(JsonSchema(text))
    assert isinstance(source, SchemaSource) and source.text == text
    assert read_output(JsonSchema(text)).parse("[1, 2.5, null]") == [1, 2.5, None]
    assert JsonSchema(True).schema == "true"


@pytest.mark.parametrize(
    ("text", "syntax"),
    [
        ('root ::= "a" | b\nb ::= [0-9]+', "gbnf"),
        ('# a comment\n\nroot   ::=\n "a"', "gbnf"),
        ('my-rule ::= "a"\nroot ::= my-rule', "gbnf"),
        ('start: "a" | B\nB: /[0-9]+/', "lark"),
        ("%llguidance {}\nstart: /a+/", "lark"),
        ('?start: "x"\n', "lark"),
        ('start[max_tokens=5]: "x"\n', "lark"),
    ],
)
def test_a_grammar_says_by_its_looks_what_it_is(text: str, syntax: str) -> None:
    assert Grammar(text).syntax == syntax
    assert source_of(Grammar(text)) == CfgSource(text=text, syntax=syntax)


def test_a_grammar_may_name_its_syntax() -> None:
    assert source_of(Grammar("a b c", syntax="lark", is_trusted=False)) == CfgSource(text="a b c", is_trusted=False)


@pytest.mark.parametrize("spec", [Choice("a"), Regex("a"), JsonSchema({}), Grammar("start: /a/")], ids=repr)
def test_specs_are_frozen_values(spec: OutputSpec[Any]) -> None:
    with pytest.raises(AttributeError):
        spec.is_trusted = False  # type: ignore[attr-defined]  # on purpose
    assert spec == spec and hash(spec) == hash(spec) and type(spec).__name__ in repr(spec)
    assert read_output(spec) is read_output(spec)


def test_a_spec_reads_what_its_grammar_lets_through() -> None:
    assert Choice("a").parse("a") == "a" and JsonSchema({}).parse("[1]") == [1]


UNTYPED: Any = outputs  # what no type checker looked at


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: UNTYPED.Choice(), SchemaError, "at least one"),
        (lambda: UNTYPED.Choice(1), SchemaError, "expected text, got int"),
        (lambda: UNTYPED.Choice(["a", "b"]), SchemaError, r"Choice\(\*values\)"),
        (lambda: UNTYPED.Choice("\ud800"), SchemaError, "surrogate"),
        (lambda: UNTYPED.Choice(*map(str, range(4097))), SchemaTooComplex, "4096"),
        (lambda: UNTYPED.Regex(""), SchemaError, "not empty"),
        (lambda: UNTYPED.Regex(re.compile("a")), SchemaError, "got Pattern"),
        (lambda: UNTYPED.Regex("a", is_trusted=1), InvalidRequest, "is_trusted"),
        (lambda: UNTYPED.JsonSchema("{"), SchemaError, "JSON text"),
        (lambda: UNTYPED.JsonSchema("[" * 100_000), SchemaError, "JSON text"),
        (lambda: UNTYPED.JsonSchema("[]"), SchemaError, "an object or a boolean, got list"),
        (lambda: UNTYPED.JsonSchema(3), SchemaError, "got int"),
        (lambda: UNTYPED.JsonSchema(Data), SchemaError, "got type"),
        (lambda: UNTYPED.JsonSchema({"const": float("nan")}), SchemaError, "not JSON"),
        (lambda: UNTYPED.JsonSchema({"const": object()}), SchemaError, "not JSON"),
        (lambda: UNTYPED.JsonSchema({"const": "\ud800"}), SchemaError, "not JSON"),
        (lambda: UNTYPED.JsonSchema({}, on_unsupported="skip"), InvalidRequest, "error, warn, ignore"),
        (lambda: UNTYPED.JsonSchema({}, backend="x"), InvalidRequest, "backend"),
        (lambda: UNTYPED.Grammar(""), SchemaError, "not empty"),
        (lambda: UNTYPED.Grammar("hello"), SchemaError, "gbnf"),
        (lambda: UNTYPED.Grammar("root ::= a", syntax="ebnf"), InvalidRequest, "gbnf, lark"),
    ],
)
def test_bad_specs_are_refused_when_they_are_made(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ---- types -----------------------------------------------------------------------------------------------------------


def test_str_alone_is_plain_text() -> None:
    plan = read_output(str)
    assert plan.source is None and not plan.is_json and plan.parse('"x"') == '"x"'


def test_types_are_closed_schemas() -> None:
    source = source_of(Invoice)
    assert isinstance(source, SchemaSource)
    assert source.is_closed and source.on_unsupported == "error" and source.is_trusted
    assert source.text.index('"number"') < source.text.index('"lines"') < source.text.index('"note"')


def test_plans_are_kept() -> None:
    assert read_output(Invoice) is read_output(Invoice) and read_output(list[Line]) is read_output(list[Line])
    plan = read_output(Invoice)
    assert read_output(plan) is plan
    assert read_output(Annotated[list[Line], ["unhashable"]]).parse('[{"name": "x"}]') == [Line("x")]


def test_recursive_and_repeated_classes_are_defined_once() -> None:
    source = source_of(tuple[Circle, Circle, list[Circle]])
    assert isinstance(source, SchemaSource) and source.text.count('"radius"') == 2, "in properties and in required"


def test_classes_of_one_name_stay_apart() -> None:
    def make(annotation: type) -> type:
        return msgspec.defstruct("Same", [("a", annotation)])

    plan = read_output(tuple[make(int), make(str)])  # type: ignore[misc]  # made here
    assert [item.a for item in plan.parse('[{"a": 1}, {"a": "x"}]')] == [1, "x"]


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (None, InvalidRequest, "got None"),
        ('{"type": "object"}', InvalidRequest, r"JsonSchema\(...\)"),
        ({"type": "object"}, InvalidRequest, r"JsonSchema\(...\)"),
        (Line("x"), InvalidRequest, "object of Line; give the type"),
        (3, InvalidRequest, "object of int"),
        (len, InvalidRequest, "builtin_function"),
        (complex, SchemaError, "complex"),
        (list[complex], SchemaError, "complex"),
        (Untagged | Line, SchemaError, "tagged"),
        (PydanticInStruct, SchemaError, "msgspec.Meta"),
        (StructInModel, SchemaError, "StructInModel"),
        (Unresolved, SchemaError, "Nowhere"),
        (Raising, SchemaError, "on purpose"),
        (dict[None, int], SchemaError, "keys"),
        (dict[tuple[int, int], int], SchemaError, "keys"),
        (pydantic.Json[int], SchemaError, "Json"),
        (list["Nowhere"], SchemaError, "Nowhere"),  # type: ignore[name-defined]  # noqa: F821
        (Union[complex, int], SchemaError, "complex"),  # noqa: UP007  # both spellings are in use
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_an_output(output: object, error: type[Exception], message: str) -> None:
    for _ in range(2):  # the second time as the first
        with pytest.raises(error, match=message):
            read_output(output)


@pytest.mark.parametrize(
    ("output", "text", "message"),
    [
        (Invoice, '{"number": "secret", "lines": []}', "Expected `int`, got `str` - at `$.number`"),
        (Invoice, '{"lines": []}', "Object missing required field `number`"),
        (list[Line], '[{"name": "secret", "count": 0}]', "Expected `int` >= 1 - at `$[0].count`"),
        (Circle, '{"type": "secret"}', "Expected a known tag - at `$.type`"),
        (Guarded, '{"code": "secret"}', "a check failed"),
        (list[Guarded], '[{"code": "secret"}]', "a check failed"),
        (Model, '{"A": 1, "c": {"A": "secret"}}', "at `/c/A`"),
        (Invoice, '{"number": 1', "Input data was truncated"),
        (Invoice, "secret", "JSON is malformed"),
        (int, "[" * 100_000, "does not validate as int"),
        (Any, "[" * 100_000, "does not validate as Any"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_does_not_validate_is_told_without_the_text(output: object, text: str, message: str) -> None:
    with pytest.raises(OutputInvalid) as caught:
        read_output(output).parse(text)
    assert message in str(caught.value) and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ['{"number": 1.0, "lines": [], "note": "a 1.0 \\" 2.0"}', '{"number":1.00,"lines":[{"name":"x","count":2.0}]}'],
)
def test_integers_may_be_written_as_json_schema_has_them(text: str) -> None:
    invoice = read_output(Invoice).parse(text)
    assert type(invoice.number) is int and invoice.note in (None, 'a 1.0 " 2.0')
    for wrong in ('{"number": 1.5, "lines": []}', '{"number": 1.0, "lines": [0.0]}'):
        with pytest.raises(OutputInvalid, match=r"number|lines"):
            read_output(Invoice).parse(wrong)
    assert read_output(StrictCount).parse('{"count": 3.0}').count == 3


def test_items_are_read_as_the_elements_type() -> None:
    assert read_output(list[Line]).parse_item(b'{"name": "x"}') == Line("x")
    assert read_output(list[str]).parse_item(b'"x"') == "x", "an element is JSON"
    with pytest.raises(OutputInvalid, match="items"):
        read_output(list[Line]).parse_item(b"{}")
    with pytest.raises(InvalidRequest, match="list"):
        read_output(Line).parse_item(b"{}")


# ---- terms of outlines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "matches", "others"),
    [
        (outlines.types.Regex(r"[0-9]{2}"), ["12"], ["1"]),
        (outlines.types.date, ["2024-01-31"], ["2024"]),
        (dsl.Choice(["a", "b.c"]), ["a", "b.c"], ["bxc"]),
        (dsl.either("x", dsl.exactly(2, "y")), ["x", "yy"], ["y"]),
        (dsl.String("a") + outlines.types.Regex("b?"), ["a", "ab"], ["b"]),
    ],
    ids=str,
)
def test_terms_are_regular_expressions(term: Any, matches: list[str], others: list[str]) -> None:
    plan = read_output(term)
    assert isinstance(plan.source, RegexSource)
    assert all(re.fullmatch(plan.source.pattern, text) for text in matches)
    assert not any(re.fullmatch(plan.source.pattern, text) for text in others)
    assert plan.parse(matches[0]) == matches[0]


def test_other_terms() -> None:
    schema = outlines.types.JsonSchema({"type": "object", "properties": {"a": {"type": "integer"}}})
    source = source_of(schema)
    assert isinstance(source, SchemaSource) and source.text == schema.schema and not source.is_closed
    assert read_output(schema).parse('{"a": 1}') == {"a": 1}
    assert source_of(outlines.types.CFG('start: "a"')) == CfgSource(text='start: "a"', syntax="lark")


def test_terms_that_say_what_is_not_kept_are_refused() -> None:
    with pytest.raises(SchemaError, match="whitespace_pattern"):
        read_output(outlines.types.JsonSchema({}, whitespace_pattern=" *"))
    with pytest.raises(SchemaError, match="no regular expression"):
        read_output(dsl.either("a", outlines.types.CFG("start: /a/")))


# ---- what it costs ---------------------------------------------------------------------------------------------------


def test_types_of_msgspec_need_neither_pydantic_nor_outlines() -> None:
    code = (
        "import sys, msgspec\nfrom streamgen.grammar.outputs import read_output\n"
        "class A(msgspec.Struct):\n    a: int\n"
        "read_output(A).parse('{\"a\": 1}'); read_output(list[A]); read_output(dict[str, int])\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'outlines', 'llguidance', 'jsonschema'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(Path(streamgen.__file__).parents[1]), "PATH": ""},
    )
    assert done.stdout.strip() == "[]", done.stderr
