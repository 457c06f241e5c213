"""Random schemas of the kinds that people write, each with an end in sight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

NAMES = ("name", "größe", "価格", "count", "is open", "a/b", 'quo"te', "tags", "🚲")


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose values are short."""
    kinds = ["string", "integer", "number", "boolean", "enum", "pattern", "format", "null"]
    if depth < 3:
        kinds += ["object", "object", "array", "union"]
    return _MAKERS[rng.choice(kinds) if depth else "object"](rng, depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(1, 4))
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.8],
    }
    if rng.random() < 0.9:
        schema["additionalProperties"] = False
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(0, 2)
    high = low + rng.randint(0, 2)
    return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": high}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth + 1), {"type": "null"}]}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": rng.randint(1, 12), "minLength": rng.randint(0, 1)}


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randint(-10, 10)
    return {"type": "number", "exclusiveMinimum": low, "maximum": low + rng.randint(1, 9)}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "grün", "ｂ", 1, 2.5, None, True, {"k": [1]}, "a\nb"], rng.randint(1, 5))}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "pattern": rng.choice([r"^[A-Z]{2}-\d{4}$", r"^(foo|foobar)$", "^[äöü]{1,3}$"])}


def _format(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(["date", "date-time", "uuid", "ipv4"])}


_MAKERS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "object": _object,
    "array": _array,
    "union": _union,
    "string": _string,
    "integer": _integer,
    "number": _number,
    "enum": _enum,
    "pattern": _pattern,
    "format": _format,
    "boolean": lambda rng, depth: {"type": "boolean"},
    "null": lambda rng, depth: {"type": "null"},
}
