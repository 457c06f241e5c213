from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamgen.sampling import MAX_STOP_BYTES, MAX_STOPS
from streamgen.text.stops import StopMatcher

LETTERS = st.text(alphabet="ab\n€", min_size=0, max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n€", min_size=1, max_size=6), max_size=5)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """By definition: the smallest end of any stop string in the text; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end, max(ending, key=len)
    return None


def held_back(text: str, stops: list[str]) -> int:
    """By definition: the length of the longest suffix that is a proper beginning of some stop string."""
    sizes = range(min(len(text), MAX_STOP_BYTES), 0, -1)
    return next((n for n in sizes if any(s.startswith(text[-n:]) and len(s) > n for s in stops)), 0)


@settings(max_examples=500)
@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=8), include=st.booleans())
@example(text="aab", stops=["aaab", "aab"], cuts=[1], include=False)
@example(text="abab", stops=["babb", "ab"], cuts=[], include=True)
@example(text="aba", stops=["abab", "b"], cuts=[1, 2], include=False)
def test_equals_the_definition(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    matcher = StopMatcher(stops, include_stop=include)
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    parts = [text[a:b] for a, b in pairwise(borders)]
    shown, seen, matched = "", "", None
    for part in parts:
        new, matched = matcher.feed(part)
        shown, seen = shown + new, seen + part
        if matched is not None:
            break
        assert shown == seen[: len(seen) - held_back(seen, stops)]
    found = first_stop(text, stops)
    if found is None:
        assert matched is None
        assert shown + matcher.finish() == text
        return
    end, stop = found
    assert matched == stop
    assert shown + matcher.finish() == (text[:end] if include else text[: end - len(stop)])


def test_text_after_a_match_is_dropped() -> None:
    matcher = StopMatcher(["END"], include_stop=False)
    assert matcher.feed("one EN") == ("one ", None)
    assert matcher.feed("D two END three") == ("", "END")
    assert matcher.feed("four") == ("", "END")
    assert matcher.finish() == ""


def test_no_stops_hold_nothing_back() -> None:
    matcher = StopMatcher([], include_stop=False)
    assert matcher.feed("anything") == ("anything", None)
    assert matcher.finish() == ""


def test_what_was_held_is_shown_when_it_cannot_match_any_more() -> None:
    matcher = StopMatcher(["\n\nUser:"], include_stop=False)
    assert matcher.feed("hi\n\nUs") == ("hi", None)
    assert matcher.feed("\n\nUser") == ("\n\nUs", None)
    assert matcher.finish() == "\n\nUser"


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_string_is_kept_on_demand(include: bool) -> None:
    matcher = StopMatcher(["</a>"], include_stop=include)
    shown = "".join(matcher.feed(char)[0] for char in "x</a>y") + matcher.finish()
    assert shown == ("x</a>" if include else "x")


def test_the_largest_allowed_set_costs_a_constant_per_character() -> None:
    """The worst text for naive matching: all of it nearly matches. Counted in steps of the automaton, not in time."""
    stops = ["a" * (MAX_STOP_BYTES - 1 - i) + "b" for i in range(MAX_STOPS)]
    matcher = StopMatcher(stops, include_stop=False)
    steps = 0
    automaton = matcher._automaton
    edges = automaton._edges

    class Counted(dict[str, int]):
        def __contains__(self, key: object) -> bool:
            nonlocal steps
            steps += 1
            return super().__contains__(key)

    automaton._edges = [Counted(edge) for edge in edges]
    text = ("a" * 300 + "c") * 20
    shown = "".join(matcher.feed(char)[0] for char in text) + matcher.finish()
    assert shown == text
    assert steps <= 3 * len(text)
