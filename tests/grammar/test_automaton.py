"""Automata of regular expressions: the same texts as `re.fullmatch`, and a table that is whole."""

from __future__ import annotations

import codecs
import re
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.automaton import AutomatonGrammar, build_automaton
from streamgen.grammar.bounds import CompileLimits
from streamgen.grammar.compiler import load_grammar
from streamgen.grammar.pattern import read_pattern
from streamgen.grammar.vocabulary import GrammarVocabulary

ALPHABET = "ab0 -\né😀"

# Patterns with texts: what matters is that both sides agree, so the texts hold matches and others.
DIALECT = [
    (r"foo|foobar", ["foo", "foobar", "foob", ""]),
    (r"a(bc)?", ["a", "abc", "ab"]),
    (r"(?P<year>\d{4})-(?:0[1-9]|1[0-2])", ["2024-12", "2024-13", "٢٠٢٤-12"]),
    (r"^a|b$", ["a", "b", "ab"]),
    (r"^(?:a|^b)c?$", ["a", "bc", "c"]),
    (r"\Aa+\Z", ["a", "aa", "a\n"]),
    (r"(?i)straße|k", ["STRASSE", "StRaße", "K", "\u212a", "k"]),
    (r"(?i:a)b", ["Ab", "AB", "ab"]),
    (r"(?s).|x", ["\n", "y", ""]),
    (r".", ["\n", "y", "😀", "\r"]),
    (r"(?a)\d\w\s", ["1a ", "٢a ", "1é ", "1a\u2003"]),
    (r"\D\W\S", ["a-a", "1-a", "aaa", "é-😀"]),
    (r"[\d\-x-z]+", ["1-x", "w", "٢yz", "-"]),
    (r"[^\s\d]", ["a", "1", " ", "\u2003", "😀"]),
    (r"[]a]|[^]a]b", ["]", "a", "b", "bb", "]b"]),
    (r"[\]\\^-]{2}", ["]\\", "^-", "a]"]),
    (r"a{2}|b{,2}|c{3,}|d{1,2}?", ["aa", "a", "", "bb", "bbb", "ccccc", "cc", "dd", "ddd"]),
    (r"a{x}|{|}|]|b{,|\{1\}", ["a{x}", "{", "}", "]", "b{,", "{1}", "aa"]),
    (r"a*?b+?c??", ["aabbc", "b", "bcc"]),
    (r"\x41\u00e9\U0001F600\101\07?", ["Aé😀A", "Aé😀A\7", "Aé😀"]),
    (r"\.\*\/\"\-\ ", ['.*/"- ', "ab/"]),
    (r"\t\n\r\f\v\a", ["\t\n\r\f\v\a", "tnrfva"]),
    (r"a(?#a comment)b", ["ab", "a"]),
    (r"(a?){3}(|b)", ["", "aaa", "aaab", "aaaa"]),
    (r"(?:){3}a", ["a", ""]),
    (r"[é-ü]+|[ぁ-ゟ]|[\U0001F600-\U0001F64F]", ["éü", "a", "ぁ", "ゟ", "😀", "🙏", "á"]),
    (r"[é-ş]+|[\u0100-\uffee]", ["éşĀ", "è", "Š", "\u00ff", "\uffef", "\uffee"]),
    (r"[^a]{2}", ["éü", "a😀", "\n\n", "\x7f\x80"]),
    (r"#a b", ["#a b", "#ab"]),
]


@pytest.mark.parametrize(("pattern", "texts"), DIALECT, ids=[pattern for pattern, _ in DIALECT])
def test_a_pattern_means_what_fullmatch_means(pattern: str, texts: list[str]) -> None:
    texts = [*texts, "", "a", "b", "é", "ab\n"]
    expected = [bool(re.fullmatch(pattern, text)) for text in texts]
    grammar = AutomatonGrammar.compile(pattern)
    assert [grammar.accepts(text.encode()) for text in texts] == expected
    assert any(expected)


@pytest.mark.parametrize("escape", [r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "."])
def test_named_classes_hold_the_same_characters(escape: str) -> None:
    grammar = AutomatonGrammar.compile(escape)
    matches = [bool(re.fullmatch(escape, chr(code))) for code in range(sys.maxunicode + 1)]
    edges = {code + step for code in range(1, len(matches)) if matches[code] != matches[code - 1] for step in (-1, 0)}
    codes = edges | set(range(1, 0x800)) | set(range(1, len(matches), 997))
    for code in sorted(codes - set(range(0xD800, 0xE000))):
        assert grammar.accepts(chr(code).encode()) == matches[code], hex(code)


def patterns() -> st.SearchStrategy[str]:
    single = st.sampled_from(["a", "b", "0", "é", "😀", " ", r"\d", r"\w", r"\s", ".", "[ab]", "[^a]", "[a-é]", r"\-"])

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        counts = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?"])
        return st.one_of(
            st.lists(inner, min_size=1, max_size=4).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
            st.tuples(inner, counts).map(lambda pair: f"({pair[0]}){pair[1]}"),
        )

    return st.recursive(single, larger, max_leaves=8)


@settings(max_examples=80, deadline=None)
@given(pattern=patterns(), texts=st.lists(st.text(alphabet=ALPHABET, max_size=6), min_size=5, max_size=12))
def test_random_patterns_agree_with_fullmatch(pattern: str, texts: list[str]) -> None:
    grammar = AutomatonGrammar.compile(pattern)
    for text in ["", *texts]:
        assert grammar.accepts(text.encode()) == bool(re.fullmatch(pattern, text)), text


@settings(max_examples=30, deadline=None)
@given(pattern=patterns())
def test_prefixes_are_those_of_what_is_accepted(pattern: str) -> None:
    """Over a small alphabet: what begins an accepted text is a prefix, and what is none begins no accepted text."""
    grammar = AutomatonGrammar.compile(pattern)
    for size in range(4):
        for text in map("".join, product("a0é", repeat=size)):
            data = text.encode()
            if grammar.accepts(data):
                assert all(grammar.prefix_ok(data[:end]) for end in range(len(data) + 1))
            if data and grammar.prefix_ok(data):
                assert grammar.prefix_ok(data[:-1])


@settings(max_examples=30, deadline=None)
@given(pattern=patterns())
def test_every_state_is_reached_and_leads_to_an_end(pattern: str) -> None:
    automaton = build_automaton(pattern)
    transitions, ends = automaton.transitions, automaton.accepting.astype(bool)
    assert transitions.dtype == np.int32 and automaton.classes.dtype == automaton.accepting.dtype == np.uint8
    assert transitions.min() >= -1 and transitions.max() < automaton.num_states
    assert automaton.classes.max() + 1 == transitions.shape[1]
    assert len({column.tobytes() for column in transitions.T}) == transitions.shape[1]
    assert (transitions[:, automaton.classes[0]] == -1).all()
    assert set(np.unique(transitions)) | {0, -1} == set(range(-1, automaton.num_states)), "each is reached"
    assert all(transitions[:state].max(initial=0) >= state for state in range(automaton.num_states)), (
        "from one before it"
    )
    before = None
    while before is None or (ends != before).any():
        before = ends
        ends = ends | np.where(transitions >= 0, ends[transitions], False).any(axis=1)
    assert ends.all()


def test_equal_patterns_give_equal_tables() -> None:
    first, second = (AutomatonGrammar.compile(r'\{"a": "[^"]*", "b": (\d+|null)\}').automaton for _ in range(2))
    assert (first.transitions == second.transitions).all()
    assert (first.classes == second.classes).all()


REFUSED = [
    (r"a(?=b)", "look-ahead", 1),
    (r"a(?!b)", "look-ahead", 1),
    (r"(?<=a)b", "look-behind", 0),
    (r"ab(?<!a)b", "look-behind", 2),
    (r"(a)\1", "back-reference", 3),
    (r"(?P<x>a)(?P=x)", "back-reference", 8),
    (r"(a)?(?(1)b|c)", "conditional", 4),
    (r"(?>a)", "atomic", 0),
    (r"a++", "possessive", 2),
    (r"a**", "quantifier of a quantifier", 2),
    (r"\bfoo\b", "word border", 0),
    (r"a^b", "anchor in the middle", 1),
    (r"(a$|b)c", "anchor in the middle", 2),
    (r"a(?:b|^c)", "anchor in the middle", 6),
    (r"(^a)*", "anchor in a repeated group", 4),
    (r"(a$){2}", "anchor in a repeated group", 4),
    (r"a\Zb", "anchor in the middle", 1),
    (r"*a", "something to repeat", 0),
    (r"a|{2}", "something to repeat", 2),
    (r"(a", "expected a )", 0),
    (r"a)", "expected a (", 1),
    (r"[a", "expected a ]", 0),
    ("a\\", "after the backslash", 1),
    (r"[z-a]", "expected a range", 1),
    (r"[a-\d]", "expected a range", 1),
    (r"a{3,2}", "lower count first", 1),
    (r"\q", "escape \\q", 0),
    (r"[[:alpha:]]", "POSIX", 1),
    (r"(?x)a", "flag 'x'", 0),
    (r"a(?i)b", "beginning", 1),
    (r"\ud800", "surrogate", 0),
    (r"\U00110000", "past the last", 0),
    (r"a\x00b", "NUL", 1),
]


@pytest.mark.parametrize(("pattern", "what", "position"), REFUSED, ids=[pattern for pattern, _, _ in REFUSED])
def test_what_no_automaton_can_do_is_refused_by_name_and_place(pattern: str, what: str, position: int) -> None:
    with pytest.raises(SchemaError, match=re.escape(what)) as caught:
        build_automaton(pattern)
    assert caught.value.message.endswith(f"at character {position}")
    assert caught.value.keyword == "pattern"


@pytest.mark.parametrize("pattern", [r"[^\s\S]", r"a[^\w\W]b", r"[\x00]", r"(?:[^\d\D]|[^\s\S])+"])
def test_a_pattern_that_nothing_matches_is_refused(pattern: str) -> None:
    with pytest.raises(SchemaError, match="none does"):
        build_automaton(pattern)


def test_an_alternative_that_nothing_matches_is_left_out() -> None:
    grammar = AutomatonGrammar.compile(r"(?:[^\s\S]*|x[^\s\S])a|b[^\s\S]")
    assert [grammar.accepts(text) for text in (b"a", b"xa", b"b", b"")] == [True, False, False, False]


def test_no_text_holds_nul() -> None:
    grammar = AutomatonGrammar.compile(r"[^a]*")
    assert grammar.accepts(b"\x01b") and not grammar.prefix_ok(b"\x00")


def is_utf8_prefix(data: bytes) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return False
    return True


def test_bytes_that_are_no_utf8_are_never_allowed() -> None:
    for pattern in (r"(?s:.)*", r"[é-ş]*", r"[\u0100-\U0001F600]*"):
        automaton = build_automaton(pattern)
        for data in map(
            bytes, product((0x41, 0x7F, 0x80, 0xBF, 0xC0, 0xC1, 0xC2, 0xC5, 0xE0, 0xED, 0xF4, 0xF5), repeat=2)
        ):
            if automaton.walk(data) is not None:
                assert is_utf8_prefix(data), data
    grammar = AutomatonGrammar.compile(r"(?s:.)*")
    for data in (b"\x80", b"\xc0", b"\xff", b"\xed\xa0", b"\xf4\x90", "é".encode()[1:]):
        assert not grammar.prefix_ok(data)
    assert grammar.prefix_ok("é".encode()[:1]) and not grammar.accepts("é".encode()[:1])


def test_properties_of_characters_are_those_of_the_engine() -> None:
    grammar = AutomatonGrammar.compile(r"\p{Lu}[\p{Nd}_]+[^\p{L}]\P{L}")
    assert grammar.accepts("É٢_-1".encode())
    assert not grammar.accepts("é1--".encode()) and not grammar.accepts(b"E1a-")
    assert not grammar.prefix_ok(b"E1\x00")
    with pytest.raises(SchemaError, match="regex"):
        build_automaton(r"\p{Nonsense}")


def test_overlapping_matches_do_not_blow_up() -> None:
    """A string of a schema: escapes are longer than other characters, so that matches overlap in many ways."""
    pattern = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4}){0,200}"'
    grammar = AutomatonGrammar.compile(pattern)
    assert grammar.stats.states == 2_603
    for body in ("", "x" * 200, "\\n" * 200, "\\u00e9" * 200, "é" * 200):
        assert grammar.accepts(f'"{body}"'.encode())
        assert grammar.accepts(f'"{body}x"'.encode()) == (body == "")


def test_a_dump_is_the_grammar_again() -> None:
    grammar = AutomatonGrammar.compile(r'\{"é": [0-9]+\}', warnings=("/a: b",))
    loaded = load_grammar(grammar.dump())
    assert isinstance(loaded, AutomatonGrammar)
    assert loaded.stats == grammar.stats
    assert loaded.stats.backend == "outlines" and loaded.stats.warnings == ("/a: b",)
    assert (loaded.automaton.transitions == grammar.automaton.transitions).all()
    assert loaded.accepts('{"é": 12}'.encode()) and not loaded.accepts('{"é": }'.encode())
    assert loaded.dump() == grammar.dump()


def test_a_limit_on_states_is_obeyed() -> None:
    with pytest.raises(SchemaTooComplex) as caught:
        build_automaton("a{50}", CompileLimits(max_states=50))
    assert caught.value.bound == "max_states"
    assert build_automaton("a{49}", CompileLimits(max_states=50)).num_states == 50


def test_bound_to_a_vocabulary_it_takes_tokens() -> None:
    tokens = [b"", b"{", b'{"', b'"', b"a", b'a"', b":", b": ", b"1", b"12", b"}", b"", b"x"]
    bound = AutomatonGrammar.compile(r'\{"a": [0-9]+\}').bind(GrammarVocabulary(tokens, [0, 11], vocab_size=40))
    matcher = bound.start()
    words = np.zeros(2, np.uint32)
    matcher.fill_mask(words)
    assert words.tolist() == [1 << 1 | 1 << 2, 0]
    assert all(matcher.advance(token) for token in (2, 5, 7, 9, 8, 10))
    assert matcher.may_stop and matcher.must_stop
    matcher.fill_mask(words)
    assert words.tolist() == [1 << 0 | 1 << 11, 0]


def test_what_a_vocabulary_cannot_spell_is_refused() -> None:
    vocabulary = GrammarVocabulary([b"a", b"b", b""], [2], vocab_size=3)
    with pytest.raises(SchemaError, match="spell"):
        AutomatonGrammar.compile("ab*c").bind(vocabulary)


def test_reading_a_pattern_keeps_the_host_alive_at_any_depth() -> None:
    limits = CompileLimits(max_regex_nesting=100_000)
    assert read_pattern("(" * 20_000 + "a" + ")" * 20_000, limits).rust == "a"
