"""Python types -> the JSON schema of exactly what msgspec's decoder reads for them.

msgspec makes schemas itself, for documentation: there a time is any string, and so is the key of a `dict[int, str]`. A
grammar made from these would let a model write what the decoder then refuses, so schemas are made here, from
`msgspec.inspect`. Fields come in the order in which the class declares them: that is the order they are written in.
"""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import inspect

if TYPE_CHECKING:
    from collections.abc import Callable

Schema: TypeAlias = dict[str, Any]

# No \d in these: in Python it matches the digits of every script.
_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_LEAP_YEAR = (
    "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"  # 4, 8 ... but not 0000, 1900
)
_DAY = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
_ZONE = "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_SECONDS = r"[0-9]{1,6}(?:\.[0-9]{1,6})?S"
_MINUTES = f"(?:[0-9]{{1,6}}M(?:{_SECONDS})?|{_SECONDS})"
_HOURS = f"(?:[0-9]{{1,6}}H(?:{_MINUTES})?|{_MINUTES})"
_BASE64 = "[A-Za-z0-9+/]"
KEY_INTEGER = "-?(?:0|[1-9][0-9]{0,17})"
KEY_NUMBER = r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,18})?"

DATE: Schema = {"type": "string", "format": "date"}
UUID: Schema = {"type": "string", "format": "uuid"}


def text_of(pattern: str) -> Schema:
    """A string that is all of a pattern."""
    return {"type": "string", "pattern": f"^(?:{pattern})$"}


def _with_zone(pattern: str, tz: bool | None) -> Schema:
    return text_of(pattern + {None: f"{_ZONE}?", True: _ZONE, False: ""}[tz])


def datetime_schema(tz: bool | None) -> Schema:
    """A date and time of RFC 3339. `tz`: with an offset (True), without (False), as it comes (None)."""
    return _with_zone(f"{_DAY}T{_CLOCK}", tz)


def time_schema(tz: bool | None) -> Schema:
    """A time of day, likewise."""
    return _with_zone(_CLOCK, tz)


def duration_schema() -> Schema:
    """A duration of ISO 8601 in days, hours, minutes and seconds: the units of which everybody knows the length."""
    return text_of(f"-?P(?:[0-9]{{1,6}}D(?:T{_HOURS})?|T{_HOURS})")


def decimal_schema(*, digits: int = 24, places: int = 24, is_negative: bool = True) -> Schema:
    """A decimal number in a string, so that none of its digits are lost."""
    sign = "-?" if is_negative else ""
    integer = f"(?:0|[1-9][0-9]{{0,{digits - 1}}})" if digits else "0"
    fraction = rf"(?:\.[0-9]{{1,{places}}})?" if places else ""
    return text_of(f"{sign}{integer}{fraction}")


def base64_schema(low: int | None = None, high: int | None = None) -> Schema:
    """Bytes in base64: `low` to `high` of them."""
    tails = ("", f"{_BASE64}[AQgw]==", f"{_BASE64}{{2}}[AEIMQUYcgkosw048]=")  # whose unused bits are 0
    parts = []
    for size, tail in enumerate(tails):
        at_least = max(0, -((size - (low or 0)) // 3))
        at_most = None if high is None else (high - size) // 3
        if at_most is None or at_least <= at_most:
            parts.append(f"(?:{_BASE64}{{4}}){{{at_least},{'' if at_most is None else at_most}}}{tail}")
    return text_of("|".join(parts))


def object_of(keys: Schema, values: Schema) -> Schema:
    """An object that maps what a schema of strings describes."""
    if keys in ({}, {"type": "string"}):
        return {"type": "object", "additionalProperties": values}
    if "enum" in keys:
        return {"type": "object", "properties": dict.fromkeys(keys["enum"], values), "additionalProperties": False}
    if set(keys) == {"type", "pattern"}:
        return {"type": "object", "patternProperties": {keys["pattern"]: values}, "additionalProperties": False}
    return {"type": "object", "propertyNames": keys, "additionalProperties": values}


class UnsupportedType(TypeError):
    """There is no schema of a type; the message names it."""


def schema_of(tp: object, custom: Callable[[Any], tuple[Schema, dict[str, Schema]]]) -> Schema:
    """The schema of a type that msgspec reads. `custom` makes that of a class which it does not know, with its `$defs`.

    Raises:
        TypeError: msgspec does not take the type. UnsupportedType: it has no JSON form. NameError: a name in an
        annotation does not exist.
    """
    return _Writer(custom).write(inspect.type_info(tp))


class _Writer:
    """Makes one schema, with its definitions."""

    def __init__(self, custom: Callable[[Any], tuple[Schema, dict[str, Schema]]]) -> None:
        self._custom = custom
        self._names: dict[int, str] = {}  # id of a class's node -> its name among the definitions
        self._definitions: dict[str, Schema] = {}

    def write(self, node: inspect.Type) -> Schema:
        schema = self._schema(node)
        return {**schema, "$defs": self._definitions} if self._definitions else schema

    def _schema(self, node: inspect.Type) -> Schema:
        match node:
            case inspect.Metadata():
                extra = dict(node.extra_json_schema or {})
                return {**self._schema(node.type), **extra}
            case inspect.StructType() | inspect.DataclassType() | inspect.TypedDictType() | inspect.NamedTupleType():
                return self._reference(node)
            case inspect.UnionType():
                return {"anyOf": [self._schema(option) for option in node.types]}
            case inspect.DictType():
                return self._mapping(node)
            case inspect.CollectionType():
                return self._collection(node)
            case inspect.TupleType():
                return _row([self._schema(item) for item in node.item_types], num_required=len(node.item_types))
            case inspect.CustomType():
                schema, definitions = self._custom(node.cls)
                self._definitions.update(definitions)
                return schema
            case _:
                return _scalar(node)

    def _reference(
        self, node: inspect.StructType | inspect.DataclassType | inspect.TypedDictType | inspect.NamedTupleType
    ) -> Schema:
        name = self._names.get(id(node))
        if name is None:
            base = str(getattr(node.cls, "__name__", "type"))
            name = next(n for n in _numbered(base) if n not in self._definitions)
            self._names[id(node)] = name
            self._definitions[name] = {}  # it may refer to itself
            self._definitions[name] = self._class(node)
        return {"$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1")}

    def _class(
        self, node: inspect.StructType | inspect.DataclassType | inspect.TypedDictType | inspect.NamedTupleType
    ) -> Schema:
        fields = _in_declared_order(node)
        schemas = {field.encode_name: self._schema(field.type) for field in fields}
        required = [field.encode_name for field in fields if field.required]
        if isinstance(node, inspect.NamedTupleType):
            return _row(list(schemas.values()), num_required=len(required))
        if isinstance(node, inspect.StructType):
            tag = {} if node.tag_field is None else {node.tag_field: {"const": node.tag}}
            if node.array_like:
                return _row([*tag.values(), *schemas.values()], num_required=len(tag) + _num_leading(fields))
            schemas, required = {**tag, **schemas}, [*tag, *required]
        return {"type": "object", "properties": schemas, "required": required}

    def _mapping(self, node: inspect.DictType) -> Schema:
        schema = dict(object_of(self._key(node.key_type), self._schema(node.value_type)))
        return _with(schema, minProperties=node.min_length, maxProperties=node.max_length)

    def _key(self, node: inspect.Type) -> Schema:
        """The schema of an object's keys: what msgspec reads from a string."""
        match node:
            case inspect.AnyType():
                return {}
            case inspect.IntType():
                return text_of(KEY_INTEGER)
            case inspect.FloatType():
                return text_of(KEY_NUMBER)
            case inspect.Metadata():
                return self._key(node.type)
            case inspect.EnumType() | inspect.LiteralType():
                values = _scalar(node)["enum"]
                if all(isinstance(value, str | int) for value in values):
                    return {"enum": [str(value) for value in values]}
            case (
                inspect.StrType()
                | inspect.DateType()
                | inspect.DateTimeType()
                | inspect.TimeType()
                | inspect.TimeDeltaType()
                | inspect.UUIDType()
                | inspect.DecimalType()
                | inspect.BytesType()
            ):
                return _scalar(node)
        raise UnsupportedType("keys of a dict: expected str, int, float, an enum, a date or time, UUID, Decimal, bytes")

    def _collection(self, node: inspect.CollectionType) -> Schema:
        schema: Schema = {"type": "array", "items": self._schema(node.item_type)}
        # What is written twice is once in the set, which nobody minds, unless it has to have so many.
        if isinstance(node, inspect.SetType | inspect.FrozenSetType) and (node.min_length or 0) > 1:
            schema["uniqueItems"] = True
        return _with(schema, minItems=node.min_length, maxItems=node.max_length)


def _scalar(node: inspect.Type) -> Schema:
    match node:
        case inspect.AnyType() | inspect.RawType():
            return {}
        case inspect.NoneType():
            return {"type": "null"}
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.IntType() | inspect.FloatType():
            return _with(
                {"type": "integer" if isinstance(node, inspect.IntType) else "number"},
                minimum=node.ge,
                exclusiveMinimum=node.gt,
                maximum=node.le,
                exclusiveMaximum=node.lt,
                multipleOf=node.multiple_of,
            )
        case inspect.StrType():
            return _with({"type": "string"}, minLength=node.min_length, maxLength=node.max_length, pattern=node.pattern)
        case inspect.EnumType():
            return {"enum": [member.value for member in node.cls]}
        case inspect.LiteralType():
            return {"enum": list(node.values)}
        case inspect.BytesType() | inspect.ByteArrayType() | inspect.MemoryViewType():
            return base64_schema(node.min_length, node.max_length)
        case _:
            return _moment_or_number(node)


def _moment_or_number(node: inspect.Type) -> Schema:
    match node:
        case inspect.DateType():
            return DATE
        case inspect.DateTimeType():
            return datetime_schema(node.tz)
        case inspect.TimeType():
            return time_schema(node.tz)
        case inspect.TimeDeltaType():
            return duration_schema()
        case inspect.UUIDType():
            return UUID
        case inspect.DecimalType():
            return decimal_schema()
    raise UnsupportedType(f"{type(node).__name__.removesuffix('Type')} has no JSON form")


def _row(items: list[Schema], *, num_required: int) -> Schema:
    """An array whose every place has its own schema."""
    if not items:
        return {"type": "array", "maxItems": 0}
    return {"type": "array", "prefixItems": items, "minItems": num_required, "maxItems": len(items)}


def _num_leading(fields: list[inspect.Field]) -> int:
    """How many fields an array has to have: all up to the last required one."""
    return max((index for index, field in enumerate(fields, 1) if field.required), default=0)


def _with(schema: Schema, **bounds: Any) -> Schema:
    """With those keywords that have a value."""
    return {**schema, **{keyword: value for keyword, value in bounds.items() if value is not None}}


def _in_declared_order(
    node: inspect.StructType | inspect.DataclassType | inspect.TypedDictType | inspect.NamedTupleType,
) -> list[inspect.Field]:
    if not isinstance(node, inspect.TypedDictType):
        return list(node.fields)
    order = {name: index for index, name in enumerate(typing.get_type_hints(typing.get_origin(node.cls) or node.cls))}
    return sorted(node.fields, key=lambda field: order[field.name])


def _numbered(base: str) -> typing.Iterator[str]:
    yield base
    yield from (f"{base}_{number}" for number in range(2, 1_000_000))
