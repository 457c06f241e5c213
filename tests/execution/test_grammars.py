"""Grammars of running sequences: every way to use one, drafts, forced runs, faults."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from streamgen.backends.base import ANY_TOKEN, GRAMMAR, SAMPLE_ROW
from streamgen.execution.grammars import Drawn, Grammars, Taken
from streamgen.grammar.grammar import GrammarStats
from streamgen.grammar.vocabulary import GrammarVocabulary
from streamgen.messages import Begin, Fault, GrammarUse, Turn
from streamgen.sampling import ResolvedSampling
from tests.grammar.automata import STRING, automaton, bound

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from streamgen.grammar.grammar import Matcher, TokenGrammar
    from streamgen.grammar.tokens import AutomatonTokens

EOS, CALL, THINK, DONE = 256, 257, 258, 259
TEXTS = [b"ab", b'":', b'{"', b"true", b"xyz"]
VOCAB = 260 + len(TEXTS)
VOCABULARY = GrammarVocabulary([bytes([i]) for i in range(256)] + [b""] * 4 + TEXTS, (EOS,), vocab_size=VOCAB)
LENGTH, SLOTS, PROMPT = 90, 3, (1, 2, 3)


class Wrapped:
    """The same grammar as one that the executor does not know to be an automaton."""

    def __init__(self, grammar: AutomatonTokens) -> None:
        self._grammar = grammar
        self.grammar = grammar.grammar
        self.vocabulary = grammar.vocabulary
        self.stats = grammar.stats

    def start(self) -> Matcher:
        return self._grammar.start()


def grammar(regex: str) -> AutomatonTokens:
    return bound(automaton(regex), VOCABULARY)


def table(regex: str, kind: str) -> dict[str, TokenGrammar]:
    made = grammar(regex)
    return {"key": made if kind == "automaton" else Wrapped(made)}


class Running:
    """One sequence in a slot, driven as the runner does."""

    def __init__(self, grammars: Grammars, begin: Begin) -> None:
        self.grammars = grammars
        self.begin = begin
        self.tokens = np.zeros((SLOTS, LENGTH), np.int32)
        self.tokens[begin.slot, : len(begin.ids)] = begin.ids
        self.length = len(begin.ids)
        self.mask = grammars.begin(begin)

    def rows(self, position: int, count: int) -> NDArray[np.void]:
        """Rows that draw at `count` positions from `position` on."""
        rows = np.zeros(count, SAMPLE_ROW)
        rows["slot"], rows["target"], rows["mask"] = self.begin.slot, -1, self.mask
        rows["position"] = np.arange(position, position + count)
        return rows

    def masks(self, rows: NDArray[np.void]) -> list[set[int]]:
        """What each row may draw."""
        made = self.grammars.make_masks(rows, self.tokens)
        return [self._mask(row, made) for row in rows]

    def _mask(self, row: np.void, made: NDArray[np.uint32]) -> set[int]:
        words = np.full(-(-VOCAB // 32), 0xFFFFFFFF, np.uint32)
        if row["mask"] == GRAMMAR:
            assert self.grammars.automata is not None
            self.grammars.automata.fill(self.begin.slot, int(row["position"]), words.ctypes.data)
        elif row["mask"] != ANY_TOKEN:
            words = made[row["mask"]]
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCAB]
        return {int(i) for i in np.flatnonzero(bits)}

    def draft(self, ids: tuple[int, ...]) -> None:
        """Write drafts behind the last token."""
        self.tokens[self.begin.slot, self.length : self.length + len(ids)] = ids
        self.grammars.propose(self.begin.slot, self.length, ids)

    def take(self, rows: NDArray[np.void], drawn: Iterable[int]) -> Taken:
        """Take what was drawn, as the only sequence of a plan, at place 5."""
        places = np.full(len(rows), 5, np.int32)
        return self.grammars.take(Drawn(rows, np.array(list(drawn), np.int32), self.tokens, places))

    def step(self, token: int) -> Turn | None:
        """Draw one token, and take what is forced behind it."""
        self.tokens[self.begin.slot, self.length] = token
        taken = self.take(self.rows(self.length - 1, 1), [token])
        assert not taken.faults and not taken.cuts
        turn = taken.turns[0] if taken.turns else None
        self.length += 1 + (len(turn.forced) if turn is not None else 0)
        return turn

    @property
    def allowed(self) -> set[int]:
        """What the next token may be."""
        return self.masks(self.rows(self.length - 1, 1))[0]

    @property
    def output(self) -> list[int]:
        return [int(i) for i in self.tokens[self.begin.slot, self.begin.num_prompt : self.length]]


@pytest.fixture(params=["automaton", "matcher"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def begin_with(use: GrammarUse | None, *, output: Iterable[int] = (), slot: int = 1, **fields: Any) -> Begin:
    defaults: dict[str, Any] = {"sampling": ResolvedSampling(), "stop_ids": (EOS,)}
    fields = defaults | fields
    return Begin(slot=slot, ids=(*PROMPT, *output), num_prompt=len(PROMPT), grammar=use, **fields)


def sequence(
    regex: str, kind: str, *, output: Iterable[int] = (), fields: dict[str, Any] | None = None, **use: Any
) -> Running:
    grammars = Grammars(table(regex, kind), num_slots=SLOTS, vocab_size=VOCAB)
    return Running(grammars, begin_with(GrammarUse(key="key", **use), output=output, **(fields or {})))


EVERYTHING = set(range(VOCAB))


# ---- the ways to use a grammar --------------------------------------------------------------------------------------


def test_from_the_first_token_to_the_end(kind: str) -> None:
    s = sequence("(?:yes|no)", kind)
    assert s.allowed == set(b"yn")
    turn = s.step(ord("n"))
    assert turn is not None and (turn.index, turn.forced, turn.ends) == (5, (ord("o"),), True)
    assert bytes(s.output) == b"no"
    assert s.allowed == {EOS}


def test_a_step_that_was_under_way_at_the_end_changes_nothing(kind: str) -> None:
    s = sequence("(?:yes|no)", kind)
    s.step(ord("n"))
    rows = s.rows(len(PROMPT), 1)
    assert s.masks(rows) == [{ord("o")}], "the row behind n is under way while o is forced"
    assert s.take(rows, [ord("o")]) == Taken()
    after = s.take(s.rows(len(PROMPT) + 1, 1), [EOS])
    assert not after.faults and all(turn.ends for turn in after.turns)


def test_optional_ends_are_the_model_s_choice(kind: str) -> None:
    s = sequence("x+", kind)
    assert s.step(ord("x")) is None
    assert s.allowed == {ord("x"), EOS}
    turn = s.step(EOS)
    assert turn is not None and turn.ends and not turn.forced
    assert s.allowed == EVERYTHING, "what a step under way draws does not matter"


def test_free_text_until_a_token_begins_the_grammar(kind: str) -> None:
    s = sequence("[0-9]b", kind, begins_after=(DONE,))
    assert s.allowed == EVERYTHING - {EOS}, "an end would leave the output without what it has to obey"
    for token in (THINK, ord("q"), CALL):
        assert s.step(token) is None
    assert s.allowed == EVERYTHING - {EOS}
    assert s.step(DONE) is None
    assert s.allowed == set(b"0123456789")
    turn = s.step(ord("7"))
    assert turn is not None and (turn.forced, turn.ends) == ((ord("b"),), True)


def test_an_opening_that_the_model_may_leave_out(kind: str) -> None:
    use: dict[str, Any] = {"begins_after": (DONE,), "opens_with": (THINK, CALL)}
    s = sequence("(?:yes|no)", kind, **use)
    assert s.allowed == {THINK, CALL, *b"yn"}
    s.step(THINK)
    assert s.allowed == EVERYTHING - {EOS}
    s.step(DONE)
    assert s.allowed == set(b"yn")
    s = sequence("(?:yes|no)", kind, **use)
    turn = s.step(ord("y"))
    assert turn is not None and (turn.forced, turn.ends) == (tuple(b"es"), True)


def test_a_forced_beginning(kind: str) -> None:
    s = sequence("(?:yes|no)", kind, begins_after=(CALL, THINK), is_forced=True)
    assert s.allowed == {CALL, THINK}
    s.step(THINK)
    assert s.allowed == set(b"yn")


def test_free_text_follows_and_the_grammar_begins_again(kind: str) -> None:
    s = sequence("<[ab]>", kind, begins_after=(CALL,), repeats=True)
    assert s.allowed == EVERYTHING, "the text may end without any call"
    for _ in range(2):
        s.step(ord("q"))
        turn = s.step(CALL)
        assert turn is not None and turn.forced == (ord("<"),)
        assert s.allowed == set(b"ab")
        turn = s.step(ord("b"))
        assert turn is not None and (turn.forced, turn.ends) == ((ord(">"),), False)
        assert s.allowed == EVERYTHING
    assert s.step(EOS) is None


def test_it_ends_or_begins_again_where_it_has_to_begin(kind: str) -> None:
    s = sequence("<[ab]>", kind, begins_after=(CALL,), is_forced=True, repeats=True)
    s.step(CALL)
    s.step(ord("a"))
    assert s.allowed == {CALL, EOS}
    turn = s.step(CALL)
    assert turn is not None and turn.forced == (ord("<"),)
    s.step(ord("b"))
    turn = s.step(EOS)
    assert turn is not None and turn.ends


def test_a_grammar_that_could_go_on_is_left_for_free_text(kind: str) -> None:
    s = sequence("[0-9]+", kind, begins_after=(CALL,), repeats=True)
    s.step(CALL)
    assert s.allowed == set(b"0123456789")
    s.step(ord("4"))
    assert s.allowed == EVERYTHING
    s.step(ord("2"))
    s.step(ord("q"))
    s.step(ord("3"))
    assert s.allowed == EVERYTHING
    s.step(CALL)
    assert s.allowed == set(b"0123456789")
    s.step(ord("1"))
    s.step(CALL)
    assert s.allowed == set(b"0123456789")


def test_forced_and_repeating_and_unfinished(kind: str) -> None:
    s = sequence("[0-9]+", kind, begins_after=(CALL,), is_forced=True, repeats=True)
    s.step(CALL)
    s.step(ord("4"))
    assert s.allowed == {CALL, EOS, *b"0123456789"}


# ---- runs, drafts, replays, faults ----------------------------------------------------------------------------------


def test_no_forced_runs_where_log_probabilities_are_wanted(kind: str) -> None:
    s = sequence("(?:yes|no)", kind, fields={"sampling": ResolvedSampling(logprobs=0)})
    turn = s.step(ord("n"))
    assert turn is None or (not turn.forced and not turn.ends)
    assert s.allowed == {ord("o")}
    turn = s.step(ord("o"))
    assert turn is not None and turn.ends and not turn.forced


def test_long_runs_come_in_parts(kind: str) -> None:
    s = sequence(f"(?:a{'bc' * 30}d|x)", kind)
    turn = s.step(ord("a"))
    assert turn is not None and not turn.ends and bytes(turn.forced) == b"bc" * 7 + b"b"
    turn = s.step(ord("c"))
    assert turn is not None and not turn.ends and bytes(turn.forced) == b"bc" * 7 + b"b"
    turn = s.step(ord("c"))
    assert turn is not None and not turn.ends and bytes(turn.forced) == b"bc" * 7 + b"b"
    turn = s.step(ord("c"))
    assert turn is not None and turn.ends and bytes(turn.forced) == b"bc" * 6 + b"d"


def test_runs_stop_where_the_context_does(kind: str) -> None:
    s = sequence(f"a{'bc' * 100}", kind, output=b"a" + b"bc" * 40)
    turn = s.step(ord("b"))
    assert turn is not None and len(turn.forced) == LENGTH - len(PROMPT) - 82
    assert s.length == LENGTH


def test_likely_tokens_are_told() -> None:
    s = sequence('(?:x\\{"ab":true|y)', "automaton")
    assert s.step(ord("x")) == Turn(5, (), False, tuple(260 + i for i in (2, 0, 1, 3)))
    assert s.step(260 + 2) == Turn(5, (), False, tuple(260 + i for i in (0, 1, 3)))
    assert s.step(260 + 0) == Turn(5, (), False, tuple(260 + i for i in (1, 3)))


@pytest.mark.parametrize("right", range(4))
def test_drafts_are_verified_under_the_grammar(kind: str, right: int) -> None:
    """Of three drafts the first `right` are drawn; then comes something else, which counts, and nothing after it."""
    s = sequence("[p-r]{2}[u-w][p-r]{6}", kind)
    drawn = [*b"pqw", ord("p")]
    drafts = [token if i < right else ord("r") for i, token in enumerate(drawn[:3])]
    s.draft(tuple(drafts))
    rows = s.rows(s.length - 1, 4)
    masks = s.masks(rows)
    assert masks[0] == masks[1] == set(b"pqr")
    assert masks[2] == set(b"uvw")
    if right == 3:
        assert masks[3] == set(b"pqr")
    taken = s.take(rows, drawn)
    assert not taken.faults and not taken.turns and not taken.cuts
    kept = right + 1
    s.tokens[1, s.length : s.length + kept] = drawn[:kept]
    s.length += kept
    assert s.allowed == set(b"uvw" if kept == 2 else b"pqr")
    while len(s.output) < 9:
        s.step(min(s.allowed))
    assert s.allowed == {EOS}


def test_a_draft_that_the_grammar_forbids_harms_nothing(kind: str) -> None:
    s = sequence("[p-r]{4}", kind)
    s.draft((ord("p"), ord("z"), ord("p")))
    rows = s.rows(s.length - 1, 4)
    assert s.masks(rows)[:2] == [set(b"pqr")] * 2
    taken = s.take(rows, [*b"pq", 0, 0])
    assert not taken.faults and not taken.turns
    s.tokens[1, s.length : s.length + 2] = list(b"pq")
    s.length += 2
    s.step(ord("r"))
    turn = s.step(ord("r"))
    assert turn is not None and turn.ends


def test_drafts_behind_the_end_do_not_count(kind: str) -> None:
    s = sequence("[pq][uv]", kind)
    s.draft((*b"pu", EOS, EOS))
    rows = s.rows(s.length - 1, 5)
    assert s.masks(rows)[:3] == [set(b"pq"), set(b"uv"), {EOS}]
    taken = s.take(rows, [*b"pu", EOS, EOS, EOS])
    assert taken.cuts == {5: 2}
    assert [(turn.forced, turn.ends) for turn in taken.turns] == [((), True)]


def test_drafts_that_were_queued_before_a_run_was_known(kind: str) -> None:
    """Drafts overwrite forced tokens that the scheduler did not know of; what was taken stays taken."""
    s = sequence("[pq]uvw[cd]{3}", kind)
    turn = s.step(ord("p"))
    assert turn is not None and bytes(turn.forced) == b"uvw"
    s.tokens[1, 4:7] = list(b"uqc")  # drafts behind the row of p
    s.grammars.propose(1, 4, tuple(b"uqc"))
    rows = s.rows(3, 4)
    masks = s.masks(rows)
    assert masks[0] == {ord("u")}
    assert s.take(rows, [*b"uv", 0, 0]) == Taken()
    s.tokens[1, 4:7] = list(b"uvw")
    assert s.allowed == set(b"cd")


def test_an_output_is_replayed_after_a_preemption(kind: str) -> None:
    regex, rng = rf"\{{{STRING}:[0-9]+\}}", Random(2)
    whole = sequence(regex, kind, fields={"sampling": ResolvedSampling(logprobs=0)})
    masks = [whole.allowed]
    for _ in range(30):
        turn = whole.step(rng.choice(sorted(masks[-1] - {EOS})))
        if turn is not None and turn.ends:
            break
        masks.append(whole.allowed)
    for count, mask in enumerate(masks):
        assert sequence(regex, kind, output=whole.output[:count]).allowed == mask


def test_what_cannot_be_is_the_fault_of_the_sequence_alone(kind: str) -> None:
    s = sequence("[pq]{3}", kind)
    taken = s.take(s.rows(s.length - 1, 1), [ord("z")])
    assert [(fault.index, fault.code) for fault in taken.faults] == [(5, "generation_error")]
    assert "does not allow" in taken.faults[0].message
    assert s.take(s.rows(s.length, 1), [ord("p")]).faults, "and it stays failed"
    assert s.grammars.begin(begin_with(None)) == ANY_TOKEN
    assert s.take(s.rows(s.length - 1, 1), [ord("z")]) == Taken(), "until another takes the slot"


def test_a_replay_that_is_not_allowed_fails_at_the_first_step(kind: str) -> None:
    s = sequence("[pq]{3}", kind, output=b"pz")
    taken = s.take(s.rows(s.length - 1, 1), [ord("p")])
    assert [fault.index for fault in taken.faults] == [5] and not taken.turns


class Broken:
    """A grammar whose matcher fails from its n-th call on."""

    stats = GrammarStats(backend="broken")
    vocabulary = VOCABULARY

    def __init__(self, calls: int) -> None:
        self._calls = calls
        self._matcher = grammar("[pq]{9}").start()

    def start(self) -> Matcher:
        self._count()
        return self

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._matcher, name)
        self._count()
        return found

    def _count(self) -> None:
        self._calls -= 1
        if self._calls < 0:
            raise ValueError("secret")


@pytest.mark.parametrize("calls", range(8))
def test_a_matcher_that_raises_fails_its_sequence_alone(calls: int) -> None:
    grammars = Grammars({"key": Broken(calls), "good": grammar("[pq]{9}")}, num_slots=SLOTS, vocab_size=VOCAB)
    bad = Running(grammars, begin_with(GrammarUse(key="key")))
    good = Running(grammars, begin_with(GrammarUse(key="good"), slot=2))
    faults: list[Fault] = []
    for _ in range(3):
        rows = np.concatenate([bad.rows(bad.length - 1, 1), good.rows(good.length - 1, 1)])
        grammars.make_masks(rows, bad.tokens)
        assert good._mask(rows[1], np.zeros((1, 1), np.uint32)) == set(b"pq")
        taken = grammars.take(Drawn(rows, np.array([ord("p")] * 2, np.int32), bad.tokens, None))
        faults.extend(taken.faults)
        assert all(fault.index == 0 for fault in taken.faults)
        bad.length += 1
        good.length += 1
    assert faults and faults[0].code == "generation_error"
    assert "ValueError" in faults[0].message and "secret" not in faults[0].message


def test_rows_of_a_sequence_that_failed_name_no_mask() -> None:
    s = sequence("[pq]{9}", "matcher")
    s.take(s.rows(s.length - 1, 1), [ord("z")])
    rows = s.rows(s.length, 1)
    assert s.grammars.make_masks(rows, s.tokens).size == 0
    assert rows["mask"].tolist() == [ANY_TOKEN]


@pytest.mark.parametrize(
    ("key", "vocab", "message"),
    [("other", VOCAB, "not there any more"), ("key", VOCAB + 1, f"vocabulary of {VOCAB + 1} tokens")],
)
def test_a_grammar_that_is_not_there_or_not_of_this_model(key: str, vocab: int, message: str) -> None:
    grammars = Grammars(table("[pq]", "automaton"), num_slots=SLOTS, vocab_size=vocab)
    s = Running(grammars, begin_with(GrammarUse(key=key)))
    assert grammars.concern(s.rows(2, 1))
    taken = s.take(s.rows(2, 1), [5])
    assert message in taken.faults[0].message


def test_ids_that_are_no_tokens_fail_the_sequence() -> None:
    s = sequence("[pq]", "automaton", begins_after=(VOCAB + 3,))
    assert [fault.index for fault in s.take(s.rows(2, 1), [5]).faults] == [5]


def test_rows_that_only_score_are_passed_over(kind: str) -> None:
    s = sequence("[pq]{3}", kind)
    rows = s.rows(s.length - 1, 1)
    scored = s.rows(0, 2)
    scored["target"] = 7
    both = np.concatenate([scored, rows])
    s.grammars.make_masks(both, s.tokens)
    assert s.take(both, [7, 7, ord("p")]) == Taken()
    s.tokens[1, s.length] = ord("p")
    s.length += 1
    assert s.allowed == set(b"pq")


USES: tuple[dict[str, Any], ...] = (
    {},
    {"begins_after": (CALL,)},
    {"begins_after": (CALL, DONE), "opens_with": (THINK,)},
    {"begins_after": (CALL,), "is_forced": True},
    {"begins_after": (CALL,), "repeats": True},
    {"begins_after": (CALL, DONE), "repeats": True, "opens_with": (THINK,)},
    {"begins_after": (CALL,), "is_forced": True, "repeats": True},
)
WAYS = ("(?:yes|no|nothing)", rf"\{{(?:{STRING}:(?:true|[0-9]{{1,3}}),){{0,2}}\}}", "[0-9]+", "(?:ab|xyz){1,4}!?")


@pytest.mark.parametrize("regex", WAYS)
@pytest.mark.parametrize("use", USES, ids=str)
def test_automata_and_matchers_go_the_same_way(use: dict[str, Any], regex: str) -> None:
    """Random tokens and drafts: the same masks, the same runs, the same ends, on both ways through the code."""
    for seed in range(12):
        rng = Random(seed)
        wants = ResolvedSampling(logprobs=0 if seed % 4 == 3 else None)
        fast, slow = (sequence(regex, kind, fields={"sampling": wants}, **use) for kind in ("automaton", "matcher"))
        for _ in range(25):
            if fast.length + 6 > LENGTH:
                break
            drafts = tuple(_likely_token(fast, rng) for _ in range(rng.choice((0, 0, 1, 3))))
            if _both_ended(fast, slow, rng, drafts):
                break


def _likely_token(s: Running, rng: Random) -> int:
    return int(rng.choice([*s.allowed, *b'ab1"{:', CALL, EOS]))


def _both_ended(fast: Running, slow: Running, rng: Random, drafts: tuple[int, ...]) -> bool:
    """One step of both; whether it was the last."""
    masks = []
    for s in (fast, slow):
        s.draft(drafts)
        masks.append(s.masks(s.rows(s.length - 1, 1 + len(drafts))))
    drawn, follows = [], True
    for i, (one, other) in enumerate(zip(*masks, strict=True)):
        if not follows:
            drawn.append(rng.randrange(VOCAB))
            continue
        assert one == other
        guessed = i < len(drafts) and drafts[i] in one and rng.random() < 0.8
        drawn.append(drafts[i] if guessed else rng.choice(sorted(one)))
        follows = i < len(drafts) and drawn[-1] == drafts[i]
    first, second = (s.take(s.rows(s.length - 1, len(drawn)), drawn) for s in (fast, slow))
    turns = [(turn.forced, turn.ends) for turn in first.turns if turn.forced or turn.ends]
    assert turns == [(turn.forced, turn.ends) for turn in second.turns]
    assert (first.faults, first.cuts) == (second.faults, second.cuts) and not first.faults
    kept = first.cuts.get(5, 1 + next((i for i, d in enumerate(drafts) if d != drawn[i]), len(drafts)))
    forced, ends = turns[0] if turns else ((), False)
    for s in (fast, slow):
        s.tokens[1, s.length : s.length + kept] = drawn[:kept]
        s.length += kept + len(forced)
    assert fast.output == slow.output
    return ends


def test_a_grammar_that_is_no_automaton_at_all() -> None:
    """Nested brackets, which no automaton counts: drafts, runs and a replay through the library that does."""
    pytest.importorskip("llguidance")
    from streamgen.grammar.llguidance import LlguidanceGrammar, lark_grammar

    made = LlguidanceGrammar.compile(lark_grammar('start: "<" ("p" | "q" | start)? ">."')).bind(VOCABULARY)

    def running(output: Iterable[int] = ()) -> Running:
        grammars = Grammars({"key": made}, num_slots=SLOTS, vocab_size=VOCAB)
        return Running(grammars, begin_with(GrammarUse(key="key"), output=output))

    s = running()
    assert s.allowed == {ord("<")}
    s.draft(tuple(b"<<qq"))
    rows = s.rows(s.length - 1, 5)
    inside = {*b"<pq>"}
    assert s.masks(rows) == [{ord("<")}, inside, inside, {ord(">")}, EVERYTHING]
    taken = s.take(rows, [*b"<<q>", 0])
    assert [turn.forced for turn in taken.turns] == [tuple(b".>.")] and taken.turns[0].ends
    s.tokens[1, s.length : s.length + 4] = list(b"<<q>")
    s.length += 7
    assert bytes(s.output) == b"<<q>.>."
    for count in range(7):
        again = running(b"<<q>.>."[:count])
        assert ord("<<q>.>."[count]) in again.allowed
