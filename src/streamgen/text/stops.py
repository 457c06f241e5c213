"""Stop strings: ends a text at the first stop string in it, and never shows a part of one.

Text that could still become a stop string is held back, and not a character more: what is held is the longest suffix
that some stop string begins with. That is the state of an Aho-Corasick automaton, so each character costs a constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in a text that arrives in parts. Owned by whoever feeds it; one per sequence.

    The stop string that ends first wins; of several that end at one place, the longest.

    include_stop   whether the text that is handed out ends with the stop string or before it
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        self._include_stop = include_stop
        self._automaton = _Automaton([stop for stop in stops if stop])
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take more text; return what can be shown of it, and the stop string that ended the text, if one did.

        After a match everything further is dropped and the same stop string is answered.
        """
        if self._matched is not None:
            return "", self._matched
        automaton = self._automaton
        if self._state == 0 and automaton.first_chars.isdisjoint(text):
            return text, None
        state = self._state
        for index, char in enumerate(text):
            state = automaton.next_state(state, char)
            stop = automaton.stops[state]
            if stop is not None:
                return self._end(self._held + text[: index + 1], stop), stop
        self._state = state
        text = self._held + text
        shown = len(text) - automaton.depths[state]
        self._held = text[shown:]
        return text[:shown], None

    def finish(self) -> str:
        """The text ended: what was held back can be shown after all."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _end(self, text: str, stop: str) -> str:
        self._matched, self._held = stop, ""
        return text if self._include_stop else text[: len(text) - len(stop)]


class _Automaton:
    """Aho-Corasick: state = the longest suffix of the text that some stop string begins with; 0 is the empty one.

    depths[state]   length of that suffix
    stops[state]    the longest stop string that the text ends with, or None
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._edges: list[dict[str, int]] = [{}]
        self._fallbacks = [0]
        self.depths = [0]
        self.stops: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self.first_chars = frozenset(self._edges[0])

    def next_state(self, state: int, char: str) -> int:
        """The state after one more character."""
        edges = self._edges
        while state and char not in edges[state]:
            state = self._fallbacks[state]
        return edges[state].get(char, 0)

    def _insert(self, stop: str) -> None:
        state = 0
        for char in stop:
            following = self._edges[state].get(char)
            if following is None:
                following = len(self._edges)
                self._edges[state][char] = following
                self._edges.append({})
                self._fallbacks.append(0)
                self.depths.append(self.depths[state] + 1)
                self.stops.append(None)
            state = following
        self.stops[state] = stop

    def _link(self) -> None:
        """Set each state's fallback: the longest proper suffix that is a state too. Shorter states come first."""
        for state in sorted(range(len(self._edges)), key=self.depths.__getitem__):
            for char, following in self._edges[state].items():
                if state:
                    self._fallbacks[following] = self.next_state(self._fallbacks[state], char)
                if self.stops[following] is None:
                    self.stops[following] = self.stops[self._fallbacks[following]]
