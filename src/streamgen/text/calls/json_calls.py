"""Calls that are written as JSON objects with a name and arguments, alone, in a row, or as a list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.text.calls.parser import CallParser, Marker, MarkerKind, Misfit, Steps, Symbol

if TYPE_CHECKING:
    from collections.abc import Mapping

_NAME_KEYS = frozenset({"name"})
_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_CALL_KEYS = _NAME_KEYS | _ARGUMENT_KEYS | {"id", "type"}
_LONGEST_KEY = max(map(len, _CALL_KEYS))
_FENCES = ("\n", "json\n", "tool_call\n")
_MAX_NAME = 256


class JsonCalls(CallParser):
    """A block holds `{"name": ..., "arguments": ...}` objects.

    end   how a block ends, if it has an end; a token of kind END does as well

    Models also write a call without any marker, as nothing but the object, or in a fence of Markdown. At the very
    beginning of an answer that is taken for a call, if the object has a name, arguments, and nothing that calls lack.
    """

    def __init__(self, markers: Mapping[int, Marker], *, begin: str = "", end: str = "") -> None:
        self._end = end
        super().__init__(markers, begin=begin)

    def _calls(self) -> Steps[None]:
        symbol = yield from self._objects((yield from self._space()), is_strict=False)
        if isinstance(symbol, Marker) and symbol.kind is MarkerKind.END:
            return
        if not self._end or symbol != self._end[0]:
            raise Misfit
        yield from self._match(self._end[1:])

    def _opening(self) -> Steps[None]:
        symbol = yield from self._space()
        if symbol == self._begin[:1]:
            raise Misfit
        while symbol == "`":
            yield from self._match("``")
            yield from self._fence_name()
            if (yield from self._objects((yield from self._space()), is_strict=True)) != "`":
                raise Misfit
            yield from self._match("``")
            self._held.clear()
            symbol = yield from self._space()
        yield from self._objects(symbol, is_strict=True)
        raise Misfit  # what follows is no part of the calls

    def _fence_name(self) -> Steps[None]:
        name = ""
        while name not in _FENCES:
            symbol = yield
            name += symbol if isinstance(symbol, str) else symbol.literal
            if not any(fence.startswith(name) for fence in _FENCES):
                raise Misfit

    def _objects(self, symbol: Symbol, *, is_strict: bool) -> Steps[Symbol]:
        """One call or several; the first symbol after them."""
        is_list = symbol == "["
        if is_list:
            symbol = yield from self._space()
        while True:
            if symbol != "{":
                raise Misfit
            yield from self._object(is_strict=is_strict)
            symbol = yield from self._space()
            if symbol in (",", ";"):
                symbol = yield from self._space()
            elif symbol != "{":
                break
        if not is_list:
            return symbol
        if symbol != "]":
            raise Misfit
        self._held.clear()
        return (yield from self._space())

    def _object(self, *, is_strict: bool, is_doubled: bool = False) -> Steps[None]:
        """A call whose `{` was taken."""
        name: str | None = None
        early: str | None = None  # arguments that came before the name
        symbol = yield from self._space()
        if symbol == "{" and not is_doubled:  # Qwen2.5's template shows calls with two braces, and models learn it
            yield from self._object(is_strict=is_strict, is_doubled=True)
            if (yield from self._space()) != "}":
                raise Misfit
            self._held.clear()
            return
        while symbol == '"':
            key = yield from self._string(limit=_LONGEST_KEY if is_strict else _MAX_NAME)
            if is_strict and key not in _CALL_KEYS:
                raise Misfit
            if (yield from self._space()) != ":":
                raise Misfit
            symbol = yield from self._space()
            if key in _NAME_KEYS and name is None and not self._is_open:
                name = yield from self._name(symbol)
                symbol = yield from self._space()
            elif key in _ARGUMENT_KEYS and early is None and not self._is_open:
                early, symbol = yield from self._read_arguments(symbol, name, is_strict=is_strict)
            else:
                symbol = yield from self._skip(symbol)
            if symbol == ",":
                symbol = yield from self._space()
            elif symbol != "}":
                raise Misfit
        if symbol != "}" or (is_strict and not self._is_open and early is None):
            raise Misfit
        self._complete(name, early)

    def _name(self, symbol: Symbol) -> Steps[str]:
        if symbol != '"':
            raise Misfit
        name = yield from self._string(limit=_MAX_NAME)
        if not name:
            raise Misfit
        return name

    def _read_arguments(self, symbol: Symbol, name: str | None, *, is_strict: bool) -> Steps[tuple[str | None, Symbol]]:
        """(arguments that wait for their name, the first symbol after them)."""
        if symbol == "{" and name is not None:
            self._start_call(name)
            yield from self._container("{", self._arguments)
            self._end_arguments()
            return None, (yield from self._space())
        if symbol == "{":
            raw: list[str] = []
            yield from self._container("{", raw)
            return "".join(raw), (yield from self._space())
        if symbol == '"':  # an object that was turned into text once more
            text = yield from self._string()
            if is_strict and not text.lstrip().startswith("{"):
                raise Misfit
            return text, (yield from self._space())
        if is_strict:
            raise Misfit
        return "{}", (yield from self._skip(symbol))  # null: none

    def _complete(self, name: str | None, early: str | None) -> None:
        if not self._is_open:
            if name is None:
                raise Misfit
            self._start_call(name)
            self._arguments.append(early or "{}")
        self._end_call()
        self._held.clear()

    def _skip(self, symbol: Symbol) -> Steps[Symbol]:
        """A JSON value that nobody asks for; the first symbol after it."""
        if symbol == '"':
            yield from self._string()
            return (yield from self._space())
        if symbol in ("{", "["):
            yield from self._container(str(symbol), [])
            return (yield from self._space())
        while symbol not in (",", "}", "]", " ", "\n", "\t", "\r"):
            if not isinstance(symbol, str):
                raise Misfit
            symbol = yield
        return symbol if symbol in (",", "}", "]") else (yield from self._space())
