"""Grammars as llama.cpp writes them: read, refused with their place, and the same texts whichever back end they get."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.bounds import DEFAULT_LIMITS
from streamgen.grammar.compiler import compile_source
from streamgen.grammar.gbnf import Chars, Choice, Expression, Ref, Repeat, Rules, Sequence, Text, read_gbnf
from streamgen.grammar.lexemes import write_lark
from streamgen.grammar.llguidance import LlguidanceGrammar, lark_grammar
from streamgen.grammar.source import CfgSource

JSON = r"""
# values of JSON, white space where people put it
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( pair ("," ws pair)* )? "}" ws
pair   ::= string ":" ws value
array  ::=
  "[" ws (
    value ("," ws value)*   # elements
  )? "]" ws
string ::= "\"" ([^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,3})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""

ARITHMETIC = r"""
root  ::= (sum "=" blank sum "\n")+
sum   ::= product ([-+*/] product)*
product ::= name | number | "(" blank sum ")" blank
name  ::= [a-z] [a-z0-9_]* blank
number ::= [0-9]+ blank
blank ::= [ \t\n]*
"""

LIST = 'root ::= entry+\nentry ::= "- " [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029]+ "\\n"'

CHESS = r"""
root ::= "1. " move " " move "\n" ([1-9] [0-9]? ". " move " " move "\n")+
move ::= (pawn | piece | castle) [+#]?
piece ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle ::= "O-O" "-O"?
"""

JAPANESE = r"""
root ::= letter+ ([ \t\n] letter+)*
letter ::= hiragana | katakana | mark | han
hiragana ::= [ぁ-ゟ]
katakana ::= [\u30A1-\u30FF]
mark ::= [、-〾]
han ::= [\U00004e00-\U00009fff]
"""

C = r"""
root ::= function*
function ::= type name "(" parameter? ")" "{" statement* "}"
type ::= ("int" | "float" | "char") space
parameter ::= type name
statement ::=
    ( type name space "=" space sum ";" ) |
    ( name space "=" space sum ";" ) |
    ( "return" space sum ";" ) |
    ( "while" "(" condition ")" "{" statement* "}" ) |
    ( "if" "(" condition ")" "{" statement* "}" ("else" "{" statement* "}")? ) |
    ( "//" [^\n]* "\n" ) |
    ( "/*" ( [^*] | ("*" [^/]) )* "*/" )
condition ::= sum ("<=" | "<" | "==" | "!=" | ">=" | ">") sum
sum ::= term (("+" | "-") term)*
term ::= factor (("*" | "/") factor)*
factor ::= name | number | "-" factor | name "(" (sum ("," space sum)*)? ")" | "(" sum ")"
name ::= [a-zA-Z_] [a-zA-Z_0-9]*
number ::= [0-9]+
space ::= [ \t\n]+
"""

DOCUMENTED = {
    "json": (
        JSON,
        ["{}", '{"a": [1, -2.5e+10, "x\\n\\u00e9", true], "é": {"b":null}}', '{ "a":[ ]}\n\t'],
        ["[]", '{"a":}', '{"a": 01}', '{"a": "\\x"}', '{"a":1,}'],
    ),
    "arithmetic": (ARITHMETIC, ["(a+1)*2 = x\n", "1+1=2\n\na = 3\n"], ["1+=\n", "(1=2\n", "1=1"]),
    "list": (LIST, ["- a\n", "- é b\n- 😀\n"], ["- a", "a\n", "- \u2028\n", "- \n"]),
    "chess": (
        CHESS,
        ["1. e4 e5\n2. Nf3 Nc6\n", "1. O-O O-O-O+\n12. exd5=Q Kxe1#\n"],
        ["1. e4 e5\n", "1. e9 e5\n2. a1 a1\n"],
    ),
    "japanese": (JAPANESE, ["こんにちは 世界、カタカナ"], ["hello", " ぁ", "ぁ "]),
    "c": (
        C,
        [
            "int main(){return 1;}",
            "int f(char integer){while(f(1, -a)<=ifx){a = a+1;}/* ** c* */if(a>b){}else{x = (a);}}",
            "",
            "float g(){//int\n}",
        ],
        ["int main(){return1;}", "int main(){x=1;}", "intmain(){}", "int f(){if(a){}}"],
    ),
}


def compile_gbnf(text: str) -> object:
    return compile_source(CfgSource(text=text, syntax="gbnf"))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_grammars(name: str) -> None:
    text, valid, invalid = DOCUMENTED[name]
    grammar = compile_source(CfgSource(text=text, syntax="gbnf"))
    assert grammar.stats.backend == ("llguidance" if name in ("json", "arithmetic", "c") else "outlines")
    for sample in valid:
        data = sample.encode()
        assert grammar.accepts(data), sample
        assert all(grammar.prefix_ok(data[:end]) for end in range(len(data)))
    for sample in invalid:
        assert not grammar.accepts(sample.encode()), sample


@pytest.mark.parametrize("name", ["list", "chess", "japanese"])
def test_a_grammar_without_recursion_means_the_same_to_both_back_ends(name: str) -> None:
    text, valid, invalid = DOCUMENTED[name]
    plain = LlguidanceGrammar.compile(lark_grammar(read_gbnf(text, DEFAULT_LIMITS).lark()))
    for sample in (*valid, *invalid):
        assert plain.accepts(sample.encode()) == (sample in valid), sample


SYNTAX = [
    ('root ::= "a" | "b" |\n  "c"', "abc", "d"),
    ('root ::= (\n"a"\n"b"\n)\n', ["ab"], ["a"]),
    ('root ::= "\\x41\\u00e9\\U0001F600\\t\\"\\\\\\[\\]"', ['Aé😀\t"\\[]'], [""]),
    ('root ::= [a\\]\\-\\\\]+ "."', ["a]-\\."], ["b.", "."]),
    ("root ::= [^a-c]{2}", ["xy", "\n😀"], ["ax", "x"]),
    ("root ::= [a-] [-a]", ["a-", "-a"], ["b-"]),
    ("root ::= . .", ["ab", "\né"], ["a", "abc"]),
    ('root ::= "a"{2} "b"{1,} "c"{0,2} "d"{2,3}', ["aabdd", "aabbbbccddd"], ["abdd", "aabcccdd", "aabd"]),
    ('root::="a"rule-1 # comment\nrule-1 ::= "b" # "c"\n\n', ["ab"], ["a"]),
    ('root ::= ""', [""], ["a"]),
    ("root ::= ", [""], ["a"]),
    ('root ::= a\na ::= "(" a ")" | ""', ["", "(())"], ["(", "())"]),
    ('root ::= root "a" | "b"', ["b", "baaa"], ["a", "ab"]),
    ('root ::= "a" root "b" | "a" "b"', ["ab", "aaabbb"], ["aab", "ba", ""]),
    ('root ::= a*\na ::= "x" | "(" a* ")"', ["", "xx(x)()"], ["(", ")"]),
    ('root ::= [a-z]* "b" | "(" root ")"', ["b", "abb", "((ab))"], ["a", "(b"]),
    ('root ::= ("a" other)*\nother ::= (root*)*', ["", "aaa"], ["b"]),
    ('root ::= [é-ü] "é" root? | "ü" [é]', ["éé", "üé", "éééé"], ["é", "üü"]),
]


@pytest.mark.parametrize(("text", "valid", "invalid"), SYNTAX, ids=[text for text, _, _ in SYNTAX])
def test_syntax(text: str, valid: list[str], invalid: list[str]) -> None:
    grammar = compile_source(CfgSource(text=text, syntax="gbnf"))
    for sample in valid:
        assert grammar.accepts(sample.encode()), sample
    for sample in invalid:
        assert not grammar.accepts(sample.encode()), sample


@pytest.mark.parametrize(
    ("text", "what", "line", "column"),
    [
        ('root ::= "a" b', "no rule named 'b'", 1, 14),
        ('root ::= "a"\nb ::= (c', r"expected a \) for the \(", 2, 7),
        ('root ::= "a', "expected text", 1, 10),
        ("root ::= [a", "expected text", 1, 10),
        ('root ::= "a" )', "end of the rule", 1, 14),
        ("root ::= *", "something to repeat", 1, 10),
        ('root ::= "a"{3,2}', "lower count", 1, 13),
        ('root ::= "\\q"', "escape \\\\q", 1, 10),
        ('root ::= "\\ud800"', "no character", 1, 10),
        ('root ::= "\\x00"', "NUL", 1, 10),
        ("root ::= [z-a]", "a range", 1, 10),
        ("root ::= <think>", "special token", 1, 10),
        ("root ::= !<[3]>", "special token", 1, 10),
        ('root = "a"', "::=", 1, 6),
        ('root ::= "a"\nroot ::= "b"', "twice", 2, 1),
        ('root ::= "a" b ::= "c"', "new line", 1, 14),
        ('root ::= "a"\n"b"', "name of a rule", 2, 1),
        ("root ::= ?", "something to repeat", 1, 10),
        ('root ::= a & b\na ::= "a"', "expected text", 1, 12),
    ],
)
def test_mistakes_are_refused_with_their_place(text: str, what: str, line: int, column: int) -> None:
    with pytest.raises(SchemaError, match=what) as caught:
        read_gbnf(text, DEFAULT_LIMITS)
    assert caught.value.message.endswith(f"at line {line}, column {column}")


def test_a_grammar_starts_at_root() -> None:
    with pytest.raises(SchemaError, match="named root"):
        read_gbnf('start ::= "a"', DEFAULT_LIMITS)
    with pytest.raises(SchemaError, match="named root"):
        read_gbnf("", DEFAULT_LIMITS)


@pytest.mark.parametrize("text", ["root ::= root", 'root ::= "a" root', "root ::= a\na ::= root b\nb ::= root"])
def test_a_grammar_of_no_texts(text: str) -> None:
    try:
        grammar = compile_source(CfgSource(text=text, syntax="gbnf"))
    except SchemaError as error:
        assert "no text" in error.message
    else:
        assert not any(grammar.accepts(b"a" * count) for count in range(5))


def test_limits_of_a_grammar() -> None:
    for text, bound in [
        ("root ::= " + "(" * 65 + '"a"' + ")" * 65, "max_cfg_depth"),
        ('root ::= "a"{5001}', "max_repeats"),
        ("root ::= " + "#" * 70_000, "max_cfg_bytes"),
        ("\n" * 3_000, "max_cfg_lines"),
    ]:
        with pytest.raises(SchemaTooComplex) as caught:
            compile_gbnf(text)
        assert caught.value.bound == bound


def test_rules_that_multiply_do_not_take_for_ever() -> None:
    rules = "\n".join(f"a{number} ::= a{number + 1} a{number + 1}" for number in range(60))
    grammar = compile_source(CfgSource(text=f'root ::= a0\n{rules}\na60 ::= "x"', syntax="gbnf"))
    assert grammar.prefix_ok(b"x" * 100) and not grammar.accepts(b"x" * 100)


def test_what_is_regular_and_large_is_cut_where_it_has_to_be() -> None:
    words = " | ".join(f'"{number:05}" tail' for number in range(1_000))
    grammar = compile_source(
        CfgSource(text=f'root ::= (word ",")* word\nword ::= {words}\ntail ::= [a-z]*', syntax="gbnf")
    )
    assert (
        grammar.accepts(b"00000abc,00999,00042z") and not grammar.accepts(b"02000") and not grammar.accepts(b"00000,")
    )


# Random grammars, against a recognizer that tries everything.


def recognizes(rules: dict[str, Expression], text: str) -> bool:
    """By spans: whether an expression derives text[start:end], as a least fixed point over all spans and rules."""
    spans = {name: set[tuple[int, int]]() for name in rules}
    size = len(text)

    def ends(expression: Expression, start: int) -> set[int]:
        match expression:
            case Text(literal):
                return {start + len(literal)} if text.startswith(literal, start) else set()
            case Chars(ranges):
                fits = start < size and any(low <= ord(text[start]) <= high for low, high in ranges)
                return {start + 1} if fits else set()
            case Ref(name):
                return {end for begin, end in spans[name] if begin == start}
            case Sequence(items):
                found = {start}
                for item in items:
                    found = {end for middle in found for end in ends(item, middle)}
                return found
            case Choice(items):
                return {end for item in items for end in ends(item, start)}
            case Repeat(item, low, high):
                found, result = {start}, set[int]()
                for count in range(min(high if high is not None else size + low + 1, size + low + 1) + 1):
                    if count >= low:
                        result |= found
                    found = {end for middle in found for end in ends(item, middle)}
                return result

    while True:
        grown = {
            name: {(start, end) for start in range(size + 1) for end in ends(rule, start)}
            for name, rule in rules.items()
        }
        if grown == spans:
            return (0, size) in spans["root"]
        spans = grown


def expressions() -> st.SearchStrategy[Expression]:
    def chars(text: str) -> Chars:
        return Chars(tuple((ord(char), ord(char)) for char in text))

    leaves: st.SearchStrategy[Expression] = st.one_of(
        st.sampled_from(["a", "b", "ab", "ba", "é", "aé", "ü", ""]).map(Text),
        st.sampled_from(["a", "ab", "bé", "éü"]).map(chars),
        st.sampled_from(["root", "other"]).map(Ref),
    )

    def larger(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        lists = st.lists(inner, min_size=2, max_size=3).map(tuple)
        counts = st.sampled_from([(0, None), (1, None), (0, 1), (2, 2), (1, 2)])
        return st.one_of(
            lists.map(Sequence),
            lists.map(Choice),
            st.tuples(inner, counts).map(lambda pair: Repeat(pair[0], *pair[1])),
        )

    return st.recursive(leaves, larger, max_leaves=7)


@cache
def samples() -> list[str]:
    texts = [""]
    for text in texts:
        if len(text) < 3:
            texts += [text + char for char in "abéü"]
    return texts


@settings(max_examples=100, deadline=None)
@given(root=expressions(), other=expressions())
def test_random_grammars_have_the_texts_that_they_derive(root: Expression, other: Expression) -> None:
    rules = {"root": Choice((root, Sequence((Text("("), Ref("root"), Text(")"))))), "other": other}
    expected = [recognizes(rules, text) for text in samples()]
    try:
        grammar = LlguidanceGrammar.compile(lark_grammar(write_lark(Rules(rules, DEFAULT_LIMITS))))
    except SchemaError:
        assert not any(expected)
        return
    assert [grammar.accepts(text.encode()) for text in samples()] == expected
