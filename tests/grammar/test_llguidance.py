"""The back end without tables: what it accepts, its masks against bytes, and going back in it."""

from __future__ import annotations

import gc
import json
import random
import sys
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest

from streamgen.errors import GenerationError, SchemaError, SchemaTooComplex
from streamgen.grammar.compiler import compile_source, load_grammar
from streamgen.grammar.llguidance import LlguidanceGrammar, lark_grammar, lark_literal, regex_grammar
from streamgen.grammar.source import CfgSource, RegexSource
from streamgen.grammar.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from streamgen.grammar.grammar import Matcher

BYTES = [bytes([byte]) for byte in range(256)]
WORDS = [b"ab", b"ab", b"abc", b"((", b"))", b"()", b'{"', b'":', b', "', "é".encode(), "😀".encode(), b"true", b"12"]
STOPS = (256, 258)
TOKENS = [*BYTES, b"", b"", b"", *WORDS]
VOCABULARY = GrammarVocabulary(TOKENS, STOPS, vocab_size=300)
NUM_WORDS = 10

GRAMMARS = {
    "parentheses": 'start: "(" start? ")" | "ab" start',
    "json": 'start: %json {"type": "object", "properties": {"é": {"type": "integer"}, "b": {"type": "boolean"}}, '
    '"required": ["é"], "additionalProperties": false, "x-guidance": {"whitespace_flexible": false}}',
    "words": 'start: WORD ("," WORD)*\nWORD: /[a-c😀é]{1,3}/',
    "options": 'start: "ab" ("c" | "de")?',
}


def compile_lark(text: str) -> LlguidanceGrammar:
    return LlguidanceGrammar.compile(lark_grammar(text))


def allowed(matcher: Matcher) -> list[int]:
    words = np.zeros(NUM_WORDS, np.uint32)
    matcher.fill_mask(words)
    return [int(token) for token in np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))]


def expected(grammar: LlguidanceGrammar, text: bytes) -> list[int]:
    """By asking the grammar over bytes for every token."""
    tokens = [token for token, data in enumerate(TOKENS) if data and grammar.prefix_ok(text + data)]
    return sorted([*tokens, *(STOPS if grammar.accepts(text) else ())])


@pytest.mark.parametrize("name", GRAMMARS)
def test_masks_are_those_of_the_bytes(name: str) -> None:
    grammar = compile_lark(GRAMMARS[name])
    bound = grammar.bind(VOCABULARY)
    for seed in range(6):
        rng = random.Random(seed)
        matcher, text = bound.start(), b""
        for _ in range(12):
            mask = allowed(matcher)
            assert mask == expected(grammar, text), text
            assert matcher.may_stop == grammar.accepts(text)
            assert matcher.must_stop == (mask == list(STOPS))
            choices = [token for token in mask if token not in STOPS]
            if not choices:
                break
            token = rng.choice(choices)
            assert matcher.advance(token)
            text += TOKENS[token]


@pytest.mark.parametrize("name", GRAMMARS)
def test_going_back_is_as_if_it_had_never_gone(name: str) -> None:
    bound = compile_lark(GRAMMARS[name]).bind(VOCABULARY)
    for seed in range(6):
        rng = random.Random(seed)
        matcher, taken = bound.start(), list[int]()
        for _ in range(40):
            if taken and rng.random() < 0.4:
                count = rng.randint(1, len(taken))
                matcher.rollback(count)
                del taken[-count:]
            elif not (taken and taken[-1] in STOPS):
                token = rng.choice(allowed(matcher))
                assert matcher.advance(token)
                taken.append(token)
            fresh = bound.start()
            assert all(fresh.advance(token) for token in taken)
            assert allowed(matcher) == allowed(fresh)
            assert (matcher.may_stop, matcher.must_stop) == (fresh.may_stop, fresh.must_stop)


def test_a_token_that_is_not_allowed_changes_nothing() -> None:
    matcher = compile_lark(GRAMMARS["options"]).bind(VOCABULARY).start()
    before = allowed(matcher)
    for token in (ord("x"), 256, 257, 299, 262):
        assert not matcher.advance(token)
    assert allowed(matcher) == before
    assert matcher.advance(259) and matcher.may_stop and not matcher.must_stop
    assert matcher.advance(258)
    assert matcher.must_stop and matcher.may_stop and allowed(matcher) == []
    assert not matcher.advance(ord("c")) and not matcher.advance(256)
    matcher.rollback(1)
    assert matcher.advance(ord("c")) and matcher.must_stop


def test_sequences_do_not_disturb_each_other() -> None:
    bound = compile_lark(GRAMMARS["parentheses"]).bind(VOCABULARY)
    first, second = bound.start(), bound.start()
    assert first.advance(ord("("))
    assert allowed(second) == allowed(bound.start()) != allowed(first)


def test_what_follows_without_a_choice_is_a_run() -> None:
    tokens = [*BYTES, b""]
    vocabulary = GrammarVocabulary(tokens, [256], vocab_size=257)
    bound = compile_lark('start: "abcde" ("f" | "g") "hi"').bind(vocabulary)
    matcher = bound.start()
    assert bytes(matcher.forced_run(100)) == b"abcde"
    assert bytes(matcher.forced_run(2)) == b"ab"
    assert matcher.forced_run(0) == ()
    assert matcher.advance(ord("a")), "asking for a run takes nothing"
    for byte in b"bcdef":
        assert matcher.advance(byte)
    assert bytes(matcher.forced_run(100)) == b"hi"
    ambiguous = compile_lark('start: "abcde"').bind(VOCABULARY).start()
    assert ambiguous.forced_run(10) == (), "more tokens than one spell it"


def test_a_run_ends_where_the_output_may() -> None:
    vocabulary = GrammarVocabulary([*BYTES, b""], [256], vocab_size=257)
    assert bytes(compile_lark('start: "ab" "c"?').bind(vocabulary).start().forced_run(9)) == b"ab"
    assert bytes(compile_lark('start: "ab"').bind(vocabulary).start().forced_run(9)) == b"ab"


@pytest.mark.parametrize("text", ["", "a", 'a"b\\c', "é😀\n\t\x01\x7f\u2028/", "%json {", "\\u00e9"])
def test_a_literal_is_exactly_its_text(text: str) -> None:
    grammar = compile_lark(f'start: "<" {lark_literal(text)} ">"')
    assert grammar.accepts(f"<{text}>".encode())
    assert not grammar.accepts(b"<x>") and not grammar.accepts(f"<{text}{text}x>".encode())


@pytest.mark.parametrize("pattern", ["a/b", r"[a/]+\n?", "(?:é|😀){2}", r"\w{1,80}", r"a\\/", r"[\]\[^-]"])
def test_regular_expressions_mean_the_same_to_both_back_ends(pattern: str) -> None:
    plain = compile_source(RegexSource(pattern=pattern, backend="llguidance"))
    assert plain.stats.backend == "llguidance" and plain.stats.states is None
    try:
        table = compile_source(RegexSource(pattern=pattern, backend="outlines"))
    except SchemaTooComplex:
        return
    for text in ("a/b", "a", "//\n", "éé", "é😀", "a\\/", "]", "-", "x" * 80, "x" * 81, ""):
        assert plain.accepts(text.encode()) == table.accepts(text.encode()), text
        assert plain.prefix_ok(text.encode()) == table.prefix_ok(text.encode()), text


def test_what_is_too_large_for_a_table_gets_one_that_is_none() -> None:
    grammar = compile_source(RegexSource(pattern=r"\w{1,120}"))
    assert grammar.stats.backend == "llguidance"
    assert grammar.accepts("é".encode() * 120) and not grammar.accepts(b"x" * 121)
    with pytest.raises(SchemaTooComplex):
        compile_source(RegexSource(pattern=r"\w{1,120}", backend="outlines"))


@pytest.mark.parametrize(
    "text",
    ["start: start", 'start: "a" start', r"start: /[^\s\S]/", "start: a\na: b\nb: a"],
    ids=["itself", "no base", "no character", "circle"],
)
def test_a_grammar_of_no_texts_is_refused(text: str) -> None:
    try:
        grammar = compile_lark(text)
    except SchemaError as error:
        assert "no text" in error.message
        return
    # "a" again and again: there is no place where it may end, and no way to see that at its beginning
    assert not grammar.accepts(b"a" * 10) and grammar.prefix_ok(b"a" * 10)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("start: x", 'unknown name: "x"'),
        ('start: "a', "lexer error"),
        ("root: 'a'", "lexer error"),
        ("start: /(?=a)/", "regex"),
        ('start: %json {"type": "nonsense"}', "nonsense"),
        ("", "start"),
    ],
)
def test_what_is_no_grammar_is_refused(text: str, what: str) -> None:
    with pytest.raises(SchemaError, match=what) as caught:
        compile_source(CfgSource(text=text))
    assert len(caught.value.message) < 250 and "\n" not in caught.value.message


def test_a_grammar_that_is_too_large_names_its_bound() -> None:
    with pytest.raises(SchemaTooComplex) as caught:
        compile_lark("start: %json " + json.dumps({"enum": list(range(100_000))}))
    assert caught.value.bound == "llguidance"


def test_a_vocabulary_without_its_first_character_is_refused() -> None:
    with pytest.raises(SchemaError, match="spell"):
        compile_lark('start: "ab"').bind(GrammarVocabulary([b"b", b"c", b""], [2], vocab_size=3))


def test_a_place_where_no_token_fits_fails_that_sequence() -> None:
    matcher = compile_lark('start: "ab"').bind(GrammarVocabulary([b"a", b"c", b""], [2], vocab_size=3)).start()
    assert matcher.advance(0)
    with pytest.raises(GenerationError, match="grammar"):
        matcher.fill_mask(np.zeros(1, np.uint32))


def test_a_vocabulary_without_stop_ids_still_ends() -> None:
    matcher = compile_lark('start: "a" "b"?').bind(GrammarVocabulary([b"a", b"b"], [], vocab_size=2)).start()
    assert matcher.advance(0) and matcher.may_stop
    words = np.zeros(1, np.uint32)
    matcher.fill_mask(words)
    assert words.tolist() == [2]


def test_the_library_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SchemaError, match="pip install llguidance"):
        compile_source(CfgSource(text='start: "a"'))
    assert compile_source(RegexSource(pattern="a")).accepts(b"a")


def test_a_dump_is_the_grammar_again() -> None:
    grammar = LlguidanceGrammar.compile(regex_grammar("a(?:bc)?"), warnings=("/a: b",))
    loaded = load_grammar(grammar.dump())
    assert isinstance(loaded, LlguidanceGrammar) and loaded.stats == grammar.stats
    assert loaded.accepts(b"abc") and not loaded.accepts(b"ab")
    assert loaded.dump() == grammar.dump()
    assert allowed(loaded.bind(VOCABULARY).start()) == allowed(grammar.bind(VOCABULARY).start())


def test_its_tokenizer_lives_no_longer_than_its_vocabulary() -> None:
    from streamgen.grammar import llguidance

    vocabulary = GrammarVocabulary(TOKENS, STOPS, vocab_size=300)
    assert llguidance._tokenizers.of(vocabulary).vocab_size == 300
    gone = weakref.ref(vocabulary)
    del vocabulary
    gc.collect()
    assert gone() is None


def test_its_tokenizer_is_made_once_for_a_vocabulary() -> None:
    from streamgen.grammar import llguidance

    vocabulary = GrammarVocabulary(TOKENS, STOPS, vocab_size=300)
    assert llguidance._tokenizers.of(vocabulary) is llguidance._tokenizers.of(vocabulary)
    assert llguidance._tokenizers.of(vocabulary) is not llguidance._tokenizers.of(VOCABULARY)
