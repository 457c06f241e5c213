"""Tools: what a model may call, read from functions, classes or OpenAI's dicts.

A function's signature and docstring become the schema of its arguments, and what a model writes is checked against the
same signature before the function sees it. Nothing here calls a function: `tool_loop` does.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn, get_type_hints, is_typeddict

import msgspec
from msgspec import Struct, structs

from streamgen.errors import InvalidRequest, OutputInvalid

MAX_TOOLS = 128
MAX_DEFINITIONS_BYTES = 1_000_000
CHOICES = ("auto", "required", "none")

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Tool(Struct, frozen=True, kw_only=True):
    """One tool.

    definition   as OpenAI writes it. A `strict` of None: the arguments obey their schema where the model's format of
                 calls allows it
    function     what `tool_loop` calls; None for a class or a dict
    parse        JSON text -> the function's arguments by name, the class's instance, or the dict; raises ValueError
    """

    definition: dict[str, Any]
    parse: Callable[[str], Any]
    function: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """What the model calls it."""
        name: str = self.definition["function"]["name"]
        return name


class ToolPlan(Struct, frozen=True, kw_only=True):
    """The tools of a request by name, and which of them the model has to call: "auto", "required", "none" or a name."""

    tools: dict[str, Tool]
    choice: str = "auto"

    @property
    def definitions(self) -> tuple[dict[str, Any], ...]:
        """All of them as OpenAI writes them."""
        return tuple(tool.definition for tool in self.tools.values())

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """Those that can be called."""
        return {name: tool.function for name, tool in self.tools.items() if tool.function is not None}

    def parse_arguments(self, name: str, text: str) -> Any:
        """The arguments of a call: by name for a function, an instance for a class, an object for a dict.

        Raises:
            OutputInvalid: there is no such tool, or the text does not fit its signature.
        """
        tool = self.tools.get(name)
        if tool is None:
            raise OutputInvalid(f"tool {name[:64]!r}: there is none of this name; {_names(self.tools)}")
        try:
            return tool.parse(text)
        except (ValueError, RecursionError) as error:
            raise OutputInvalid(f"tool {name!r}: the arguments do not fit: {_reason(error)}") from None


def read_tools(tools: Sequence[object], tool_choice: object = "auto") -> ToolPlan:
    """Check tools and choice.

    tools         functions, async functions, classes (msgspec Structs, dataclasses, TypedDicts, pydantic models) or
                  OpenAI's dicts
    tool_choice   "auto", "required", "none", a tool's name, or OpenAI's dict with a name

    Raises:
        InvalidRequest: the message names the tool, and the parameter.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        _refuse(f"tools: expected a sequence of functions, classes or dicts, got {type(tools).__name__}")
    if len(tools) > MAX_TOOLS:
        _refuse(f"tools: expected <= {MAX_TOOLS}, got {len(tools)}")
    by_name: dict[str, Tool] = {}
    for index, given in enumerate(tools):
        tool = _read_tool(given, f"tools[{index}]")
        if tool.name in by_name:
            _refuse(f"tools[{index}]: there is another tool {tool.name!r}; names have to differ")
        by_name[tool.name] = tool
    size = sum(len(msgspec.json.encode(tool.definition)) for tool in by_name.values())
    if size > MAX_DEFINITIONS_BYTES:
        _refuse(f"tools: expected <= {MAX_DEFINITIONS_BYTES} bytes of definitions, got {size}")
    return ToolPlan(tools=by_name, choice=_read_choice(tool_choice, by_name))


def _read_choice(choice: object, tools: Mapping[str, Tool]) -> str:
    if isinstance(choice, Mapping):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(choice, str):
        raise InvalidRequest(
            f"tool_choice: expected {', '.join(CHOICES)} or a tool's name, got {type(choice).__name__}",
            param="tool_choice",
        )
    if choice in ("auto", "none"):
        return choice
    if not tools:
        raise InvalidRequest(
            "tool_choice: a call is required, and there are no tools; pass tools=", param="tool_choice"
        )
    if choice != "required" and choice not in tools:
        near = get_close_matches(choice, [*tools, *CHOICES], n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; {_names(tools)}"
        raise InvalidRequest(f"tool_choice: there is no tool {choice[:64]!r}{hint}", param="tool_choice")
    return choice


def _read_tool(given: object, where: str) -> Tool:
    if isinstance(given, Mapping):
        return _read_dict(given, where)
    if isinstance(given, type) or is_typeddict(given):
        return _read_class(given, where)
    if callable(given):
        return _read_function(given, where)
    _refuse(f"{where}: expected a function, a class or a dict, got {type(given).__name__}")


# ---- OpenAI's dicts -------------------------------------------------------------------------------------------------


def _read_dict(given: Mapping[Any, Any], where: str) -> Tool:
    function = given.get("function")
    if given.get("type") != "function" or not isinstance(function, Mapping):
        _refuse(f'{where}: expected {{"type": "function", "function": {{"name": ..., "parameters": ...}}}}')
    unknown = sorted(set(map(str, function)) - {"name", "description", "parameters", "strict"})
    if unknown:
        _refuse(f"{where}.function: unknown field {unknown[0][:64]!r}; expected name, description, parameters, strict")
    name = _check_name(function.get("name"), f"{where}.function.name")
    description, strict = function.get("description"), function.get("strict")
    if description is not None and not isinstance(description, str):
        _refuse(f"{where} {name!r}: description: expected text, got {type(description).__name__}")
    if strict is not None and not isinstance(strict, bool):
        _refuse(f"{where} {name!r}: strict: expected true or false, got {type(strict).__name__}")
    fields: dict[str, Any] = {"name": name}
    if description is not None:
        fields["description"] = description
    fields["parameters"] = _check_parameters(function.get("parameters"), f"{where} {name!r}: parameters")
    fields["strict"] = bool(strict)
    return Tool(definition={"type": "function", "function": fields}, parse=_parse_object)


def _check_parameters(parameters: object, where: str) -> dict[str, Any]:
    """A copy made of JSON types alone."""
    if parameters is None:
        return {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        _refuse(f"{where}: expected a JSON schema, got {type(parameters).__name__}")
    try:
        plain = msgspec.json.decode(msgspec.json.encode(parameters), type=dict[str, Any])
    except (TypeError, ValueError, RecursionError) as error:
        _refuse(f"{where}: expected JSON data: {error}")
    if plain.get("type", "object") != "object":
        _refuse(f'{where}: expected a schema of type "object", got {str(plain["type"])[:40]!r}')
    if not isinstance(plain.get("properties", {}), dict):
        _refuse(f"{where}: properties: expected an object, got {type(plain['properties']).__name__}")
    return {"type": "object", **plain}


def _parse_object(text: str) -> dict[str, Any]:
    return msgspec.json.decode(text, type=dict[str, Any])


# ---- classes --------------------------------------------------------------------------------------------------------


def _read_class(given: Any, where: str) -> Tool:
    name = _check_name(given.__name__, where)
    if hasattr(given, "model_json_schema"):
        schema, parse = given.model_json_schema(), given.model_validate_json
    elif issubclass(given, Struct) or dataclasses.is_dataclass(given) or is_typeddict(given):
        schema, parse = _schema_of(given, f"{where} {name!r}"), msgspec.json.Decoder(given).decode
    else:
        _refuse(f"{where} {name!r}: expected a msgspec Struct, a dataclass, a TypedDict or a pydantic model")
    schema = _inline_root(schema)
    described = schema.pop("description", "")
    return Tool(definition=_define(name, _own_doc(given) or described, schema), parse=parse)


def _own_doc(given: type) -> str:
    """A class's docstring, where it is none that was made or inherited."""
    doc = given.__dict__.get("__doc__") or ""
    return "" if doc.startswith(f"{given.__name__}(") else _Docstring(doc).description


# ---- functions ------------------------------------------------------------------------------------------------------

# Reading a signature takes a millisecond of the caller's loop, and a request may bring 128 of the same functions again.
_FUNCTIONS: weakref.WeakKeyDictionary[Callable[..., Any], Tool] = weakref.WeakKeyDictionary()


def _read_function(given: Callable[..., Any], where: str) -> Tool:
    if not inspect.isfunction(given):
        return _describe_function(given, where)
    known = _FUNCTIONS.get(given)
    if known is None:
        tool = _describe_function(given, where)
        _FUNCTIONS[given] = structs.replace(tool, function=None)  # which would keep its own key alive
        return tool
    return structs.replace(known, function=given)


def _describe_function(given: Callable[..., Any], where: str) -> Tool:
    inner = given.func if isinstance(given, functools.partial) else given
    name = _check_name(getattr(inner, "__name__", None), where)
    where = f"{where} {name!r}"
    parameters = _read_parameters(given, inner, where)
    schema, parse = _read_signature(name, parameters, where)
    doc = _Docstring(inspect.getdoc(inner) or "")
    for parameter, description in doc.parameters.items():
        if parameter in schema["properties"]:
            schema["properties"][parameter].setdefault("description", description)
    return Tool(definition=_define(name, doc.description, schema), parse=parse, function=given)


def _read_parameters(given: Callable[..., Any], inner: Callable[..., Any], where: str) -> dict[str, tuple[Any, Any]]:
    """Parameter -> (type, default), the default `inspect.Parameter.empty` where there is none."""
    try:
        signature = inspect.signature(given)
        hints = get_type_hints(inner, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        _refuse(f"{where}: its signature cannot be read: {error}")
    parameters = {}
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            _refuse(f"{where}: parameter {parameter.name!r}: expected one that is passed by name, got {parameter}")
        if parameter.name not in hints:
            _refuse(f"{where}: parameter {parameter.name!r}: expected a type annotation, which becomes its schema")
        parameters[parameter.name] = (hints[parameter.name], parameter.default)
    return parameters


def _read_signature(
    name: str, parameters: Mapping[str, tuple[Any, Any]], where: str
) -> tuple[dict[str, Any], Callable[[str], dict[str, Any]]]:
    """(the schema of the arguments, JSON text -> arguments by name)."""
    refused = _first_refused(parameters)
    if refused is None:
        fields = [(key, type_, *_msgspec_default(default)) for key, (type_, default) in parameters.items()]
        struct: Any = msgspec.defstruct(name.replace("-", "_"), fields, kw_only=True, forbid_unknown_fields=True)
        return _inline_root(_schema_of(struct, where)), _by_name(msgspec.json.Decoder(struct).decode, parameters)
    pydantic = sys.modules.get("pydantic")
    if pydantic is None:
        _refuse(f"{where}: parameter {refused[0]!r}: {refused[1]}")
    fields_ = {key: (t, ... if d is inspect.Parameter.empty else d) for key, (t, d) in parameters.items()}
    try:
        model = pydantic.create_model(name, __config__={"extra": "forbid"}, **fields_)
        schema = model.model_json_schema()
    except Exception as error:  # whatever pydantic thinks of the types
        _refuse(f"{where}: parameter {refused[0]!r}: neither msgspec nor pydantic has a schema of its type: {error}")
    return _inline_root(schema), _by_name(model.model_validate_json, parameters)


def _first_refused(parameters: Mapping[str, tuple[Any, Any]]) -> tuple[str, str] | None:
    """The first parameter whose type msgspec has no schema of, and what it says."""
    for name, (type_, _) in parameters.items():
        try:
            msgspec.json.schema(type_)
        except (TypeError, ValueError) as error:
            return name, str(error)
    return None


def _msgspec_default(default: Any) -> tuple[Any, ...]:
    """The rest of a field's definition. Values that could be changed are made anew for each call by msgspec or here."""
    if default is inspect.Parameter.empty:
        return ()
    if default is None or isinstance(default, bool | int | float | str):
        return (default,)
    return (msgspec.field(default_factory=lambda: default),)


def _by_name(decode: Callable[[str], Any], names: Mapping[str, object]) -> Callable[[str], dict[str, Any]]:
    def parse(text: str) -> dict[str, Any]:
        values = decode(text)
        return {name: getattr(values, name) for name in names}

    return parse


# ---- schemas and definitions ----------------------------------------------------------------------------------------


def _define(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": name, "description": description, "parameters": schema, "strict": None}
    return {"type": "function", "function": fields}


def _schema_of(type_: Any, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.schema(type_)
    except (TypeError, ValueError) as error:
        _refuse(f"{where}: msgspec has no schema of it: {error}")


def _inline_root(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the object itself at its root, and without the title that repeats the name."""
    definitions = dict(schema.get("$defs", {}))
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    root = dict(definitions[name]) if name else {key: value for key, value in schema.items() if key != "$defs"}
    root.pop("title", None)
    if name and f'"#/$defs/{name}"' not in msgspec.json.encode([root, definitions]).decode():
        del definitions[name]
    root.setdefault("properties", {})
    return {**root, "$defs": definitions} if definitions else root


def _check_name(name: object, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = repr(name[:64]) if isinstance(name, str) else type(name).__name__
        _refuse(f"{where}: expected a name of 1 to 64 letters, digits, _ and -, got {shown}")
    if name in CHOICES:
        _refuse(f"{where}: {name!r} is what tool_choice calls something else; choose another name")
    return name


def _names(tools: Mapping[str, object]) -> str:
    return f"the tools are {', '.join(tools)}" if tools else "there are no tools"


def _reason(error: Exception) -> str:
    """What is wrong, without the values that are wrong."""
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return str(error)
    first = errors(include_url=False, include_input=False, include_context=False)[0]  # pydantic's
    return f"{first['msg']} - at `{'.'.join(map(str, first['loc']))}`"


def _refuse(message: str) -> NoReturn:
    raise InvalidRequest(message, param="tools")


# ---- docstrings -----------------------------------------------------------------------------------------------------

_GOOGLE = re.compile(r"(Args|Arguments|Parameters|Params):")
_SECTION = re.compile(
    r"(Args|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?|Warnings?|See Also):?"
)
_UNDERLINE = re.compile(r"-{3,}")
_REST = re.compile(r":(?:param|parameter|arg|argument)\s+(?:[^:]*\s)?(\w+):\s*(.*)")
_FIELD = re.compile(r":\w+[^:]*:")
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)")
_NUMPY_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?::.*)?")


class _Docstring:
    """What a docstring says of a function and of its parameters: Google's, numpy's or reST's way."""

    def __init__(self, text: str) -> None:
        self._lines = inspect.cleandoc(text).splitlines()
        self._description: list[str] = []
        self._parameters: dict[str, list[str]] = {}
        self._read()

    @property
    def description(self) -> str:
        """All before the first section."""
        return "\n".join(self._description).strip()

    @property
    def parameters(self) -> dict[str, str]:
        """Parameter -> what is said of it, on one line."""
        return {name: " ".join(words) for name, words in self._parameters.items() if words}

    def _read(self) -> None:
        at, in_description = 0, True
        while at < len(self._lines):
            line = self._lines[at].strip()
            is_numpy = _SECTION.fullmatch(line) and _UNDERLINE.fullmatch(self._line(at + 1).strip())
            if is_numpy and line in ("Parameters", "Other Parameters"):
                at, in_description = self._read_entries(at + 2, _NUMPY_ENTRY), False
            elif _GOOGLE.fullmatch(line):
                at, in_description = self._read_entries(at + 1, _GOOGLE_ENTRY), False
            elif _REST.match(line):
                at, in_description = self._read_rest(at), False
            else:
                is_section = is_numpy or (line.endswith(":") and _SECTION.fullmatch(line)) or _FIELD.match(line)
                in_description = in_description and not is_section
                if in_description:
                    self._description.append(self._lines[at])
                at += 1

    def _line(self, at: int) -> str:
        return self._lines[at] if at < len(self._lines) else ""

    def _read_entries(self, at: int, entry: re.Pattern[str]) -> int:
        """Entries at the indent of the first one, their continuations deeper; the line after them."""
        base = _indent(self._line(at))
        words: list[str] = []
        while at < len(self._lines):
            line, indent = self._lines[at].strip(), _indent(self._lines[at])
            if line and (indent < base or (_SECTION.fullmatch(line) and indent == base == 0)):
                break
            found = entry.fullmatch(line) if indent == base else None
            if found is not None:
                words = self._parameters.setdefault(found[1], [])
                line = found[2] if found.re.groups > 1 else ""
            if line:
                words.append(line)
            at += 1
        return at

    def _read_rest(self, at: int) -> int:
        found = _REST.match(self._lines[at].strip())
        assert found is not None, "the caller has matched it"
        words = self._parameters.setdefault(found[1], [])
        words += [found[2]] if found[2] else []
        at += 1
        while at < len(self._lines) and _indent(self._lines[at]) and self._lines[at].strip():
            words.append(self._lines[at].strip())
            at += 1
        return at


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
