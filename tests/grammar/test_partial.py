"""JSON while it is being written: equal to json.loads at the end, and never wrong before."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgen.grammar.partial import ABSENT, ItemScanner, JsonMalformed, JsonReader, NotAnArray
from streamgen.grammar.shapes import SchemaShape

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
STYLES: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 1])
)
DOCUMENT = '{"a~/b": [1, {"x": -2.5e3, "größe": "h\\ud83d\\ude00i 🙂\\n"}, []], "": true, "z": {"y": null}, "n": "é"}'
DOCUMENTS = [
    DOCUMENT,
    '[{"id": 1, "name": "a, b] \\"c\\""}, {"id": 22, "name": "\\\\"}, "x", 3, [4, [5]], null]',
    '"top \\u00e9\\t"',
    "-12.5e-3",
    "false",
    "[ ]",
    "{ }",
    " [ 1 , 2 ]\n",
]


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[a:b] for a, b in pairwise(edges)]


def read(texts: list[str], **options: Any) -> tuple[JsonReader, list[Any]]:
    reader = JsonReader(**options)
    snapshots = []
    for text in texts:
        reader.feed(text)
        snapshots.append(reader.snapshot())
    reader.finish()
    return reader, snapshots


def is_begun(part: Any, whole: Any) -> bool:
    """Whether `part` may be shown while `whole` is being written."""
    if isinstance(part, str) and isinstance(whole, str):
        return whole.startswith(part)
    if isinstance(part, list) and isinstance(whole, list):
        begun = len(part) - 1
        return len(part) <= len(whole) and all(
            is_begun(p, w) if i == begun else p == w for i, (p, w) in enumerate(zip(part, whole, strict=False))
        )
    if isinstance(part, dict) and isinstance(whole, dict):
        begun = len(part) - 1
        return list(part) == list(whole)[: len(part)] and all(
            is_begun(part[k], whole[k]) if i == begun else part[k] == whole[k] for i, k in enumerate(part)
        )
    return type(part) is type(whole) and bool(part == whole)


@settings(max_examples=300)
@given(ANY_JSON, STYLES, st.lists(st.integers(0, 400), max_size=12))
def test_the_end_is_what_json_reads(value: Any, style: dict[str, Any], cuts: list[int]) -> None:
    text = json.dumps(value, **style)
    reader, snapshots = read(pieces(text, cuts))
    assert reader.snapshot() == json.loads(text) == value
    shown = [snapshot for snapshot in snapshots if snapshot is not ABSENT]
    assert all(is_begun(snapshot, value) for snapshot in shown)
    assert all(is_begun(a, b) for a, b in pairwise(shown))


@pytest.mark.parametrize("text", DOCUMENTS)
def test_every_split_point(text: str) -> None:
    value = json.loads(text)
    whole_fields = read([text], wants_fields=True)[0].fields
    for cut in range(len(text) + 1):
        reader, snapshots = read([text[:cut], text[cut:]], wants_fields=True)
        assert reader.snapshot() == value
        assert reader.fields == whole_fields
        assert snapshots[0] is ABSENT or is_begun(snapshots[0], value)


def test_one_character_at_a_time_shows_what_is_certain() -> None:
    shown: list[str] = []
    reader = JsonReader()
    for character in '{"n": 35, "s": "ab", "t": true, "l": [1, 2]}':
        reader.feed(character)
        snapshot = repr(reader.snapshot())
        if snapshot not in shown:
            shown.append(snapshot)
    assert shown == [
        "{}",
        "{'n': 35}",  # never 3
        "{'n': 35, 's': ''}",
        "{'n': 35, 's': 'a'}",
        "{'n': 35, 's': 'ab'}",
        "{'n': 35, 's': 'ab', 't': True}",
        "{'n': 35, 's': 'ab', 't': True, 'l': []}",
        "{'n': 35, 's': 'ab', 't': True, 'l': [1]}",
        "{'n': 35, 's': 'ab', 't': True, 'l': [1, 2]}",
    ]


def test_half_an_escape_is_not_shown() -> None:
    reader = JsonReader()
    shown = []
    for character in '"a\\ud83d\\ude00\\n"':
        reader.feed(character)
        shown.append(reader.snapshot())
    assert sorted(set(shown), key=len) == ["", "a", "a🙂"[:1] + "😀", "a😀\n"]


@pytest.mark.parametrize(
    "text", ['"\\ud83d"', '"\\ud83dx"', '"\\ude00"', '"\\ud83d\\n"', '"\\ud83d\\ud83d\\ude00"', '"\\ud83d\\u0041"']
)
def test_halves_of_surrogate_pairs_are_read_as_json_reads_them(text: str) -> None:
    for cut in range(len(text)):
        assert read([text[:cut], text[cut:]])[0].snapshot() == json.loads(text)


def test_snapshots_stay_as_they_are() -> None:
    reader = JsonReader()
    kept = []
    for character in DOCUMENT:
        reader.feed(character)
        snapshot = reader.snapshot()
        kept.append((snapshot, repr(snapshot)))
    assert all(repr(snapshot) == before for snapshot, before in kept)


def test_a_repeated_key_counts_as_json_counts_it() -> None:
    text = '{"a": 1, "b": 2, "a": [3]}'
    assert read([text])[0].snapshot() == json.loads(text)


def test_fields_are_members_inner_ones_first() -> None:
    assert read([DOCUMENT], wants_fields=True)[0].fields == [
        ("/a~0~1b/1/x", -2500.0),
        ("/a~0~1b/1/größe", "h😀i 🙂\n"),
        ("/a~0~1b", [1, {"x": -2500.0, "größe": "h😀i 🙂\n"}, []]),
        ("/", True),
        ("/z/y", None),
        ("/z", {"y": None}),
        ("/n", "é"),
    ]


@given(ANY_JSON)
def test_every_field_can_be_found_by_its_pointer(value: Any) -> None:
    for pointer, member in read([json.dumps(value)], wants_fields=True)[0].fields:
        found = value
        for part in pointer.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found[int(name)] if isinstance(found, list) else found[name]
        assert found == member


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@pytest.mark.parametrize(
    "text",
    [
        "{", "[1", "[1,]", "{,}", '{"a"}', '{"a":}', '{"a":1,}', '{1:2}', "[1 2]", "01", "1.", "-", "+1", ".5", "1e",
        "tru", "nul", "NaN", "Infinity", "'a'", '"\\x"', '"\\u12g4"', '"\n"', "[}", "{]", "1 2", "[] []", "", " ", '"a',
        '{"a":1', "[1,", "t", "truefalse", "9" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused_at_every_split(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        json.loads(text, parse_constant=_refuse)
    for cut in range(min(len(text), 50) + 1):
        with pytest.raises(JsonMalformed, match="not JSON"):
            read([text[:cut], text[cut:]])


def test_the_message_says_where_and_holds_nothing_of_the_text() -> None:
    reader = JsonReader()
    reader.feed('{"secret": 1')
    with pytest.raises(JsonMalformed) as caught:
        reader.feed(" secret")
    assert str(caught.value) == "not JSON: expected a comma at character 13"


@pytest.mark.parametrize("depth", [64, 5000])
def test_depth_needs_no_stack(depth: int) -> None:
    text = '[{"a":' * depth + "1" + "}]" * depth
    reader, scanner = JsonReader(), ItemScanner()
    for piece in pieces(text, list(range(0, len(text), 7))):
        reader.feed(piece)
    reader.finish()
    value, count = reader.snapshot(), 0
    while value != 1:
        value, count = value[0]["a"], count + 1
    assert count == depth
    assert scanner.feed(text) == [text[1:-1]]


# ---- elements --------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(ANY_JSON), STYLES, st.lists(st.integers(0, 400), max_size=12))
def test_elements_are_cut_where_they_close(values: list[Any], style: dict[str, Any], cuts: list[int]) -> None:
    scanner = ItemScanner()
    texts = pieces(json.dumps(values, **style), cuts)
    elements = [json.loads(element) for text in texts for element in scanner.feed(text)]
    assert elements == values


def test_elements_at_every_split_point() -> None:
    text = DOCUMENTS[1]
    for cut in range(len(text) + 1):
        scanner = ItemScanner()
        elements = [*scanner.feed(text[:cut]), *scanner.feed(text[cut:])]
        assert [json.loads(element) for element in elements] == json.loads(text)


def test_an_element_comes_with_the_character_that_ends_it() -> None:
    scanner = ItemScanner()
    assert [scanner.feed(character) for character in "[1,[2],{}]"] == [
        [], [], ["1"], [], [], [], ["[2]"], [], [], ["{}"]
    ]  # fmt: skip


@pytest.mark.parametrize("text", ['{"a": [1]}', "1", ' "[1]"', "null"])
def test_another_value_has_no_elements(text: str) -> None:
    with pytest.raises(NotAnArray):
        ItemScanner().feed(text)


def test_nothing_follows_an_array() -> None:
    scanner = ItemScanner()
    assert scanner.feed("[1] \n") == ["1"]
    with pytest.raises(JsonMalformed):
        scanner.feed("[2]")


# ---- shapes ----------------------------------------------------------------------------------------------------------

SCHEMA = {
    "$ref": "#/$defs/Line",
    "$defs": {
        "Line": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "unit": {"enum": ["kg", "piece"]},
                "day": {"type": "string", "format": "date"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "string", "pattern": "^[A-Z]+$"}, {"type": "integer"}]},
                "parts": {"type": "array", "items": {"$ref": "#/$defs/Line"}},
                "pair": {"type": "array", "prefixItems": [{"type": "string"}, {"const": "xy"}]},
            },
            "additionalProperties": {"const": "fixed"},
        }
    },
}
LINE = {
    "name": "ab", "unit": "kg", "day": "2024-02-29", "note": "cd", "code": "EF", "pair": ["gh", "xy"], "more": "fixed",
}  # fmt: skip


def test_only_free_text_is_shown_half() -> None:
    shown: dict[str, list[str]] = {}
    reader = JsonReader(SchemaShape(SCHEMA))
    for character in json.dumps({**LINE, "parts": [LINE]}):
        reader.feed(character)
        line = reader.snapshot()
        for path, value in _texts("", line if isinstance(line, dict) else {}):
            if value not in shown.setdefault(path, []):
                shown[path].append(value)
    growing = {path for path, values in shown.items() if len(values) > 1}
    names = {"/name", "/note", "/pair/0"}
    assert growing == names | {f"/parts/0{name}" for name in names}
    assert shown["/day"] == ["2024-02-29"] and shown["/name"] == ["", "a", "ab"]


def _texts(path: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(path, value)]
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, child in children for found in _texts(f"{path}/{key}", child)]


@pytest.mark.parametrize(
    "schema", [True, False, {}, {"$ref": "#"}, {"$ref": "http://x"}, {"$ref": "#/nowhere"}, {"allOf": [{"$ref": "#"}]}]
)
def test_a_schema_that_says_nothing_leaves_everything_free(schema: Any) -> None:
    shape = SchemaShape(schema)
    assert shape.grows and shape.member("a").element(3).grows


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_reading_is_linear() -> None:
    def seconds(count: int) -> float:
        text = json.dumps([{"id": i, "name": "a \\ b" * 3, "tags": ["x", "y"]} for i in range(count)])
        start = time.perf_counter()
        read_only(text)
        return time.perf_counter() - start

    def read_only(text: str) -> None:
        reader, scanner = JsonReader(wants_fields=True), ItemScanner()
        for i in range(0, len(text), 4):
            reader.feed(text[i : i + 4])
            scanner.feed(text[i : i + 4])
        assert reader.is_whole

    seconds(50)
    small, large = min(seconds(200) for _ in range(3)), min(seconds(1600) for _ in range(3))
    assert large < 8 * small * 2.5
