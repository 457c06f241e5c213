"""What goes ahead of tiles - runs of splits of long contexts, pages that sequences have in common - changes no bit; nor
does a decode that turns its heads and stores its keys and values itself. And pages of 8 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.backends.attending import (
    ALONE,
    ISAS,
    OPERANDS,
    RAGGED,
    STEPS,
    TOLERANCE,
    Cut,
    Floats,
    Rows,
    Sequences,
    Shape,
    bits,
    rounded,
    same_bits,
    turned,
)

MANY = Cut(workers=1000)  # everything that can be cut is, into single splits
KINDS = [("float32", ""), ("bfloat16", ""), ("float32", "int8"), ("bfloat16", "int8")]


def pair(shape: Shape, lengths: list[int], cut: Cut, isa: str, **others: object) -> tuple[Sequences, Sequences]:
    """The same sequences twice: cut in the given way on two threads, and every tile alone on one."""
    return (
        Sequences(shape, lengths, isa=isa, threads=2, cut=cut, **others),  # type: ignore[arg-type]  # forwarded
        Sequences(shape, lengths, isa=isa, threads=1, cut=ALONE, **others),  # type: ignore[arg-type]  # forwarded
    )


def compare(some: Sequences, alone: Sequences, rows: Rows, *, ahead: bool = True) -> list[Floats]:
    got, expected = some.attend(rows), alone.attend(rows)
    assert (some.ahead > 0) == ahead and alone.ahead == 0
    same_bits(got, expected)
    return got


# ---- long contexts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "kv"), KINDS)
@pytest.mark.parametrize("head_dim", [32, 80])
def test_cut_contexts_change_no_bit(isa: str, dtype: str, kv: str, head_dim: int) -> None:
    shape = Shape(num_heads=3, num_kv_heads=1, head_dim=head_dim, dtype=dtype, kv=kv)
    lengths = [1100, 2050, 768, 513]
    cut, alone = pair(shape, lengths, MANY, isa)
    for sequences in (cut, alone):
        sequences.attend([(i, 0, n - 9) for i, n in enumerate(lengths)])
    got = compare(cut, alone, [(i, n - 9, 1) for i, n in enumerate(lengths)])
    for i, n in enumerate(lengths):
        np.testing.assert_allclose(got[i], cut.expected(i, n - 9, 1), rtol=0, atol=TOLERANCE[dtype])
    compare(
        cut, alone, [(3, 505, 8), (1, 2042, 8), (0, 1092, 3)]
    )  # tiles of several positions, one across a tile's end
    compare(cut, alone, [(0, 1095, 1)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [1, 600, 1000, 1500])
def test_cut_contexts_with_windows_change_no_bit(isa: str, window: int) -> None:
    shape = Shape(num_heads=4, num_kv_heads=2, head_dim=16, window=window, softcap=3.0, dtype="bfloat16")
    cut, alone = pair(shape, [1700], MANY, isa)
    for sequences in (cut, alone):
        sequences.attend([(0, 0, 1690)])
    compare(cut, alone, [(0, 1690, 10)], ahead=window >= 768)


@pytest.mark.parametrize("workers", [2, 3, 8, 64])
def test_any_number_of_workers_gives_the_same_bits(workers: int) -> None:
    shape = Shape(num_heads=9, num_kv_heads=3, dtype="bfloat16")
    cut, alone = pair(shape, [5000, 40], Cut(workers=workers), ISAS[0])
    for sequences in (cut, alone):
        sequences.attend([(0, 0, 4990), (1, 0, 30)])
    compare(cut, alone, [(0, 4990, 1), (1, 30, 1)])


def test_contexts_too_many_to_cut_all_at_once() -> None:
    """The memory for what goes ahead is bounded; the rest of the tiles stay whole."""
    shape = Shape(num_heads=1, num_kv_heads=1, head_dim=8)
    lengths = [3100] * 24
    cut, alone = pair(shape, lengths, MANY, ISAS[0])
    for sequences in (cut, alone):
        sequences.attend([(i, 0, n - 9) for i, n in enumerate(lengths)])
    compare(cut, alone, [(i, n - 9, 9) for i, n in enumerate(lengths)])  # 24 x 9 x 7 states are more than fit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("page_size", "kv"), [(1, ""), (1, "int8"), (32, "int8"), (8, "")])
def test_cut_contexts_in_pages_of_other_sizes(isa: str, page_size: int, kv: str) -> None:
    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=24, page_size=page_size, kv=kv, dtype="bfloat16")
    cut, alone = pair(shape, [1000], MANY, isa)
    for sequences in (cut, alone):
        sequences.attend([(0, 0, 990)])
    compare(cut, alone, [(0, 990, 1)])


# ---- common pages ---------------------------------------------------------------------------------------------------


def prefill(sequences: Sequences, common: dict[int, tuple[int, int]], keep: int) -> None:
    """All but the last `keep` tokens of each sequence; what is common is written by the first that has it."""
    for i, length in enumerate(sequences.lengths):
        start = common.get(i, (0, 0))[1]
        if length - keep > start:
            sequences.attend([(i, start, length - keep - start)])


GROUPS: dict[str, tuple[list[int], dict[int, tuple[int, int]]]] = {
    "two": ([300, 290], {1: (0, 272)}),
    "many": ([700] + [650 + 3 * i for i in range(30)], dict.fromkeys(range(1, 31), (0, 640))),
    "half a split": ([1300, 1200, 1250], {1: (0, 1152), 2: (0, 1152)}),
    "whole splits": ([1100, 1100, 1100], {1: (0, 1024), 2: (0, 1024)}),
    "nothing of their own": ([530, 530, 529], {1: (0, 512), 2: (0, 512)}),
    "two groups": ([400, 390, 380, 600, 590], {1: (0, 384), 2: (0, 256), 4: (3, 512)}),
    "nested": ([900] * 6, {1: (0, 256), 2: (0, 256), 3: (2, 768), 4: (2, 768), 5: (2, 512)}),
    "one longer than the rest": ([2100, 300, 300, 300], {1: (0, 288), 2: (0, 288), 3: (0, 288)}),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "kv"), KINDS)
@pytest.mark.parametrize("name", GROUPS)
def test_common_pages_change_no_bit(isa: str, dtype: str, kv: str, name: str) -> None:
    lengths, common = GROUPS[name]
    shape = Shape(num_heads=3, num_kv_heads=1, head_dim=32, dtype=dtype, kv=kv)
    together, alone = pair(shape, lengths, Cut(workers=2), isa, common=common)
    for sequences in (together, alone):
        prefill(sequences, common, 9)
    order = np.random.default_rng(1).permutation(len(lengths)).tolist()
    got = compare(together, alone, [(i, lengths[i] - 9, 1) for i in order])
    for i, x in zip(order[:4], got, strict=False):
        np.testing.assert_allclose(x, together.expected(i, lengths[i] - 9, 1), rtol=0, atol=TOLERANCE[dtype])
    compare(together, alone, [(i, lengths[i] - 8, 1 + i % 3) for i in order])  # drafts


@pytest.mark.parametrize("heads", [(14, 2), (8, 1), (2, 2), (40, 1)])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_common_pages_with_any_heads(heads: tuple[int, int], head_dim: int) -> None:
    lengths, common = [420] * 7, dict.fromkeys(range(1, 7), (0, 400))
    shape = Shape(num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, dtype="bfloat16", softcap=5.0)
    for cut in (Cut(workers=1), MANY):
        together, alone = pair(shape, lengths, cut, ISAS[0], common=common)
        for sequences in (together, alone):
            prefill(sequences, common, 1)
        compare(together, alone, [(i, 419, 1) for i in range(7)])


@pytest.mark.parametrize("page_size", [1, 32])
def test_common_pages_of_other_sizes(page_size: int) -> None:
    lengths, common = [420] * 4, dict.fromkeys(range(1, 4), (0, 384))
    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=24, page_size=page_size, dtype="bfloat16")
    together, alone = pair(shape, lengths, Cut(), ISAS[0], common=common)
    for sequences in (together, alone):
        prefill(sequences, common, 1)
    compare(together, alone, [(i, 419, 1) for i in range(4)])


def test_pages_in_common_that_no_group_is_made_of() -> None:
    """Too few tokens, a page that this step writes, prompts, a window that begins after them."""
    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=16)
    lengths, common = [300] * 3, {1: (0, 112), 2: (0, 112)}
    few, alone = pair(shape, lengths, Cut(), ISAS[0], common=common)
    for sequences in (few, alone):
        prefill(sequences, common, 20)
    compare(few, alone, [(i, 280, 1) for i in range(3)], ahead=False)

    common = {1: (0, 256), 2: (0, 256)}
    prompts, alone = pair(shape, lengths, Cut(), ISAS[0], common=common)
    for sequences in (prompts, alone):
        prefill(sequences, common, 20)
    compare(prompts, alone, [(i, 280, 16) for i in range(3)], ahead=False)
    windowed, alone = pair(replace(shape, window=100), lengths, Cut(), ISAS[0], common=common)
    for sequences in (windowed, alone):
        prefill(sequences, common, 20)
    compare(windowed, alone, [(i, 280, 1) for i in range(3)], ahead=False)


@pytest.mark.parametrize("isa", ISAS)
def test_a_window_wider_than_the_contexts_is_none(isa: str) -> None:
    lengths, common = [300] * 3, {1: (0, 256), 2: (0, 256)}
    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=16, window=290)
    together, alone = pair(shape, lengths, Cut(), isa, common=common)
    for sequences in (together, alone):
        prefill(sequences, common, 20)
    compare(together, alone, [(i, 280, 1) for i in range(3)])
    compare(together, alone, [(i, 281, 15) for i in range(3)], ahead=False)


# ---- decodes that do it all -----------------------------------------------------------------------------------------


def turn(sequences: Sequences, rows: Rows, cos: Floats, sin: Floats) -> Sequences:
    """The same sequences with queries and keys of the rows turned."""
    for r, (i, start, _) in enumerate(rows):
        for x in (sequences.q[i], sequences.k[i]):
            x[start : start + 1] = turned(x[start : start + 1], cos[r : r + 1], sin[r : r + 1])
    return sequences


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "kv"), KINDS)
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (80, 20), (32, 0)])
@pytest.mark.parametrize("cut", [ALONE, MANY], ids=["alone", "ahead"])
def test_a_fused_decode_has_the_bits_of_its_parts(
    isa: str, dtype: str, kv: str, head_dim: int, rotary: int, cut: Cut
) -> None:
    lengths, common = [300, 290, 1034, 17, 2], {1: (0, 272)}
    shape = Shape(num_heads=6, num_kv_heads=2, head_dim=head_dim, dtype=dtype, kv=kv)
    fused, parts = pair(shape, lengths, cut, isa, common=common)
    for sequences in (fused, parts):
        prefill(sequences, common, 2)
    rng = np.random.default_rng(3)
    for last in (2, 1):
        rows: Rows = [(i, n - last, 1) for i, n in enumerate(lengths)]
        angles = rng.standard_normal((len(rows), rotary // 2))
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        got = fused.attend(rows, rotary=(cos, sin))
        assert (fused.ahead > 0) == (cut is MANY)
        same_bits(got, turn(parts, rows, cos, sin).attend(rows))
    np.testing.assert_array_equal(fused.k_pages, parts.k_pages)
    np.testing.assert_array_equal(fused.v_pages, parts.v_pages)


# ---- what goes in and out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
@pytest.mark.parametrize("head_dim", [8, 64, 72])
def test_outputs_of_either_type(isa: str, dtype: str, head_dim: int) -> None:
    """Rounding is the last thing that happens: a float32 output rounds to the bfloat16 one."""
    shape = Shape(num_heads=4, head_dim=head_dim, dtype=dtype)
    floats = Sequences(replace(shape, out="float32"), RAGGED, isa=isa)
    halves = Sequences(replace(shape, out="bfloat16"), RAGGED, isa=isa)
    for rows in STEPS:
        a, b = (np.concatenate(x.attend(rows)) for x in (floats, halves))
        np.testing.assert_array_equal(rounded(a, "bfloat16"), b)
        assert np.isfinite(a).all() and not np.array_equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "kv"), KINDS[2:])
@pytest.mark.parametrize(
    ("head_dim", "page_size"), [(64, 16), (80, 16), (96, 16), (128, 16), (256, 16), (10, 1), (24, 32)]
)
def test_pages_of_8_bits(isa: str, dtype: str, kv: str, head_dim: int, page_size: int) -> None:
    """Exactly what their codes say, however they are read."""
    shape = Shape(num_heads=4, head_dim=head_dim, page_size=page_size, dtype=dtype, kv=kv)
    sequences = Sequences(shape, RAGGED, isa=isa)
    for rows in STEPS:
        sequences.check(rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", OPERANDS)
def test_a_row_over_8_bits_has_the_same_bits_however_it_is_computed(isa: str, dtype: str) -> None:
    shape = Shape(num_heads=3, num_kv_heads=1, head_dim=32, dtype=dtype, kv="int8")
    whole = Sequences(shape, [600], isa=isa).attend([(0, 0, 600)])[0]
    chunked = Sequences(shape, [600], isa=isa, threads=2)
    position = 0
    for count in [1, 1, 14, 17, 64, 100, 1, 1, 300, 1, 99, 1]:
        got = chunked.attend([(0, position, count)])[0]
        np.testing.assert_array_equal(bits(got), bits(whole[position : position + count]))
        position += count
    assert position == 600


def test_8_bits_cost_little() -> None:
    """Against float32 pages, on random numbers: a share of the outputs' own size."""
    shape = Shape(num_heads=9, num_kv_heads=3, dtype="float32")
    exact = Sequences(shape, [600], isa=ISAS[0]).attend([(0, 0, 600)])[0][64:]
    errors = {}
    for name, other in {"int8": replace(shape, kv="int8"), "bfloat16": replace(shape, dtype="bfloat16")}.items():
        got = Sequences(replace(other, out="float32"), [600], isa=ISAS[0]).attend([(0, 0, 600)])[0][64:]
        errors[name] = float(np.sqrt(((got - exact) ** 2).mean() / (exact**2).mean()))
    assert 1e-4 < errors["bfloat16"] < 0.01 and 1e-3 < errors["int8"] < 0.015, errors


@pytest.mark.parametrize("isa", ISAS)
def test_a_key_or_value_of_zeros_is_zeros(isa: str) -> None:
    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=16, kv="int8")
    sequences = Sequences(shape, [40], isa=isa)
    sequences.k[0][:20], sequences.v[0][:20] = 0, 0
    sequences.check([(0, 0, 40)])
