"""The keywords that look at one type each -> sets of values: bounds, patterns, items, properties."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.formats import REFUSED, format_language
from streamgen.grammar.schema.keywords import TYPES
from streamgen.grammar.schema.limits import too_complex
from streamgen.grammar.schema.numbers import Number, simplified
from streamgen.grammar.schema.patterns import PatternError, search_language
from streamgen.grammar.schema.values import (
    ALL_ITEMS,
    FALSE,
    TRUE,
    Array,
    Atom,
    Boolean,
    Contains,
    Goal,
    Null,
    Object,
    Text,
    Unsupported,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamgen.grammar.schema.expand import Expander, Written
    from streamgen.grammar.schema.language import Language

KEYWORDS = frozenset(
    {
        "type",
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "pattern", "format"),
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
        *("contains", "minContains", "maxContains"),
        *("properties", "patternProperties", "additionalProperties", "propertyNames"),
        *("required", "minProperties", "maxProperties"),
    }
)
BOUNDS = (
    ("minimum", "maximum"),
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
    ("minContains", "maxContains"),
)


class Conflict(Struct, frozen=True):
    """Two keywords that no value satisfies: the reason to give where a whole schema turns out empty."""

    pointer: str
    keyword: str
    message: str


def asserted(written: Written, expander: Expander) -> tuple[Atom, ...]:
    """The values that these keywords of one subschema allow."""
    for low, high in BOUNDS:
        if low in written and high in written and written[low] > written[high]:
            where = written.place.pointer or "/"
            expander.conflicts.append(
                Conflict(written.place.pointer, low, f"{where}: {low} {written[low]} is above {high} {written[high]}")
            )
    return tuple(_atoms(written, expander))


def _atoms(written: Written, expander: Expander) -> Iterator[Atom]:
    named = written.get("type", [*TYPES])
    types = [named] if isinstance(named, str) else named
    if "null" in types:
        yield Null()
    if "boolean" in types:
        yield Boolean()
    if "number" in types or "integer" in types:
        number = _number(written, is_integer="number" not in types)
        if number is not None:
            yield number
    if "string" in types:
        text = _text(written, expander)
        if text != lang.NEVER:
            yield Text(text)
    if "array" in types:
        yield _array(written, expander)
    if "object" in types:
        yield _object(written, expander)


def _number(written: Written, *, is_integer: bool) -> Number | None:
    low, is_low_open = _bound(written, "minimum", "exclusiveMinimum", max)
    high, is_high_open = _bound(written, "maximum", "exclusiveMaximum", min)
    unit = written.get("multipleOf")
    return simplified(
        Number(
            low=low,
            is_low_open=is_low_open,
            high=high,
            is_high_open=is_high_open,
            is_integer=is_integer or None,
            multiples=() if unit is None else (Decimal(unit),),
            pointer=written.place.pointer,
        )
    )


def _bound(written: Written, closed: str, opened: str, stricter: Any) -> tuple[Decimal | None, bool]:
    """The stricter of two bounds, and whether it is the open one; draft 4 writes the open one as a flag."""
    bound, open_bound = written.get(closed), written.get(opened)
    if isinstance(open_bound, bool):
        return (None, False) if bound is None else (Decimal(bound), open_bound)
    if open_bound is None or (bound is not None and bound != open_bound and stricter(bound, open_bound) == bound):
        return (None if bound is None else Decimal(bound)), False
    return Decimal(open_bound), True


def _text(written: Written, expander: Expander) -> Language:
    parts: list[Language] = []
    low, high = _count(written, "minLength") or 0, _count(written, "maxLength")
    if low or high is not None:
        parts.append(_lengths(low, high))
    if "pattern" in written:
        parts.append(pattern_language(written, expander, "pattern", written["pattern"]))
    if "format" in written:
        parts.append(_format(written))
    return lang.both(*parts)


def _lengths(low: int, high: int | None) -> Language:
    if high is not None and low > high:
        return lang.NEVER
    return lang.EMPTY if high == 0 else lang.Repeat(lang.ANY_CHAR, low, high)


def _format(written: Written) -> Language:
    name = written["format"]
    if name in REFUSED:
        raise Unsupported(written.place.pointer, "format", f"the format {name} is not enforced")
    language = format_language(name)
    return lang.ANY if language is None else language


def pattern_language(written: Written, expander: Expander, keyword: str, pattern: str) -> Language:
    """All strings in which a pattern is found.

    Raises:
        SchemaTooComplex: it repeats too often.
        Unsupported: it is not a pattern, or holds what is not supported.
    """
    try:
        language = search_language(pattern)
    except PatternError as error:
        raise Unsupported(written.place.pointer, keyword, f"the pattern holds {error}") from error
    limit = expander.document.limits.max_repeats
    if lang.max_repeats(language) > limit:
        too_complex(f"repetitions in the pattern {written.place.pointer}/{keyword}", "max_repeats", limit)
    return language


def _count(written: Written, keyword: str) -> int | None:
    value = written.get(keyword)
    return None if value is None else int(value)


# --- arrays ------------------------------------------------------------------------------------------------------


def _array(written: Written, expander: Expander) -> Array:
    prefix, rest, num_evaluated = _items(written, expander)
    return Array(
        prefix=prefix,
        rest=rest,
        low=_count(written, "minItems") or 0,
        high=_count(written, "maxItems"),
        contains=_contains(written, expander),
        unique=written.place.pointer if written.get("uniqueItems") else None,
        num_evaluated=num_evaluated,
    )


def _items(written: Written, expander: Expander) -> tuple[tuple[Goal, ...], Goal, int]:
    """Goals of the first items and of the rest, and how many of them that looks at."""
    is_list = isinstance(written.get("items"), list)
    if is_list or expander.draft <= 2019:
        first, following = ("items" if is_list else None), ("additionalItems" if is_list else "items")
    else:
        first, following = "prefixItems", "items"
    prefix = (
        [expander.goal(written.child(first, index)) for index in range(len(written.get(first, ())))] if first else []
    )
    if following not in written:
        return tuple(prefix), TRUE, len(prefix)
    return tuple(prefix), expander.goal(written.child(following)), ALL_ITEMS


def _contains(written: Written, expander: Expander) -> tuple[Contains, ...]:
    if "contains" not in written or expander.draft <= 4:
        return ()
    low, high = (1, None) if expander.draft <= 7 else (_count(written, "minContains"), _count(written, "maxContains"))
    low = 1 if low is None else low
    goal = expander.goal(written.child("contains"))
    return (Contains(goal, low, high, 0, written.place.pointer),) if low or high is not None else ()


# --- objects -----------------------------------------------------------------------------------------------------


def _object(written: Written, expander: Expander) -> Object:
    names = list(written.get("properties", ()))
    patterns = {
        pattern: pattern_language(written, expander, "patternProperties", pattern)
        for pattern in written.get("patternProperties", ())
    }
    clauses = [
        (language, expander.goal(written.child("patternProperties", pattern))) for pattern, language in patterns.items()
    ]
    named = lang.union(lang.words(names), *patterns.values())
    if "additionalProperties" in written:
        clauses.append((lang.negate(named), expander.goal(written.child("additionalProperties"))))
    if "propertyNames" in written and expander.draft > 4:
        clauses.append((lang.negate(_names(written, expander)), FALSE))
    low = _count(written, "minProperties") or 0
    others = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
    return Object(
        properties=tuple((name, expander.goal(written.child("properties", name))) for name in names),
        clauses=tuple(clause for clause in clauses if clause[1] != TRUE),
        required=tuple(dict.fromkeys(written.get("required", ()))),
        some=(lang.ANY,) if low == 1 else (),
        low=low if low > 1 else 0,
        high=_count(written, "maxProperties"),
        counts_at=written.place.pointer,
        is_closed=expander.is_closed and bool(names) and not any(keyword in written for keyword in others),
        evaluated=lang.ANY if "additionalProperties" in written else named,
    )


def _names(written: Written, expander: Expander) -> Language:
    atoms = expander.expand(expander.goal(written.child("propertyNames")))
    return lang.union(*(atom.language for atom in atoms if isinstance(atom, Text)))
