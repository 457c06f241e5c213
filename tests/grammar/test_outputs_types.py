"""Types as outputs: what their schema allows is read, and what is read means what it should."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamgen.errors import OutputInvalid
from streamgen.grammar.automaton import AutomatonGrammar, ByteAutomaton
from streamgen.grammar.compiler import compile_source
from streamgen.grammar.outputs import read_output
from streamgen.grammar.source import SchemaSource
from tests.grammar.output_types import COUNTEREXAMPLES, EXAMPLES

if TYPE_CHECKING:
    from collections.abc import Callable

TYPES = [tp for tp, _ in EXAMPLES]
VALIDATOR = jsonschema.Draft202012Validator


def schema_of(tp: object) -> Any:
    source = read_output(tp).source
    assert isinstance(source, SchemaSource) and source.is_closed and source.is_trusted
    return json.loads(source.text)


@cache
def grammar_of(tp: Any) -> Any:
    source = read_output(tp).source
    assert source is not None
    return compile_source(source)


def cases(table: list[tuple[Any, list[Any]]]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize(
        ("tp", "case"), [pytest.param(tp, case, id=f"{tp}"[:60]) for tp, texts in table for case in texts]
    )


@cases(EXAMPLES)
def test_what_is_of_the_type_is_read(tp: Any, case: tuple[str, Any]) -> None:
    text, value = case
    plan = read_output(tp)
    found = plan.parse(text)
    assert found == value and type(found) is type(value)
    assert plan.is_json
    VALIDATOR(schema_of(tp), format_checker=VALIDATOR.FORMAT_CHECKER).validate(json.loads(text))


@cases(COUNTEREXAMPLES)
def test_what_is_not_of_the_type_is_refused_by_both(tp: Any, case: str) -> None:
    with pytest.raises(OutputInvalid, match="does not validate"):
        read_output(tp).parse(case)
    validator = VALIDATOR(schema_of(tp), format_checker=VALIDATOR.FORMAT_CHECKER)
    assert not validator.is_valid(json.loads(case))


@pytest.mark.parametrize("tp", TYPES, ids=lambda tp: f"{tp}"[:60])
def test_schemas_are_schemas(tp: Any) -> None:
    VALIDATOR.check_schema(schema_of(tp))


@pytest.mark.parametrize("tp", TYPES, ids=lambda tp: f"{tp}"[:60])
def test_every_type_is_enforced(tp: Any) -> None:
    assert grammar_of(tp).stats.warnings == ()


@cases(EXAMPLES)
def test_the_grammar_lets_examples_through(tp: Any, case: tuple[str, Any]) -> None:
    value = json.loads(case[0])
    for text in (json.dumps(value), json.dumps(value, separators=(",", ":")), json.dumps(value, ensure_ascii=False)):
        assert grammar_of(tp).accepts(text.encode())


@cases(COUNTEREXAMPLES)
def test_the_grammar_lets_nothing_else_through(tp: Any, case: str) -> None:
    assert not grammar_of(tp).accepts(case.encode())


@pytest.mark.parametrize("tp", TYPES, ids=lambda tp: f"{tp}"[:60])
def test_whatever_the_grammar_lets_through_is_read(tp: Any) -> None:
    grammar = grammar_of(tp)
    if not isinstance(grammar, AutomatonGrammar):
        pytest.skip("walks need the whole automaton; the test of real outputs samples this grammar")
    automaton = grammar.automaton
    for seed in range(30):
        text = random_walk(automaton, random.Random(seed))
        read_output(tp).parse(text.decode())


def random_walk(automaton: ByteAutomaton, rng: random.Random) -> bytes:
    """A text that the automaton accepts. It wanders for a while and then takes the shortest way out."""
    distances = distances_to_end(automaton)
    text, state, patience = bytearray(), 0, rng.randrange(120)
    while not (automaton.accepting[state] and (len(text) >= patience or rng.random() < 0.1)):
        targets = automaton.transitions[state, automaton.classes]
        steps = [byte for byte in range(256) if targets[byte] >= 0]
        if len(text) >= patience:
            nearest = min(distances[targets[byte]] for byte in steps)
            steps = [byte for byte in steps if distances[targets[byte]] == nearest]
        if not steps:
            break
        text.append(rng.choice(steps))
        state = int(targets[text[-1]])
    assert automaton.accepting[state]
    return bytes(text)


def distances_to_end(automaton: ByteAutomaton) -> list[int]:
    distances = [0 if accepts else 10**6 for accepts in automaton.accepting]
    is_settled = False
    while not is_settled:
        is_settled = True
        for state, row in enumerate(automaton.transitions):
            nearest = 1 + min((distances[target] for target in set(row.tolist()) if target >= 0), default=10**6)
            if nearest < distances[state]:
                distances[state], is_settled = nearest, False
    return distances


@pytest.mark.parametrize("tp", TYPES, ids=lambda tp: f"{tp}"[:60])
@settings(max_examples=15, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_whatever_the_schema_allows_is_read(tp: Any, data: st.DataObject) -> None:
    value = data.draw(values_of(schema_of(tp)))
    read_output(tp).parse(json.dumps(value))


FORMATS: dict[str, st.SearchStrategy[str]] = {
    "date": st.dates().map(str),
    "uuid": st.uuids().map(str),
    "ipv4": st.ip_addresses(v=4).map(str),
}


def values_of(schema: Any) -> st.SearchStrategy[Any]:
    """Values that a schema allows, for the keywords that occur in schemas of types."""
    definitions: dict[str, st.SearchStrategy[Any]] = {}
    parts = schema.get("$defs", {}) if isinstance(schema, dict) else {}

    def make(part: Any) -> st.SearchStrategy[Any]:
        if part == {}:
            return st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())
        if "$ref" in part:
            name = part["$ref"].removeprefix("#/$defs/")
            if name not in definitions:
                definitions[name] = st.deferred(lambda: made[name])
                made[name] = make(parts[name])
            return definitions[name]
        if "anyOf" in part or "oneOf" in part:
            return st.one_of([make(option) for option in part.get("anyOf", part.get("oneOf"))])
        if "enum" in part or "const" in part:
            return st.sampled_from(part.get("enum", [part.get("const")]))
        return {
            "null": lambda _: st.none(),
            "boolean": lambda _: st.booleans(),
            "integer": _numbers,
            "number": _numbers,
            "string": _strings,
            "array": arrays,
            "object": objects,
        }[part["type"]](part)

    def arrays(part: Any) -> st.SearchStrategy[Any]:
        if "prefixItems" in part:
            sizes = st.integers(part["minItems"], part["maxItems"])
            rows = st.tuples(*map(make, part["prefixItems"]))
            return st.builds(lambda size, row: list(row[:size]), sizes, rows)
        items = make(part["items"]) if "items" in part else st.nothing()
        most = part.get("maxItems", 0 if "items" not in part else None)
        return st.lists(
            items, min_size=part.get("minItems", 0), max_size=most, unique_by=repr if "uniqueItems" in part else None
        )

    def objects(part: Any) -> st.SearchStrategy[Any]:
        if part.get("properties"):
            required = part.get("required", [])
            fields = {name: make(value) for name, value in part["properties"].items()}
            known = {name: fields[name] for name in fields if name in required}
            return st.fixed_dictionaries(known, optional={n: f for n, f in fields.items() if n not in required})
        if part.get("patternProperties"):
            ((pattern, value),) = part["patternProperties"].items()
            keys, values = _strings({"pattern": pattern}), make(value)
        else:
            keys, values = _strings(part.get("propertyNames", {})), make(part["additionalProperties"])
        return st.dictionaries(
            keys, values, min_size=part.get("minProperties", 0), max_size=part.get("maxProperties", 3)
        )

    made: dict[str, st.SearchStrategy[Any]] = {}
    return make(schema)


def _numbers(part: Any) -> st.SearchStrategy[Any]:
    low, high = part.get("minimum", part.get("exclusiveMinimum")), part.get("maximum", part.get("exclusiveMaximum"))
    step = part.get("multipleOf", 1)
    whole = st.integers(low, high) if part["type"] == "integer" else st.integers(-(10**15), 10**15)
    numbers: st.SearchStrategy[Any] = whole.map(lambda value: value * step) if step != 1 else whole
    if part["type"] == "number":
        numbers |= st.floats(low, high, allow_nan=False, allow_infinity=False)
    return numbers.filter(jsonschema.Draft202012Validator(part).is_valid)


def _strings(part: Any) -> st.SearchStrategy[str]:
    if "format" in part:
        return FORMATS[part["format"]]
    if "pattern" in part:
        whole = part["pattern"].removesuffix("$") + (r"\Z" if part["pattern"].endswith("$") else "")
        strings = st.from_regex(whole)
    else:
        strings = st.text(min_size=part.get("minLength", 0), max_size=part.get("maxLength"))
    return strings.filter(lambda text: part.get("minLength", 0) <= len(text) <= part.get("maxLength", 10**6))
