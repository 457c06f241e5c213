"""Where half a string means something: free text grows while it is written, half a date or an enum's name is nothing.

Read from the schema along the path of what is being written, for `partial.JsonReader`. It changes only what is shown
early, so a keyword that is not looked at here does no harm.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

_WHOLE = ("enum", "const", "format", "pattern")  # a string under one of these is shown once it is whole
_BRANCHES = ("anyOf", "oneOf", "allOf")


class Shape(Protocol):
    """What is known of a value that is to come."""

    @property
    def grows(self) -> bool:
        """Whether a string is shown while it is being written; otherwise once it is whole, as a number is."""
        ...

    def member(self, key: str) -> Shape:
        """The same of an object's member."""
        ...

    def element(self, index: int) -> Shape:
        """The same of an array's element."""
        ...


class _FreeShape:
    """Any JSON: every string grows."""

    grows = True

    def member(self, key: str) -> Shape:
        return self

    def element(self, index: int) -> Shape:
        return self


FREE: Final[Shape] = _FreeShape()


class SchemaShape:
    """The shape of what a schema describes. Where it leaves a choice, what one branch allows counts."""

    def __init__(self, schema: object, document: object | None = None) -> None:
        self._document = schema if document is None else document
        self._schemas: list[dict[str, Any]] = []
        self._children: dict[str | int, Shape] = {}
        self._flatten(schema, seen=set())

    @property
    def grows(self) -> bool:
        """Whether it may be free text."""
        return any(_allows_text(schema) for schema in self._schemas) or not self._schemas

    def member(self, key: str) -> Shape:
        """Of an object's member."""
        return self._child(key, [_member(schema, key) for schema in self._schemas])

    def element(self, index: int) -> Shape:
        """Of an array's element."""
        return self._child(index, [_element(schema, index) for schema in self._schemas])

    def _child(self, key: str | int, schemas: list[object]) -> Shape:
        shape = self._children.get(key)
        if shape is None:
            found = [schema for schema in schemas if schema is not None]
            shape = SchemaShape({"anyOf": found}, self._document) if found else FREE
            if len(self._children) < 1000:  # an array may have any number of elements
                self._children[key] = shape
        return shape

    def _flatten(self, schema: object, seen: set[int]) -> None:
        """Follow references and branches down to schemas that say something themselves."""
        if not isinstance(schema, dict) or id(schema) in seen:
            return
        seen.add(id(schema))
        branches = [branch for name in _BRANCHES for branch in _list(schema.get(name))]
        if "$ref" in schema:
            branches.append(_resolve(self._document, schema["$ref"]))
        for branch in branches:
            self._flatten(branch, seen)
        if not branches:
            self._schemas.append(schema)


def _allows_text(schema: dict[str, Any]) -> bool:
    kinds = schema.get("type", "string")
    return (kinds == "string" or "string" in _list(kinds)) and not any(name in schema for name in _WHOLE)


def _member(schema: dict[str, Any], key: str) -> object | None:
    properties = schema.get("properties")
    if isinstance(properties, dict) and key in properties:
        return properties[key]  # type: ignore[no-any-return]  # whatever it is, `_flatten` looks
    patterns = schema.get("patternProperties")
    if isinstance(patterns, dict) and patterns:
        return {"anyOf": list(patterns.values())}
    return schema.get("additionalProperties")


def _element(schema: dict[str, Any], index: int) -> object | None:
    first = _list(schema.get("prefixItems"))
    return first[index] if index < len(first) else schema.get("items")


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _resolve(document: object, reference: object) -> object:
    """What a local reference points at; None if it is of another kind."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        document = document.get(name) if isinstance(document, dict) else None
    return document
