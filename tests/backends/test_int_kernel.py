"""Products with integer weights, of every instruction set and type, and the quantizing of what they read."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.backends.arrays import F32, Guarded
from tests.backends.integers import (
    EVERY_KERNEL,
    ISAS,
    PACKINGS,
    PackedMatrix,
    columns_step,
    name_of,
    packed_matrix,
    quantized_blocks,
    random_stored,
    values_of_blocks,
    values_of_stored,
)

if TYPE_CHECKING:
    from streamgen.quantization.base import Packing

_cpu = pytest.importorskip("streamgen._cpu")

RAGGED_ROWS = (*range(1, 18), 31, 32, 33, 64, 100)

Floats = NDArray[np.float32]
Blocks = NDArray[np.void]


@cache
def activations(rows: int, columns: int) -> Blocks:
    x = np.random.default_rng([rows, columns]).standard_normal((rows, columns), dtype=np.float32)
    x[:, ::37] = 0
    x[0, :32] = 0  # a block without a value
    return quantized_blocks(x)


class Product:
    """A product with random integer weights, run in any number of pieces."""

    def __init__(self, isa: str, packing: Packing, n: int, k: int, *, bias: bool = False) -> None:
        self.isa, self.packing, self.n, self.k = isa, packing, n, k
        stored = random_stored(packing, n, k)
        self.weights = values_of_stored(packing, stored, k)
        self.matrix: PackedMatrix = packed_matrix(isa, packing, stored, k)
        rng = np.random.default_rng([n, k])
        self.bias = rng.standard_normal(n, dtype=np.float32) if bias else None
        self.before = rng.standard_normal((max(RAGGED_ROWS), n), dtype=np.float32)

    def run(self, x: Blocks, *, accumulate: bool = False, ranges: list[tuple[int, int]] | None = None) -> Floats:
        """The product of the rows of x; outputs are NaN before, and nothing around them may change."""
        out = Guarded(len(x), self.n, F32, self.before[: len(x)] if accumulate else None)
        bias = 0 if self.bias is None else self.bias.ctypes.data
        for begin, end in ranges or [(-1, -1)]:
            _cpu.kernel_linear(
                self.isa, x.ctypes.data, self.k // 32, self.matrix.address, bias, out.address, out.stride, len(x),
                self.n, self.k, accumulate, self.packing.type, begin, end, self.packing.group,
            )  # fmt: skip
        return out.values()

    def items(self, rows: int) -> int:
        """Work items of that many rows."""
        return int(_cpu.kernel_linear_items(self.isa, rows, self.n, self.k, self.packing.type, self.packing.group))

    def assert_right(self, x: Blocks, got: Floats, *, accumulate: bool = False) -> None:
        """Compare with float64; the error allowed is that of a chain of float32 sums over blocks of exact integers."""
        values, weights = values_of_blocks(x), self.weights.astype(np.float64)
        wanted, size = values @ weights.T, np.abs(values) @ np.abs(weights).T
        if self.bias is not None:
            wanted, size = wanted + self.bias, size + np.abs(self.bias)
        if accumulate:
            wanted, size = wanted + self.before[: len(x)], size + np.abs(self.before[: len(x)])
        # Types with a minimum add scale * q and it apart, which are larger than what they add up to.
        larger = 1 + 2 * np.abs(values) @ np.ones_like(weights).T * np.abs(weights).max()
        assert np.all(np.abs(got - wanted) <= (size + larger) * 2.0**-24 * (self.k // 8 + 4))


@EVERY_KERNEL
@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (17, 2), (40, 3)])
def test_is_the_product_for_any_number_of_rows(isa: str, packing: Packing, n: int, blocks: int) -> None:
    product = Product(isa, packing, n, blocks * columns_step(packing), bias=n == 17)
    for rows in RAGGED_ROWS:
        x = activations(rows, product.k)
        for accumulate in (False, True):
            product.assert_right(x, product.run(x, accumulate=accumulate), accumulate=accumulate)


@EVERY_KERNEL
def test_a_row_has_the_same_bits_in_any_batch(isa: str, packing: Packing) -> None:
    product = Product(isa, packing, 33, 2 * columns_step(packing), bias=True)
    x = activations(100, product.k)
    alone = np.concatenate([product.run(x[row : row + 1].copy()) for row in range(100)])
    for rows in RAGGED_ROWS:
        np.testing.assert_array_equal(product.run(x[:rows]), alone[:rows], err_msg=f"{rows} rows")


@EVERY_KERNEL
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_any_ranges_of_items_give_the_same_bits(isa: str, packing: Packing, rows: int) -> None:
    product = Product(isa, packing, 600, columns_step(packing))
    x = activations(rows, product.k)
    whole, items = product.run(x), product.items(rows)
    assert items > 1
    single = [(i, i + 1) for i in range(items)]
    for ranges in (single[::-1], [(items // 3, items), (0, items // 3)]):
        np.testing.assert_array_equal(product.run(x, ranges=ranges), whole)


@pytest.mark.parametrize("packing", PACKINGS, ids=name_of)
def test_instruction_sets_agree_closely(packing: Packing) -> None:
    x = activations(5, 8 * columns_step(packing))
    results = [Product(isa, packing, 20, 8 * columns_step(packing)).run(x) for isa in ISAS]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=4e-6 * np.abs(results[0]).max())


def test_a_product_of_no_rows_has_no_items() -> None:
    for isa in ISAS:
        assert Product(isa, PACKINGS[0], 64, 32).items(0) == 0


# ---- what is quantized ----


def quantize(isa: str, x: Floats) -> Blocks:
    """x [rows, width] by the kernel; memory behind the blocks must stay."""
    rows, width = x.shape
    blocks = activations(1, 32)[:, :1].repeat(rows, 0).repeat(width // 32 + 1, 1)
    before = blocks[:, -1].copy()
    _cpu.kernel_quantize(isa, x.ctypes.data, width, blocks.ctypes.data, blocks.shape[1], rows, width)
    np.testing.assert_array_equal(blocks[:, -1], before)
    return blocks[:, :-1]


def assert_same_blocks(got: Blocks, wanted: Blocks) -> None:
    for field in ("codes", "scales", "negative_sums", "sum"):
        np.testing.assert_array_equal(got[field], wanted[field], err_msg=field)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [32, 64, 224, 256, 288, 576, 1536])
def test_quantizing_is_exact(isa: str, width: int) -> None:
    x = np.random.default_rng(width).standard_normal((9, width), dtype=np.float32)
    assert_same_blocks(quantize(isa, x), quantized_blocks(x))


@pytest.mark.parametrize("isa", ISAS)
def test_quantizing_extremes(isa: str) -> None:
    x = np.random.default_rng(1).standard_normal((10, 64), dtype=np.float32)
    x[0] = 0
    x[1] = -0.0
    x[2, :16], x[2, 16:] = 0, 1e-3
    x[3] *= np.float32(3e37)
    x[4] *= np.float32(1e-36)
    x[5] *= np.float32(1e-40)  # denormals
    x[6, 0], x[6, 1:] = np.finfo(np.float32).max, 1
    x[7] = np.arange(64) - 31.5  # ties
    x[8] = np.float32(2.0**-20) * np.arange(64)
    got, wanted = quantize(isa, x), quantized_blocks(x)
    assert_same_blocks(got, wanted)
    assert np.abs(got["codes"].astype(np.int32)).max() == 127
    assert not got["codes"][:2].any() and not got["sum"][:2].any()
    error = np.abs(values_of_blocks(got) - x)
    most = np.abs(x).reshape(10, -1, 16).max(axis=2).repeat(16, axis=1)
    assert np.all(error <= most / 127 * 0.5001 + 1e-32)


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_is_quantized_the_same_in_any_batch(isa: str) -> None:
    x = np.random.default_rng(2).standard_normal((40, 320), dtype=np.float32)
    whole = quantize(isa, x)
    for row in (0, 17, 39):
        assert_same_blocks(quantize(isa, x[row : row + 1].copy()), whole[row : row + 1])
