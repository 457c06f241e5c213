"""What a plan is: which back end, which warnings, closed objects, order; and that all it promises is bounded."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest

from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.schema import SchemaLimits, plan_schema
from tests.grammar.schema.acceptance import accepts, accepts_text


def plan(schema: Any, **options: Any) -> Any:
    return plan_schema(json.dumps(schema), **options)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


def test_a_class_becomes_a_regular_expression() -> None:
    found = plan(PERSON, is_closed=True)
    assert (found.backend, found.lark, found.warnings) == ("outlines", None, ())
    assert found.regex is not None


def test_open_objects_and_recursion_go_to_the_parser() -> None:
    for schema in (
        PERSON,
        {},
        {"$defs": {"n": {"items": {"$ref": "#/$defs/n"}, "type": "array"}}, "$ref": "#/$defs/n"},
    ):
        found = plan(schema)
        assert (found.backend, found.regex) == ("llguidance", None)
        assert found.lark is not None and found.lark.startswith("json: ")
        with pytest.raises(SchemaError, match="no regular expression"):
            plan(schema, backend="outlines")


def test_either_back_end_accepts_the_same() -> None:
    schema = {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "minimum": -3, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "é"]}, "maxItems": 2},
            "x": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        },
        "required": ["tags"],
        "additionalProperties": False,
    }
    assert plan(schema).backend == "outlines"
    values: list[Any] = [
        {"tags": []},
        {"id": 121, "tags": []},
        {"id": -3, "tags": ["a", "é"], "x": None},
        {"tags": ["b"]},
    ]
    values += [{"tags": ["a"], "x": 1e-7}, {"id": 1}, {"tags": [], "y": 1}, {"id": 12, "tags": ["a", "a", "a"]}]
    answers = [accepts(schema, value) for value in values]
    assert answers == [accepts(schema, value, backend="llguidance") for value in values]
    assert answers == [True, False, True, False, True, False, False, False]


def test_closed_objects_have_only_what_they_list() -> None:
    assert accepts(PERSON, {"name": "x", "age": 3, "z": 1})
    assert not accepts(PERSON, {"name": "x", "age": 3, "z": 1}, is_closed=True)
    free = {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}}
    assert accepts(free, {"a": None, "b": 1}, is_closed=True), "the schema itself says what others may be"
    assert accepts({"type": "object"}, {"b": 1}, is_closed=True), "an object that lists nothing is a mapping"
    both = {"allOf": [{"properties": {"a": {}}, "type": "object"}, {"properties": {"b": {}}}]}
    assert accepts(both, {"a": 1, "b": 2}, is_closed=True)
    assert not accepts(both, {"a": 1, "b": 2, "c": 3}, is_closed=True)


def test_integers_of_classes_have_no_point() -> None:
    assert accepts_text({"type": "integer"}, "1.0")
    assert not accepts_text({"type": "integer"}, "1.0", is_closed=True)
    assert not accepts_text({"type": "integer"}, "1.5")


def test_properties_come_in_their_order() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}, "required": ["z", "a"], "additionalProperties": True}
    assert accepts_text(schema, '{"b": 1, "a": 1, "z": 1, "q": 1, "c": 1}')
    assert accepts_text(schema, '{"b": 1, "a": 1, "z": 1, "c": 1, "q": 1}')
    for text in ('{"a": 1, "b": 1, "z": 1}', '{"a": 1, "q": 1, "z": 1}', '{"z": 1, "a": 1}'):
        assert not accepts_text(schema, text)


def test_properties_of_branches_follow_the_keywords_order() -> None:
    after = {
        "properties": {"a": {}},
        "anyOf": [{"properties": {"b": {}}, "required": ["b"]}],
        "additionalProperties": True,
    }
    assert accepts_text(after, '{"a": 1, "b": 1}')
    assert not accepts_text(after, '{"b": 1, "a": 1}')
    before = {"anyOf": [{"properties": {"b": {}}, "required": ["b"]}], "properties": {"a": {}}}
    assert accepts_text(before, '{"b": 1, "a": 1}')
    assert not accepts_text(before, '{"a": 1, "b": 1}')


def test_no_property_is_written_twice() -> None:
    schema = {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1, "maxProperties": 3}
    for text in ('{"a": 1, "a": 1}', '{"a": 1, "b": 1, "a": 1}', '{"x": 1, "b": 1}'):
        assert not accepts_text(schema, text)


def test_a_property_written_twice_never_makes_up_a_count() -> None:
    with pytest.raises(SchemaError) as caught:
        plan({"type": "object", "minProperties": 2})
    assert (caught.value.pointer, caught.value.keyword) == ("", "minProperties")
    enough = {"type": "object", "properties": {"a": {}}, "required": ["a"], "minProperties": 2}
    assert accepts(enough, {"a": 1, "x": 1})
    assert not accepts(enough, {"a": 1})


@pytest.mark.parametrize("subset", list(itertools.product([False, True], repeat=4)))
def test_any_subset_of_optional_properties(subset: tuple[bool, ...]) -> None:
    names = "abcd"
    present = {name: 1 for name, is_there in zip(names, subset, strict=True) if is_there}
    properties = {name: {"type": "integer"} for name in names}
    for extra, backend in itertools.product(({}, {"x": 1}), ("auto", "llguidance")):
        schema = {"type": "object", "properties": properties, "additionalProperties": False}
        assert accepts(schema, present | extra, backend=backend) == (not extra)
        assert accepts(schema | {"additionalProperties": {"const": 1}}, present | extra)
        assert accepts(schema | {"minProperties": 2, "maxProperties": 3}, present) == (2 <= len(present) <= 3)


@pytest.mark.parametrize("bounds", [(0, 0), (0, 1), (0, 3), (1, 1), (1, None), (2, 3), (3, None)])
@pytest.mark.parametrize("count", range(5))
def test_numbers_of_items(bounds: tuple[int, int | None], count: int) -> None:
    low, high = bounds
    value = [1, "a", None, None][:count] + [None] * (count - 4)
    for prefix in ([], [{"type": "integer"}], [{"type": "integer"}, {"type": "string"}]):
        free = {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]}
        schema: dict[str, Any] = {"type": "array", "prefixItems": prefix, "items": free, "minItems": low}
        schema = {key: part for key, part in schema.items() if part != []}
        schema |= {} if high is None else {"maxItems": high}
        assert accepts(schema, value) == (low <= count <= (99 if high is None else high))


def test_what_is_not_enforced_is_refused_by_name() -> None:
    schema = {"properties": {"a/b": {"items": {"type": "string"}, "uniqueItems": True, "type": "array"}}}
    with pytest.raises(SchemaError) as caught:
        plan(schema)
    assert (caught.value.pointer, caught.value.keyword) == ("/properties/a~1b", "uniqueItems")
    assert "uniqueItems" in str(caught.value) and "on_unsupported" in str(caught.value)


def test_what_is_not_enforced_is_left_out_where_that_is_allowed() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
            "b": {"pattern": "(?<=a)b"},
        },
    }
    warned = plan(schema, on_unsupported="warn")
    assert sorted(warning.partition(":")[0] for warning in warned.warnings) == ["/properties/a", "/properties/b"]
    assert plan(schema, on_unsupported="ignore").warnings == ()
    assert accepts(schema, {"a": ["x", "x"], "b": "q"}, on_unsupported="warn")
    assert not accepts(schema, {"a": [1]}, on_unsupported="warn")


REFUSED: dict[str, tuple[str, str, str | None, str]] = {
    # name: schema, pointer, keyword, part of the message
    "no JSON": ("{", "", None, "line 1, column 2"),
    "no schema": ("[]", "", None, "an object or a boolean"),
    "not a number": ('{"minimum": NaN}', "", None, "NaN"),
    "huge number": ('{"minimum": 1e999999}', "", None, "digits"),
    "half a pair": ('{"const": "\\ud800"}', "", None, "surrogate"),
    "type": ('{"items": {"type": "text"}}', "/items", "type", "null, boolean"),
    "minimum": ('{"minimum": "3"}', "", "minimum", "a number, got a string"),
    "minLength": ('{"minLength": -1}', "", "minLength", ">= 0, got -1"),
    "required": ('{"required": "a"}', "", "required", "array of strings"),
    "properties": ('{"properties": {"a": 5}}', "", "properties", "object of schemas"),
    "allOf": ('{"allOf": []}', "", "allOf", "at least one"),
    "multipleOf": ('{"multipleOf": 0}', "", "multipleOf", "> 0"),
    "draft 4 bound": (
        '{"$schema": "http://json-schema.org/draft-04/schema#", "exclusiveMinimum": 3}',
        "",
        "exclusiveMinimum",
        "a boolean",
    ),
    "draft 3": ('{"$schema": "http://json-schema.org/draft-03/schema#"}', "", "$schema", "draft 3"),
    "empty enum": ('{"properties": {"a": {"enum": []}}, "required": ["a"]}', "/properties/a", "enum", "at least one"),
    "remote reference": ('{"$ref": "http://example.com/x"}', "", "$ref", "another document"),
    "reference to nothing": ('{"items": {"$ref": "#/nowhere"}}', "/items", "$ref", "nowhere"),
    "self reference": ('{"$ref": "#"}', "", None, "base case"),
    "circle": (
        '{"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}',
        "/$defs/a",
        None,
        "base",
    ),
    "endless": ('{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}', "", None, "recursive"),
    "contradiction": ('{"type": "string", "const": 5}', "", None, "contradict"),
    "false": ("false", "", None, "some JSON value"),
    "bounds": ('{"type": "string", "minLength": 5, "maxLength": 3}', "", "minLength", "above maxLength 3"),
    "number of items": (
        '{"items": {"type": "array", "minItems": 2, "maxItems": 1}, "type": "array", "minItems": 1}',
        "/items",
        "minItems",
        "above",
    ),
    "look-behind": ('{"type": "string", "pattern": "(?<=a)b"}', "", "pattern", "character 1"),
    "pattern": ('{"type": "string", "pattern": "("}', "", "pattern", "not closed"),
    "property pattern": ('{"patternProperties": {"a\\\\b": {}}}', "", "patternProperties", "escape"),
    "large numbers": ('{"type": "integer", "minimum": 1' + "0" * 30 + "}", "", "minimum", "24 digits"),
    "values of others": (
        '{"not": {"type": "object", "additionalProperties": {"type": "string"}}}',
        "",
        "not",
        "unnamed property",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name: str) -> None:
    text, pointer, keyword, part = REFUSED[name]
    with pytest.raises(SchemaError) as caught:
        plan_schema(text)
    assert (caught.value.pointer, caught.value.keyword) == (pointer, keyword)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 400


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


BOUNDED: dict[str, tuple[str, str]] = {
    "text": ('{"description": "' + "x" * 70_000 + '"}', "max_bytes"),
    "depth": (nested(5_000), "max_depth"),
    "brackets": ("[" * 60_000, "max_depth"),
    "properties": (json.dumps({"properties": {f"p{i}": {} for i in range(300)}}), "max_properties"),
    "enum": (json.dumps({"enum": list(range(5_000))}), "max_enum"),
    "counts in a pattern": ('{"type": "string", "pattern": "^(.{1,1000}){1,1000}$"}', "max_repeats"),
    "references": (
        json.dumps(
            {"allOf": [{"$ref": f"#/$defs/d{i}"} for i in range(1_100)], "$defs": {f"d{i}": {} for i in range(1_100)}}
        ),
        "max_refs",
    ),
    "pairs of alternatives": (
        json.dumps(
            {
                "type": "object",
                "allOf": [
                    {"anyOf": [{"properties": {f"a{i}": {"type": "null"}}}, {"required": [f"b{i}"]}]} for i in range(16)
                ],
            }
        ),
        "max_alternatives",
    ),
    "first items": (json.dumps({"prefixItems": [{"type": "integer"}] * 2_000}), "max_depth"),
    "chain of references": (
        json.dumps(
            {
                "$ref": "#/$defs/d0",
                "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(700)} | {"d700": {}},
            }
        ),
        "max_depth",
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_each_bound_is_named_and_kept_quickly(name: str) -> None:
    text, bound = BOUNDED[name]
    start = time.perf_counter()
    with pytest.raises(SchemaTooComplex) as caught:
        plan_schema(text)
    assert caught.value.bound == bound
    assert time.perf_counter() - start < 2, "a refusal takes some milliseconds, and this is a generous cap"


def test_bounds_can_be_raised() -> None:
    many = json.dumps({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(300)}})
    assert plan_schema(many, limits=SchemaLimits(max_properties=400)).backend == "llguidance"


def test_many_optional_properties_stay_linear() -> None:
    schema = {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer"} for i in range(250)},
        "additionalProperties": False,
    }
    found = plan(schema)
    assert found.lark is not None and len(found.lark) < 60_000
    assert accepts(schema, {"p3": 1, "p249": 2})
    assert not accepts(schema, {"p249": 2, "p3": 1})
    assert accepts(schema, {f"p{i}": i for i in range(250)})


def test_conditions_on_one_property_do_not_multiply() -> None:
    kinds = [f"k{i}" for i in range(40)]
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": kinds}, "value": {}},
        "required": ["kind", "value"],
        "allOf": [
            {"if": {"properties": {"kind": {"const": kind}}}, "then": {"properties": {"value": {"const": index}}}}
            for index, kind in enumerate(kinds)
        ],
    }
    assert accepts(schema, {"kind": "k7", "value": 7})
    assert not accepts(schema, {"kind": "k7", "value": 8})


def test_the_same_text_makes_the_same_plan() -> None:
    text = json.dumps({"type": "object", "properties": {"a": {"enum": ["x", "y"]}, "b": {"not": {"const": 3}}}})
    assert plan_schema(text) == plan_schema(text)
