"""What the keywords of JSON schema are: where subschemas stand, and what values they may have."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from streamgen.errors import SchemaError
from streamgen.grammar.schema.limits import SchemaLimits, too_complex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TYPES = ("null", "boolean", "number", "string", "array", "object")

ONE_SCHEMA = (
    "additionalProperties",
    "additionalItems",
    "propertyNames",
    "contains",
    "not",
    "if",
    "then",
    "else",
    "unevaluatedProperties",
    "unevaluatedItems",
)
LIST_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
MAP_OF_SCHEMAS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")


def subschemas(schema: dict[str, Any]) -> Iterator[tuple[str | int, ...]]:
    """Paths to the subschemas directly under a valid schema."""
    for keyword, value in schema.items():
        if keyword in ONE_SCHEMA:
            yield (keyword,)
        elif keyword in LIST_OF_SCHEMAS:
            yield from ((keyword, index) for index in range(len(value)))
        elif keyword in MAP_OF_SCHEMAS:
            yield from ((keyword, name) for name in value)
        elif keyword == "items":
            yield from ((keyword, index) for index in range(len(value))) if isinstance(value, list) else [(keyword,)]
        elif keyword == "dependencies":
            yield from ((keyword, name) for name, part in value.items() if not isinstance(part, list))


def check_keywords(schema: Any, pointer: str, draft: int, limits: SchemaLimits) -> None:
    """Check the values of a schema's own keywords.

    Raises:
        SchemaError: one is not what the draft asks for.
        SchemaTooComplex: one lists too much.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        _refuse(pointer, None, "an object or a boolean", schema)
    for keyword, value in schema.items():
        check = _CHECKS.get(keyword)
        if keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            check = (_is_bool, "a boolean") if draft <= 4 else (_is_number, "a number")
        if check is not None and not check[0](value):
            _refuse(pointer, keyword, check[1], value)
    for keyword, limit, bound in (
        ("properties", limits.max_properties, "max_properties"),
        ("enum", limits.max_enum, "max_enum"),
    ):
        if len(schema.get(keyword, ())) > limit:
            too_complex(f"entries in {pointer}/{keyword}", bound, limit)


def _refuse(pointer: str, keyword: str | None, wanted: str, got: Any) -> None:
    where = f"{pointer}/{keyword}" if keyword else pointer or "/"
    shown = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    kind = shown.get(type(got), f"{got}")
    raise SchemaError(f"{where}: expected {wanted}, got {kind}", pointer=pointer, keyword=keyword)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | Decimal) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict | bool)


def _is_array(value: Any) -> bool:
    return isinstance(value, list)


def _are_schemas(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_schema, value))


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_string, value))


def _is_type(value: Any) -> bool:
    named = [value] if isinstance(value, str) else value
    return _are_strings(named) and bool(named) and set(named) <= {*TYPES, "integer"}


def _are_dependencies(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_schema(part) or _are_strings(part) for part in value.values())


def _is_map_of_names(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_are_strings, value.values()))


def _are_items(value: Any) -> bool:
    return _is_schema(value) or (isinstance(value, list) and all(map(_is_schema, value)))


_COUNT = (_is_count, "a whole number >= 0")
_NUMBER = (_is_number, "a number")
_SCHEMA = (_is_schema, "a schema (an object or a boolean)")
_SCHEMAS = (_are_schemas, "an array of schemas, at least one")
_MAP = (_is_map, "an object of schemas")
_STRING = (_is_string, "a string")

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(ONE_SCHEMA, _SCHEMA),
    **dict.fromkeys(LIST_OF_SCHEMAS, _SCHEMAS),
    **dict.fromkeys(MAP_OF_SCHEMAS, _MAP),
    **dict.fromkeys(("$ref", "$dynamicRef", "$recursiveRef", "pattern", "format"), _STRING),
    **dict.fromkeys(("minimum", "maximum"), _NUMBER),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _COUNT),
    **dict.fromkeys(("minProperties", "maxProperties", "minContains", "maxContains"), _COUNT),
    "items": (_are_items, "a schema or an array of schemas"),
    "multipleOf": (_is_positive, "a number > 0"),
    "enum": (_is_array, "an array of values"),
    "required": (_are_strings, "an array of strings"),
    "type": (_is_type, f"one or several of {', '.join(TYPES)} and integer"),
    "uniqueItems": (_is_bool, "a boolean"),
    "dependencies": (_are_dependencies, "an object of schemas or of arrays of names"),
    "dependentRequired": (_is_map_of_names, "an object of arrays of names"),
}
