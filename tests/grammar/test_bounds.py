"""Limits of compiling: what passes them is refused before it is built, and what is built is what was estimated."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest
from msgspec.structs import replace

from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.automaton import build_automaton
from streamgen.grammar.bounds import DEFAULT_LIMITS, CompileLimits, check_cfg_text, check_lark_text, check_regex
from streamgen.grammar.compiler import compile_source
from streamgen.grammar.source import CfgSource, RegexSource, SchemaSource

MAX_SECONDS = 2.0  # of a refusal; it takes a tenth of that on a machine that has nothing else to do
MAX_BYTES = 64 << 20

KILLERS = {
    "a{1000000}": ("a{1000000}", "max_repeats"),
    "exponential": ("(a|b)*a(a|b){20}", "max_regex_work"),
    "exponential words": ("(ab|ac)*ab(ab|ac){20}", "max_regex_work"),
    "exponential, 18": ("(a|b)*a(a|b){18}", "max_regex_work"),
    "exponential without counts": ("(a|b)*a" + "(a|b)" * 20, "max_regex_work"),
    "repeats of repeats": ("(.{1,1000}){1,1000}", "max_repeats"),
    "ambiguous repeats": ("(.{1,1000}){1,5}", "max_regex_work"),
    "three deep": ("(((a{0,99}){0,99}){0,99})", "max_repeats"),
    "groups": ("(" * 60_000, "max_regex_nesting"),
    "closed groups": ("(?:" * 20_000 + ")" * 20_000, "max_regex_nesting"),
    "long": ("x" * 200_001, "max_regex_chars"),
    "wide": ("|".join(f"{number:08x}" for number in range(20_000)), "max_positions"),
    "options": ("a?" * 2_000 + "a" * 2_000, "max_regex_work"),
    "nested stars": ("(" * 150 + "a*" + "b?)*" * 150, "max_regex_work"),
    "many states": ("a{0,4999}b{0,4999}c{0,4999}d{0,4999}e{0,4999}", "max_states"),
}


@pytest.mark.parametrize("name", KILLERS)
def test_a_killer_is_refused_by_estimate(name: str) -> None:
    pattern, bound = KILLERS[name]
    tracemalloc.start()
    try:
        start = time.perf_counter()
        with pytest.raises(SchemaTooComplex) as caught:
            check_regex(pattern)
        seconds = time.perf_counter() - start
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    assert caught.value.bound == bound
    assert bound in caught.value.message and len(caught.value.message) < 200
    assert seconds < MAX_SECONDS * 5, "tracing makes it slower"


@pytest.mark.parametrize("backend", ["auto", "outlines"])
def test_a_killer_is_refused_by_the_compiler(backend: str) -> None:
    for name, (pattern, bound) in KILLERS.items():
        if bound == "max_states" and backend == "auto":
            continue  # there is a back end without tables for those
        with pytest.raises(SchemaTooComplex):
            compile_source(RegexSource(pattern=pattern, backend=backend))
            pytest.fail(name)


LIMITS = {
    "max_regex_chars": ("a" * 11, "a" * 10, 10),
    "max_regex_nesting": ("(((a)))", "((a))", 2),
    "max_repeats": ("(a{3}){4}", "(a{3}){3}", 9),
    "max_positions": ("a{11}", "a{10}", 10),
    "max_states": ("a{10}", "a{9}", 10),
}


@pytest.mark.parametrize("bound", LIMITS)
def test_each_limit_holds_where_it_is_set(bound: str) -> None:
    refused, taken, limit = LIMITS[bound]
    limits = replace(DEFAULT_LIMITS, **{bound: limit})
    with pytest.raises(SchemaTooComplex) as caught:
        build_automaton(refused, limits)
    assert caught.value.bound == bound
    build_automaton(taken, limits)


def test_steps_are_limited_too() -> None:
    assert check_regex("(a|b)*a(a|b){6}", CompileLimits(max_regex_work=20_000)).work > 100
    with pytest.raises(SchemaTooComplex) as caught:
        check_regex("(a|b)*a(a|b){6}", CompileLimits(max_regex_work=100))
    assert caught.value.bound == "max_regex_work"


@pytest.mark.parametrize(
    "pattern",
    [
        "foo|foobar|fob",
        "(a|b)*a(a|b){7}",
        "a{200}",
        "(a?){50}a{50}",
        r"\{\"a\": (true|false)(, \"b\": -?[0-9]+)?\}",
        '"([^"\\\\]|\\\\.){0,50}"',
        "[a-z]{3,20}@[a-z]{2,10}\\.(com|org)",
        "(one|two|three)(,(one|two|three)){0,9}",
        "[é-ü]{1,9}|[ぁ-ゟ]+",
        ".{0,30}",
        r"\d{4}-\d\d",
    ],
)
def test_the_estimate_is_near_the_automaton(pattern: str) -> None:
    """Not less than a third of it, which keeps building within bounds; not so much more that good ones suffer."""
    states = build_automaton(pattern).num_states
    estimate = check_regex(pattern).states
    assert states / 3 <= estimate <= 6 * states + 20, (estimate, states)


PATHOLOGICAL_SCHEMAS = {
    "deep": '{"items":' * 5_000 + "{}" + "}" * 5_000,
    "recursive ref": json.dumps({"$ref": "#"}),
    "refs in a circle": json.dumps(
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    ),
    "huge enum": json.dumps({"enum": list(range(100_000))}),
    "no base": json.dumps({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}),
    "exponential pattern": json.dumps({"type": "string", "pattern": "^(a|b)*a(a|b){20}$"}),
}


@pytest.mark.parametrize("name", PATHOLOGICAL_SCHEMAS)
def test_pathological_schemas_are_refused(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises((SchemaError, SchemaTooComplex)) as caught:
        compile_source(SchemaSource(text=PATHOLOGICAL_SCHEMAS[name]))
    assert time.perf_counter() - start < MAX_SECONDS
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 100_000},
        {"type": "string", "pattern": "^(.{1,1000}){1,1000}$"},
        {"type": "array", "maxItems": 100, "items": {"type": "array", "maxItems": 100, "items": {"type": "integer"}}},
        {"allOf": [{"anyOf": [{"type": ["string", "number"]}, {"type": "boolean"}]}] * 16},
    ],
    ids=["maxLength 100000", "repeats", "maxItems 100x100", "anyOf pairs"],
)
def test_large_schemas_are_served_or_refused_in_time(schema: object) -> None:
    start = time.perf_counter()
    try:
        compile_source(SchemaSource(text=json.dumps(schema)))
    except (SchemaError, SchemaTooComplex) as error:
        assert len(error.message) < 500
    assert time.perf_counter() - start < MAX_SECONDS


def test_the_text_of_a_grammar_is_limited() -> None:
    check_cfg_text('start: "a"\n' * 3)
    for text, bound in (("#" * 65_537, "max_cfg_bytes"), ("\n" * 2_001, "max_cfg_lines")):
        with pytest.raises(SchemaTooComplex) as caught:
            check_cfg_text(text)
        assert caught.value.bound == bound
    with pytest.raises(SchemaTooComplex) as caught:
        check_lark_text("start: " + "(" * 65)
    assert caught.value.bound == "max_cfg_depth"
    check_lark_text("start: " + '"((("' * 65 + "/[(]/" * 65 + "// ((((" * 65)


@pytest.mark.parametrize("text", ["start: <think>", 'start: "a"\nb: <[1-9]>', "start: <[*]>"])
def test_special_tokens_are_no_text(text: str) -> None:
    with pytest.raises(SchemaError, match="special token"):
        check_lark_text(text)
    with pytest.raises(SchemaError, match="special token"):
        compile_source(CfgSource(text=text))


@pytest.mark.parametrize("text", ['start: "<think>"', "start: /<a>/", 'start: "a" // <b>', 'start: "a" # <b>'])
def test_text_in_angle_brackets_is_text(text: str) -> None:
    check_lark_text(text)
