"""Subschemas -> unions of sets of values: the keywords that combine schemas, and the memory of what was combined.

Here `allOf` is intersection, `anyOf` union, `not` complement, and everything else of that kind - `oneOf`, `if`,
`dependentSchemas`, `$ref` - is said by those three. Elements of arrays and objects are not entered: they stay goals,
so that recursion through them ends.
"""

from __future__ import annotations

from decimal import Decimal
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

from streamgen.errors import SchemaError
from streamgen.grammar.schema import document as documents
from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.assertions import KEYWORDS, Conflict, asserted
from streamgen.grammar.schema.emptiness import Emptiness, StillOpen
from streamgen.grammar.schema.limits import too_complex
from streamgen.grammar.schema.numbers import Number
from streamgen.grammar.schema.values import (
    ALL_ITEMS,
    ANYTHING,
    FALSE,
    TRUE,
    Array,
    Atom,
    Boolean,
    Goal,
    Null,
    Object,
    Text,
    Unsupported,
    both_goals,
    intersect,
    item_goal,
    outside,
    unite,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from streamgen.grammar.schema.document import Document, Place

REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
COMBINING = (
    *REFERENCES,
    *("allOf", "anyOf", "oneOf", "not", "if", "const", "enum", documents.CONSTANT),
    *("dependentRequired", "dependentSchemas", "dependencies"),
)
# Beyond this many branches `unevaluated*` would look at too many combinations of them.
MAX_TRACKED_BRANCHES = 5


class Written(dict[str, Any]):
    """The keywords of one subschema that count, in their order, and where they stand."""

    def __init__(self, place: Place, keywords: dict[str, Any], document: Document) -> None:
        super().__init__(keywords)
        self.place = place
        self._document = document

    def child(self, *path: str | int) -> Place:
        """The subschema that a path leads to."""
        return self._document.child(self.place, *path)


class Expander:
    """What the goals of one schema mean.

    is_closed  whether objects that list properties have no others
    conflicts  bounds found that contradict each other
    ignored    (pointer, keyword) pairs that are read as if they were not there
    """

    def __init__(self, document: Document, *, is_closed: bool, ignored: frozenset[tuple[str, str]]) -> None:
        self.document = document
        self.draft = document.draft
        self.is_closed = is_closed
        self._ignored = ignored
        self._expanded: dict[Goal, tuple[Atom, ...]] = {}
        self._goals: dict[int, Goal] = {}
        self._open: dict[Goal, int] = {}
        self._followed: set[str] = set()
        self.emptiness = Emptiness(self)
        self.conflicts: list[Conflict] = []

    def written(self, place: Place) -> Written:
        """A subschema's keywords."""
        schema = place.schema
        if self.draft <= 7 and "$ref" in schema:
            schema = {"$ref": schema["$ref"]}
        known = {
            keyword: value
            for keyword, value in schema.items()
            if self._is_known(keyword) and (place.pointer, keyword) not in self._ignored
        }
        return Written(place, known, self.document)

    def _is_known(self, keyword: str) -> bool:
        if keyword in ("$dynamicRef", "prefixItems"):
            return self.draft >= 2020
        if keyword == "$recursiveRef":
            return self.draft == 2019
        if keyword in ("dependentRequired", "dependentSchemas", "unevaluatedProperties", "unevaluatedItems"):
            return self.draft >= 2019
        if keyword in ("if", "then", "else"):
            return self.draft >= 7
        if keyword in ("const", "contains", "propertyNames"):
            return self.draft >= 6
        return keyword in KEYWORDS or keyword in COMBINING

    def goal(self, place: Place) -> Goal:
        """The goal that a subschema sets, straight from where its reference leads if it is nothing else."""
        if place.id not in self._goals:
            self._goals[place.id] = self._find_goal(place)
        return self._goals[place.id]

    def _find_goal(self, place: Place) -> Goal:
        seen: set[int] = set()
        while True:
            if isinstance(place.schema, bool):
                return TRUE if place.schema else FALSE
            if not isinstance(place.schema, dict):
                raise SchemaError(f"{place.pointer}: expected a schema (an object or a boolean)", pointer=place.pointer)
            written = self.written(place)
            if not written:
                return TRUE
            if list(written) != ["$ref"] or place.id in seen:
                return (place.id,)
            seen.add(place.id)
            place = self._target(written, "$ref")

    def _target(self, written: Written, keyword: str) -> Place:
        place = self.document.resolve(written.place, keyword)
        self._followed.add(place.pointer)
        if len(self._followed) > self.document.limits.max_refs:
            too_complex("references", "max_refs", self.document.limits.max_refs)
        return place

    def expand(self, goal: Goal) -> tuple[Atom, ...]:
        """The union of sets that a goal means.

        Raises:
            SchemaError: a subschema is its own condition.
            SchemaTooComplex: it falls into too many sets.
            Unsupported: a keyword on the way is not enforced.
        """
        found = self._expanded.get(goal)
        if found is not None:
            return found
        if goal in self._open:
            if self._open[goal] < self.emptiness.depth:
                raise StillOpen
            pointer = self.document.place(abs(goal[0])).pointer
            raise SchemaError(f"{pointer or '/'}: the schema refers to itself without a base case", pointer=pointer)
        self._open[goal] = self.emptiness.depth
        try:
            found = self._combine(goal)
        finally:
            del self._open[goal]
        self._remember(goal, found)
        return found

    def _remember(self, goal: Goal, found: tuple[Atom, ...]) -> None:
        limits = self.document.limits
        if len(found) > limits.max_alternatives:
            too_complex("alternatives in one place", "max_alternatives", limits.max_alternatives)
        if len(self._expanded) > limits.max_subschemas:
            too_complex("combinations of subschemas", "max_subschemas", limits.max_subschemas)
        self._expanded[goal] = found

    def _combine(self, goal: Goal) -> tuple[Atom, ...]:
        if goal == FALSE:
            return ()
        if len(goal) == 1:
            return self._negative(-goal[0]) if goal[0] < 0 else self._positive(self.document.place(goal[0]))
        known = self._expanded.get(goal[:-1])
        if known is not None:
            return self.meet(known, self.expand(goal[-1:]))
        return self._all_of(ANYTHING, ((number,) for number in goal))

    def meet(self, left: tuple[Atom, ...], right: tuple[Atom, ...]) -> tuple[Atom, ...]:
        """The intersection of two unions, within bounds and without what is empty."""
        if left == ANYTHING or right == ANYTHING:
            return right if left == ANYTHING else left
        met = (intersect(a, b) for a in left for b in right)
        return self._united(atom for atom in met if atom is not None and not self.emptiness.is_atom_empty(atom))

    def subtract(self, left: tuple[Atom, ...], right: tuple[Atom, ...], place: Place, keyword: str) -> tuple[Atom, ...]:
        """What is in one union and not in the other. What cannot be said is blamed on the keyword that asks for it."""
        for taken in right:
            kept: list[Atom] = []
            for atom in left:
                shared = intersect(atom, taken)
                if shared is None or self.emptiness.is_atom_empty(shared):
                    kept.append(atom)
                else:
                    kept.extend(self.meet((atom,), outside(taken, place.pointer, keyword)))
            left = self._united(kept)
        return left

    def _united(self, atoms: Iterable[Atom]) -> tuple[Atom, ...]:
        limit = self.document.limits.max_alternatives
        found = unite(islice(atoms, limit + 1))
        if len(found) > limit:
            too_complex("alternatives in one place", "max_alternatives", limit)
        return found

    def _negative(self, number: int) -> tuple[Atom, ...]:
        return self.subtract(ANYTHING, self.expand((number,)), self.document.place(number), "not")

    def _positive(self, place: Place) -> tuple[Atom, ...]:
        written = self.written(place)
        found = ANYTHING
        for keyword in self._steps(written):
            found = self._step(written, keyword, found)
        if "unevaluatedProperties" in written or "unevaluatedItems" in written:
            found = tuple(self._restrict_unevaluated(written, atom) for atom in found)
        return found

    def _steps(self, written: Written) -> Iterator[str]:
        """The keywords in the order written, which decides the order of properties; one for all that look at types."""
        plain = [keyword for keyword in written if keyword in KEYWORDS]
        first = next((keyword for keyword in plain if keyword in ("properties", "additionalProperties")), None)
        first = first or (plain[0] if plain else None)
        return (keyword for keyword in written if keyword == first or keyword in COMBINING)

    def _step(self, written: Written, keyword: str, found: tuple[Atom, ...]) -> tuple[Atom, ...]:
        """What of some values a keyword allows."""
        match keyword:
            case "$ref" | "$dynamicRef" | "$recursiveRef":
                return self.meet(found, self._reference(written, keyword))
            case "allOf":
                return self._all_of(found, self._branches(written, keyword))
            case "anyOf":
                return self.meet(found, self._any_of(written))
            case "oneOf":
                return self._one_of(written, found)
            case "not":
                goal = self.goal(written.child("not"))
                return self.subtract(found, self.expand(goal), written.place, "not")
            case "if":
                return self._if(written, found)
            case "const" | documents.CONSTANT:
                return self.meet(found, self._constants([written[keyword]], written, "const"))
            case "enum":
                return self.meet(found, self._enum(written))
            case "dependentRequired" | "dependentSchemas" | "dependencies":
                return self._dependent(written, keyword, found)
            case _:
                return self.meet(found, asserted(written, self))

    def _all_of(self, found: tuple[Atom, ...], goals: Iterable[Goal]) -> tuple[Atom, ...]:
        for goal in goals:
            found = self.meet(found, self.expand(goal))
        return found

    def _branches(self, written: Written, keyword: str) -> list[Goal]:
        return [self.goal(written.child(keyword, index)) for index in range(len(written[keyword]))]

    def _reference(self, written: Written, keyword: str) -> tuple[Atom, ...]:
        if keyword == "$recursiveRef" and self.document.is_ambiguous_anchor(""):
            raise Unsupported(written.place.pointer, keyword, "what it refers to depends on the way there")
        if keyword == "$dynamicRef" and self.document.is_ambiguous_anchor(written[keyword].partition("#")[2]):
            raise Unsupported(written.place.pointer, keyword, "what it refers to depends on the way there")
        return self.expand(self.goal(self._target(written, keyword)))

    def _any_of(self, written: Written) -> tuple[Atom, ...]:
        goals = self._branches(written, "anyOf")
        if not self.document.uses_unevaluated:
            return unite(atom for goal in goals for atom in self.expand(goal))
        # All branches that an instance satisfies count as having looked at its properties, so they are met as well.
        if len(goals) > MAX_TRACKED_BRANCHES:
            raise Unsupported(written.place.pointer, "anyOf", "so many branches beside unevaluated* are not enforced")
        subsets = (subset for size in range(1, len(goals) + 1) for subset in combinations(goals, size))
        return unite(atom for subset in subsets for atom in self._all_of(ANYTHING, subset))

    def _one_of(self, written: Written, found: tuple[Atom, ...]) -> tuple[Atom, ...]:
        goals = self._branches(written, "oneOf")
        alone: list[Atom] = []
        for index, goal in enumerate(goals):
            kept = self.meet(found, self.expand(goal))
            for other in (*goals[:index], *goals[index + 1 :]):
                kept = self.subtract(kept, self.expand(other), written.place, "oneOf") if kept else kept
            alone.extend(kept)
        return self._united(alone)

    def _if(self, written: Written, found: tuple[Atom, ...]) -> tuple[Atom, ...]:
        if "then" not in written and "else" not in written and not self.document.uses_unevaluated:
            return found
        condition = self.expand(self.goal(written.child("if")))
        met, unmet = self.meet(found, condition), self.subtract(found, condition, written.place, "if")
        if "then" in written:
            met = self.meet(met, self.expand(self.goal(written.child("then"))))
        if "else" in written:
            unmet = self.meet(unmet, self.expand(self.goal(written.child("else"))))
        return self._united((*met, *unmet))

    def _dependent(self, written: Written, keyword: str, found: tuple[Atom, ...]) -> tuple[Atom, ...]:
        for name, wanted in written[keyword].items():
            without, holding = Object(properties=((name, FALSE),)), Object(required=(name,))
            absent = self.meet(found, tuple(without if isinstance(atom, Object) else atom for atom in ANYTHING))
            if isinstance(wanted, list):
                present = self.meet(found, (Object(required=tuple(dict.fromkeys((name, *wanted)))),))
            else:
                present = self.meet(found, (holding,))
                present = self.meet(present, self.expand(self.goal(written.child(keyword, name))))
            found = self._united((*absent, *present))
        return found

    def _enum(self, written: Written) -> tuple[Atom, ...]:
        if not written["enum"]:
            pointer = written.place.pointer
            raise SchemaError(f"{pointer}/enum: expected at least one value, got none", pointer=pointer, keyword="enum")
        return self._constants(written["enum"], written, "enum")

    def _constants(self, values: list[Any], written: Written, keyword: str) -> tuple[Atom, ...]:
        texts = [value for value in values if isinstance(value, str)]
        truths = tuple(dict.fromkeys(value for value in values if isinstance(value, bool)))
        is_number = [isinstance(value, int | Decimal) and not isinstance(value, bool) for value in values]
        numbers = tuple(Decimal(value) for value, is_one in zip(values, is_number, strict=True) if is_one)
        found: list[Atom] = [Text(lang.words(texts))] if texts else []
        found.extend([Boolean(truths)] if truths else [])
        found.extend([Number(choices=tuple(dict.fromkeys(numbers)))] if numbers else [])
        pointer = f"{written.place.pointer}/{keyword}"
        for value in values:
            if value is None:
                found.append(Null())
            elif isinstance(value, list | dict):
                found.append(self._structure(value, pointer))
        return unite(found)

    def _structure(self, value: Any, pointer: str) -> Atom:
        """The set of one array or object."""
        if isinstance(value, list):
            items = tuple(self._constant_goal(item, pointer) for item in value)
            return Array(prefix=items, rest=FALSE, low=len(items), high=len(items))
        properties = tuple((name, self._constant_goal(part, pointer)) for name, part in value.items())
        others = (lang.negate(lang.words(value)), FALSE)
        return Object(properties=properties, clauses=(others,), required=tuple(value))

    def _constant_goal(self, value: Any, pointer: str) -> Goal:
        return (self.document.constant(value, pointer).id,)

    def _restrict_unevaluated(self, written: Written, atom: Atom) -> Atom:
        if isinstance(atom, Object) and "unevaluatedProperties" in written:
            goal = self.goal(written.child("unevaluatedProperties"))
            clause = ((lang.negate(atom.evaluated), goal),) if goal != TRUE else ()
            return intersect(atom, Object(clauses=clause, evaluated=lang.ANY)) or atom
        if isinstance(atom, Array) and "unevaluatedItems" in written:
            return self._restrict_items(written, atom)
        return atom

    def _restrict_items(self, written: Written, atom: Array) -> Atom:
        if atom.contains:
            raise Unsupported(written.place.pointer, "unevaluatedItems", "beside contains it is not enforced")
        if atom.num_evaluated == ALL_ITEMS:
            return atom
        goal = self.goal(written.child("unevaluatedItems"))
        prefix = tuple(
            item_goal(atom, index) if index < atom.num_evaluated else both_goals(item_goal(atom, index), goal)
            for index in range(len(atom.prefix))
        )
        return Array(
            prefix=prefix,
            rest=both_goals(atom.rest, goal),
            low=atom.low,
            high=atom.high,
            unique=atom.unique,
            num_evaluated=ALL_ITEMS,
        )
