"""Packing integer weights: repacking loses nothing, rounding is what `quantization/rounding.py` says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

from streamgen.config import make_options
from streamgen.execution.model import plan_model
from streamgen.quantization.base import BLOCKS, Packing, TensorType
from streamgen.quantization.gguf_blocks import unpermute_rows
from streamgen.quantization.groups import values_of
from streamgen.quantization.rounding import round_matrix
from tests.backends.integers import (
    EVERY_KERNEL,
    ISAS,
    PACKINGS,
    PackedMatrix,
    columns_step,
    name_of,
    packed_matrix,
    random_stored,
    row_bytes_of,
    values_of_stored,
)

if TYPE_CHECKING:
    from pathlib import Path

_cpu = pytest.importorskip("streamgen._cpu")

ROUNDED = (
    Packing(TensorType.Q8_0),
    Packing(TensorType.Q4_0),
    *(Packing(TensorType.INT8, group, True) for group in (64, 2048)),
    *(Packing(TensorType.INT4, group, symmetric) for group in (32, 96, 1024, 2048) for symmetric in (False, True)),
)


@EVERY_KERNEL
def test_repacking_is_a_bijection(isa: str, packing: Packing) -> None:
    columns = 5 * columns_step(packing)
    stored = random_stored(packing, 37, columns)
    values = packed_matrix(isa, packing, stored, columns).values()
    wanted = values_of_stored(packing, stored, columns)
    np.testing.assert_array_equal(values, wanted)
    if packing.type in BLOCKS:
        theirs = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(packing.type.value))
        np.testing.assert_array_equal(values, theirs)


@EVERY_KERNEL
@pytest.mark.parametrize("sizes", [(16, 48, 16), (8, 8, 5), (20, 3, 40), (1, 1, 31)])
def test_matrices_lie_side_by_side(isa: str, packing: Packing, sizes: tuple[int, ...]) -> None:
    columns = columns_step(packing)
    matrix = PackedMatrix.empty(packing, sum(sizes), columns)
    parts = [random_stored(packing, rows, columns, seed=i) for i, rows in enumerate(sizes)]
    first_row = 0
    for part in parts:
        matrix.pack(isa, part, first_row=first_row)
        first_row += len(part)
    wanted = np.concatenate([values_of_stored(packing, part, columns) for part in parts])
    np.testing.assert_array_equal(matrix.values(), wanted)


@EVERY_KERNEL
@pytest.mark.parametrize(("heads", "head_dim", "first_row"), [(3, 64, 0), (2, 10, 7), (1, 4, 16)])
def test_rows_in_rope_order(isa: str, packing: Packing, heads: int, head_dim: int, first_row: int) -> None:
    columns = columns_step(packing)
    stored = random_stored(packing, heads * head_dim, columns)
    matrix = PackedMatrix.empty(packing, first_row + heads * head_dim, columns)
    matrix.pack(isa, stored, first_row=first_row, rope_heads=heads)
    wanted = unpermute_rows(values_of_stored(packing, stored, columns), heads)
    np.testing.assert_array_equal(matrix.values()[first_row:], wanted)
    assert not matrix.values()[:first_row].any()


@EVERY_KERNEL
def test_panels_one_by_one_and_slices_of_rows(isa: str, packing: Packing) -> None:
    columns = 2 * columns_step(packing)
    stored = random_stored(packing, 70, columns)
    whole = packed_matrix(isa, packing, stored, columns)
    apart = PackedMatrix.empty(packing, 70, columns)
    for start, stop in ((48, 70), (0, 16), (16, 48)):
        for panel in reversed(range(-(-(stop - start) // 16))):
            apart.pack(isa, stored[start:stop], first_row=start, panels=(panel, panel + 1))
    np.testing.assert_array_equal(apart.memory, whole.memory)


def hard_values(rows: int, columns: int) -> np.ndarray:
    """Rows of every size, and what rounding could stumble over."""
    rng = np.random.default_rng([rows, columns])
    x = rng.standard_normal((rows, columns)) * np.exp(rng.normal(0, 12, (rows, 1)))
    x[0, : columns // 2] = 0
    x[1] = 1e38
    x[2, 5], x[3, 7], x[4, 9] = np.inf, -np.inf, np.nan
    x[5], x[6] = np.abs(x[5]), -np.abs(x[6])
    x[7] = rng.standard_normal(columns) * 1e-38  # to be lost in a half, denormals among them
    x[8] = rng.integers(0, 16, columns) * 0.25 - 1.5  # exact in 4 bits
    x[9] = rng.standard_normal(columns) * 1e-6  # subnormal scales
    return x.astype(np.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packing", ROUNDED, ids=lambda p: name_of(p) + ("-symmetric" if p.symmetric else ""))
def test_rounding_equals_numpys_to_the_bit(isa: str, packing: Packing) -> None:
    columns = 6144 if packing.group == 2048 else 2 * 3 * 1024
    x = hard_values(33, columns)
    with np.errstate(all="ignore"):
        wanted = values_of(round_matrix(x, packing))
        got = packed_matrix(isa, packing, x, columns).values()
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type", [TensorType.F16, TensorType.BF16])
def test_rounding_reads_every_float(isa: str, type: TensorType) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 16, (20, 256), np.uint16) & np.uint16(0xBFFF)
    values = bits.view(np.float16).astype(np.float32)
    if type is TensorType.BF16:
        values = (bits.astype(np.uint32) << 16).view(np.float32)
    packing = Packing(TensorType.INT4, 64)
    matrix = PackedMatrix.empty(packing, 20, 256)
    _cpu.kernel_pack(
        isa, bits.ctypes.data, 512, type, matrix.address, packing.type, 20, 256, 0, 0, -1, -1, 64, False
    )  # fmt: skip
    np.testing.assert_array_equal(matrix.values(), values_of(round_matrix(values, packing)))


def test_sizes_are_those_of_the_file_or_little_more() -> None:
    """Scales of six bits take eight in memory; all else is as large as it is stored, or smaller."""
    grown = {TensorType.Q4_K: 148 / 144, TensorType.Q5_K: 180 / 176}
    for packing in PACKINGS:
        if packing.type in BLOCKS:
            columns = 4 * columns_step(packing)
            packed = _cpu.packed_panel_bytes(packing.type, packing.group, columns) / 16
            assert packed / row_bytes_of(packing, columns) == pytest.approx(grown.get(packing.type, 1.0))


def test_the_demo_model_takes_the_memory_of_its_file(demo_model_path: Path) -> None:
    plan = plan_model(make_options(demo_model_path, {"kv_memory": "16MiB"}))
    assert plan.weights == pytest.approx(demo_model_path.stat().st_size, rel=0.03)
