"""The schema of a call: one object per function, with the function's own schema inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from streamgen.grammar.source import SchemaSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamgen.text.calls.formats import Definition

ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}

# Keywords whose values are instances, not schemas: what looks like a reference in them is none.
_INSTANCES = frozenset({"const", "enum", "default", "examples"})
# Keywords whose values map names of any kind to schemas.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def call_source(
    definitions: Sequence[Definition],
    *,
    free: frozenset[str] = frozenset(),
    arguments_key: str = "arguments",
    is_list: bool = False,
    max_calls: int | None = None,
    before: str = "",
    after: str = "",
) -> SchemaSource:
    """The grammar of `{"name": ..., "arguments": ...}` objects of these functions.

    free       names of functions whose arguments may be any object
    is_list    a list of at least one of them, and at most `max_calls`
    before, after   what stands around
    """
    shared: dict[str, Any] = {}
    calls = [_call_schema(definition, i, free, arguments_key, shared) for i, definition in enumerate(definitions)]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if is_list:
        schema = {"type": "array", "items": schema, "minItems": 1}
        if max_calls is not None:
            schema["maxItems"] = max_calls
    if shared:
        schema["$defs"] = shared
    is_strict = any(d["function"].get("strict") for d in definitions if d["function"]["name"] not in free)
    return _source(schema, is_strict=is_strict, before=before, after=after)


def arguments_source(definition: Definition) -> SchemaSource:
    """The grammar of one function's arguments."""
    shared: dict[str, Any] = {}
    schema = _arguments_schema(definition, 0, shared)
    if shared:
        schema = {**schema, "$defs": shared}
    return _source(schema, is_strict=bool(definition["function"].get("strict")), before="", after="")


def _source(schema: dict[str, Any], *, is_strict: bool, before: str, after: str) -> SchemaSource:
    return SchemaSource(
        text=msgspec.json.encode(schema).decode(),
        is_closed=True,  # a model that makes arguments up is not wanted, whatever the schema leaves open
        before=before,
        after=after,
        on_unsupported="error" if is_strict else "ignore",
    )


def _call_schema(
    definition: Definition, index: int, free: frozenset[str], arguments_key: str, shared: dict[str, Any]
) -> dict[str, Any]:
    name = definition["function"]["name"]
    arguments = ANY_ARGUMENTS if name in free else _arguments_schema(definition, index, shared)
    return {
        "type": "object",
        "properties": {"name": {"const": name}, arguments_key: arguments},
        "required": ["name", arguments_key],
        "additionalProperties": False,
    }


def _arguments_schema(definition: Definition, index: int, shared: dict[str, Any]) -> dict[str, Any]:
    """The function's schema; one with references moves to `shared`, where they are bent to."""
    parameters = definition["function"].get("parameters") or {"type": "object", "properties": {}}
    schema = {key: value for key, value in parameters.items() if key not in ("$schema", "$id")}
    if not _has_references(schema):
        return schema
    place = f"tool{index}"
    shared[place] = _bend(schema, f"#/$defs/{place}")
    return {"$ref": f"#/$defs/{place}"}


def _has_references(schema: Any) -> bool:
    bent: object = _bend(schema, "#/-")
    return bool(bent != schema)


def _bend(schema: Any, root: str) -> Any:
    """The schema with `#` in its references replaced by `root`."""
    if isinstance(schema, list):
        return [_bend(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _bend_keyword(key, value, root) for key, value in schema.items()}


def _bend_keyword(key: str, value: Any, root: str) -> Any:
    if key in _INSTANCES:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: _bend(schema, root) for name, schema in value.items()}
    if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
        return root + value[1:]
    return _bend(value, root)
