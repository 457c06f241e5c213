"""The grammars of calls, compiled: they accept what formats write, refuse what schemas do, and are read back."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

from streamgen.grammar.compiler import compile_source
from streamgen.text.calls.hermes import HermesCalls
from streamgen.text.calls.llama import LlamaCalls
from streamgen.text.calls.mistral import MistralListCalls
from streamgen.tools import read_tools
from tests.text.test_calls import BY_ID, SPECIALS, read, run
from tests.text.vocabularies import DATA

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamgen.grammar.grammar import Grammar
    from streamgen.text.calls.formats import CallFormat, Definition

KINDS = ("BFCL", "bfcl", "Glaive")


def real_functions() -> list[tuple[dict[str, Any], list[Any], list[Any]]]:
    """(definition, valid arguments, invalid ones) of functions that people gave to models."""
    found: list[tuple[dict[str, Any], list[Any], list[Any]]] = []
    for path in sorted((DATA / "schemas").glob("*.json")):
        if path.stem.startswith(KINDS):
            file = json.loads(path.read_text())
            function = {"name": f"call_{len(found)}", "parameters": file["schema"], "strict": True}
            valid, invalid = (
                [t["data"] for t in file["tests"] if t["valid"] is is_valid] for is_valid in (True, False)
            )
            found.append(({"type": "function", "function": function}, valid, invalid))
    return found


def invent_functions() -> list[dict[str, Any]]:
    """Functions as programs have them, to make twenty."""

    def get_weather(city: str, unit: str = "celsius", days: int | None = None) -> None: ...
    def send_email(to: list[str], subject: str, body: str, urgent: bool = False) -> None: ...
    def convert(amount: float, source: str, target: str) -> None: ...
    def search(query: str, limit: int = 10, filters: dict[str, str] | None = None) -> None: ...
    def set_alarm(hour: int, minute: int, weekdays: list[int] | None = None) -> None: ...
    def add(a: int, b: int) -> None: ...
    def translate(text: str, language: str) -> None: ...
    def play(song: str, artist: str | None = None, volume: float = 0.5) -> None: ...
    def remember(key: str, value: str | int | bool | None) -> None: ...
    def draw(points: list[tuple[float, float]], closed: bool) -> None: ...
    def now() -> None: ...
    def sort(items: list[str], descending: bool = False) -> None: ...
    def navigate(start: str, end: str, avoid: list[str] | None = None) -> None: ...

    functions: list[Any] = [get_weather, send_email, convert, search, set_alarm, add, translate, play, remember, draw]
    return list(read_tools([*functions, now, sort, navigate]).definitions)


@cache
def compiled(make: type[CallFormat], names: tuple[str, ...], choice: str) -> tuple[Grammar, str, str]:
    """(the grammar, what stands before a call, what after)."""
    known = {d["function"]["name"]: d for d in [*(f[0] for f in real_functions()), *invent_functions()]}
    grammar = make(BY_ID).grammar([known[name] for name in names], choice)
    assert grammar is not None
    before, after = {HermesCalls: ("\n", "\n</tool_call>"), MistralListCalls: ("[", "]")}.get(make, ("", ""))
    return compile_source(grammar.source), before, after


def call_text(make: type[CallFormat], name: str, arguments: Any, *, is_compact: bool) -> str:
    key = "parameters" if make is LlamaCalls else "arguments"
    separators = (",", ":") if is_compact else None
    return json.dumps({"name": name, key: arguments}, separators=separators, ensure_ascii=False)


def all_names() -> tuple[str, ...]:
    return tuple(d["function"]["name"] for d in [*(f[0] for f in real_functions()), *invent_functions()])


@pytest.mark.parametrize("make", [HermesCalls, LlamaCalls, MistralListCalls])
def test_one_of_twenty_functions(make: type[CallFormat]) -> None:
    names = all_names()
    assert len(names) >= 20
    grammar, before, after = compiled(make, names, "required")
    accepted = 0
    for definition, valid, _ in real_functions():
        name = definition["function"]["name"]
        for arguments in valid:
            for is_compact in (True, False):
                text = before + call_text(make, name, arguments, is_compact=is_compact) + after
                assert grammar.accepts(text.encode()), text
                accepted += 1
            assert not grammar.accepts((before + call_text(make, "other", arguments, is_compact=True) + after).encode())
    assert accepted >= 10
    add = call_text(make, "add", {"a": 1, "b": -2}, is_compact=True)
    assert grammar.accepts(f"{before}{add}{after}".encode())
    for wrong in ('{"a":1}', '{"a":1,"b":"2"}', '{"a":1,"b":2,"c":3}', '{"b":1,"a":2}', "{}", "null"):
        text = add.replace('{"a":1,"b":-2}', wrong)
        assert not grammar.accepts(f"{before}{text}{after}".encode()), wrong


def test_each_function_alone_refuses_what_its_schema_does() -> None:
    for definition, valid, invalid in real_functions():
        name = definition["function"]["name"]
        grammar, before, after = compiled(HermesCalls, (name,), name)
        for arguments in valid:
            assert grammar.accepts(
                (before + call_text(HermesCalls, name, arguments, is_compact=False) + after).encode()
            )
        for arguments in invalid:
            text = call_text(HermesCalls, name, arguments, is_compact=False)
            assert not grammar.accepts((before + text + after).encode()), text


def test_what_is_accepted_is_read_back() -> None:
    (definition, valid, _), *_ = real_functions()
    name = definition["function"]["name"]
    for make in (HermesCalls, LlamaCalls, MistralListCalls):
        grammar, before, after = compiled(make, (name,), name)
        text = before + call_text(make, name, valid[0], is_compact=True) + after
        assert grammar.accepts(text.encode())
        begin = {HermesCalls: "<tool_call>", MistralListCalls: "[TOOL_CALLS]"}.get(make)
        said, calls = read(run(make(BY_ID).parser(), [SPECIALS[begin], text] if begin else [text]))
        assert said == "" and [(n, json.loads(a), w) for n, a, w in calls] == [(name, valid[0], True)]


def test_a_list_has_several_calls_and_a_named_choice_one() -> None:
    one = call_text(MistralListCalls, "add", {"a": 1, "b": 2}, is_compact=False)
    many, _, _ = compiled(MistralListCalls, ("add", "now"), "required")
    single, _, _ = compiled(MistralListCalls, ("add", "now"), "add")
    assert many.accepts(f"[{one}, {one}]".encode()) and not many.accepts(b"[]")
    assert single.accepts(f"[{one}]".encode()) and not single.accepts(f"[{one}, {one}]".encode())


def test_functions_that_are_free_take_any_object() -> None:
    free: Definition = {"type": "function", "function": {"name": "free", "parameters": {"type": "object"}}}
    strict: Sequence[Definition] = [d for d in invent_functions() if d["function"]["name"] == "add"]
    found = HermesCalls(BY_ID).grammar([free, *strict], "auto")
    assert found is not None
    grammar = compile_source(found.source)
    for name, arguments, is_fit in (
        ("free", {"x": [1, {"y": None}]}, True),
        ("free", {}, True),
        ("add", {"a": 1, "b": 2}, True),
        ("add", {"a": 1}, False),
    ):
        text = call_text(HermesCalls, name, arguments, is_compact=True)
        assert grammar.accepts(f"\n{text}\n</tool_call>".encode()) is is_fit, text
