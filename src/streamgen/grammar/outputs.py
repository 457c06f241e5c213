"""`output=`: what a request's output may be, the grammar for it, and how it is read.

Every type but `str` is written as JSON and read as the type; `str` alone is plain text, under no grammar. `Choice`,
`Regex` and `Grammar` are plain text as well, `JsonSchema` is JSON.
"""

from __future__ import annotations

import json
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Generic, Literal, TypeVar

import msgspec

from streamgen.errors import InvalidRequest, OutputInvalid, SchemaError, SchemaTooComplex
from streamgen.grammar.reading import Unreadable, as_text, name_of, reader_of
from streamgen.grammar.shapes import FREE, SchemaShape, Shape
from streamgen.grammar.source import BACKENDS, ON_UNSUPPORTED, CfgSource, GrammarSource, RegexSource, SchemaSource

T_co = TypeVar("T_co", covariant=True)

MAX_CHOICES = 4096
MAX_CACHED = 256
_LISTS = (list, set, frozenset, Sequence, AbstractSet)
_Reads = Callable[[str | bytes], Any]


class OutputPlan:
    """How one output is made and read.

    source   what it has to obey; None: any text
    is_json  whether it is JSON; otherwise it is plain text
    """

    def __init__(
        self,
        source: GrammarSource | None,
        *,
        name: str,
        read: _Reads,
        is_json: bool = False,
        item: Callable[[], _Reads] | None = None,
    ) -> None:
        self.source = source
        self.is_json = is_json
        self.name = name
        self._read = read
        self._make_item = item

    def parse(self, text: str) -> Any:
        """The value of a whole output.

        Raises:
            OutputInvalid: it is not of the type. The message does not quote it.
        """
        return self._checked(self._read, text, "output")

    @cached_property
    def item(self) -> _Reads | None:
        """Reads one element; None where the output is no array, or none of one kind of element."""
        return None if self._make_item is None else self._make_item()

    def parse_item(self, value: bytes) -> Any:
        """One element of an output that is an array.

        Raises:
            OutputInvalid: it is not of the type. InvalidRequest: the output is no such array.
        """
        if self.item is None:
            raise InvalidRequest(f"items: expected an output like list[T], got {self.name}", param="items")
        return self._checked(self.item, value, "items")

    @cached_property
    def shape(self) -> Shape:
        """What is shown of a value that is being written."""
        if isinstance(self.source, SchemaSource):
            return SchemaShape(json.loads(self.source.text))
        return FREE

    def _checked(self, read: _Reads, data: str | bytes, what: str) -> Any:
        try:
            return read(data)
        except Unreadable as error:
            raise OutputInvalid(f"{what}: it does not validate as {self.name}: {error}") from error

    def __repr__(self) -> str:
        return f"<OutputPlan {self.name}>"


class OutputSpec(Generic[T_co]):
    """Base of what can be given as `output=` beside types. `T_co` is what comes back as `Completion.parsed`."""

    def _plan(self) -> OutputPlan:
        raise NotImplementedError

    def parse(self, text: str) -> T_co:
        """What an output means.

        Raises:
            OutputInvalid: it is not one.
        """
        value: T_co = self._plan().parse(text)
        return value


@dataclass(frozen=True, init=False)
class Choice(OutputSpec[str]):
    """One of these texts, as it stands: `Choice("yes", "no")`."""

    values: tuple[str, ...]

    def __init__(self, *values: str) -> None:
        """Check the values.

        Raises:
            SchemaError: there are none, or one is no text. SchemaTooComplex: there are more than 4,096.
        """
        if len(values) == 1 and isinstance(values[0], list | tuple | set | frozenset):
            raise SchemaError(f"Choice: expected texts, got one {type(values[0]).__name__}; unpack it: Choice(*values)")
        if not values:
            raise SchemaError("Choice: expected at least one text, got none")
        if len(values) > MAX_CHOICES:
            raise SchemaTooComplex(f"Choice: expected <= {MAX_CHOICES} texts, got {len(values)}", bound="enum values")
        for value in values:
            _check_text("Choice", value, may_be_empty=True)
        object.__setattr__(self, "values", tuple(values))

    def _plan(self) -> OutputPlan:
        pattern = "|".join(map(_escape, self.values))
        return OutputPlan(RegexSource(pattern=pattern), name="Choice", read=self._read)

    def _read(self, data: str | bytes) -> str:
        if data not in self.values:
            raise Unreadable("it is none of the choices")
        return _as_str(data)


@dataclass(frozen=True)
class Regex(OutputSpec[str]):
    """Text that a regular expression matches as a whole; look-around, back-references and word borders are not known.

    is_trusted   False compiles it apart from the engine, with limits on time and memory: for patterns of strangers
    """

    pattern: str
    is_trusted: bool = True

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            SchemaError: the pattern is no text. InvalidRequest.
        """
        _check_text("Regex", self.pattern)
        _check_bool("is_trusted", self.is_trusted)

    def _plan(self) -> OutputPlan:
        source = RegexSource(pattern=self.pattern, is_trusted=self.is_trusted)
        return OutputPlan(source, name="Regex", read=_as_str)


@dataclass(frozen=True)
class JsonSchema(OutputSpec[Any]):
    """JSON that is valid under a schema; it comes back as plain dicts, lists and scalars.

    schema          a mapping, or JSON text; properties are written in its order. It is kept as text
    on_unsupported  what becomes of a keyword that cannot be enforced: "error" refuses the request and names it; "warn"
                    and "ignore" leave it out
    backend         "outlines", "llguidance", or "auto": the first that enforces every keyword
    is_trusted      False compiles it apart from the engine, with limits on time and memory: for schemas of strangers
    """

    schema: Mapping[str, Any] | str | bool
    on_unsupported: str = "error"
    backend: str = "auto"
    is_trusted: bool = True

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            SchemaError: the schema is not JSON, or neither an object nor a boolean. InvalidRequest.
        """
        _check_choice("on_unsupported", self.on_unsupported, ON_UNSUPPORTED)
        _check_choice("backend", self.backend, BACKENDS)
        _check_bool("is_trusted", self.is_trusted)
        object.__setattr__(self, "schema", _schema_text(self.schema))

    def _plan(self) -> OutputPlan:
        source = SchemaSource(
            text=str(self.schema),
            on_unsupported=self.on_unsupported,
            backend=self.backend,
            is_trusted=self.is_trusted,
        )
        return OutputPlan(source, name="JsonSchema", read=_read_json, is_json=True, item=lambda: _read_json)


@dataclass(frozen=True)
class Grammar(OutputSpec[str]):
    """Text that is derived from a grammar.

    text        "gbnf", as llama.cpp writes it: `root ::= ...`; or "lark", as llguidance reads it: `start: ...`
    syntax      which of them; None: the one that it looks like
    is_trusted  False compiles it apart from the engine, with limits on time and memory: for grammars of strangers
    """

    text: str
    syntax: Literal["gbnf", "lark"] | None = None
    is_trusted: bool = True

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            SchemaError: the grammar is no text, or looks like neither syntax. InvalidRequest.
        """
        _check_text("Grammar", self.text)
        _check_bool("is_trusted", self.is_trusted)
        if self.syntax is None:
            object.__setattr__(self, "syntax", _guess_syntax(self.text))
        _check_choice("syntax", self.syntax, ("gbnf", "lark"))

    def _plan(self) -> OutputPlan:
        source = CfgSource(text=self.text, syntax=self.syntax or "lark", is_trusted=self.is_trusted)
        return OutputPlan(source, name="Grammar", read=_as_str)


def read_output(output: object) -> OutputPlan:
    """The plan of what was given as `output=`: a type, an `OutputSpec`, or a term of `outlines.types`.

    Raises:
        InvalidRequest: it is none of these. SchemaError: the type cannot be made a grammar.
    """
    try:
        hash(output)
    except TypeError:  # a term, or an annotation that holds a list
        return _read_output(output)
    return _read_cached(output)


def _read_output(output: object) -> OutputPlan:
    if isinstance(output, OutputPlan):
        return output
    if isinstance(output, OutputSpec):
        return output._plan()
    if output is str:
        return OutputPlan(None, name="str", read=_as_str)
    if _is_type(output):
        return _plan_of_type(output)
    term = _as_spec(output)
    if term is not None:
        return term._plan()
    raise _not_an_output(output)


_read_cached = lru_cache(maxsize=MAX_CACHED, typed=True)(_read_output)


# ---- types --------------------------------------------------------------------------------------------------------


def _is_type(output: object) -> bool:
    """Whether it can stand in an annotation, text aside."""
    if output is Any or isinstance(output, type | types.UnionType | typing.NewType):
        return True
    return typing.get_origin(output) is not None or type(output).__name__ == "TypeAliasType"


def _plan_of_type(tp: object) -> OutputPlan:
    reader = reader_of(tp)
    source = SchemaSource(text=as_text(reader.schema()), is_closed=True)
    element = _element_of(tp)
    item = None if element is None else lambda: reader_of(element[0]).read
    return OutputPlan(source, name=name_of(tp), read=reader.read, is_json=True, item=item)


def _element_of(tp: Any) -> tuple[object] | None:
    """The type of an array's elements; None if it is no array, or one of several kinds of elements."""
    tp = _unwrap(tp)
    origin, args = typing.get_origin(tp) or tp, typing.get_args(tp)
    if origin is tuple:
        return (args[0],) if len(args) == 2 and args[1] is Ellipsis else None if args else (Any,)
    if origin in _LISTS:
        return (args[0],) if args else (Any,)
    if getattr(origin, "__pydantic_root_model__", False):
        return _element_of(origin.model_fields["root"].annotation)
    return None


def _unwrap(tp: Any) -> Any:
    """Without Annotated, NewType and aliases."""
    while True:
        if hasattr(tp, "__metadata__"):
            tp = tp.__origin__
        elif isinstance(tp, typing.NewType):
            tp = tp.__supertype__
        elif type(tp).__name__ == "TypeAliasType":
            tp = tp.__value__
        else:
            return tp


# ---- terms of outlines --------------------------------------------------------------------------------------------


def _as_spec(output: object) -> OutputSpec[Any] | None:
    """What a term of `outlines.types` means here. Who has one has imported the package."""
    dsl: Any = sys.modules.get("outlines.types.dsl")
    if dsl is None or not isinstance(output, dsl.Term):
        return None
    if isinstance(output, dsl.JsonSchema):
        if output.whitespace_pattern is not None:
            raise SchemaError("output: a JsonSchema of outlines with a whitespace_pattern; leave it out", keyword=None)
        return JsonSchema(output.schema)
    if isinstance(output, dsl.CFG):
        return Grammar(output.definition, syntax="lark")
    try:
        return Regex(dsl.to_regex(output))
    except (TypeError, ValueError, NotImplementedError, RecursionError) as error:
        raise SchemaError(f"output: the term of outlines is no regular expression: {type(error).__name__}") from error


# ---- checks -------------------------------------------------------------------------------------------------------


def _not_an_output(output: object) -> InvalidRequest:
    expected = "output: expected a type, Choice, Regex, JsonSchema or Grammar"
    if isinstance(output, str | Mapping):
        hint = f"got a {type(output).__name__}; wrap a schema as JsonSchema(...), a pattern as Regex(...)"
    elif output is None:
        hint = "got None"
    else:
        hint = f"got an object of {type(output).__name__}; give the type itself"
    return InvalidRequest(f"{expected}, {hint}", param="output")


def _check_text(what: str, value: object, *, may_be_empty: bool = False) -> None:
    if not isinstance(value, str):
        raise SchemaError(f"{what}: expected text, got {type(value).__name__}")
    if not value and not may_be_empty:
        raise SchemaError(f"{what}: expected text that is not empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SchemaError(f"{what}: expected text without lone surrogates") from error


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name}: expected True or False, got {type(value).__name__}", param=name)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        got = repr(value)[:40] if isinstance(value, str) else type(value).__name__
        raise InvalidRequest(f"{name}: expected one of {', '.join(choices)}, got {got}", param=name)


def _schema_text(schema: object) -> str:
    text = schema if isinstance(schema, str) else None
    if text is not None:
        _check_text("JsonSchema", text)
        schema = _load(text)
    if not isinstance(schema, Mapping | bool):
        raise SchemaError(f"JsonSchema: expected an object or a boolean, got {type(schema).__name__}")
    if text is not None:
        return text
    return as_text(schema if isinstance(schema, bool) else dict(schema))


def _load(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemaError(f"JsonSchema: expected JSON text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"JsonSchema: expected JSON text: {type(error).__name__}") from error


def _guess_syntax(text: str) -> str:
    if re.search(r"^[ \t]*[A-Za-z0-9_-]+\s*::=", text, re.MULTILINE):
        return "gbnf"
    if re.search(r"^[ \t]*(?:[?!]*[A-Za-z_]\w*[^\n:\"]*:|%)", text, re.MULTILINE):
        return "lark"
    raise SchemaError('Grammar: expected rules like `root ::= "a"` (gbnf) or `start: "a"` (lark); name the syntax=')


def _escape(text: str) -> str:
    """Text as a regular expression of itself, in the dialect of both Python and Rust."""
    text = re.sub(r"[\\.+*?()|\[\]{}^$&~#-]", r"\\\g<0>", text)
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def _as_str(data: str | bytes) -> str:
    return data if isinstance(data, str) else data.decode()


def _read_json(data: str | bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Unreadable(str(error) if isinstance(error, msgspec.DecodeError) else type(error).__name__) from error
