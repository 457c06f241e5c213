"""Who reads a type: msgspec where it can, pydantic where the type is made for it. What both say of a bad value."""

from __future__ import annotations

import enum
import json
import re
import typing
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from streamgen.errors import SchemaError
from streamgen.grammar.types import Schema, UnsupportedType, schema_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.grammar.pydantic_types import PydanticReader


class Unreadable(ValueError):
    """A value is not of the type. The message tells where and what was expected, and holds nothing of the value."""


class TypeReader(Protocol):
    """Reads the JSON of one type."""

    def schema(self) -> Schema:
        """The JSON that it reads."""
        ...

    def read(self, data: str | bytes) -> Any:
        """The value.

        Raises:
            Unreadable.
        """
        ...


def reader_of(tp: object) -> TypeReader:
    """The reader of a type.

    Raises:
        SchemaError: neither library takes the type.
    """
    found = uses(tp)
    if Uses.PYDANTIC_METADATA in found and Uses.STRUCT in found:
        raise SchemaError(
            f"output: {name_of(tp)} has constraints of pydantic beside a msgspec.Struct; in a Struct use msgspec.Meta"
        )
    if Uses.PYDANTIC_METADATA in found or (Uses.PYDANTIC_CLASS in found and Uses.STRUCT not in found):
        return _pydantic_reader(tp)
    try:
        return MsgspecReader(tp)
    except TypeError as error:
        if Uses.STRUCT in found:
            raise _not_supported(tp, error) from error
        try:
            return _pydantic_reader(tp)
        except SchemaError:
            raise _not_supported(tp, error) from error
    except Exception as error:  # evaluating annotations may raise anything
        raise _not_supported(tp, error) from error


class MsgspecReader:
    """Reads with msgspec; what it does not know itself, but pydantic does, with that.

    Raises:
        TypeError: the type holds what neither reads.
    """

    def __init__(self, tp: object) -> None:
        self._custom: dict[Any, PydanticReader] = {}
        self._schema = schema_of(tp, self._custom_schema)
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(tp, dec_hook=self._convert)

    def schema(self) -> Schema:
        """The JSON that it reads."""
        return self._schema

    def read(self, data: str | bytes) -> Any:
        """The value."""
        try:
            return read_with(self._decoder.decode, data, msgspec.ValidationError)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:  # the first is that of validation too
            raise Unreadable(_describe(error)) from error

    def _custom_schema(self, cls: Any) -> tuple[Schema, dict[str, Schema]]:
        try:
            reader = _pydantic_reader(cls, prefix=f"{len(self._custom)}.")
        except SchemaError as error:
            raise UnsupportedType(f"{name_of(cls)} cannot be read from JSON") from error
        self._custom[cls] = reader
        schema = dict(reader.schema())
        return schema, schema.pop("$defs", {})

    def _convert(self, cls: Any, value: Any) -> Any:
        return self._custom[cls].convert(value)


_FRACTION = re.compile(r'"(?:[^"\\]|\\.)*"|\.0+(?![0-9eE])')


def read_with(decode: Callable[[str], Any], data: str | bytes, refused: type[Exception]) -> Any:
    """What `decode` reads. To JSON schema 1.0 is an integer, to decoders not: what they refuse is tried with 1 too."""
    text = data if isinstance(data, str) else data.decode()
    try:
        return decode(text)
    except refused:
        plain = _FRACTION.sub(lambda match: match[0] if match[0].startswith('"') else "", text)
        if plain == text:
            raise
        try:
            return decode(plain)
        except refused:
            pass
        raise


def _pydantic_reader(tp: object, *, prefix: str = "") -> PydanticReader:
    try:
        from streamgen.grammar.pydantic_types import PydanticReader
    except ImportError as error:
        raise SchemaError(f"output: {name_of(tp)} needs pydantic, which is not installed") from error
    return PydanticReader(tp, prefix=prefix)


def _not_supported(tp: object, error: Exception) -> SchemaError:
    said = " ".join(str(error).split()) or type(error).__name__
    return SchemaError(f"output: {name_of(tp)} cannot be made a grammar: {said[:300]}")


def name_of(tp: object) -> str:
    """A type's name, for messages."""
    plain = isinstance(tp, type) and not typing.get_args(tp)
    name = getattr(tp, "__name__", "") if plain else repr(tp).replace("typing.", "")
    return name if len(name) <= 80 else name[:77] + "..."


# What msgspec says without quoting the value, and what of the rest can be said.
_PLAIN = (
    "Expected ",
    "Object missing required field",
    "Number out of range",
    "Integer value out of range",
    "JSON is malformed",
    "Input data was truncated",
    "Invalid RFC3339",
    "Invalid ISO8601",
    "Invalid UUID",
    "Invalid base64",
    "Invalid decimal",
    "Invalid UTF-8",
    "Only units",
    "Duration is out of range",
)
_QUOTING = {
    "Invalid enum value": "Expected one of its values",
    "Invalid value": "Expected a known tag",
    "Object contains unknown field": "Object contains an unknown field",
}


def _describe(error: Exception) -> str:
    message, at, place = str(error).partition(" - at ")
    if not isinstance(error, msgspec.DecodeError):
        return type(error).__name__
    if not message.startswith(_PLAIN):
        said = next((said for start, said in _QUOTING.items() if message.startswith(start)), "a check failed")
        message, at, place = said, *_last_place(str(error))
    return f"{message}{at}{place}"


def _last_place(message: str) -> tuple[str, str]:
    """msgspec's ` - at `$.path`` at the end of what somebody else said."""
    _, at, place = message.rpartition(" - at ")
    return (at, place) if at and place.startswith(("`$", "`key` in `$")) else ("", "")


def as_text(schema: Schema | bool) -> str:
    """A schema as JSON text, its keys in their order.

    Raises:
        SchemaError: it holds what is no JSON.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SchemaError(f"output: the schema is not JSON: {type(error).__name__}: {str(error)[:100]}") from error
    return text


# ---- which library ------------------------------------------------------------------------------------------------


class Uses(enum.Flag):
    """What occurs in a type."""

    NOTHING = 0
    STRUCT = enum.auto()
    PYDANTIC_CLASS = enum.auto()  # a model, or a class with pydantic's hook
    PYDANTIC_METADATA = enum.auto()  # constraints that msgspec would not see


_METADATA_OF = ("pydantic", "annotated_types", "pydantic_extra_types")
_HOOK = "__get_pydantic_core_schema__"


def uses(tp: object) -> Uses:
    """What occurs in a type, at any depth."""
    return _uses(tp, set())


def _uses(tp: Any, seen: set[int]) -> Uses:
    if id(tp) in seen:
        return Uses.NOTHING
    seen.add(id(tp))
    found = Uses.NOTHING
    metadata = getattr(tp, "__metadata__", ())
    if any(_is_pydantic(type(item)) or hasattr(item, _HOOK) for item in metadata):
        found |= Uses.PYDANTIC_METADATA
    for part in (*typing.get_args(tp), *_wrapped(tp)):
        found |= _uses(part, seen)
    origin = typing.get_origin(tp) or tp
    if isinstance(origin, type):
        found |= _uses_of_class(origin, seen)
    elif hasattr(tp, _HOOK):  # an object that stands for a type
        found |= Uses.PYDANTIC_CLASS
    return found


def _uses_of_class(cls: type, seen: set[int]) -> Uses:
    if hasattr(cls, _HOOK) or hasattr(cls, "__pydantic_core_schema__"):
        return Uses.PYDANTIC_CLASS
    found = Uses.NOTHING
    if issubclass(cls, msgspec.Struct):
        found |= Uses.STRUCT
    if not _has_fields(cls):
        return found
    defaults = (getattr(field, "default", None) for field in getattr(cls, "__dataclass_fields__", {}).values())
    if any(_is_pydantic(type(default)) for default in defaults):
        found |= Uses.PYDANTIC_METADATA
    for annotation in _annotations(cls):
        found |= _uses(annotation, seen)
    return found


def _has_fields(cls: type) -> bool:
    return issubclass(cls, msgspec.Struct) or any(
        hasattr(cls, name) for name in ("__dataclass_fields__", "__total__", "_fields", "__attrs_attrs__")
    )


def _annotations(cls: type) -> list[Any]:
    try:
        return list(typing.get_type_hints(cls, include_extras=True).values())
    except Exception:  # evaluating annotations may raise anything; who reads the type will say it
        return []


def _wrapped(tp: Any) -> tuple[Any, ...]:
    """What a NewType, an alias or a type variable stands for."""
    names = ("__supertype__", "__value__", "__bound__")
    return tuple(part for name in names if (part := getattr(tp, name, None)) is not None and not isinstance(tp, type))


def _is_pydantic(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _METADATA_OF
