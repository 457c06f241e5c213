"""Paged attention of every instruction set, against float64; and that a row's bits depend on its sequence alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.backends.attending import (
    ISAS,
    OPERANDS,
    RAGGED,
    STEPS,
    TOLERANCE,
    Rows,
    Sequences,
    Shape,
    bits,
    check_ragged,
)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 96, 128, 256])
def test_head_dims(isa: str, dtype: str, head_dim: int) -> None:
    check_ragged(Shape(num_heads=4, head_dim=head_dim, dtype=dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (4, 1), (8, 1), (7, 1), (14, 2)])
def test_groups_of_query_heads(isa: str, dtype: str, heads: tuple[int, int]) -> None:
    check_ragged(Shape(num_heads=heads[0], num_kv_heads=heads[1], head_dim=32, dtype=dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize(
    ("window", "softcap"), [(0, 2.0), (1, 0), (2, 0), (16, 0), (17, 2.0), (100, 0), (512, 0), (1000, 0)]
)
def test_windows_and_softcaps(isa: str, dtype: str, window: int, softcap: float) -> None:
    check_ragged(Shape(num_heads=2, num_kv_heads=1, window=window, softcap=softcap, head_dim=32, dtype=dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize(("page_size", "head_dim"), [(1, 8), (1, 64), (2, 64), (32, 48)])
def test_page_size_changes_no_bit(isa: str, dtype: str, page_size: int, head_dim: int) -> None:
    shape = Shape(num_heads=2, num_kv_heads=2, page_size=page_size, head_dim=head_dim, dtype=dtype)
    other = Sequences(shape, RAGGED, isa=isa)
    usual = Sequences(replace(shape, page_size=16), RAGGED, isa=isa)
    for rows in STEPS:
        for a, b, (i, start, count) in zip(other.attend(rows), usual.attend(rows), rows, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))
            np.testing.assert_allclose(a, usual.expected(i, start, count), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", OPERANDS)
def test_odd_page_size_in_float32_and_pages_of_one_token(dtype: str) -> None:
    check_ragged(Shape(page_size=3 if dtype == "float32" else 1, dtype=dtype), ISAS[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(head_dim=8),
        Shape(num_heads=3, num_kv_heads=3, head_dim=16),
        Shape(num_heads=7, num_kv_heads=1, head_dim=80),
        Shape(window=37, head_dim=32),
        Shape(window=520, head_dim=32, softcap=3.0),
        Shape(window=1, head_dim=32),
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_however_it_is_computed(isa: str, dtype: str, shape: Shape) -> None:
    """In one prompt, in chunks of any size, one by one, alone or beside others."""
    shape = replace(shape, dtype=dtype)
    length = 1100 if shape.head_dim == 64 else 560  # three splits, or two
    whole = Sequences(shape, [length, 90], isa=isa).attend([(0, 0, length)])[0]
    rng = np.random.default_rng(5)
    for chunks in ("decodes", "random"):
        sequences = Sequences(shape, [length, 90], isa=isa, threads=2)
        position, neighbour = 0, 0
        while position < length:
            count = 1 if chunks == "decodes" else min(length - position, int(rng.integers(1, 90)))
            rows: Rows = [(0, position, count)]
            if neighbour < 90 and rng.random() < 0.4:
                rows.insert(int(rng.integers(2)), (1, neighbour, 1))
                neighbour += 1
            outputs = sequences.attend(rows)
            got = outputs[[i for i, _, _ in rows].index(0)]
            np.testing.assert_array_equal(bits(got), bits(whole[position : position + count]), err_msg=f"at {position}")
            position += count


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
def test_threads_change_no_bit(isa: str, dtype: str) -> None:
    shape = Shape(dtype=dtype)
    for rows in STEPS:
        one, three = (Sequences(shape, RAGGED, isa=isa, threads=n) for n in (1, 3))
        before: Rows = [(i, 0, start) for i, start, _ in rows if start]
        for sequences in (one, three):
            if before:
                sequences.attend(before)
        for a, b in zip(one.attend(rows), three.attend(rows), strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
def test_positions_taken_back_leave_nothing_behind(isa: str, dtype: str) -> None:
    """Rejected drafts: positions are written again with other keys and values, and their old ones were NaN."""
    shape = Shape(dtype=dtype)
    clean, dirty = (Sequences(shape, [40], isa=isa) for _ in range(2))
    for sequences in (clean, dirty):
        sequences.attend([(0, 0, 20)])
    k, v = dirty.k[0].copy(), dirty.v[0].copy()
    dirty.k[0][20:30], dirty.v[0][20:30] = np.nan, np.nan
    dirty.attend([(0, 20, 10)])
    dirty.k[0][:], dirty.v[0][:] = k, v
    for position in range(20, 30):
        rows: Rows = [(0, position, 1)]
        np.testing.assert_array_equal(bits(dirty.attend(rows)[0]), bits(clean.attend(rows)[0]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
def test_great_scores_do_not_overflow(isa: str, dtype: str) -> None:
    sequences = Sequences(Shape(dtype=dtype, head_dim=32), [80], isa=isa)
    sequences.q[0] *= 1000
    got = sequences.attend([(0, 0, 80)])[0]
    # The largest score takes all, so each output is one token's value.
    np.testing.assert_allclose(got, sequences.expected(0, 0, 80), rtol=0, atol=2e-2)


def test_instruction_sets_agree() -> None:
    outputs = []
    for isa in ISAS:
        sequences = Sequences(Shape(), RAGGED, isa=isa)
        outputs.append([x for rows in STEPS for x in sequences.attend(rows)])
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
