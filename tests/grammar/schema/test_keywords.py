"""Every keyword, by values that satisfy it and values that do not; jsonschema has to agree about each."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from tests.grammar.schema.acceptance import accepts

DRAFT_4 = "http://json-schema.org/draft-04/schema#"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
DRAFT_2019 = "https://json-schema.org/draft/2019-09/schema"

# schema, valid values, invalid values
CASES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "true": (True, [None, 1, "x", [], {"a": [1]}], []),
    "type": ({"type": "integer"}, [0, -5, 10**20, 1.0], [1.5, "1", None, True]),
    "types": ({"type": ["string", "null"]}, ["", None], [0, [], False]),
    "boolean": ({"type": "boolean"}, [True, False], [0, 1, "true"]),
    "number": ({"type": "number"}, [0, -1.5, 1e300, 5e-324, 1e-7, 123456.789], ["1", None]),
    "enum": (
        {"enum": ["a", 1, None, True, [1], {"k": "é"}]},
        ["a", 1, None, True, [1], {"k": "é"}],
        ["b", 2, False, []],
    ),
    "const string": ({"const": 'é"\\/\n😀'}, ['é"\\/\n😀'], ["é", ""]),
    "const number": ({"const": 1.5}, [1.5], [1, 1.51, "1.5"]),
    "const object": ({"const": {"a": [1, {"b": None}]}}, [{"a": [1, {"b": None}]}], [{"a": [1]}, {}]),
    "minimum": ({"type": "number", "minimum": 1.5}, [1.5, 2, 100.25, 1e300], [1.49, -2, 0]),
    "maximum": ({"type": "integer", "maximum": 12}, [12, 0, -100], [13, 120]),
    "open bounds": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        [0.5, 1e-7, 0.999],
        [0, 1, 1.5, -0.5],
    ),
    "open bounds of draft 4": (
        {"$schema": DRAFT_4, "type": "number", "minimum": 0, "exclusiveMinimum": True},
        [0.1, 3],
        [0, -1],
    ),
    "integers of draft 4": ({"$schema": DRAFT_4, "type": "integer"}, [1, -3], [1.0, 1.5]),
    "multipleOf 7": ({"type": "integer", "multipleOf": 7}, [0, 7, -14, 7000], [1, 15, -8]),
    "multipleOf 5 in bounds": ({"type": "integer", "multipleOf": 5, "minimum": 3, "maximum": 22}, [5, 20], [0, 7, 25]),
    "multipleOf 0.25": ({"type": "number", "multipleOf": 0.25}, [0.25, 1, -3.75, 2.5], [0.3, 0.1]),
    "not multipleOf": ({"type": "integer", "not": {"multipleOf": 10}}, [1, 15, -3], [10, 0, -20]),
    "lengths": ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "é😀", "a\nb"], ["", "a", "abcd", "😀"]),
    "pattern": ({"type": "string", "pattern": "a+b"}, ["aab", "xabx", "éab"], ["", "ba"]),
    "anchored pattern": ({"type": "string", "pattern": "^[a-z]{2}\\d$"}, ["ab1"], ["ab", "xab1", "ab12"]),
    "pattern beside lengths": (
        {"type": "string", "pattern": "^(ab)*$", "minLength": 3, "maxLength": 6},
        ["abab", "ababab"],
        ["ab", "abababab", "aba"],
    ),
    "look-ahead": ({"type": "string", "pattern": "^(?!no)[a-z]+$"}, ["yes", "n"], ["no", "none", ""]),
    "format": ({"type": "string", "format": "date"}, ["2024-02-29"], ["2023-02-29", "2024-13-01", "x"]),
    "format of a number": ({"format": "date"}, [3, "2020-01-31"], ["3"]),
    "unknown format": ({"type": "string", "format": "colour-of-the-day"}, ["x"], [1]),
    "items": ({"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [["a"], [1, "a"]]),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
        [[], [1], [1, "a"]],
        [["a"], [1, 2], [1, "a", 1]],
    ),
    "items as an array": (
        {"$schema": DRAFT_7, "type": "array", "items": [{"type": "integer"}], "additionalItems": {"type": "null"}},
        [[], [1], [1, None, None]],
        [[None], [1, 2]],
    ),
    "numbers of items": (
        {"type": "array", "minItems": 1, "maxItems": 2, "items": {"const": 1}},
        [[1], [1, 1]],
        [[], [1] * 3],
    ),
    "uniqueItems": (
        {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 1, "maxItems": 2},
        [["a"], ["c", "a"]],
        [[], ["a", "a"], ["a", "b", "c"], ["d"]],
    ),
    "uniqueItems of a pair": (
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "null"}], "items": False, "uniqueItems": True},
        [["a", None], []],
        [[None, "a"]],
    ),
    "contains": ({"type": "array", "contains": {"const": 1}}, [[1], [2, 1, 2], ["x", 1]], [[], [2, "1"]]),
    "minContains": (
        {"type": "array", "contains": {"const": 1}, "minContains": 2, "maxContains": 3, "maxItems": 4},
        [[1, 1], [1, 2, 1], [1, 1, 1, 2]],
        [[1], [2, 2], [1, 1, 1, 1], [1, 2, 1, 2, 2]],
    ),
    "no contained": (
        {"type": "array", "contains": {"const": 1}, "minContains": 0, "maxContains": 0},
        [[], [2]],
        [[1], [2, 1]],
    ),
    "properties": (
        {"type": "object", "properties": {"a": {"type": "integer"}}},
        [{}, {"a": 1}, {"a": 1, "b": 2}],
        [{"a": "x"}],
    ),
    "required": (
        {"type": "object", "properties": {"a": {"type": "integer"}, "b": {}}, "required": ["b", "z"]},
        [{"b": 1, "z": None}, {"a": 1, "b": [], "z": 2, "q": 3}],
        [{}, {"a": 1}, {"b": 1}, {"z": 1}],
    ),
    "additionalProperties": (
        {"type": "object", "properties": {"é": {}}, "additionalProperties": {"type": "integer"}},
        [{"é": "x", "b": 1, "c": 2}, {}],
        [{"b": "x"}, {"é": 1, "b": None}],
    ),
    "no additionalProperties": (
        {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "additionalProperties": False},
        [{}, {"a": 1}, {"b": 1}, {"a": 1, "c": 2}, {"a": 1, "b": 1, "c": 1}],
        [{"d": 1}, {"a": 1, "d": 1}],
    ),
    "patternProperties": (
        {
            "type": "object",
            "patternProperties": {"^s": {"type": "string"}, "e$": {"minLength": 2}},
            "additionalProperties": {"type": "null"},
        },
        [{"s": "x"}, {"some": "xy"}, {"e": 5}, {"q": None}],
        [{"s": 1}, {"some": "x"}, {"some": 3}, {"q": 1}],
    ),
    "patternProperties of a named one": (
        {"properties": {"foo": {"minLength": 2}}, "patternProperties": {"o$": {"maxLength": 3}}},
        [{"foo": "ab"}, {"foo": "abc"}, {"fo": "a"}],
        [{"foo": "a"}, {"foo": "abcd"}],
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"maxLength": 2}}, [{}, {"ab": 1}], [{"abc": 1}]),
    "minProperties": ({"type": "object", "minProperties": 1}, [{"a": 1}, {"b": 1, "c": 1}], [{}]),
    "numbers of properties": (
        {
            "type": "object",
            "properties": {"a": {}, "b": {}, "c": {}},
            "additionalProperties": False,
            "minProperties": 2,
            "maxProperties": 2,
        },
        [{"a": 1, "b": 1}, {"b": 1, "c": 1}],
        [{}, {"a": 1}, {"a": 1, "b": 1, "c": 1}],
    ),
    "maxProperties": (
        {"type": "object", "maxProperties": 2, "required": ["a"]},
        [{"a": 1, "b": 2}],
        [{}, {"a": 1, "b": 1, "c": 1}],
    ),
    "dependentRequired": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
        [{}, {"b": 1}, {"a": 1, "b": 1}],
        [{"a": 1}, {"a": 1, "c": 1}],
    ),
    "dependentSchemas": (
        {
            "properties": {"a": {}},
            "dependentSchemas": {"a": {"properties": {"b": {"type": "null"}}, "required": ["b"]}},
        },
        [{}, {"b": 1}, {"a": 1, "b": None}, 5],
        [{"a": 1}, {"a": 1, "b": 1}],
    ),
    "dependencies": (
        {"$schema": DRAFT_7, "type": "object", "dependencies": {"a": ["b"], "c": {"maxProperties": 1}}},
        [{}, {"b": 1}, {"a": 1, "b": 1}, {"c": 1}],
        [{"a": 1}, {"b": 1, "c": 1}],
    ),
    "allOf": (
        {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"required": ["a"]}, {"type": "object"}]},
        [{"a": 1}, {"a": 1, "b": 1}],
        [{}, {"a": "x"}, 5],
    ),
    "allOf of strings": (
        {"type": "string", "allOf": [{"pattern": "a"}, {"pattern": "b"}]},
        ["ab", "xbxa"],
        ["a", "b", ""],
    ),
    "anyOf beside properties": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}],
        [{}, {"c": 1}],
    ),
    "oneOf by a constant": (
        {
            "type": "object",
            "required": ["kind"],
            "oneOf": [
                {"properties": {"kind": {"const": "a"}, "x": {"type": "integer"}}, "required": ["x"]},
                {"properties": {"kind": {"const": "b"}, "y": {"type": "string"}}, "required": ["y"]},
            ],
        },
        [{"kind": "a", "x": 1}, {"kind": "b", "y": "z"}],
        [{"kind": "a"}, {"kind": "b", "x": 1}, {"kind": "c", "x": 1}],
    ),
    "oneOf of names": (
        {"type": "object", "properties": {"a": {}, "b": {}}, "oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}],
        [{}, {"a": 1, "b": 1}],
    ),
    "oneOf of overlapping numbers": (
        {"type": "integer", "oneOf": [{"minimum": 5}, {"maximum": 10}]},
        [4, 11, -3],
        [5, 7, 10],
    ),
    "oneOf of overlapping strings": (
        {"type": "string", "oneOf": [{"pattern": "^a"}, {"pattern": "b$"}]},
        ["a", "b", "ac"],
        ["ab", "c", ""],
    ),
    "not": ({"type": ["string", "integer"], "not": {"enum": ["a", 5]}}, ["b", 4, 6, ""], ["a", 5, None]),
    "not of what the bounds leave out anyway": (
        {"type": "number", "minimum": 0, "maximum": 3, "not": {"enum": [-1, 2, 5]}},
        [0, 1.5, 2.5, 3],
        [-1, 2, 2.0, 5, 3.5, 4],
    ),
    "not required": ({"type": "object", "not": {"required": ["a"]}}, [{}, {"b": 1}], [{"a": 1}, {"b": 1, "a": 1}]),
    "not a type": ({"not": {"type": "object"}}, [1, "x", [], [{}]], [{}, {"a": 1}]),
    "if": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {}},
            "if": {"properties": {"a": {"const": 1}}, "required": ["a"]},
            "then": {"required": ["b"]},
            "else": {"properties": {"b": {"type": "null"}}},
        },
        [{"a": 1, "b": 2}, {"a": 2}, {}, {"a": 2, "b": None}],
        [{"a": 1}, {"a": 2, "b": 2}, {"b": 1}],
    ),
    "$ref": (
        {"$defs": {"a/b": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/a~1b"}},
        [[], [1]],
        [["x"]],
    ),
    "$ref with siblings": (
        {"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n", "minimum": 3}}},
        [{"a": 3}, {}],
        [{"a": 2}, {"a": "x"}],
    ),
    "$ref of draft 7 without siblings": (
        {
            "$schema": DRAFT_7,
            "definitions": {"n": {"type": "integer"}},
            "items": {"$ref": "#/definitions/n", "minimum": 3},
        },
        [[1]],
        [["x"]],
    ),
    "$anchor": ({"$defs": {"n": {"$anchor": "num", "type": "integer"}}, "items": {"$ref": "#num"}}, [[1], 5], [["x"]]),
    "$id": (
        {
            "$id": "https://example.com/root.json",
            "$defs": {"n": {"$id": "n.json", "type": "integer"}},
            "items": {"$ref": "n.json"},
        },
        [[1]],
        [["x"]],
    ),
    "recursion": (
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
                    "required": ["v"],
                    "additionalProperties": False,
                }
            },
            "$ref": "#/$defs/node",
        },
        [{"v": 1}, {"v": 1, "next": {"v": 2, "next": {"v": 3}}}],
        [{}, {"v": 1, "next": {}}, {"v": 1, "next": {"v": "x"}}],
    ),
    "$dynamicRef": (
        {"$dynamicAnchor": "node", "type": "object", "additionalProperties": {"$dynamicRef": "#node"}},
        [{}, {"a": {"b": {}}}],
        [{"a": 1}, {"a": {"b": 2}}],
    ),
    "$recursiveRef": (
        {"$schema": DRAFT_2019, "type": "object", "additionalProperties": {"$recursiveRef": "#"}},
        [{}, {"a": {"b": {}}}],
        [{"a": 1}],
    ),
    "unevaluatedProperties": (
        {
            "type": "object",
            "properties": {"a": {}},
            "anyOf": [
                {"properties": {"b": {"const": 1}}, "required": ["b"]},
                {"properties": {"c": {}}, "required": ["c"]},
            ],
            "unevaluatedProperties": False,
        },
        [{"a": 1, "b": 1}, {"c": 1}, {"b": 1, "c": 1}],
        [{"a": 1}, {"b": 2}, {"b": 1, "d": 1}, {"b": 2, "c": 1}],
    ),
    "unevaluatedItems": (
        {"type": "array", "allOf": [{"prefixItems": [{"type": "integer"}]}], "unevaluatedItems": {"type": "string"}},
        [[], [1], [1, "a", "b"]],
        [["a"], [1, 2]],
    ),
    "unknown keywords": ({"type": "integer", "x-form": {"widget": 3}, "nullable": True}, [3], [None]),
}


@pytest.mark.parametrize("name", CASES)
def test_keyword(name: str) -> None:
    schema, valid, invalid = CASES[name]
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    check = validator(schema, format_checker=validator.FORMAT_CHECKER)
    for value in valid:
        assert check.is_valid(value), f"the table is wrong about {value!r}"
        assert accepts(schema, value), f"{value!r} is refused"
    for value in invalid:
        assert not check.is_valid(value), f"the table is wrong about {value!r}"
        assert not accepts(schema, value), f"{value!r} is accepted"
