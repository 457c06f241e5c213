"""The algebra of languages and patterns, against Python's `re` on all short strings."""

from __future__ import annotations

import itertools
import re

import pytest

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.patterns import PatternError, full_language, search_language
from streamgen.grammar.schema.printing import lark_text, num_states, regex_text

SHORT = ["".join(text) for size in range(5) for text in itertools.product("abc-1", repeat=size)]

SEARCHED = [
    "a",
    "^a|b$",
    "^(foo|bar)$",
    "(^a)?b",
    "a?^b",
    "^(?!ab)[a-c]*$",
    "^(?=.*c)a*.*$",
    "^a{2,3}$",
    "x*",
    "^$|^a+$",
    "^[^ab]+$",
    "(?:ab|c)+$",
    r"^\d{1,2}-\w*$",
    "^((?!ab).){0,5}$",
    "a(?=b)",
    "a(?!b)",
    "^(a|^b)c",
    "^a$b",
    "b{2,}",
    "(?P<x>a)b",
    r"^\S+$",
    r"[\w-]{3}",
    "(?i)AB",
    r"\Aab\Z",
    "a+?b??",
]


@pytest.mark.parametrize("pattern", SEARCHED)
def test_a_pattern_is_found_where_python_finds_it(pattern: str) -> None:
    language = search_language(pattern)
    wrong = [text for text in SHORT if lang.matches(language, text) != bool(re.search(pattern, text))]
    assert wrong == []


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"(a)\1", r"escape \1"),
        (r"a\b", r"escape \b"),
        ("(?<=a)b", "(?<="),
        ("(?<!a)b", "(?<!"),
        ("a++", "quantifier after a quantifier"),
        ("(a", "not closed"),
        ("a)", "closing parenthesis"),
        ("*a", "nothing before it"),
        ("a{3,2}", "repetition"),
        ("a{,3}", "lower bound"),
        ("a{1000000}", "repetition"),
        ("[z-a]", "ends before it begins"),
        ("[]a]", "empty character class"),
        ("[a", "unexpected end"),
        (r"\p{L}", r"escape \p"),
        (r"\xZZ", "hexadecimal"),
        ("(?:^a)*", "unbounded repetition"),
        ("(" * 100 + "a" + ")" * 100, "nested"),
    ],
)
def test_a_pattern_that_no_language_says_is_refused_by_its_construct(pattern: str, named: str) -> None:
    with pytest.raises(PatternError, match=re.escape(named)) as caught:
        search_language(pattern)
    assert "character" in str(caught.value)


def test_patterns_read_escapes() -> None:
    assert lang.matches(full_language(r"\x41\u00e9\t\cA\0\/\-"), "A\u00e9\t\x01\x00/-")
    assert lang.matches(full_language(r"\ud83d\ude00"), "😀")
    assert not lang.matches(full_language("."), "\n")
    assert lang.matches(full_language(r"[\d\-x]+"), "1-x")


def test_operators_agree_with_sets() -> None:
    languages = {text: full_language(text) for text in ("a*b?", "[ab]{1,3}", "(?:ab)*", "c|a", "a{0,2}", "[^a]*")}
    for (p, left), (q, right) in itertools.product(languages.items(), repeat=2):
        for text in SHORT:
            in_left, in_right = bool(re.fullmatch(p, text)), bool(re.fullmatch(q, text))
            assert lang.matches(lang.both(left, right), text) == (in_left and in_right)
            assert lang.matches(lang.union(left, right), text) == (in_left or in_right)
            assert lang.matches(lang.both(left, lang.negate(right)), text) == (in_left and not in_right)


def test_words_are_filtered_by_what_they_meet() -> None:
    assert lang.both(lang.words(["ab", "abc", "x"]), search_language("^a")) == lang.words(["ab", "abc"])
    assert lang.both(lang.words(["a"]), lang.negate(lang.words(["a"]))) == lang.NEVER
    several = lang.both(lang.negate(lang.words(["a"])), lang.negate(lang.words(["b"])))
    assert several == lang.negate(lang.words(["a", "b"]))


def test_lengths_are_dropped_where_they_say_nothing() -> None:
    assert lang.both(full_language("[ab]{2,3}"), lang.Repeat(lang.ANY_CHAR, 1, 5)) == full_language("[ab]{2,3}")
    assert lang.both(lang.Repeat(lang.ANY_CHAR, 0, 3), lang.Repeat(lang.ANY_CHAR, 4, None)) == lang.NEVER
    assert lang.negate(lang.Repeat(lang.ANY_CHAR, 2, 3)) == lang.union(
        lang.Repeat(lang.ANY_CHAR, 0, 1), lang.Repeat(lang.ANY_CHAR, 4, None)
    )


def test_repetition_beside_anything_keeps_its_least_count() -> None:
    assert search_language("a{1,255}") == search_language("a")
    assert search_language("x*") == lang.ANY
    assert search_language("a{3,}") == search_language("aaa") or lang.matches(search_language("a{3,}"), "aaa")


def test_emptiness() -> None:
    assert lang.is_empty(lang.both(search_language("^a"), search_language("^b")))
    assert lang.is_empty(lang.both(search_language("^a{3}$"), lang.Repeat(lang.ANY_CHAR, 4, None)))
    assert not lang.is_empty(lang.both(search_language("a"), search_language("b")))
    assert not lang.is_empty(lang.negate(search_language("^a$")))
    assert lang.is_empty(lang.both(lang.ANY, lang.negate(search_language("x*"))))


def test_printed_expressions_match_the_same() -> None:
    for pattern in ("a*b?", "[ab]{1,3}", "(?:ab)+c", "[^a]", r"\.\*", "(?:a|bc){2}", "(?:abc)?", "", "-|1"):
        language = full_language(pattern)
        printed = re.compile(regex_text(language))
        assert [t for t in SHORT if bool(printed.fullmatch(t)) != bool(re.fullmatch(pattern, t))] == []
        assert num_states(language) >= 0
    words = lang.words(["a", "b-1", "a.c", "]"])
    assert all(re.fullmatch(regex_text(words), word) for word in ("a", "b-1", "a.c", "]"))
    assert lark_text(lang.both(search_language("a"), search_language("b"))).count("&") == 1


def test_large_counts_are_seen() -> None:
    assert lang.max_repeats(search_language("^((a{1,30}){2,10}){3}$")) == 900
