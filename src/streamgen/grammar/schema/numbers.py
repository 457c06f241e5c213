"""Numbers of a schema: intervals, multiples and finite sets of them, and the text that spells exactly those.

Text is bounded so that no model writes digits for ever: 24 digits before the point, 24 after it, and exponents whose
value stays finite. Within that everything is exact on the decimal text, and on the double that a reader makes of it:
an exclusive bound becomes the next double's own spelling, since digits beyond that would round onto the bound.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from msgspec import Struct

from streamgen.grammar.schema import language as lang
from streamgen.grammar.schema.language import EMPTY, NEVER, Language
from streamgen.grammar.schema.patterns import full_language

if TYPE_CHECKING:
    from collections.abc import Callable

    _Between: TypeAlias = Callable[[Decimal, Decimal | None], Language]

MAX_DIGITS = 24
MAX_ENUMERATED = 1_000
LARGEST_TEXT = Decimal(10) ** MAX_DIGITS
SMALLEST_TEXT = Decimal(1).scaleb(-MAX_DIGITS)
EXACT_INTEGERS = Decimal(2**53)
# Sums and quotients of bounds that have at most some hundreds of digits.
EXACT = Context(prec=800, Emax=10_000, Emin=-10_000)

DIGIT = lang.one_of("0123456789")
_FRACTION = r"(?:\.[0-9]{1,24})"
_LARGE = r"[eE]\+?(?:1[6-9]|[2-9][0-9]|[12][0-9]{2}|30[0-7])"
_TINY = r"[eE]-0?0?(?:[5-9]|[1-9][0-9]|[12][0-9]{2}|30[0-7])"
ANY_NUMBER = (
    rf"-?(?:(?:0|[1-9][0-9]{{0,23}}){_FRACTION}?(?:[eE](?:-[0-9]{{1,3}}|\+?[0-9]{{1,2}}|\+?1[0-9]{{2}}"
    rf"|\+?2[0-7][0-9]))?|[0-9]{_FRACTION}?[eE]\+?(?:2[89][0-9]|30[0-7]))"
)


class Number(Struct, frozen=True):
    """A set of numbers.

    low, high   its bounds, None where there is none; is_low_open, is_high_open whether the bound itself is outside
    is_integer  True: integers alone; False: none of them; None: both
    multiples, non_multiples   what each is a multiple of, and of what none is
    choices     the only numbers that are allowed; None is all
    excluded    numbers that are not
    pointer     where the bounds were written, for errors
    """

    low: Decimal | None = None
    is_low_open: bool = False
    high: Decimal | None = None
    is_high_open: bool = False
    is_integer: bool | None = None
    multiples: tuple[Decimal, ...] = ()
    non_multiples: tuple[Decimal, ...] = ()
    choices: tuple[Decimal, ...] | None = None
    excluded: tuple[Decimal, ...] = ()
    pointer: str = ""


def intersect_numbers(left: Number, right: Number) -> Number | None:
    """The numbers in both; None if there are none for sure."""
    if left.is_integer is not None and right.is_integer not in (None, left.is_integer):
        return None
    low, is_low_open = max((left.low, left.is_low_open), (right.low, right.is_low_open), key=_low_key)
    high, is_high_open = min((left.high, left.is_high_open), (right.high, right.is_high_open), key=_high_key)
    choices = left.choices if right.choices is None else right.choices
    if left.choices is not None and right.choices is not None:
        choices = tuple(value for value in left.choices if value in right.choices)
    found = Number(
        low=low,
        is_low_open=is_low_open,
        high=high,
        is_high_open=is_high_open,
        is_integer=left.is_integer if right.is_integer is None else right.is_integer,
        multiples=tuple(dict.fromkeys(left.multiples + right.multiples)),
        non_multiples=tuple(dict.fromkeys(left.non_multiples + right.non_multiples)),
        choices=choices,
        excluded=tuple(dict.fromkeys(left.excluded + right.excluded)),
        pointer=left.pointer or right.pointer,
    )
    return simplified(found)


def _low_key(bound: tuple[Decimal | None, bool]) -> tuple[Decimal, bool]:
    return (Decimal("-Infinity") if bound[0] is None else bound[0]), bound[1]


def _high_key(bound: tuple[Decimal | None, bool]) -> tuple[Decimal, bool]:
    return (Decimal("Infinity") if bound[0] is None else bound[0]), not bound[1]


def simplified(number: Number) -> Number | None:
    """The same set with its choices filtered, or None if it is empty for sure."""
    if number.choices is None:
        return None if _has_nothing_between(number) else number
    kept = tuple(value for value in number.choices if contains(number, value))
    return Number(choices=kept, is_integer=number.is_integer) if kept else None


def contains(number: Number, value: Decimal) -> bool:
    """Whether a number is in the set."""
    is_above = number.low is None or value > number.low or (value == number.low and not number.is_low_open)
    is_below = number.high is None or value < number.high or (value == number.high and not number.is_high_open)
    return (
        is_above
        and is_below
        and (number.is_integer is None or (value == value.to_integral_value()) is number.is_integer)
        and all(_divides(unit, value) for unit in number.multiples)
        and not any(_divides(unit, value) for unit in number.non_multiples)
        and (number.choices is None or value in number.choices)
        and value not in number.excluded
    )


def _divides(unit: Decimal, value: Decimal) -> bool:
    return EXACT.remainder(value, unit) == 0


def _has_nothing_between(number: Number) -> bool:
    if number.low is None or number.high is None:
        return False
    if number.low == number.high:
        return not contains(number, number.low)
    if number.is_integer:
        low, high = integer_bounds(number)
        assert low is not None and high is not None
        return low > high or (low == high and not contains(number, Decimal(low)))
    return number.low > number.high


def complement_number(number: Number) -> list[Number]:
    """The numbers that are not in the set, as a union."""
    if number.choices is not None:
        outside = Number(excluded=number.choices)
        return [outside] if number.is_integer is None else [outside, Number(is_integer=not number.is_integer)]
    found = [Number(choices=(value,)) for value in number.excluded]
    if number.low is not None:
        found.append(Number(high=number.low, is_high_open=not number.is_low_open, pointer=number.pointer))
    if number.high is not None:
        found.append(Number(low=number.high, is_low_open=not number.is_high_open, pointer=number.pointer))
    if number.is_integer is not None:
        found.append(Number(is_integer=not number.is_integer))
    found.extend(Number(non_multiples=(unit,), pointer=number.pointer) for unit in number.multiples)
    found.extend(Number(multiples=(unit,), pointer=number.pointer) for unit in number.non_multiples)
    return found


def integer_bounds(number: Number) -> tuple[int | None, int | None]:
    """The least and the greatest integer between the bounds."""
    low = high = None
    if number.low is not None:
        low = math.ceil(number.low)
        low += number.is_low_open and low == number.low
    if number.high is not None:
        high = math.floor(number.high)
        high -= number.is_high_open and high == number.high
    return low, high


def finite_choices(number: Number) -> tuple[Decimal, ...] | None:
    """Its numbers one by one, where they are few."""
    if number.choices is not None:
        return number.choices
    unit = _enumerable_unit(number)
    if unit is None or number.low is None or number.high is None:
        return None
    first, last = math.ceil(EXACT.divide(number.low, unit)), math.floor(EXACT.divide(number.high, unit))
    if last - first > MAX_ENUMERATED:
        return None
    values = (EXACT.multiply(unit, Decimal(factor)) for factor in range(first, last + 1))
    return tuple(value for value in values if contains(number, value))


def _enumerable_unit(number: Number) -> Decimal | None:
    if number.multiples:
        return max(number.multiples)
    return Decimal(1) if number.is_integer and (number.non_multiples or number.excluded) else None


# --- text -------------------------------------------------------------------------------------------------------


def choice_text(value: Decimal, *, has_point: bool) -> Language:
    """The spellings of one number: as its digits, as encoders write a double, and an integer with `.0` if allowed."""
    if value != value.to_integral_value():
        return lang.words([f"{value:f}".rstrip("0"), *_double_text(value)])
    plain = f"{value.to_integral_value():f}"
    options = [plain, f"{plain}.0", *_double_text(value)] if has_point else [plain]
    return lang.words(["0", "-0", "0.0", "-0.0"] if value == 0 and has_point else options)


def _double_text(value: Decimal) -> list[str]:
    number = float(value)
    return [repr(number)] if math.isfinite(number) and Decimal(repr(number)) == value else []


def interval_text(number: Number, *, has_point: bool) -> Language:
    """The text of all numbers between the bounds; of integers alone, if it says so.

    has_point  whether an integer may be written with `.0`
    """
    if number.is_integer:
        low, high = integer_bounds(number)
        whole = _signed(_decimal(low), _decimal(high), _whole_between)
        return lang.cat(whole, lang.repeat(lang.literal(".0"), 0, 1)) if has_point else whole
    if number.low is None and number.high is None:
        return full_language(ANY_NUMBER)
    low_bound, high_bound = _closed_low(number), _closed_high(number)
    plain = _signed(low_bound, high_bound, _decimal_between)
    return lang.union(plain, *_scientific(low_bound, high_bound))


def _decimal(value: int | None) -> Decimal | None:
    return None if value is None else Decimal(value)


def _closed_low(number: Number) -> Decimal | None:
    return _next(number.low, 1) if number.low is not None and number.is_low_open else number.low


def _closed_high(number: Number) -> Decimal | None:
    return _next(number.high, -1) if number.high is not None and number.is_high_open else number.high


def _next(bound: Decimal, direction: int) -> Decimal:
    """The nearest number that text can hold on that side and that no reader rounds onto the bound."""
    if bound == 0:
        return SMALLEST_TEXT * direction
    if abs(bound) >= EXACT_INTEGERS:
        return EXACT.add(bound, Decimal(direction) * (abs(bound) if abs(bound) > LARGEST_TEXT else 1))
    return Decimal(repr(math.nextafter(float(bound), math.copysign(math.inf, direction))))


def _signed(low: Decimal | None, high: Decimal | None, between: _Between) -> Language:
    options: list[Language] = []
    if low is None or low <= 0:
        least = high.copy_negate() if high is not None and high < 0 else Decimal(0)
        options.append(lang.cat(lang.literal("-"), between(least, _minus(low))))
    if high is None or high >= 0:
        options.append(between(max(low, Decimal(0)) if low is not None else Decimal(0), high))
    return lang.union(*options)


def _scientific(low: Decimal | None, high: Decimal | None) -> list[Language]:
    """What encoders write with an exponent, on each side of zero where all of it is between the bounds."""
    options: list[Language] = []
    for sign, least, most in (("", low, high), ("-", _minus(high), _minus(low))):
        mantissa = rf"{sign}[1-9]{_FRACTION}?"
        if (least is None or least <= SMALLEST_TEXT) and (most is None or most >= Decimal("0.0001")):
            options.append(full_language(mantissa + _TINY))
        if most is None and (least is None or least <= 10**16):
            options.append(full_language(mantissa + _LARGE))
    return options


def _minus(value: Decimal | None) -> Decimal | None:
    return None if value is None else value.copy_negate()


def _whole_between(low: Decimal, high: Decimal | None) -> Language:
    first = f"{math.ceil(low)}"
    last = "9" * MAX_DIGITS if high is None or high >= LARGEST_TEXT else f"{math.floor(high)}"
    if Decimal(first) > Decimal(last):
        return NEVER
    return _wholes(first, last)


def _wholes(first: str, last: str) -> Language:
    """Digits without leading zeros from first to last."""
    if int(first) == 10 ** (len(first) - 1) and set(last) == {"9"}:
        return lang.cat(lang.one_of("123456789"), lang.repeat(DIGIT, len(first) - 1, len(last) - 1))
    if len(first) == len(last):
        return _same_length(first, last)
    options = [_same_length(first, "9" * len(first)), _same_length("1" + "0" * (len(last) - 1), last)]
    if len(last) - len(first) > 1:
        free = lang.repeat(DIGIT, len(first), len(last) - 2)
        options.append(lang.cat(lang.one_of("123456789"), free))
    return lang.union(*options)


@lru_cache(maxsize=4096)
def _same_length(first: str, last: str) -> Language:
    if not first:
        return EMPTY
    if set(first[1:]) <= {"0"} and set(last[1:]) <= {"9"}:
        return lang.cat(_digits(first[0], last[0]), lang.repeat(DIGIT, len(first) - 1, len(first) - 1))
    if first[0] == last[0]:
        return lang.cat(lang.literal(first[0]), _same_length(first[1:], last[1:]))
    nines, zeros = "9" * (len(first) - 1), "0" * (len(first) - 1)
    options = [lang.cat(lang.literal(first[0]), _same_length(first[1:], nines))]
    options.append(lang.cat(lang.literal(last[0]), _same_length(zeros, last[1:])))
    if int(first[0]) + 1 < int(last[0]):
        middle = _digits(chr(ord(first[0]) + 1), chr(ord(last[0]) - 1))
        options.append(lang.cat(middle, lang.repeat(DIGIT, len(zeros), len(zeros))))
    return lang.union(*options)


def _digits(first: str, last: str) -> Language:
    return lang.chars([(ord(first), ord(last))])


def _decimal_between(low: Decimal, high: Decimal | None) -> Language:
    """Whole numbers with or without a fraction, from low to high, both at least 0."""
    if high is not None and (low > high or low >= LARGEST_TEXT):
        return NEVER
    whole_low, fraction_low = _split(low)
    if high is None or high >= LARGEST_TEXT:
        above = _whole_between(Decimal(whole_low) + 1, None)
        return lang.union(_with_fraction(str(whole_low), fraction_low, None), lang.cat(above, _fraction("", None)))
    whole_high, fraction_high = _split(high)
    if whole_low == whole_high:
        return _with_fraction(str(whole_low), fraction_low, fraction_high)
    options = [_with_fraction(str(whole_low), fraction_low, None), _with_fraction(str(whole_high), "", fraction_high)]
    if whole_high - whole_low > 1:
        options.append(lang.cat(_wholes(str(whole_low + 1), str(whole_high - 1)), _fraction("", None)))
    return lang.union(*options)


def _split(value: Decimal) -> tuple[int, str]:
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _with_fraction(whole: str, low: str, high: str | None) -> Language:
    return lang.cat(lang.literal(whole), _fraction(low, high))


def _fraction(low: str, high: str | None) -> Language:
    """Nothing, if that is at least low, or a point and digits from 0.low to 0.high; high None is below 1."""
    digits = lang.cat(lang.literal("."), _fraction_digits(low, high, MAX_DIGITS, is_first=True))
    return lang.union(EMPTY, digits) if not low else digits


@lru_cache(maxsize=4096)
def _fraction_digits(low: str, high: str | None, room: int, *, is_first: bool) -> Language:
    """Digits after a point from low to high, of which trailing zeros mean nothing; at most `room` of them."""
    if room == 0:
        return NEVER if low else EMPTY
    low, high = low.rstrip("0"), None if high is None else high.rstrip("0")
    if not low and not high:
        return lang.repeat(DIGIT if high is None else lang.literal("0"), int(is_first), room)
    first, last = int(low[0]) if low else 0, 9 if high is None else int(high[0]) if high else 0
    options: list[Language] = [] if low or is_first else [EMPTY]
    edges = {first: (low[1:], high[1:] if high and first == last else "" if first == last and high == "" else None)}
    if high is not None and first != last:
        edges[last] = ("", high[1:])
    for digit, (rest_low, rest_high) in edges.items():
        options.append(
            lang.cat(lang.literal(str(digit)), _fraction_digits(rest_low, rest_high, room - 1, is_first=False))
        )
    free = [d for d in range(first, last + 1) if d not in edges]
    if free:
        options.append(lang.cat(_digits(str(free[0]), str(free[-1])), lang.repeat(DIGIT, 0, room - 1)))
    return lang.union(*options)


# --- multiples ---------------------------------------------------------------------------------------------------


def multiple_text(unit: Decimal, *, has_point: bool) -> Language | None:
    """The text of all multiples, where the last digits decide that; None where they do not."""
    scale = max(-unit.normalize(EXACT).as_tuple().exponent, 0)  # type: ignore[operator]  # finite
    coefficient = int(unit.scaleb(scale))
    length = next((k for k in range(scale, scale + 4) if 10**k % coefficient == 0), None)
    if length is None:
        return None
    sign, any_whole = r"-?", "(?:0|[1-9][0-9]{0,23})"
    if scale == 0:
        whole = lang.cat(full_language(sign), _whole_multiples(coefficient, length))
        return lang.cat(whole, full_language(r"(?:\.0{1,24})?")) if has_point else whole
    if length > scale or (10**length // coefficient > MAX_ENUMERATED and coefficient > 1):
        return None
    if coefficient == 1:
        fraction = full_language(rf"(?:\.[0-9]{{1,{scale}}}0{{0,{MAX_DIGITS - scale}}})?")
    else:
        tails = [f"{value:0{length}d}" for value in range(0, 10**length, coefficient)]
        fraction = lang.union(EMPTY, lang.cat(lang.literal("."), lang.union(*map(_padded, tails))))
    return lang.cat(full_language(sign + any_whole), fraction)


def _padded(tail: str) -> Language:
    """Digits after the point: without the trailing zeros, or with any number of them."""
    kept = tail.rstrip("0") or "0"
    return lang.cat(lang.literal(kept), lang.repeat(lang.literal("0"), 0, MAX_DIGITS - len(kept)))


def _whole_multiples(unit: int, length: int) -> Language:
    small = [str(value) for value in range(0, 10**length, unit)]
    tails = [f"{value:0{length}d}" for value in range(0, 10**length, unit)] if length else [""]
    leading = full_language(rf"[1-9][0-9]{{0,{MAX_DIGITS - 1 - length}}}")
    return lang.union(lang.words(small), lang.cat(leading, lang.words(tails) if length else EMPTY))
