"""The text of numbers: intervals and multiples against exact arithmetic, and what a reader makes of the text."""

from __future__ import annotations

import math
import random
import re
from decimal import Decimal

import pytest

from streamgen.grammar.schema.language import NEVER
from streamgen.grammar.schema.numbers import (
    Number,
    complement_number,
    contains,
    finite_choices,
    intersect_numbers,
    interval_text,
    multiple_text,
    simplified,
)
from streamgen.grammar.schema.printing import regex_text


def random_texts(rng: random.Random, count: int) -> set[str]:
    texts = set()
    for _ in range(count):
        whole = rng.choice([0, rng.randrange(15), rng.randrange(130), rng.randrange(20_000)])
        digits = "".join(rng.choice("0123459") for _ in range(rng.choice([0, 0, 1, 2, 3])))
        texts.add(("-" if rng.random() < 0.3 else "") + str(whole) + ("." + digits if digits else ""))
    return texts


def random_number(rng: random.Random) -> Number | None:
    def bound() -> Decimal | None:
        scale = rng.choice([1, 10, 100])
        return rng.choice([None, Decimal(0), Decimal(rng.randrange(-120 * scale, 120 * scale)) / scale])

    low, high = bound(), bound()
    if low is not None and high is not None:
        low, high = min(low, high), max(low, high)
    return simplified(
        Number(
            low=low,
            is_low_open=rng.random() < 0.4,
            high=high,
            is_high_open=rng.random() < 0.4,
            is_integer=rng.choice([None, True]),
        )
    )


def edges(number: Number) -> set[str]:
    """Text at and right beside the bounds."""
    found = set()
    for bound in (number.low, number.high):
        if bound is not None:
            plain = f"{bound:f}"
            found |= {plain, f"{bound + 1:f}", f"{bound - 1:f}"}
            found |= {plain + ("0" if "." in plain else ".0"), plain + ("1" if "." in plain else ".01")}
            found |= {repr(math.nextafter(float(bound), way)) for way in (-math.inf, math.inf)}
    return {text for text in found if "e" not in text}


@pytest.mark.parametrize("seed", range(60))
def test_intervals_are_exact(seed: int) -> None:
    rng = random.Random(seed)
    number = random_number(rng)
    if number is None:
        return
    language = interval_text(number, has_point=False)
    assert language != NEVER
    pattern = re.compile(regex_text(language))
    for text in random_texts(rng, 200) | edges(number):
        expected = contains(number, Decimal(text)) and not (number.is_integer and "." in text)
        assert bool(pattern.fullmatch(text)) == expected, (number, text)


@pytest.mark.parametrize(
    ("low", "high"), [(None, None), (0, None), (Decimal("0.5"), None), (None, 0), (-5, 5), (0, 1), (None, -3)]
)
def test_what_encoders_write_for_a_double(low: Decimal | int | None, high: Decimal | int | None) -> None:
    rng = random.Random(7)
    bounds = [None if bound is None else Decimal(bound) for bound in (low, high)]
    number = Number(low=bounds[0], is_low_open=True, high=bounds[1])
    pattern = re.compile(regex_text(interval_text(number, has_point=False)))
    for _ in range(2_000):
        value = rng.choice(
            [rng.random(), rng.uniform(-6, 6), 10 ** rng.uniform(-300, 300), -(10 ** rng.uniform(-300, 300))]
        )
        assert bool(pattern.fullmatch(repr(value))) == contains(number, Decimal(repr(value))), value


def test_a_reader_never_rounds_onto_an_open_bound() -> None:
    for bound in ("1", "0.1", "100", "-2.5"):
        below = Number(high=Decimal(bound), is_high_open=True)
        pattern = re.compile(regex_text(interval_text(below, has_point=False)))
        whole, _, fraction = f"{Decimal(repr(math.nextafter(float(bound), -math.inf))):f}".partition(".")
        assert pattern.fullmatch(f"{whole}.{fraction}")
        for digits in range(1, 25):
            text = whole + "." + (fraction + "9" * 24)[:digits]
            assert not pattern.fullmatch(text) or float(text) < float(bound), text
    positive = re.compile(regex_text(interval_text(Number(low=Decimal(0), is_low_open=True), has_point=False)))
    assert not any(positive.fullmatch(text) for text in ("0", "0.0", "-0", "0." + "0" * 24, "0e5", "0.0e-5", "1e-999"))
    assert positive.fullmatch("0." + "0" * 23 + "1")


def test_all_numbers_are_finite() -> None:
    pattern = re.compile(regex_text(interval_text(Number(), has_point=False)))
    for text in ("9" * 24 + ".9e279", "9.9e307", "1e308", "1e999", "9" * 24 + "e280", "0.1e307"):
        assert not pattern.fullmatch(text) or math.isfinite(float(text)), text
    assert not any(pattern.fullmatch(text) for text in ("01", "1.", ".5", "+1", "1e", "--1", "1" * 25, ""))
    assert all(pattern.fullmatch(text) for text in ("0", "-0", "-0.0", "1E5", "1e+05", "2e-07", "1" * 24))


@pytest.mark.parametrize(
    "unit", ["1", "2", "5", "10", "100", "20", "25", "4", "8", "0.01", "0.1", "0.5", "0.25", "0.0001", "1E+2"]
)
def test_multiples(unit: str) -> None:
    rng = random.Random(3)
    language = multiple_text(Decimal(unit), has_point=True)
    assert language is not None
    pattern = re.compile(regex_text(language))
    for text in random_texts(rng, 400):
        assert bool(pattern.fullmatch(text)) == (Decimal(text) % Decimal(unit) == 0), text


def test_multiples_that_the_last_digits_do_not_tell() -> None:
    assert multiple_text(Decimal(7), has_point=False) is None
    bounded = Number(low=Decimal(10), high=Decimal(30), multiples=(Decimal(7),))
    assert finite_choices(bounded) == tuple(map(Decimal, (14, 21, 28)))


def test_intersection_and_complement_agree_with_membership() -> None:
    rng = random.Random(11)
    values = [Decimal(rng.randrange(-3000, 3000)) / rng.choice([1, 10, 100]) for _ in range(300)]
    numbers = [
        Number(low=Decimal(3), is_low_open=True),
        Number(high=Decimal(20)),
        Number(low=Decimal("-2.5"), high=Decimal("2.5"), is_high_open=True),
        Number(is_integer=True),
        Number(is_integer=False),
        Number(multiples=(Decimal(5),)),
        Number(choices=(Decimal(1), Decimal(5), Decimal("2.5"))),
        Number(excluded=(Decimal(4), Decimal("0.5"))),
    ]
    for left in numbers:
        outside = complement_number(left)
        assert all(any(contains(part, value) for part in outside) != contains(left, value) for value in values)
        for right in numbers:
            met = intersect_numbers(left, right)
            for value in values:
                expected = contains(left, value) and contains(right, value)
                assert (met is not None and contains(met, value)) == expected, (left, right, value)


def test_empty_sets_are_seen() -> None:
    assert simplified(Number(low=Decimal(3), high=Decimal(2))) is None
    assert simplified(Number(low=Decimal(3), high=Decimal(3), is_high_open=True)) is None
    assert simplified(Number(low=Decimal("3.1"), high=Decimal("3.9"), is_integer=True)) is None
    assert simplified(Number(choices=(Decimal(3),), high=Decimal(2))) is None
    assert intersect_numbers(Number(is_integer=True), Number(is_integer=False)) is None
