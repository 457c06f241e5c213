"""Token masks against brute force over the whole vocabulary, on real tokenizers; runs, the cache, its readers."""

from __future__ import annotations

import threading
from functools import cache
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import streamgen._cpu as _cpu
from streamgen.errors import SchemaError
from streamgen.grammar.automaton import ByteAutomaton
from streamgen.grammar.vocabulary import GrammarVocabulary
from tests.grammar.automata import REGEXES, STRING, automaton, bound, expected_ids, make_table, row_ids
from tests.text import vocabularies

TOKENIZERS = ("llama2/model", "mistral-v3/json", "phi-3-mini/json", "qwen2/json")
BYTES = [bytes([i]) for i in range(256)]
EXTRA = [b"fo", b"foo", b"bar", b"foobar", b'{"', b'":', b'", "', b"true", b"ab" * 20, "é".encode(), "🙂".encode()[:2]]
STOPS = (256, 300)


@cache
def small() -> GrammarVocabulary:
    """Every byte, some longer tokens, the same bytes twice, two stop ids, and a head that is wider than that."""
    tokens = [*BYTES, b"", *EXTRA, b"foo"]
    return GrammarVocabulary(tokens, STOPS, vocab_size=310)


@pytest.fixture(scope="module", params=TOKENIZERS)
def vocabulary(request: pytest.FixtureRequest) -> GrammarVocabulary:
    if not vocabularies.DATA.is_dir():
        pytest.skip("needs the folder shared/data beside the project")
    return GrammarVocabulary.from_tokenizer(vocabularies.load(request.param))


def walked_states(table: _cpu.MaskTable, vocabulary: GrammarVocabulary, rng: Random, *, count: int) -> list[int]:
    """States on random ways through the grammar, token by token."""
    states, state = {0}, 0
    for _ in range(40 * count):
        ids = sorted(row_ids(table, state) - set(vocabulary.stop_ids))
        if not ids:
            state = 0
            continue
        after = table.next_state(state, rng.choice(ids))
        assert after is not None
        state = after
        states.add(state)
        if len(states) >= count:
            break
    return sorted(states)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", REGEXES)
def test_masks_are_those_of_brute_force(name: str, vocabulary: GrammarVocabulary) -> None:
    a = automaton(REGEXES[name])
    table = make_table(a, vocabulary)
    for state in walked_states(table, vocabulary, Random(name), count=6):
        found, expected = row_ids(table, state), expected_ids(a, state, vocabulary)
        assert found == expected
        assert found, "a row is never empty"
        kind = {True: "forced", False: "sparse"}[len(found) == 1]
        assert table.row_kind(state) == (kind if len(found) <= max(16, table.vocab_size // 32) else "dense")


def test_every_state_of_small_grammars() -> None:
    for name, regex in REGEXES.items():
        a = automaton(regex)
        table = make_table(a, small())
        for state in range(len(a.accepting)):
            assert row_ids(table, state) == expected_ids(a, state, small()), (name, state)


def test_all_the_ids_of_one_text_are_allowed() -> None:
    table = make_table(automaton("foo|foobar"), small())
    foo = [i for i, text in enumerate(small().tokens) if text == b"foo"]
    assert len(foo) == 2
    assert row_ids(table, 0) == {ord("f"), small().tokens.index(b"fo"), small().tokens.index(b"foobar"), *foo}


def test_a_text_that_matches_may_go_on_or_stop_at_any_stop_id() -> None:
    table = make_table(automaton("foo|foobar"), small())
    foo = table.next_bytes(0, b"foo")
    assert foo is not None
    assert table.may_stop(foo) and not table.must_stop(foo)
    assert row_ids(table, foo) == {ord("b"), small().tokens.index(b"bar"), *STOPS}
    end = table.next_bytes(foo, b"bar")
    assert end is not None
    assert table.must_stop(end)
    assert row_ids(table, end) == set(STOPS)
    assert table.next_state(end, STOPS[0]) is None and table.is_stop(STOPS[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(REGEXES)))
def test_tokens_lead_where_their_bytes_do(data: st.DataObject, name: str) -> None:
    a = automaton(REGEXES[name])
    table = make_table(a, small())
    state = 0
    for _ in range(data.draw(st.integers(0, 25))):
        token = data.draw(st.sampled_from(sorted(row_ids(table, state))))
        if table.is_stop(token):
            assert table.may_stop(state)
            break
        after = table.next_state(state, token)
        assert after is not None and after == a.walk(small().tokens[token], state)
        state = after
    for token in data.draw(st.lists(st.integers(-2, 320), max_size=8)):
        assert (table.next_state(state, token) is not None) == (token in row_ids(table, state) - set(STOPS))


def test_emoji_that_are_split_over_tokens() -> None:
    a = automaton(REGEXES["emoji"])
    table = make_table(a, small())
    first, last = "😀".encode(), "😏".encode()
    half = small().tokens.index("🙂".encode()[:2])
    assert row_ids(table, 0) == {first[0], half}
    after = table.next_state(0, half)
    assert after is not None
    assert row_ids(table, after) == {first[2]}
    after = table.next_state(after, first[2])
    assert after is not None
    assert row_ids(table, after) == set(range(first[3], last[3] + 1))
    assert table.next_bytes(0, "😐".encode()) is None


def test_forced_runs_end_where_there_is_a_choice() -> None:
    vocabulary = GrammarVocabulary(BYTES, (), vocab_size=256)
    table = make_table(automaton('"(?:abc|abd)x*"'), vocabulary)
    assert table.forced_run(0, 10) == tuple(b'"ab')
    assert table.forced_run(0, 2) == tuple(b'"a')
    assert table.forced_bytes(0, 10) == b'"ab'
    assert table.row_kind(0) == "forced"
    state = table.next_bytes(0, b'"abc')
    assert state is not None
    assert table.forced_run(state, 10) == () == tuple(table.forced_bytes(state, 10))
    with_longer = make_table(automaton('"(?:abc|abd)"'), GrammarVocabulary([*BYTES, b'"a'], (), vocab_size=257))
    assert with_longer.forced_run(0, 10) == (), "two tokens may come first"
    assert with_longer.forced_bytes(0, 10) == b'"ab'
    assert with_longer.likely_run(0, 10) == (256, ord("b"))


def test_nothing_is_forced_where_the_output_may_end() -> None:
    table = make_table(automaton("ab(?:cd)?"), small())
    state = table.next_bytes(0, b"ab")
    assert state is not None
    assert table.forced_run(0, 9) == (ord("a"), ord("b"))
    assert table.forced_run(state, 9) == () and table.forced_bytes(state, 9) == b""


def test_likely_tokens_spell_the_forced_text(vocabulary: GrammarVocabulary) -> None:
    table = make_table(automaton(REGEXES["bounded"]), vocabulary)
    text = table.forced_bytes(0, 100)
    assert text == b'{"a":"'
    assert b"".join(vocabulary.tokens[i] for i in table.likely_run(0, 100)) == text
    assert len(table.likely_run(0, 1)) == 1


def without(*missing: bytes) -> GrammarVocabulary:
    return GrammarVocabulary([b"" if text in missing else text for text in BYTES] + [b"bc", b"xyz"], (), vocab_size=258)


def test_what_the_vocabulary_cannot_spell_is_not_allowed() -> None:
    a = automaton("a(?:b|x)(?:c|d)?")
    table = make_table(a, without(b"b", b"d"))
    assert table.is_spellable
    assert row_ids(table, 0) == {ord("a")}
    after = table.next_bytes(0, b"a")
    assert after is not None
    assert row_ids(table, after) == {ord("x"), 256}, "b alone is no token, bc is"
    dead_end = make_table(automaton("ab(?:cq|xyz)|aw"), without(b"b", b"w", b"q"))
    assert not dead_end.is_spellable, "after bc only q could follow, which is no token"


def test_a_grammar_that_cannot_be_spelled_is_refused() -> None:
    with pytest.raises(SchemaError, match="tokens can spell"):
        bound(automaton("q+"), without(b"q"))


def test_ways_that_the_vocabulary_cannot_end_are_closed() -> None:
    a = automaton("a(?:bq|cc)")
    table = make_table(a, without(b"q"))
    assert row_ids(table, table.next_bytes(0, b"a") or 0) == {ord("c")}
    assert table.next_state(table.next_bytes(0, b"a") or 0, ord("b")) is None


# ---- matchers -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(REGEXES)))
def test_rollback_is_a_replay(data: st.DataObject, name: str) -> None:
    grammar = bound(automaton(REGEXES[name]), small())
    matcher, tokens = grammar.start(), list[int]()
    words, again = np.zeros(10, np.uint32), np.zeros(10, np.uint32)
    for _ in range(data.draw(st.integers(1, 30))):
        is_back: bool = data.draw(st.booleans())
        if tokens and is_back:
            count = data.draw(st.integers(0, len(tokens)))
            matcher.rollback(count)
            del tokens[len(tokens) - count :]
        else:
            token = data.draw(st.integers(0, 309))
            before = matcher.may_stop, matcher.must_stop
            if matcher.advance(token):
                tokens.append(token)
            else:
                assert before == (matcher.may_stop, matcher.must_stop)
        fresh = grammar.start()
        assert all(fresh.advance(token) for token in tokens)
        matcher.fill_mask(words)
        fresh.fill_mask(again)
        assert (words == again).all()
        assert (matcher.may_stop, matcher.must_stop) == (fresh.may_stop, fresh.must_stop)
        assert matcher.forced_run(9) == fresh.forced_run(9)


def test_nothing_follows_a_stop_id() -> None:
    matcher = bound(automaton("foo|foobar"), small()).start()
    assert not matcher.advance(STOPS[0])
    assert all(matcher.advance(token) for token in b"foo")
    assert matcher.may_stop and not matcher.must_stop
    assert matcher.advance(STOPS[1]) and matcher.must_stop
    words = np.ones(10, np.uint32)
    matcher.fill_mask(words)
    assert not words.any() and matcher.forced_run(4) == ()
    assert not matcher.advance(ord("b"))
    matcher.rollback(1)
    assert matcher.advance(ord("b"))


# ---- vocabulary and cache -------------------------------------------------------------------------------------------


def test_special_tokens_and_stop_ids_have_no_text(vocabulary: GrammarVocabulary) -> None:
    assert all(vocabulary.tokens[stop] == b"" for stop in vocabulary.stop_ids)
    assert len(vocabulary.tokens) == vocabulary.vocab_size


def test_added_tokens_that_are_not_special_are_text() -> None:
    if not vocabularies.DATA.is_dir():
        pytest.skip("needs the folder shared/data beside the project")
    tokenizer = vocabularies.load("phi-3-mini/json")
    vocabulary = GrammarVocabulary.from_tokenizer(tokenizer, vocab_size=32064)
    assert vocabulary.vocab_size == 32064 and vocabulary.tokens[32063] == b""
    assert all(vocabulary.tokens[i] == b"" for i in tokenizer.special_ids)
    assert vocabulary.tokens[tokenizer.encode("Hello")[0]] == b" Hello"


def test_the_digest_tells_vocabularies_apart() -> None:
    def digest(tokens: list[bytes], stops: tuple[int, ...] = (), *, size: int = 8) -> str:
        return GrammarVocabulary(tokens, stops, vocab_size=size).digest

    digests = [
        digest([b"a", b"b"]),
        digest([b"ab"]),
        digest([b"b", b"a"]),
        digest([b"a", b"b"], (4,)),
        digest([], size=9),
    ]
    assert len(set(digests)) == len(digests)
    assert digest([b"a", b"b"]) == digests[0]


def test_masks_are_kept_within_bounds_and_go_with_their_table() -> None:
    a, masks = automaton(rf"(?:{STRING},){{3}}"), _cpu.MaskCache(4000)
    table = make_table(a, small(), masks)
    expected = [row_ids(table, state) for state in range(len(a.accepting))]
    assert 0 < masks.num_rows < len(expected) and masks.num_bytes <= 4000
    assert [row_ids(table, state) for state in range(len(a.accepting))] == expected
    del table
    assert (masks.num_rows, masks.num_bytes) == (0, 0)


def test_a_cache_that_holds_nothing_still_serves() -> None:
    masks = _cpu.MaskCache(0)
    table = make_table(automaton("foo|foobar"), small(), masks)
    assert row_ids(table, 0) == row_ids(make_table(automaton("foo|foobar"), small()), 0)
    assert masks.num_rows == 0


def test_many_readers_of_a_cache_that_is_far_too_small() -> None:
    tables: list[tuple[ByteAutomaton, _cpu.MaskTable]] = []
    masks = _cpu.MaskCache(2500)
    for name in ("object", "bounded", "words"):
        a = automaton(REGEXES[name])
        tables.append((a, make_table(a, small(), masks)))
    expected = [
        [row_ids(make_table(a, small(), _cpu.MaskCache(1 << 24)), state) for state in range(len(a.accepting))]
        for a, _ in tables
    ]
    failures: list[tuple[int, int]] = []

    def read(seed: int) -> None:
        rng = Random(seed)
        for _ in range(1500):
            number = rng.randrange(len(tables))
            a, table = tables[number]
            state = rng.randrange(len(a.accepting))
            if row_ids(table, state) != expected[number][state]:
                failures.append((number, state))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert masks.num_bytes <= 2500


def test_wrong_automata_and_tokens_are_refused() -> None:
    a = automaton("ab")
    with pytest.raises(ValueError, match="stop_ids: expected ids of the vocabulary without text, got 97"):
        _cpu.MaskTable(
            small().trie,
            a.classes.ctypes.data,
            a.transitions.ctypes.data,
            a.accepting.ctypes.data,
            len(a.accepting),
            256,
            (97,),
            small().masks,
        )
    wild = ByteAutomaton(a.classes, np.where(a.transitions == 1, 99, a.transitions).astype(np.int32), a.accepting)
    with pytest.raises(ValueError, match="no state has the number 99"):
        make_table(wild, small())
    with pytest.raises(IndexError, match="state: expected 0 to 2, got 3"):
        make_table(a, small()).may_stop(3)
    with pytest.raises(ValueError, match="65535 bytes"):
        _cpu.TokenTrie([b"a" * 70000])


def live_states(a: ByteAutomaton, vocabulary: GrammarVocabulary) -> set[int]:
    """States from which tokens lead to an end."""
    targets = {
        state: {a.walk(text, state) for text in vocabulary.tokens if text} - {None} for state in range(len(a.accepting))
    }
    live = {state for state in targets if a.accepting[state]}
    while more := {state for state in targets if targets[state] & live} - live:
        live |= more
    return live


@pytest.mark.parametrize("alphabet", ["ab", 'a"\\é\xa0你🙂z\n\x80\x7f'], ids=["ascii", "unicode"])
@pytest.mark.parametrize("regex", ["(?s:.)*", "a+b?", "[^b]{0,3}", STRING, r'[^"\\]{0,9}bé*', "[a-zé]*[^a-z]{2}"])
def test_any_tokens_under_any_grammar(regex: str, alphabet: str) -> None:
    """Vocabularies of random pieces of text, cut anywhere, most of which lack the tokens to spell everything."""
    rng, a = Random(regex + alphabet), automaton(regex)
    for _ in range(8):
        text = "".join(rng.choices(alphabet, k=3000)).encode() + rng.randbytes(20)
        cuts = [(at, at + rng.choice((0, 1, 1, 2, 3, 4, 7))) for at in rng.sample(range(len(text)), 250)]
        vocabulary = GrammarVocabulary([text[first:last] for first, last in cuts], (), vocab_size=260)
        table, live = make_table(a, vocabulary), live_states(a, vocabulary)
        assert table.is_spellable == (0 in live)
        for state in sorted(live):
            found = {i for i, text in enumerate(vocabulary.tokens) if text and a.walk(text, state) in live}
            assert row_ids(table, state) == found
