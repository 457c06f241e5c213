"""Sets of JSON values of one type, and their algebra: what a schema becomes once its keywords are combined.

A schema is a union of such sets. Those of arrays and objects name what their elements must be by goals: tuples of
numbers of places in the schema, all of which an element satisfies, or does not where the number is negative. So a set
is finite however deep, or recursive, the values are.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.language import ANY, Language
from streamgen.grammar.schema.numbers import Number, complement_number, intersect_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Goal: TypeAlias = tuple[int, ...]
TRUE: Goal = ()
FALSE: Goal = (0,)
ALL_ITEMS = sys.maxsize


class Unsupported(Exception):
    """A keyword that no grammar here enforces exactly."""

    def __init__(self, pointer: str, keyword: str, reason: str) -> None:
        super().__init__(reason)
        self.pointer = pointer
        self.keyword = keyword
        self.reason = reason


class Null(Struct, frozen=True):
    """null."""


class Boolean(Struct, frozen=True):
    """true, false, or both."""

    values: tuple[bool, ...] = (True, False)


class Text(Struct, frozen=True):
    """Strings of a language."""

    language: Language = ANY


class Contains(Struct, frozen=True):
    """Between low and high items from `start` on satisfy a goal."""

    goal: Goal
    low: int
    high: int | None
    start: int
    pointer: str


class Array(Struct, frozen=True):
    """Arrays.

    prefix   goals of the first items, as far as there are any    rest   of all that follow
    low, high   how many items
    unique   where it says that no item equals another; None: it does not
    num_evaluated   items from the first on that some keyword has looked at
    """

    prefix: tuple[Goal, ...] = ()
    rest: Goal = TRUE
    low: int = 0
    high: int | None = None
    contains: tuple[Contains, ...] = ()
    unique: str | None = None
    num_evaluated: int = 0


class Object(Struct, frozen=True):
    """Objects.

    properties  goals of named properties, in their order
    clauses     goals of all properties whose names are in a language, named ones too
    required    names that must be there    some   languages of which a name must be there
    low, high   how many properties         counts_at   where that is written
    is_closed   whether a property that neither `properties` nor a clause speaks of is forbidden
    evaluated   names that some keyword has looked at
    """

    properties: tuple[tuple[str, Goal], ...] = ()
    clauses: tuple[tuple[Language, Goal], ...] = ()
    required: tuple[str, ...] = ()
    some: tuple[Language, ...] = ()
    low: int = 0
    high: int | None = None
    counts_at: str = ""
    is_closed: bool = False
    evaluated: Language = lang.NEVER


Atom: TypeAlias = Null | Boolean | Number | Text | Array | Object
ANYTHING: tuple[Atom, ...] = (Null(), Boolean(), Number(), Text(), Array(), Object())


def both_goals(left: Goal, right: Goal) -> Goal:
    """What satisfies both."""
    if FALSE in (left, right):
        return FALSE
    merged = tuple(dict.fromkeys(left + right))
    return FALSE if any(-number in merged for number in merged) else merged


def negations(goal: Goal) -> list[Goal]:
    """Goals of which any is satisfied by what does not satisfy this one."""
    return [TRUE] if goal == FALSE else [(-number,) for number in goal]


def intersect(left: Atom, right: Atom) -> Atom | None:
    """The values in both sets; None if there are none for sure."""
    if type(left) is not type(right):
        return None
    match left, right:
        case Boolean(), Boolean():
            values = tuple(value for value in left.values if value in right.values)
            return Boolean(values) if values else None
        case Number(), Number():
            return intersect_numbers(left, right)
        case Text(), Text():
            language = lang.both(left.language, right.language)
            return None if language == lang.NEVER else Text(language)
        case Array(), Array():
            return _intersect_arrays(left, right)
        case Object(), Object():
            return _intersect_objects(left, right)
        case _:
            return left


def _intersect_arrays(left: Array, right: Array) -> Array | None:
    count = max(len(left.prefix), len(right.prefix))
    high = min((h for h in (left.high, right.high) if h is not None), default=None)
    low = max(left.low, right.low)
    if high is not None and low > high:
        return None
    return Array(
        prefix=tuple(both_goals(item_goal(left, index), item_goal(right, index)) for index in range(count)),
        rest=both_goals(left.rest, right.rest),
        low=low,
        high=high,
        contains=tuple(dict.fromkeys(left.contains + right.contains)),
        unique=left.unique if right.unique is None else right.unique,
        num_evaluated=max(left.num_evaluated, right.num_evaluated),
    )


def item_goal(array: Array, index: int) -> Goal:
    """What the item at an index must be."""
    return array.prefix[index] if index < len(array.prefix) else array.rest


def _intersect_objects(left: Object, right: Object) -> Object | None:
    high = min((h for h in (left.high, right.high) if h is not None), default=None)
    low = max(left.low, right.low)
    required = tuple(dict.fromkeys(left.required + right.required))
    if high is not None and max(low, len(required)) > high:
        return None
    properties = dict(left.properties)
    for name, goal in right.properties:
        properties[name] = both_goals(properties.get(name, TRUE), goal)
    return Object(
        properties=tuple(properties.items()),
        clauses=tuple(dict.fromkeys(left.clauses + right.clauses)),
        required=required,
        some=tuple(dict.fromkeys(left.some + right.some)),
        low=low,
        high=high,
        counts_at=left.counts_at or right.counts_at,
        is_closed=left.is_closed or right.is_closed,
        evaluated=lang.union(left.evaluated, right.evaluated),
    )


def unite(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    """A union without repetition, its strings in one."""
    unique = tuple(dict.fromkeys(atoms))
    texts = [atom.language for atom in unique if isinstance(atom, Text)]
    if len(texts) < 2:
        return unique
    merged = Text(lang.union(*texts))
    first = next(index for index, atom in enumerate(unique) if isinstance(atom, Text))
    rest = [atom for atom in unique if not isinstance(atom, Text)]
    return (*rest[:first], merged, *rest[first:])


def outside(atom: Atom, pointer: str, keyword: str) -> tuple[Atom, ...]:
    """The values of an atom's own type that it does not hold. Closedness counts for nothing: no schema says it.

    Raises:
        Unsupported: no union of sets says that; `pointer` and `keyword` are whom to blame.
    """
    match atom:
        case Null():
            return ()
        case Boolean():
            values = tuple(value for value in (True, False) if value not in atom.values)
            return (Boolean(values),) if values else ()
        case Number():
            return tuple(complement_number(atom))
        case Text():
            language = lang.negate(atom.language)
            return () if language == lang.NEVER else (Text(language),)
        case Array():
            return tuple(_outside_array(atom, pointer, keyword))
        case Object():
            return tuple(_outside_object(atom, pointer, keyword))


def _outside_array(array: Array, pointer: str, keyword: str) -> Iterator[Array]:
    if array.unique is not None:
        raise Unsupported(pointer, keyword, "arrays that repeat an item are not a grammar")
    for index, goal in enumerate(array.prefix):
        for negation in negations(goal):
            yield Array(prefix=((TRUE,) * index + (negation,)), low=index + 1)
    start = len(array.prefix)
    if array.rest == FALSE:
        yield Array(low=start + 1)
    else:
        for negation in negations(array.rest):
            yield Array(contains=(Contains(negation, 1, None, start, pointer),), low=start + 1)
    if array.low:
        yield Array(high=array.low - 1)
    if array.high is not None:
        yield Array(low=array.high + 1)
    for part in array.contains:
        if part.low:
            yield Array(contains=(Contains(part.goal, 0, part.low - 1, part.start, pointer),))
        if part.high is not None:
            yield Array(contains=(Contains(part.goal, part.high + 1, None, part.start, pointer),))


def _outside_object(found: Object, pointer: str, keyword: str) -> Iterator[Object]:
    for name, goal in found.properties:
        for negation in negations(goal):
            yield Object(properties=((name, negation),), required=(name,))
    for name in found.required:
        yield Object(properties=((name, FALSE),))
    for names, goal in found.clauses:
        if goal != FALSE:
            raise Unsupported(pointer, keyword, "an unnamed property with a wrong value is not a grammar")
        yield Object(some=(names,))
    for names in found.some:
        yield Object(clauses=((names, FALSE),))
    if found.low:
        yield Object(high=found.low - 1, counts_at=pointer)
    if found.high is not None:
        yield Object(low=found.high + 1, counts_at=pointer)
