"""How strings are written: every escape that JSON has, and no string by a second spelling past its constraint."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.patterns import search_language
from streamgen.grammar.schema.printing import regex_text
from streamgen.grammar.schema.spelling import string_text
from tests.grammar.schema.acceptance import accepts_text

SAMPLE = [
    '"',
    "\\",
    "/",
    "\b",
    "\f",
    "\n",
    "\r",
    "\t",
    "\x00",
    "\x1f",
    "\x7f",
    "a",
    " ",
    "é",
    "\u2028",
    "\uffff",
    "😀",
    "\U0010ffff",
]


def escapes(char: str) -> list[str]:
    """Every JSON spelling of a character."""
    units = char.encode("utf-16-be")
    hexes = "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
    short = {'"': '\\"', "\\": "\\\\", "/": "\\/", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    found = [hexes, hexes.upper().replace("\\U", "\\u"), short.get(char, hexes)]
    return found if char < " " or char in '"\\' else [*found, char]


@pytest.mark.parametrize("char", SAMPLE)
def test_a_free_string_may_use_every_escape(char: str) -> None:
    for spelled in escapes(char):
        assert json.loads(f'"{spelled}"') == char
        assert accepts_text({"type": "string", "minLength": 1, "maxLength": 1}, f'"{spelled}"'), spelled


@pytest.mark.parametrize(
    "text", ['"\n"', '"\x00"', '"\\x"', '"\\ud800"', '"\\udc00\\ud800"', '"\\u12"', '"a', 'a"', "'a'", '""a']
)
def test_what_is_no_json_string_is_refused(text: str) -> None:
    assert not accepts_text({"type": "string"}, text)


@pytest.mark.parametrize(
    "pattern", [".", r"\S", "[é-ü]", r"[^a\n]", r"\s", "[\U0001f600-\U0001f64f]", r"[\x00-\x1f]", "[^\u0100-\uffff]"]
)
def test_a_constrained_string_is_written_as_encoders_do(pattern: str) -> None:
    held = search_language(f"^{pattern}$")
    printed = re.compile(regex_text(string_text(held)))
    for code in [*range(0x300), 0x2028, 0x3000, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x1F600, 0x1F650, 0x10FFFF]:
        char = chr(code)
        expected = lang.matches(held, char)
        for ensure_ascii in (True, False):
            assert bool(printed.fullmatch(json.dumps(char, ensure_ascii=ensure_ascii))) == expected, hex(code)


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"const": "é\n"}, "type": "string"},
        {"type": "string", "not": {"pattern": "é"}},
        {"type": "string", "pattern": "^[^é]*$"},
    ],
)
def test_no_spelling_passes_an_exclusion(schema: Any) -> None:
    for text in ('"é\\n"', '"\\u00e9\\n"', '"\\u00E9\\u000a"', '"\\u00e9\\u000A"'):
        assert not accepts_text(schema, text), text
    assert accepts_text(schema, '"e\\n"')


def test_no_spelling_repeats_a_listed_name() -> None:
    schema = {"type": "object", "properties": {"aé": {"type": "integer"}}, "required": ["aé"]}
    for name in ("aé", "a\\u00e9", "a\\u00E9", "\\u0061é", "\\u0061\\u00e9"):
        assert not accepts_text(schema, f'{{"aé": 1, "{name}": "x"}}'), name
    assert accepts_text(schema, '{"a\\u00e9": 1, "b": "x"}')


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1,  "b": 2}',
        '{ "a": 1}',
        '{"a" : 1}',
        '{"a":\n1}',
        '{"a": 1 }',
        ' {"a": 1}',
        '{"a": 1} ',
        "[1,\t2]",
        "[ 1]",
    ],
)
def test_no_other_white_space(text: str) -> None:
    json.loads(text)
    assert not accepts_text({}, text)
    assert not accepts_text({"properties": {"a": {}, "b": {}}}, text)
