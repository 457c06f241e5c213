"""Reasoning and answer at every split, by token and by text; what a prompt has opened or closed."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen.text.reasoning import ReasoningFormat, ReasoningSplitter, find_reasoning

BEGIN, END = 7, 8
BY_ID = ReasoningFormat(begin="<think>", end="</think>", begin_id=BEGIN, end_id=END)
BY_TEXT = ReasoningFormat(begin="<think>", end="</think>")

Symbols = list[str | int]


def symbols(output: str, *, by_id: bool) -> Symbols:
    found: Symbols = []
    while output:
        special = next((s for s in ("<think>", "</think>") if by_id and output.startswith(s)), None)
        found.append({"<think>": BEGIN, "</think>": END}[special] if special else output[0])
        output = output[len(special or output[0]) :]
    return found


def split(output: str, *, by_id: bool, is_open: bool = False, cuts: set[int] | None = None) -> tuple[str, str]:
    """(reasoning, answer), fed symbol by symbol or in the pieces that `cuts` makes."""
    splitter = ReasoningSplitter(BY_ID if by_id else BY_TEXT, is_open=is_open)
    reasoning, answer, held = "", "", ""
    parts: Symbols = []
    for i, symbol in enumerate(symbols(output, by_id=by_id)):
        if isinstance(symbol, int):
            parts += [held, symbol] if held else [symbol]
            held = ""
        elif cuts is None or i in cuts:
            parts += [held, symbol] if held else [symbol]
            held = ""
        else:
            held += symbol
    for part in [*parts, held] if held else parts:
        more, said = splitter.feed(part) if isinstance(part, str) else splitter.feed_token(part, _text(part))
        assert not (more and answer), "reasoning comes before the answer"
        reasoning, answer = reasoning + more, answer + said
    more, said = splitter.finish()
    return reasoning + more, answer + said


def _text(token: int) -> str:
    return "<think>" if token == BEGIN else "</think>"


CASES = [
    # output, is_open, reasoning, answer
    ("<think>\nHm, 1 < 2.\n</think>\n\nYes.\n", False, "Hm, 1 < 2.", "Yes.\n"),
    ("<think></think>Yes.", False, "", "Yes."),
    ("<think>\n\n</think>\n\n", False, "", ""),
    ("Hm.\n\n</think>Yes.", True, "Hm.", "Yes."),
    ("\nHm.</think>\n", True, "Hm.", ""),
    ("Just an answer.", False, "", "Just an answer."),
    ("\n  An answer <think>x</think>", False, "", "\n  An answer <think>x</think>"),
    ("</think> x", False, "", "</think> x"),
    ("<think>a <think> b</think>c</think>d", False, "a <think> b", "c</think>d"),
    ("<think>never closed ", False, "never closed ", ""),
    ("<think>  ", False, "", ""),
    ("  ", False, "", "  "),
    ("", False, "", ""),
    ("", True, "", ""),
]


@pytest.mark.parametrize("by_id", [True, False])
@pytest.mark.parametrize(("output", "is_open", "reasoning", "answer"), CASES)
def test_every_split(output: str, is_open: bool, reasoning: str, answer: str, by_id: bool) -> None:
    assert split(output, by_id=by_id, is_open=is_open) == (reasoning, answer)
    for at in range(len(output) + 1):
        assert split(output, by_id=by_id, is_open=is_open, cuts={at}) == (reasoning, answer), f"cut at {at}"


@pytest.mark.parametrize(
    ("output", "reasoning", "answer"),
    [
        ("<think>a</thin", "a</thin", ""),
        ("<thi", "", "<thi"),
        ("<thing>", "", "<thing>"),
        ("<think>a</<x", "a</<x", ""),
    ],
)
def test_markers_that_are_spelled_only_in_part(output: str, reasoning: str, answer: str) -> None:
    for at in range(len(output) + 1):
        assert split(output, by_id=False, cuts={at}) == (reasoning, answer)


def test_letters_that_spell_a_token_are_text() -> None:
    splitter = ReasoningSplitter(BY_ID, is_open=False)
    assert splitter.feed("<think>x</think>y") == ("", "<think>x</think>y")
    splitter = ReasoningSplitter(BY_ID, is_open=True)
    assert splitter.feed("x</think>y") == ("x</think>y", "") and splitter.is_reasoning


@given(
    parts=st.lists(st.sampled_from(["<think>", "</think>", "<", "</", "think>", "a", " ", "\n", "é"]), max_size=12),
    cuts=st.sets(st.integers(0, 60)),
    by_id=st.booleans(),
    is_open=st.booleans(),
)
def test_no_split_matters_and_only_markers_and_space_are_lost(
    parts: list[str], cuts: set[int], by_id: bool, is_open: bool
) -> None:
    output = "".join(parts)
    reasoning, answer = split(output, by_id=by_id, is_open=is_open)
    assert split(output, by_id=by_id, is_open=is_open, cuts=cuts) == (reasoning, answer)
    whole = "".join((reasoning + answer).split())
    rest = "".join(output.split())
    assert whole in (rest, rest.replace("<think>", "", 1)) or len(rest) - len(whole) in (7, 8, 15)


def test_nothing_is_held_but_space_and_the_beginning_of_a_marker() -> None:
    splitter = ReasoningSplitter(BY_TEXT, is_open=True)
    assert splitter.feed("a < b </th") == ("a < b", "")
    assert splitter.feed("x") == (" </thx", "")


@pytest.mark.parametrize("unit", [" ", "<", "</think", "<think>", "x "])
@pytest.mark.parametrize("is_open", [True, False])
def test_time_is_linear(unit: str, is_open: bool) -> None:
    def seconds(count: int) -> float:
        start = time.process_time()
        split(unit * count, by_id=False, is_open=is_open)
        return time.process_time() - start

    count = 60_000 // len(unit)
    small = min(seconds(count // 50) for _ in range(3))
    assert seconds(count) < 500 * max(small, 1e-4)


@pytest.mark.parametrize(
    ("prompt_end", "has_opened", "has_closed"),
    [
        ("<|im_start|>assistant\n<think>\n", True, False),
        ("<|im_start|>assistant\n<think>", True, False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False, True),
        ("assistant\n", False, False),
        ("say <think> to me", False, False),
    ],
)
def test_what_a_prompt_leaves_to_come(prompt_end: str, has_opened: bool, has_closed: bool) -> None:
    assert (BY_ID.has_opened(prompt_end), BY_ID.has_closed(prompt_end)) == (has_opened, has_closed)


def test_the_template_and_the_vocabulary_decide() -> None:
    ids = {"<think>": 1, "</think>": 2, "[THINK]": 3}
    assert find_reasoning("... <think>", ids.get) == ReasoningFormat(
        begin="<think>", end="</think>", begin_id=1, end_id=2
    )
    assert find_reasoning("... [/THINK]", ids.get) == ReasoningFormat(begin="[THINK]", end="[/THINK]")
    assert find_reasoning("plain", ids.get) is None
