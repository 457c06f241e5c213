"""From sources to grammars: which back end takes what, text around a schema, dumps, and errors of the right kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import streamgen
from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.bounds import CompileLimits
from streamgen.grammar.compiler import compile_source, load_grammar
from streamgen.grammar.schema import SchemaLimits
from streamgen.grammar.source import CfgSource, GrammarSource, RegexSource, SchemaSource

INVOICE = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{4}$"},
        "total": {"type": "integer", "minimum": 0, "maximum": 99_999},
        "paid": {"type": "boolean"},
    },
    "required": ["id", "total"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name"],
    "additionalProperties": False,
}

SERVED = [
    (RegexSource(pattern="[a-c]+"), "outlines", ["abc"], ["", "d"]),
    (RegexSource(pattern="[a-c]+", backend="outlines"), "outlines", ["abc"], ["d"]),
    (RegexSource(pattern="[a-c]+", backend="llguidance"), "llguidance", ["abc"], ["", "d"]),
    (
        SchemaSource(text=json.dumps(INVOICE)),
        "outlines",
        ['{"id": "AB1234", "total": 5}', '{"id":"AB1234","total":5,"paid":true}'],
        ['{"id": "ab1234", "total": 5}', '{"id": "AB1234", "total": -1}', '{"total": 5, "id": "AB1234"}', "{}"],
    ),
    (
        SchemaSource(text=json.dumps(INVOICE), backend="llguidance"),
        "llguidance",
        ['{"id": "AB1234", "total": 5}', '{"id":"AB1234","total":5,"paid":true}'],
        ['{"id": "ab1234", "total": 5}', '{"id": "AB1234", "total": -1}', "{}"],
    ),
    (
        SchemaSource(text=json.dumps(TREE)),
        "llguidance",
        ['{"name": "a", "children": [{"name": "b", "children": []}]}'],
        ['{"name": "a", "children": [{"children": []}]}', "{"],
    ),
    (CfgSource(text='start: "(" start? ")"'), "llguidance", ["(())"], ["(", ""]),
    (CfgSource(text='root ::= "(" root? ")"', syntax="gbnf"), "llguidance", ["(())"], ["(", ""]),
    (CfgSource(text='root ::= "(" [a-z]* ")"', syntax="gbnf"), "outlines", ["(ab)", "()"], ["(", ""]),
]


@pytest.mark.parametrize(("source", "backend", "valid", "invalid"), SERVED)
def test_each_source_gets_the_back_end_that_enforces_it(
    source: GrammarSource, backend: str, valid: list[str], invalid: list[str]
) -> None:
    grammar = compile_source(source)
    for again in (grammar, load_grammar(grammar.dump())):
        assert again.stats.backend == backend
        assert again.stats.seconds > 0 and again.stats.bytes > 0
        assert (again.stats.states is None) == (backend == "llguidance")
        for text in valid:
            assert again.accepts(text.encode()), text
        for text in invalid:
            assert not again.accepts(text.encode()), text


@pytest.mark.parametrize("backend", ["outlines", "llguidance"])
@pytest.mark.parametrize(
    ("before", "after"), [("<tool>\n", "\n</tool>"), ("", "!"), ("(.*|é[", ""), ('"\\', "\t$^{3}")]
)
def test_text_around_a_schema_is_literal(backend: str, before: str, after: str) -> None:
    grammar = compile_source(SchemaSource(text='{"enum": [1, 23]}', before=before, after=after, backend=backend))
    assert grammar.accepts(f"{before}23{after}".encode())
    assert not grammar.accepts(f"{before}2{after}".encode())
    assert not grammar.accepts(b"23")
    for end in range(len(f"{before}23{after}".encode())):
        assert grammar.prefix_ok(f"{before}23{after}".encode()[:end])


def test_text_that_could_be_part_of_a_number_follows_regular_expressions_only() -> None:
    assert compile_source(SchemaSource(text='{"enum": [1, 23]}', after=".")).accepts(b"23.")
    with pytest.raises(SchemaError, match="part of a number"):
        compile_source(SchemaSource(text='{"enum": [1, 23]}', after=".", backend="llguidance"))


def test_a_keyword_that_nothing_enforces_is_refused_by_name_or_told() -> None:
    text = json.dumps({"type": "object", "properties": {"a": {"type": "string", "format": "regex"}}})
    with pytest.raises(SchemaError) as caught:
        compile_source(SchemaSource(text=text))
    assert caught.value.pointer == "/properties/a" and caught.value.keyword == "format"
    warned = compile_source(SchemaSource(text=text, on_unsupported="warn"))
    assert len(warned.stats.warnings) == 1 and "format" in warned.stats.warnings[0]
    assert load_grammar(warned.dump()).stats.warnings == warned.stats.warnings
    assert compile_source(SchemaSource(text=text, on_unsupported="ignore")).stats.warnings == ()


def test_a_schema_that_is_too_large_for_a_table_goes_to_the_other_back_end() -> None:
    source = SchemaSource(text=json.dumps(INVOICE))
    small = CompileLimits(max_states=10)
    assert compile_source(source, small).stats.backend == "llguidance"
    with pytest.raises(SchemaTooComplex) as caught:
        compile_source(SchemaSource(text=source.text, backend="outlines"), small)
    assert caught.value.bound == "max_states"


def test_limits_of_schemas_are_among_the_limits() -> None:
    with pytest.raises(SchemaTooComplex) as caught:
        compile_source(SchemaSource(text=json.dumps(INVOICE)), CompileLimits(schema=SchemaLimits(max_bytes=10)))
    assert caught.value.bound == "max_bytes"


@pytest.mark.parametrize(
    "source",
    [
        RegexSource(pattern="a", backend="xgrammar"),
        SchemaSource(text="{}", backend="none"),
        CfgSource(text="a", syntax="ebnf"),
        SchemaSource(text="not json"),
        SchemaSource(text='{"type": 3}'),
        SchemaSource(text='{"$ref": "https://example.com/schema.json"}'),
        SchemaSource(text='{"enum": []}'),
        SchemaSource(text='{"type": "integer", "minimum": 3, "maximum": 2}'),
        RegexSource(pattern="("),
        RegexSource(pattern="(?<!a)b", backend="llguidance"),
        RegexSource(pattern=r"[^\s\S]", backend="llguidance"),
        CfgSource(text="root ::= x", syntax="gbnf"),
        CfgSource(text="\ud800", syntax="lark"),
        RegexSource(pattern="\ud800"),
    ],
)
def test_what_is_wrong_is_a_schema_error(source: GrammarSource) -> None:
    with pytest.raises(SchemaError) as caught:
        compile_source(source)
    assert 10 < len(caught.value.message) < 400


def test_importing_the_compiler_brings_no_back_end() -> None:
    code = (
        "import sys\n"
        "import streamgen.grammar.compiler, streamgen.grammar.child, streamgen.grammar.cache\n"
        "print(*{'torch', 'outlines', 'outlines_core', 'llguidance', 'pydantic'} & set(sys.modules))\n"
        "from streamgen.grammar.source import RegexSource\n"
        "streamgen.grammar.compiler.compile_source(RegexSource(pattern='a'))\n"
        "print(*{'torch', 'outlines', 'llguidance', 'pydantic'} & set(sys.modules))\n"
    )
    path = str(Path(streamgen.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.split() == []


def test_shared_schemas_compile_alike_here_and_from_a_dump(shared_data: Path) -> None:
    compiled = 0
    for path in sorted((shared_data / "schemas").glob("*.json")):
        if path.name == "index.json":
            continue
        data = json.loads(path.read_text())
        try:
            grammar = compile_source(SchemaSource(text=json.dumps(data["schema"])))
        except (SchemaError, SchemaTooComplex) as error:
            assert error.message
            continue
        compiled += 1
        loaded = load_grammar(grammar.dump())
        for test in data["tests"]:
            text = json.dumps(test["data"]).encode()
            assert loaded.accepts(text) == grammar.accepts(text)
            assert test["valid"] or not grammar.accepts(text), path.name
    assert compiled >= 35
