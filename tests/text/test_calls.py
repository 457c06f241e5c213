"""Calls in outputs: every format at every split, what only looks like a call, what is broken, and that none is slow."""

from __future__ import annotations

import itertools
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen.text.calls.formats import CallTokens
from streamgen.text.calls.hermes import HermesCalls
from streamgen.text.calls.llama import LlamaCalls
from streamgen.text.calls.mistral import MistralListCalls, MistralNamedCalls
from streamgen.text.calls.parser import CallArguments, CallEnd, CallStart

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streamgen.text.calls.formats import CallFormat
    from streamgen.text.calls.parser import CallParser, Piece

Call = tuple[str, str, bool]  # name, arguments, whether it is whole
Read = tuple[str, list[Call]]

SPECIALS = {
    "<tool_call>": 1001,
    "</tool_call>": 1002,
    "[TOOL_CALLS]": 1003,
    "[ARGS]": 1004,
    "[CALL_ID]": 1005,
    "<|python_tag|>": 1006,
}
HIDDEN = frozenset({1003, 1004, 1005, 1006})
BY_ID = CallTokens(SPECIALS.get, HIDDEN.__contains__)
BY_TEXT = CallTokens(lambda text: None, lambda token: False)

WEATHER = '{"city": "Zürich \\"}{[ 🙂", "days": [1, {"a": null}]}'
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>'
LLAMA = f'{{"name": "weather", "parameters": {WEATHER}}}'
MISTRAL = f'[TOOL_CALLS] [{{"name": "weather", "arguments": {WEATHER}}}, {{"name": "f", "arguments": {{}}}}]'
NAMED = f"[TOOL_CALLS]weather[ARGS]{WEATHER}[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{{}}"
ONE: list[Call] = [("weather", WEATHER, True)]
TWO: list[Call] = [*ONE, ("f", "{}", True)]

# format, output, the text in it, its calls
CASES: list[tuple[type[CallFormat], str, str, list[Call]]] = [
    (HermesCalls, HERMES, "", ONE),
    (HermesCalls, "I look.\n" + HERMES, "I look.\n", ONE),
    (HermesCalls, HERMES + "\n" + HERMES.replace(f'"weather", "arguments": {WEATHER}', '"f"'), "\n", TWO),
    (HermesCalls, HERMES + "\nDone.", "\nDone.", ONE),
    (HermesCalls, f'<tool_call>{{"arguments": {WEATHER}, "id": "x", "name": "weather"}}</tool_call>', "", ONE),
    (HermesCalls, f'<tool_call>[{{"name":"weather","arguments":{WEATHER}}}]</tool_call>', "", ONE),
    (HermesCalls, json.dumps({"name": "weather", "arguments": WEATHER}), "", ONE),
    (HermesCalls, f'```json\n{{"name": "weather", "arguments": {WEATHER}}}\n```', "", ONE),
    (HermesCalls, f'```\n[{{"name": "weather", "arguments": {WEATHER}}}]\n``` There.', " There.", ONE),
    (HermesCalls, f'```json\n{LLAMA}\n```\n\n```json\n{{"name": "f", "arguments": {{}}}}\n```\n', "\n", TWO),
    (HermesCalls, f"```json\n{LLAMA}\n```\n```python\n1\n```", "\n```python\n1\n```", ONE),
    (HermesCalls, f'\n {{"name": "weather", "arguments": {WEATHER}}}', "", ONE),
    (HermesCalls, f'{{{{"name": "weather", "arguments": {WEATHER}}}}}', "", ONE),
    (HermesCalls, f'<tool_call>\n{{{{"name": "weather", "arguments": {WEATHER}}}}}\n</tool_call>', "", ONE),
    (LlamaCalls, LLAMA, "", ONE),
    (LlamaCalls, "<|python_tag|>" + LLAMA, "", ONE),
    (LlamaCalls, LLAMA + "; " + '{"name": "f", "parameters": {}}', "", TWO),
    (MistralListCalls, MISTRAL, "", TWO),
    (MistralListCalls, "Let me see." + MISTRAL, "Let me see.", TWO),
    (MistralListCalls, MISTRAL.replace('{"name": "f"', '\n  {"id": "123456789", "type": {}, "name": "f"'), "", TWO),
    (MistralNamedCalls, NAMED, "", TWO),
    (MistralNamedCalls, "So: " + NAMED + "!", "So: !", TWO),
    (MistralNamedCalls, NAMED.replace("[ARGS]", "", 1), "", TWO),
]

# What looks like a call, begins like one, or is broken: all of it is text.
TEXTS: list[tuple[type[CallFormat], str]] = [
    (HermesCalls, ""),
    (HermesCalls, "Plain text, {braces} and [brackets], ``` and < too.\n"),
    (HermesCalls, '{"name": "Ada", "age": 36}'),
    (HermesCalls, '{"name": "Ada", "parameters": 3}'),
    (HermesCalls, '{"name": "Ada", "arguments": "for"}'),
    (HermesCalls, '{"answer": {"name": "f", "arguments": {}}}'),
    (HermesCalls, '```python\nprint("x")\n```'),
    (HermesCalls, '```json\n{"a": 1}\n```'),
    (HermesCalls, "``"),
    (HermesCalls, '[{"name": 3}]'),
    (HermesCalls, "{}"),
    (HermesCalls, "</tool_call>"),
    (HermesCalls, "<tool_call>\nno JSON\n</tool_call>"),
    (HermesCalls, '<tool_call>\n{"name": 7, "arguments": {}}\n</tool_call>'),
    (HermesCalls, '<tool_call>\n{"arguments": {}}\n</tool_call>'),
    (HermesCalls, '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>'),
    (HermesCalls, '<tool_call>\n{"name": "f'),
    (HermesCalls, '<tool_call>\n{"name": "f", "arguments": '),
    (HermesCalls, "a <tool_cal> b"),
    (HermesCalls, "<tool_call>[]</tool_call>"),
    (LlamaCalls, '{"name": "Ada", "born": 1815}'),
    (LlamaCalls, 'The call is {"name": "f", "parameters": {}}'),
    (MistralListCalls, "[1, 2]"),
    (MistralNamedCalls, "[ARGS]"),
]


def symbols(make: type[CallFormat], text: str, *, by_id: bool) -> list[str | int]:
    """Characters, and the ids of the tokens that the format knows."""
    known = make(BY_ID).parser().markers if by_id else {}
    found: list[str | int] = []
    while text:
        special = next((s for s, token in SPECIALS.items() if token in known and text.startswith(s)), None)
        found.append(SPECIALS[special] if special else text[0])
        text = text[len(special or text[0]) :]
    return found


def cut(found: Sequence[str | int], at: Iterable[int]) -> list[str | int]:
    """Characters joined to texts; a token is always on its own, and texts end at these places as well."""
    ends, parts, text = set(at), list[str | int](), ""
    for i, symbol in enumerate(found):
        if (isinstance(symbol, int) or i in ends) and text:
            parts.append(text)
            text = ""
        if isinstance(symbol, int):
            parts.append(symbol)
        else:
            text += symbol
    return [*parts, text] if text else parts


def run(parser: CallParser, parts: Iterable[str | int]) -> list[Piece]:
    pieces: list[Piece] = []
    for part in parts:
        pieces += parser.feed(part) if isinstance(part, str) else parser.feed_token(part)
    return pieces + parser.finish()


def read(pieces: Iterable[Piece]) -> Read:
    """All text, and the calls; checks that they come in order."""
    text, calls, is_open = "", list[Call](), False
    for piece in pieces:
        match piece:
            case str():
                assert not is_open, "text inside of a call"
                text += piece
            case CallStart():
                assert not is_open and piece.index == len(calls)
                calls.append((piece.name, "", False))
                is_open = True
            case CallArguments():
                assert is_open and piece.index == len(calls) - 1 and piece.text
                name, arguments, _ = calls[-1]
                calls[-1] = (name, arguments + piece.text, False)
            case CallEnd():
                assert is_open and piece.index == len(calls) - 1
                calls[-1] = (*calls[-1][:2], True)
                is_open = False
    return text, calls


def visible(make: type[CallFormat], text: str, *, by_id: bool) -> str:
    """The text without those tokens of the format that are never shown."""
    for special, token in SPECIALS.items():
        if by_id and token in HIDDEN and token in make(BY_ID).parser().markers:
            text = text.replace(special, "")
    return text


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize(("make", "output", "text", "calls"), CASES)
def test_calls_at_every_split(make: type[CallFormat], output: str, text: str, calls: list[Call], by_id: bool) -> None:
    format_, found = make(BY_ID if by_id else BY_TEXT), symbols(make, output, by_id=by_id)
    assert read(run(format_.parser(), cut(found, ()))) == (text, calls)
    assert read(run(format_.parser(), found)) == (text, calls)
    for at in range(1, len(found)):
        assert read(run(format_.parser(), cut(found, (at,)))) == (text, calls), f"cut at {at}"
    for pair in itertools.combinations(range(1, len(found), 5), 2):
        assert read(run(format_.parser(), cut(found, pair))) == (text, calls), f"cut at {pair}"


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize(("make", "output"), TEXTS)
def test_what_is_no_call_is_text_at_every_split(make: type[CallFormat], output: str, by_id: bool) -> None:
    format_, found = make(BY_ID if by_id else BY_TEXT), symbols(make, output, by_id=by_id)
    expected = (visible(make, output, by_id=by_id), list[Call]())
    for at in range(len(found) + 1):
        assert read(run(format_.parser(), cut(found, (at,)))) == expected, f"cut at {at}"


@pytest.mark.parametrize("make", [HermesCalls, MistralListCalls, MistralNamedCalls])
@pytest.mark.parametrize("before", ["", "See: "])
def test_letters_that_spell_a_token_are_text(make: type[CallFormat], before: str) -> None:
    output = before + {HermesCalls: HERMES, MistralListCalls: MISTRAL, MistralNamedCalls: NAMED}[make]
    assert read(run(make(BY_ID).parser(), [output])) == (output, [])
    assert read(run(make(BY_ID).parser(), output)) == (output, [])


def test_a_token_inside_of_a_string_is_a_part_of_it() -> None:
    parts: list[str | int] = [1001, '{"name": "f", "arguments": {"text": "', 1001, "x", 1002, '"}}', 1002]
    calls = [("f", '{"text": "<tool_call>x</tool_call>"}', True)]
    assert read(run(HermesCalls(BY_ID).parser(), parts)) == ("", calls)


def test_a_token_elsewhere_in_a_call_breaks_it_and_counts() -> None:
    parts: list[str | int] = [1001, '{"na', 1001, '{"name": "f", "arguments": {"a": ', 1001]
    parts += ['{"name": "g", "arguments": {}}', 1002]
    text, calls = read(run(HermesCalls(BY_ID).parser(), parts))
    assert (text, calls) == ('<tool_call>{"na', [("f", '{"a": ', True), ("g", "{}", True)])


@pytest.mark.parametrize(
    ("output", "text", "calls"),
    [
        ('{"name": "f", "arguments": {"a": [1, 2', "", [("f", '{"a": [1, 2', False)]),
        ('{"name": "f", "arguments": {"a": "x', "", [("f", '{"a": "x', False)]),
        ('{"name": "f", "arguments": {"a": 1}', "", [("f", '{"a": 1}', False)]),
        ('{"name": "f", "arguments": {"a": 1]} x', "]} x", [("f", '{"a": 1', True)]),
        ('{"name": "f", "arguments": {"a": 1}\n</tool_call>x', "\n</tool_call>x", [("f", '{"a": 1}', True)]),
        ('{"name": "f", "arguments": {}} and so on', " and so on", [("f", "{}", True)]),
        ('{"name": "f", "arguments": {}}\n</tool', "\n</tool", [("f", "{}", True)]),
        ('{"name": "f", "arguments": {}, oops', ", oops", [("f", "{}", True)]),
        ('{"name": "f", "arguments": null}', "", [("f", "{}", True)]),
        ('{"name": "\\u0066"}', "", [("f", "{}", True)]),
        ('{"name": "f", "arguments": {}, "arguments": {"b": 2}}', "", [("f", "{}", True)]),
    ],
)
def test_broken_calls_lose_nothing_that_was_said(output: str, text: str, calls: list[Call]) -> None:
    found = [1001, *symbols(HermesCalls, output, by_id=False)]
    for at in range(len(found) + 1):
        assert read(run(HermesCalls(BY_ID).parser(), cut(found, (at,)))) == (text, calls), f"cut at {at}"


WRITTEN = (
    """<tool_call> </tool_call> [TOOL_CALLS] [ARGS] <|python_tag|> { } [ ] " \\ : , < f é null ``` {"a":1}""".split()
)
PARTS = st.sampled_from([*WRITTEN, '{"name": "f", ', '"arguments": ', '"id": ', " ", "\n", "```json\n"])


@given(
    make=st.sampled_from([HermesCalls, LlamaCalls, MistralListCalls, MistralNamedCalls]),
    by_id=st.booleans(),
    parts=st.lists(PARTS, max_size=24),
    cuts=st.lists(st.integers(0, 120), max_size=8),
)
def test_whatever_is_written_no_split_matters_and_all_of_it_comes_out(
    make: type[CallFormat], by_id: bool, parts: list[str], cuts: list[int]
) -> None:
    output = "".join(parts)
    format_, found = make(BY_ID if by_id else BY_TEXT), symbols(make, output, by_id=by_id)
    text, calls = read(run(format_.parser(), cut(found, ())))
    assert read(run(format_.parser(), cut(found, cuts))) == (text, calls) == read(run(format_.parser(), found))
    rest = iter(output)
    assert all(char in rest for char in text), "text is made of what was written, in its order"
    if not calls:
        assert text == visible(make, output, by_id=by_id)
    for _, arguments, _ in calls:
        assert arguments == "{}" or arguments in visible(make, output, by_id=by_id) or '"arguments": "' in output


def seconds(make: type[CallFormat], output: str, by_id: bool) -> float:
    found = symbols(make, output, by_id=by_id)
    parser = make(BY_ID if by_id else BY_TEXT).parser()
    start = time.process_time()
    run(parser, found)
    return time.process_time() - start


@pytest.mark.parametrize(
    ("make", "head", "unit"),
    [
        (HermesCalls, "", "<tool_call>"),
        (HermesCalls, "", "<tool_cal"),
        (HermesCalls, "", " "),
        (HermesCalls, "", '{"name": "'),
        (HermesCalls, '<tool_call>{"name": "', "x"),
        (HermesCalls, '<tool_call>{"name": "f", "arguments": ', '{"a": ['),
        (HermesCalls, '<tool_call>{"name": "f", "arguments": {"a": "', '\\"'),
        (HermesCalls, '<tool_call>{"x": ', "["),
        (HermesCalls, "<tool_call>", '{"name": "f", "arguments": {}}, '),
        (MistralNamedCalls, "", "[TOOL_CALLS]f"),
        (MistralNamedCalls, "[TOOL_CALLS]", "f"),
    ],
)
@pytest.mark.parametrize("by_id", [True, False])
def test_time_is_linear(make: type[CallFormat], head: str, unit: str, by_id: bool) -> None:
    """Fifty times the output in about fifty times the time: a square would be 2,500."""
    count = 40_000 // len(unit)
    small = min(seconds(make, head + unit * (count // 50), by_id) for _ in range(3))
    large = min(seconds(make, head + unit * count, by_id) for _ in range(2))
    assert large < 500 * max(small, 1e-4)


def test_arguments_are_handed_out_as_they_come() -> None:
    parser = HermesCalls(BY_ID).parser()
    parser.feed_token(1001)
    assert parser.feed('\n{"name": "f", "arg') == []
    assert parser.feed('uments": {"a') == [CallStart(0, "f"), CallArguments(0, '{"a')]
    assert parser.feed('": 1') == [CallArguments(0, '": 1')]
    assert parser.feed("}}") == [CallArguments(0, "}"), CallEnd(0)]


@pytest.mark.parametrize("text", ["Hello", '{"not-a-call', "<tool", "[TO", "```j", "``", '{"name": "' + 256 * "x"])
def test_no_more_is_held_than_could_be_a_call(text: str) -> None:
    parser: Any = HermesCalls(BY_TEXT).parser()
    pieces = parser.feed(text + "?")
    assert pieces == [text + "?"]
    assert parser.feed("plain") == ["plain"]
