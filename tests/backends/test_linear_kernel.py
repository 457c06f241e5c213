"""The matrix product of every instruction set: right for any size, and the same bits however the work is cut."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.backends.arrays import BF16, DTYPES, F32, Array, Guarded, loaded, packed, stored

_cpu = pytest.importorskip("streamgen._cpu")

ISAS = _cpu.isa_names()
EVERY_KERNEL = pytest.mark.parametrize(
    ("isa", "dtype"),
    [(isa, dtype) for isa in ISAS for dtype in DTYPES.values()],
    ids=lambda v: {0: "f32", 30: "bf16"}.get(v, v),
)


class Product:
    """One product on random data, run in any number of pieces."""

    def __init__(self, dtype: int, rows: int, n: int, k: int, *, bias: bool = False, seed: int = 0) -> None:
        rng = np.random.default_rng([seed, rows, n, k])
        self.dtype, self.rows, self.n, self.k = dtype, rows, n, k
        self.x = rng.standard_normal((rows, k), dtype=np.float32)
        self.weights = rng.standard_normal((n, k), dtype=np.float32)
        self.w = packed(self.weights, dtype)
        self.bias = rng.standard_normal(n, dtype=np.float32) if bias else None
        self.before = rng.standard_normal((rows, n), dtype=np.float32)

    def run(
        self,
        isa: str,
        rows: slice = slice(None),
        *,
        accumulate: bool = False,
        ranges: list[tuple[int, int]] | None = None,
    ) -> Array:
        """The product of some rows, in item ranges if given."""
        x = self.x[rows]
        given = Guarded(len(x), self.k, self.dtype, x)
        out = Guarded(len(x), self.n, F32, self.before[rows] if accumulate else None)
        bias = 0 if self.bias is None else self.bias.ctypes.data
        for begin, end in ranges or [(-1, -1)]:
            _cpu.kernel_linear(
                isa, given.address, given.stride, self.w.ctypes.data, bias, out.address, out.stride,
                len(x), self.n, self.k, accumulate, self.dtype, begin, end,
            )  # fmt: skip
        return out.values()

    def items(self, isa: str) -> int:
        """Items of the whole product."""
        return int(_cpu.kernel_linear_items(isa, self.rows, self.n, self.k, self.dtype))

    def expected(self, *, accumulate: bool = False) -> tuple[Array, Array]:
        """In float64, and how far a sum of that many float32 terms may be from it."""
        x = loaded(stored(self.x, self.dtype)).astype(np.float64)
        w = loaded(stored(self.weights, self.dtype)).astype(np.float64)
        y, size = x @ w.T, np.abs(x) @ np.abs(w.T)
        if self.bias is not None:
            y, size = y + self.bias, size + np.abs(self.bias)
        if accumulate:
            y, size = y + self.before, size + np.abs(self.before)
        return y, size * 2.0**-24 * (self.k + 3)


@EVERY_KERNEL
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 33])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 2), (17, 7), (80, 65), (100, 24), (208, 129), (64, 600)])
def test_is_the_product(isa: str, dtype: int, rows: int, n: int, k: int) -> None:
    for bias in (False, True):
        for accumulate in (False, True):
            product = Product(dtype, rows, n, k, bias=bias)
            y, tolerance = product.expected(accumulate=accumulate)
            error = np.abs(product.run(isa, accumulate=accumulate) - y)
            assert np.all(error <= tolerance), f"{bias=} {accumulate=} worst {np.max(error / tolerance)}"


@EVERY_KERNEL
@pytest.mark.parametrize("rows", [31, 50, 97, 200])
def test_is_the_product_in_tall_blocks(isa: str, dtype: int, rows: int) -> None:
    product = Product(dtype, rows, 4100, 9)  # so many columns that the rows are not cut into short blocks
    y, tolerance = product.expected()
    assert np.all(np.abs(product.run(isa) - y) <= tolerance)


@EVERY_KERNEL
def test_long_sums_continue_through_memory(isa: str, dtype: int) -> None:
    k = 4101 if dtype == F32 else 8201  # more than two stretches of K, the last one short
    product = Product(dtype, 64, 1040, k, bias=True)
    y, tolerance = product.expected(accumulate=True)
    whole = product.run(isa, accumulate=True)
    assert np.all(np.abs(whole - y) <= tolerance)
    for row in (0, 13, 63):
        alone = product.run(isa, slice(row, row + 1), accumulate=True)
        np.testing.assert_array_equal(whole[row : row + 1], alone)


@EVERY_KERNEL
@pytest.mark.parametrize(("n", "k"), [(64, 96), (90, 75), (17, 300)])
def test_a_row_has_the_same_bits_in_any_batch(isa: str, dtype: int, n: int, k: int) -> None:
    product = Product(dtype, 512, n, k, bias=True)
    alone = np.concatenate([product.run(isa, slice(r, r + 1)) for r in range(64)])
    for rows in [*range(2, 18), 31, 32, 33, 64, 100, 512]:
        batch = product.run(isa, slice(0, rows))
        np.testing.assert_array_equal(batch[:64], alone[: min(rows, 64)], err_msg=f"{rows} rows")


@EVERY_KERNEL
@pytest.mark.parametrize("rows", [1, 4, 12, 13, 40, 100, 300])
@pytest.mark.parametrize("n", [40, 576, 1100])
def test_any_ranges_of_items_give_the_same_bits(isa: str, dtype: int, rows: int, n: int) -> None:
    product = Product(dtype, rows, n, 35)
    whole, items = product.run(isa), product.items(isa)
    rng = np.random.default_rng(rows)
    cuts = sorted(set(rng.integers(0, items + 1, 6).tolist()) | {0, items})
    shuffled = rng.permutation(list(itertools.pairwise(cuts)))
    single = [(i, i + 1) for i in range(items)]
    for ranges in ([(int(b), int(e)) for b, e in shuffled], single, single[::-1]):
        np.testing.assert_array_equal(product.run(isa, ranges=ranges), whole)


@EVERY_KERNEL
def test_items_cover_small_and_large_products(isa: str, dtype: int) -> None:
    assert Product(dtype, 0, 64, 16).items(isa) == 0
    for rows in (1, 64, 512):
        assert Product(dtype, rows, 576, 8).items(isa) >= 16, "too few items to share among eight threads"


def test_bf16_sums_agree_between_instruction_sets() -> None:
    product = Product(BF16, 20, 48, 1000)
    y, tolerance = product.expected()
    for isa in ISAS:
        np.testing.assert_allclose(product.run(isa), y, atol=float(tolerance.max()) / 8)


def test_instruction_sets_are_known_by_name() -> None:
    assert ISAS[-1] == "generic"
    with pytest.raises(ValueError, match=r"expected one of .*generic, got sse9"):
        _cpu.kernel_linear_items("sse9", 1, 16, 16, F32)
