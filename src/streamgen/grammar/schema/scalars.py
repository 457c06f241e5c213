"""Sets of numbers and strings -> tokens of JSON text."""

from __future__ import annotations

import json
from decimal import Decimal
from math import lcm
from typing import TYPE_CHECKING

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.numbers import (
    MAX_DIGITS,
    Number,
    choice_text,
    finite_choices,
    integer_bounds,
    interval_text,
    multiple_text,
)
from streamgen.grammar.schema.patterns import full_language
from streamgen.grammar.schema.productions import JsonRule, Node, Token
from streamgen.grammar.schema.values import Unsupported

if TYPE_CHECKING:
    from streamgen.grammar.schema.language import Language

MAX_EXCLUDED = 32
MAX_SCALE = 8
# Without exponents: what multiples and their complements are told apart in.
PLAIN = r"-?(?:0|[1-9][0-9]{0,23})(?:\.[0-9]{1,24})?"
NOT_WHOLE = r"-?(?:(?:0|[1-9][0-9]{0,23})\.[0-9]{0,23}[1-9]|[1-9](?:\.[0-9]{1,24})?[eE]-[0-9]{1,3})"


def number_node(number: Number, *, has_point: bool) -> Node:
    """The text of a set of numbers.

    has_point  whether an integer may be written with `.0`

    Raises:
        Unsupported: its multiples are not.
    """
    choices = finite_choices(number)
    if choices is not None:
        return Token(lang.union(*(choice_text(value, has_point=has_point) for value in choices)))
    unit = _unit(number)
    if unit is not None and multiple_text(unit, has_point=has_point) is None:
        return _json_rule(number, unit)
    text = lang.union(*(_text(number, piece, unit, has_point=has_point) for piece in _pieces(number)))
    if text == lang.NEVER:
        raise Unsupported(number.pointer, "minimum", f"numbers of more than {MAX_DIGITS} digits are not written")
    return Token(text)


def _text(number: Number, piece: Number, unit: Decimal | None, *, has_point: bool) -> Language:
    if number.multiples or number.non_multiples:
        return _multiples(number, piece, unit, has_point=has_point)
    return _piece_text(piece, has_point=has_point)


def _pieces(number: Number) -> list[Number]:
    """The intervals that the excluded numbers leave; how a number is spelled then never matters."""
    if len(number.excluded) > MAX_EXCLUDED:
        raise Unsupported(number.pointer, "not", f"more than {MAX_EXCLUDED} excluded numbers are not enforced")
    pieces = [Number(number.low, number.is_low_open, number.high, number.is_high_open, number.is_integer)]
    for value in sorted(number.excluded):
        last = pieces[-1]
        if (last.low is None or value >= last.low) and (last.high is None or value <= last.high):
            below = Number(last.low, last.is_low_open, value, True, last.is_integer)
            pieces[-1:] = [below, Number(value, True, last.high, last.is_high_open, last.is_integer)]
    return [piece for piece in pieces if not _is_inverted(piece)]


def _is_inverted(piece: Number) -> bool:
    if piece.low is None or piece.high is None:
        return False
    return piece.low > piece.high or (piece.low == piece.high and (piece.is_low_open or piece.is_high_open))


def _piece_text(piece: Number, *, has_point: bool) -> Language:
    text = interval_text(piece, has_point=has_point)
    return lang.both(text, full_language(NOT_WHOLE)) if piece.is_integer is False else text


def _unit(number: Number) -> Decimal | None:
    """The least common multiple of all that the numbers are multiples of."""
    if not number.multiples:
        return None
    scale = max(max(-int(unit.normalize().as_tuple().exponent), 0) for unit in number.multiples)
    if scale > MAX_SCALE:
        raise Unsupported(
            number.pointer, "multipleOf", f"more than {MAX_SCALE} digits after the point are not enforced"
        )
    return Decimal(lcm(*(int(unit.scaleb(scale)) for unit in number.multiples))).scaleb(-scale)


def _multiples(number: Number, piece: Number, unit: Decimal | None, *, has_point: bool) -> Language:
    parts: list[Language] = []
    if piece != Number():
        parts.append(_piece_text(piece, has_point=has_point))
    if unit is not None:
        parts.append(_expect(number, multiple_text(unit, has_point=has_point)))
    # The others with every spelling, or one of them would remain.
    parts.extend(lang.negate(_expect(number, multiple_text(u, has_point=True))) for u in number.non_multiples)
    return lang.both(full_language(PLAIN), *parts) if len(parts) != 1 or number.non_multiples else parts[0]


def _expect(number: Number, text: Language | None) -> Language:
    if text is None:
        raise Unsupported(number.pointer, "multipleOf", "numbers that are not multiples of this one are not enforced")
    return text


def _json_rule(number: Number, unit: Decimal) -> JsonRule:
    """Multiples that no few last digits tell: llguidance divides while it reads."""
    coefficient = int(unit.scaleb(MAX_SCALE).normalize())
    if number.excluded or number.non_multiples or number.is_integer is False or coefficient >= 2**32 * 10**MAX_SCALE:
        raise Unsupported(number.pointer, "multipleOf", "it is not enforced beside these other keywords")
    low, high = integer_bounds(number)
    if any(bound is not None and abs(bound) >= 10**15 for bound in (low, high)):
        raise Unsupported(number.pointer, "multipleOf", "it is not enforced beside such large bounds")
    schema: dict[str, object] = {"type": "integer" if number.is_integer else "number", "multipleOf": _json(unit)}
    for bound, is_open, name in (
        (number.low, number.is_low_open, "inimum"),
        (number.high, number.is_high_open, "aximum"),
    ):
        letter = "m" if not is_open else "exclusiveM"
        schema |= {} if bound is None else {f"{letter}{name}": _json(bound)}
    return JsonRule(json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}}))


def _json(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() else float(value)
