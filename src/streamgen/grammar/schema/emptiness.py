"""Whether a set of values is empty: for pruning alternatives, and for telling disjoint ones.

Values are finite, so a recursive set is empty unless a value can be built without going round: while a goal is being
looked at it counts as empty. An answer that rests on such an assumption, or on not being able to ask, is not kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.values import (
    FALSE,
    TRUE,
    Array,
    Atom,
    Goal,
    Object,
    Text,
    both_goals,
)

if TYPE_CHECKING:
    from streamgen.grammar.schema.expand import Expander

MAX_STEPS = 20_000


class StillOpen(Exception):
    """A goal cannot be asked about, because asking is part of expanding it."""


class Emptiness:
    """Answers about the goals of one expander.

    depth  how many questions are being answered inside of each other
    """

    def __init__(self, expander: Expander) -> None:
        self._expander = expander
        self.depth = 0
        self._known: dict[Goal, bool] = {}
        self._looking: set[Goal] = set()
        self._has_assumed = False
        self._has_guessed = False
        self._names: dict[tuple[tuple[tuple[lang.Language, Goal], ...], str], Goal] = {}
        self._num_steps = 0

    def is_empty(self, goal: Goal) -> bool:
        """Whether it is certain that nothing satisfies a goal."""
        if goal in (TRUE, FALSE):
            return goal == FALSE
        if goal in self._known:
            return self._known[goal]
        if goal in self._looking:
            self._has_assumed = True
            return True
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            self._has_guessed = True
            return False
        return self._look(goal)

    def _look(self, goal: Goal) -> bool:
        outer = self._has_assumed, self._has_guessed
        self._has_assumed = self._has_guessed = False
        self._looking.add(goal)
        self.depth += 1
        try:
            found = all(self.is_atom_empty(atom) for atom in self._expander.expand(goal))
        except StillOpen:
            found, self._has_guessed = False, True
        finally:
            self.depth -= 1
            self._looking.discard(goal)
        if not self._looking:
            self._has_assumed = False
        if not (self._has_assumed if found else self._has_guessed):
            self._known[goal] = found
            self._has_assumed = self._has_guessed = False
        self._has_assumed |= outer[0]
        self._has_guessed |= outer[1]
        return found

    def is_atom_empty(self, atom: Atom) -> bool:
        """Whether it is certain that a set is empty."""
        match atom:
            case Text():
                return lang.is_empty(atom.language)
            case Array():
                return self._is_array_empty(atom)
            case Object():
                return self._is_object_empty(atom)
            case _:
                return False

    def _is_array_empty(self, array: Array) -> bool:
        if array.high is not None and array.low > array.high:
            return True
        if any(self.is_empty(goal) for goal in array.prefix[: array.low]):
            return True
        if array.low > len(array.prefix) and self.is_empty(array.rest):
            return True
        for part in array.contains:
            goals = [*array.prefix[part.start :], array.rest]
            if part.low and all(self.is_empty(both_goals(goal, part.goal)) for goal in goals):
                return True
            if part.high is not None and part.low > part.high:
                return True
        return False

    def _is_object_empty(self, found: Object) -> bool:
        if any(self.is_empty(self.property_goal(found, name)) for name in found.required):
            return True
        for names in found.some:
            forbidden = lang.union(*(language for language, goal in found.clauses if goal == FALSE))
            possible = lang.both(names, lang.negate(forbidden))
            excluded = [name for name, goal in found.properties if goal == FALSE]
            if lang.is_empty(lang.both(possible, lang.negate(lang.words(excluded)))):
                return True
        return found.high is not None and max(found.low, len(found.required)) > found.high

    def property_goal(self, found: Object, name: str) -> Goal:
        """What the property of a name must be."""
        listed = dict(found.properties)
        key = (found.clauses, name)
        if key not in self._names:
            goal = TRUE
            for language, part in found.clauses:
                if lang.matches(language, name):
                    goal = both_goals(goal, part)
            self._names[key] = goal
        return both_goals(listed.get(name, TRUE), self._names[key])
