"""Types that pydantic reads: their schema, made such that what it lets a model write validates. Imported when needed.

pydantic's own schemas describe a value loosely where JSON schema has no word for it: a Decimal is any string or number,
a `dict[int, ...]` has any keys, and a naive datetime has the format of one with an offset. Those parts are made anew.
What a validator function checks, no schema tells: it runs when the value is whole.
"""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Any

import pydantic
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from streamgen.errors import SchemaError
from streamgen.grammar.reading import Unreadable, name_of, read_with
from streamgen.grammar.types import (
    KEY_INTEGER,
    KEY_NUMBER,
    Schema,
    base64_schema,
    datetime_schema,
    decimal_schema,
    duration_schema,
    object_of,
    text_of,
    time_schema,
)

if TYPE_CHECKING:
    from pydantic.json_schema import JsonSchemaMode, JsonSchemaValue

_TZ = {None: None, "aware": True, "naive": False}
_HEX = "[0-9a-f]"

# What pydantic calls formats of its own.
_FORMATS: dict[str, Schema] = {
    "ipvanyaddress": {"anyOf": [{"type": "string", "format": "ipv4"}, {"type": "string", "format": "ipv6"}]},
    "base64": base64_schema(),
    "base64url": text_of("(?:[A-Za-z0-9_-]{4})*(?:[A-Za-z0-9_-][AQgw]==|[A-Za-z0-9_-]{2}[AEIMQUYcgkosw048]=)?"),
}
_ANNOTATIONS = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator")
_NAMED = ("properties", "patternProperties", "$defs")  # name -> schema


class PydanticReader:
    """Reads a type through a `TypeAdapter`. `prefix`: of the names of its definitions, where others stand beside them.

    Raises:
        SchemaError: pydantic does not take the type, or it has no JSON schema.
    """

    def __init__(self, tp: Any, *, prefix: str = "") -> None:
        try:
            self._adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(tp)
            template = f"#/$defs/{prefix}{{model}}"
            schema = self._adapter.json_schema(schema_generator=_Generator, ref_template=template)
        except SchemaError:
            raise
        except Exception as error:  # hooks of the type's own may raise anything
            said = " ".join(str(error).partition("\n")[0].split())
            raise SchemaError(f"output: {name_of(tp)} cannot be made a grammar: {said[:300]}") from error
        definitions = {prefix + name: definition for name, definition in schema.pop("$defs", {}).items()}
        self._schema: Schema = {**schema, "$defs": definitions} if definitions else schema

    def schema(self) -> Schema:
        """The JSON that it reads."""
        return self._schema

    def read(self, data: str | bytes) -> Any:
        """The value."""
        try:
            return read_with(self._adapter.validate_json, data, pydantic.ValidationError)
        except (pydantic.ValidationError, UnicodeError) as error:
            raise Unreadable(_describe(error)) from error

    def convert(self, value: Any) -> Any:
        """The value, from what JSON decodes to. Raises pydantic's ValidationError, which is a ValueError."""
        return self._adapter.validate_python(value)


def _describe(error: pydantic.ValidationError | UnicodeError) -> str:
    """Its first complaint, without the value; what a validator function says may quote it, so only that it failed."""
    if isinstance(error, UnicodeError):
        return type(error).__name__
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = errors[0]
    place = "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in first["loc"])
    is_own = first["type"] not in ("value_error", "assertion_error") and not _is_custom(first["type"])
    message = first["msg"] if is_own else "a check failed"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{message}{place and f' - at `{place}`'}{more}"


def _is_custom(kind: str) -> bool:
    return kind not in typing.get_args(core_schema.ErrorType)


class _Generator(GenerateJsonSchema):
    """Schemas of what validates, and nothing wider where that can be said."""

    ignored_warning_kinds = {"skipped-choice", "non-serializable-default", "skipped-discriminator"}  # noqa: RUF012

    def generate(self, schema: core_schema.CoreSchema, mode: JsonSchemaMode = "validation") -> JsonSchemaValue:
        """The schema without annotations, and with formats that are known elsewhere too."""
        return dict(_tidy(super().generate(schema, mode)))

    def datetime_schema(self, schema: core_schema.DatetimeSchema) -> JsonSchemaValue:
        """With or without an offset, as the type says."""
        return datetime_schema(_offset(schema.get("tz_constraint")))

    def time_schema(self, schema: core_schema.TimeSchema) -> JsonSchemaValue:
        """Likewise."""
        return time_schema(_offset(schema.get("tz_constraint")))

    def timedelta_schema(self, schema: core_schema.TimedeltaSchema) -> JsonSchemaValue:
        """A duration in units of fixed length."""
        return duration_schema()

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
        """A string of digits; a number where it has bounds, which strings cannot have."""
        digits, places = schema.get("max_digits"), schema.get("decimal_places")
        bounds = {name: schema.get(name) for name in ("ge", "gt", "le", "lt", "multiple_of")}
        is_negative = bounds.pop("ge") != 0
        if any(bound is not None for bound in bounds.values()) or schema.get("ge") not in (None, 0):
            return _bounded_decimal(super().decimal_schema(schema), places)
        most_places = min(places if places is not None else 24, digits if digits is not None else 24)
        most_digits = 24 if digits is None else max(0, digits - most_places)
        return decimal_schema(digits=most_digits, places=most_places, is_negative=is_negative)

    def uuid_schema(self, schema: core_schema.UuidSchema) -> JsonSchemaValue:
        """Of any version, or of one."""
        version = schema.get("version")
        if version is None:
            return {"type": "string", "format": "uuid"}
        return text_of(f"{_HEX}{{8}}-{_HEX}{{4}}-{version}{_HEX}{{3}}-[89ab]{_HEX}{{3}}-{_HEX}{{12}}")

    def set_schema(self, schema: core_schema.SetSchema) -> JsonSchemaValue:
        """What is written twice is once in the set, which nobody minds, unless it has to have so many."""
        return _without_unique(super().set_schema(schema), schema.get("min_length"))

    def frozenset_schema(self, schema: core_schema.FrozenSetSchema) -> JsonSchemaValue:
        """Likewise."""
        return _without_unique(super().frozenset_schema(schema), schema.get("min_length"))

    def dict_schema(self, schema: core_schema.DictSchema) -> JsonSchemaValue:
        """With keys that validate."""
        keys: Schema = self.generate_inner(schema["keys_schema"]) if "keys_schema" in schema else {}
        values: Schema = self.generate_inner(schema["values_schema"]) if "values_schema" in schema else {}
        result = dict(object_of(_key(self.resolve_ref_schema(keys)), values))
        bounds = {"minProperties": schema.get("min_length"), "maxProperties": schema.get("max_length")}
        return result | {keyword: bound for keyword, bound in bounds.items() if bound is not None}

    def complex_schema(self, schema: core_schema.ComplexSchema) -> JsonSchemaValue:
        """JSON has none."""
        raise SchemaError("output: a complex number has no JSON form; use two floats")

    def json_schema(self, schema: core_schema.JsonSchema) -> JsonSchemaValue:
        """A string that holds JSON is beyond a schema."""
        raise SchemaError("output: pydantic.Json is JSON in a string, which no grammar enforces; use its type")


def _offset(constraint: str | int | None) -> bool | None:
    return True if isinstance(constraint, int) else _TZ[constraint]


def _bounded_decimal(schema: JsonSchemaValue, places: int | None) -> JsonSchemaValue:
    number = next(option for option in schema.get("anyOf", [schema]) if option.get("type") == "number")
    return dict(number) if places is None else {"multipleOf": float(f"1e-{places}"), **number}


def _without_unique(schema: JsonSchemaValue, min_length: int | None) -> JsonSchemaValue:
    if (min_length or 0) <= 1:
        schema.pop("uniqueItems", None)
    return schema


def _key(schema: Schema) -> Schema:
    """The schema of an object's keys, which are strings whatever they stand for."""
    schema = {keyword: value for keyword, value in schema.items() if keyword not in _ANNOTATIONS}
    match schema.get("type"):
        case "integer":
            return text_of(KEY_INTEGER)
        case "number":
            return text_of(KEY_NUMBER)
        case "boolean":
            return {"enum": ["true", "false"]}
        case None | "string":
            pass
        case _:
            raise SchemaError("output: keys of a dict: expected what can be read from a string")
    if "anyOf" in schema:
        options = [_key(option) for option in schema["anyOf"]]
        return {} if {"type": "string"} in options else {"anyOf": options}
    if "const" in schema:
        schema = {"enum": [schema["const"]]}
    if "enum" in schema:
        return {"enum": [str(value) for value in schema["enum"]]}
    return schema


def _tidy(schema: Any) -> Any:
    """Without annotations, some of which hold values that look like schemas."""
    if isinstance(schema, list):
        return [_tidy(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") in _FORMATS:
        return _FORMATS[schema["format"]]
    tidied: dict[str, Any] = {}
    for keyword, value in schema.items():
        if keyword in _NAMED:
            tidied[keyword] = {name: _tidy(part) for name, part in value.items()}
        elif keyword in ("enum", "const"):
            tidied[keyword] = value
        elif keyword not in _ANNOTATIONS and not (keyword == "format" and "pattern" in schema):
            tidied[keyword] = _tidy(value)  # a format of pydantic's beside the pattern that was made for it
    return tidied
