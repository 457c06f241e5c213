"""Random schemas and values: what jsonschema calls valid is accepted, and nothing else is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import hypothesis
import jsonschema
import pytest
from hypothesis import strategies as st
from hypothesis_jsonschema import from_schema

from streamgen.errors import SchemaError, SchemaTooComplex
from tests.grammar.schema.acceptance import compiled

if TYPE_CHECKING:
    from streamgen.grammar.grammar import Grammar

SETTINGS = hypothesis.settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
    database=None,
)

NAMES = st.sampled_from(["a", "b", "é", "x y"])
SCALARS = st.one_of(
    st.builds(
        lambda low, size, kind: {"type": kind, "minimum": low, "maximum": low + size},
        st.integers(-20, 20),
        st.integers(0, 15),
        st.sampled_from(["integer", "number"]),
    ),
    st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        st.integers(0, 3),
        st.integers(0, 3),
    ),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-cé]{1,3}$"},
            {"type": "string", "pattern": "b"},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": ["a", "é", 1, 2.5, None]},
            {"const": {"a": [1]}},
            {"type": ["integer", "null"], "multipleOf": 5},
            {"not": {"type": ["string", "number", "array", "object"]}},
        ]
    ),
)


def extend(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Arrays, objects and combinations of smaller schemas."""
    objects = st.builds(
        lambda properties, required, is_open: {
            "type": "object",
            "properties": properties,
            "required": [name for name in required if name in properties],
            "additionalProperties": is_open,
        },
        st.dictionaries(NAMES, inner, max_size=3),
        st.lists(NAMES, max_size=2, unique=True),
        st.one_of(st.just(False), inner),
    )
    arrays = st.builds(
        lambda items, low, size: {"type": "array", "items": items, "minItems": low, "maxItems": low + size},
        inner,
        st.integers(0, 2),
        st.integers(0, 2),
    )
    tuples = st.builds(
        lambda first, items: {"type": "array", "prefixItems": first, "items": items},
        st.lists(inner, min_size=1, max_size=2),
        inner,
    )
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        objects,
        arrays,
        tuples,
        several.map(lambda parts: {"anyOf": parts}),
        several.map(lambda parts: {"oneOf": parts}),
        st.lists(inner, min_size=1, max_size=2).map(lambda parts: {"allOf": parts}),
        st.builds(lambda a, b, c: {"if": a, "then": b, "else": c}, inner, inner, inner),
        st.builds(lambda a, b: {"allOf": [a, {"not": b}]}, inner, inner),
    )


SCHEMAS = st.recursive(SCALARS, extend, max_leaves=6)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-25, 25),
        st.sampled_from([0.5, 2.5, -3.25]),
        st.text("abcéx ", max_size=4),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)


def grammar_of(schema: Any) -> Grammar | None:
    try:
        return compiled(json.dumps(schema))
    except (SchemaError, SchemaTooComplex):
        return None


def in_order(schema: Any, value: Any) -> bool:
    """Whether some order of its properties is accepted: combined schemas fix one, and which does not matter here."""
    grammar = grammar_of(schema)
    assert grammar is not None
    return any(grammar.accepts(text.encode()) for text in orders(value))


def orders(value: Any) -> list[str]:
    """JSON texts of a small value with its properties in every order."""
    if isinstance(value, list):
        texts = [""]
        for item in value:
            texts = [f"{text}{', ' if text else ''}{part}" for text in texts for part in orders(item)][:200]
        return [f"[{text}]" for text in texts]
    if isinstance(value, dict):
        return _object_orders(value)
    return [json.dumps(value)]


def _object_orders(value: dict[str, Any]) -> list[str]:
    if not value:
        return ["{}"]
    found = []
    for name in value:
        rest = {other: part for other, part in value.items() if other != name}
        for first in orders(value[name]):
            for tail in _object_orders(rest):
                comma = ", " if rest else ""
                found.append(f"{{{json.dumps(name)}: {first}{comma}{tail[1:]}")
    return found[:300]


def instances(schema: Any) -> st.SearchStrategy[Any]:
    """Values that mostly satisfy a schema of the kinds above; jsonschema decides whether they do."""
    if isinstance(schema, bool) or not schema:
        return VALUES
    for keyword in ("anyOf", "oneOf", "allOf"):
        if keyword in schema:
            return st.one_of(VALUES, *(instances(part) for part in schema[keyword] if "not" not in part))
    if "if" in schema:
        return st.one_of(instances(schema["then"]), instances(schema["else"]))
    if schema.get("type") == "object":
        required = {name: instances(schema["properties"][name]) for name in schema["required"]}
        optional = {name: instances(part) for name, part in schema["properties"].items() if name not in required}
        return st.fixed_dictionaries(required, optional=optional)
    if schema.get("type") == "array":
        first = st.tuples(*map(instances, schema.get("prefixItems", [])))
        low = schema.get("minItems", 0)
        rest = st.lists(instances(schema["items"]), min_size=low, max_size=schema.get("maxItems", low + 1))
        return st.builds(lambda a, b: [*a, *b], first, rest)
    # Numbers of more digits than are written, and smaller ones than any normal double, are known to be missing.
    return from_schema(schema).filter(lambda value: not isinstance(value, int | float) or is_plain(value))


def is_plain(value: float) -> bool:
    """Whether a number is one that is written."""
    return value == 0 or 1e-300 < abs(value) < 1e15


@SETTINGS
@hypothesis.given(st.data())
def test_likely_instances_agree_with_jsonschema(data: st.DataObject) -> None:
    schema = data.draw(SCHEMAS)
    if grammar_of(schema) is None:
        hypothesis.reject()
    value = data.draw(instances(schema))
    assert in_order(schema, value) == jsonschema.Draft202012Validator(schema).is_valid(value)


@SETTINGS
@hypothesis.given(SCHEMAS, st.lists(VALUES, min_size=5, max_size=12))
def test_acceptance_agrees_with_jsonschema(schema: Any, values: list[Any]) -> None:
    if grammar_of(schema) is None:
        hypothesis.reject()
    check = jsonschema.Draft202012Validator(schema)
    for value in values:
        assert in_order(schema, value) == check.is_valid(value), value


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 0},
        {"type": "array", "items": {"type": "string", "minLength": 1}},
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]},
    ],
)
def test_most_random_schemas_are_planned(schema: Any) -> None:
    """The two tests above must not pass by rejecting everything."""
    assert grammar_of(schema) is not None
