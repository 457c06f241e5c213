"""Matrices of integers taken apart, stored and loaded again."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from streamgen.checkpoints.base import RawTensor, TensorInfo
from streamgen.quantization.base import TensorType, row_bytes
from streamgen.quantization.gguf_blocks import dequantize
from streamgen.quantization.groups import Groups, as_halves, load, store, values_of


def random_groups(rows: int, columns: int, group: int, *, codes: int, zero: int | None = None) -> Groups:
    """Any codes and scales; any zero points but where one is given."""
    rng = np.random.default_rng([rows, columns, group, codes])
    count = columns // group
    zeros = rng.integers(0, codes, (rows, count)) if zero is None else np.full((rows, count), zero)
    scales = rng.standard_normal((rows, count)).astype(np.float16)
    return Groups(rng.integers(0, codes, (rows, columns), np.uint8), scales, zeros.astype(np.uint8))


@pytest.mark.parametrize(("type", "codes"), [(TensorType.INT4, 16), (TensorType.INT8, 256)])
@pytest.mark.parametrize("group", [32, 64, 192])
def test_groups_are_stored_and_loaded(type: TensorType, codes: int, group: int) -> None:
    groups = random_groups(7, 192, group, codes=codes)
    stored = store(groups, type)
    assert stored.shape == (7, row_bytes(type, 192, group))
    again = load(stored, type, rows=7, group=group)
    for field in Groups.__struct_fields__:
        np.testing.assert_array_equal(getattr(again, field), getattr(groups, field))
    info = TensorInfo(name="w", type=type, shape=(7, 192), num_bytes=stored.nbytes, group=group)
    np.testing.assert_array_equal(dequantize(RawTensor(info=info, data=stored.reshape(-1))), values_of(groups))


def test_values_one_by_one() -> None:
    groups = random_groups(3, 64, 32, codes=16)
    values = values_of(groups)
    for row in range(3):
        for column in range(64):
            scale = float(groups.scales[row, column // 32])
            wanted = scale * (int(groups.codes[row, column]) - int(groups.zeros[row, column // 32]))
            assert values[row, column] == np.float32(wanted)


@pytest.mark.parametrize(("type", "codes"), [(TensorType.Q4_0, 16), (TensorType.Q8_0, 256)])
def test_symmetric_groups_of_32_are_blocks_of_gguf(type: TensorType, codes: int) -> None:
    groups = random_groups(5, 96, 32, codes=codes, zero=codes // 2)
    theirs = gguf.quants.dequantize(store(groups, type), gguf.GGMLQuantizationType(type.value))
    np.testing.assert_array_equal(theirs, values_of(groups))


def test_scales_that_a_half_holds() -> None:
    some = np.zeros((1, 4), np.bool_)
    bfloat16 = np.array([[1.5, -0.0078125, 2.0**-17 * 1.9921875, 65280.0]], np.float32)
    halves = as_halves(bfloat16, some)
    assert halves is not None
    np.testing.assert_array_equal(halves.astype(np.float32), bfloat16)  # exact
    rounded = as_halves(np.array([[0.1, 0.3, 1e-4, 7.7]], np.float32), some)
    assert rounded is not None
    np.testing.assert_allclose(rounded, [[0.1, 0.3, 1e-4, 7.7]], rtol=2.0**-11)


@pytest.mark.parametrize("scale", [1e-9, 1e6, np.inf, np.nan, 2.0**-20 * 1.9921875])
def test_scales_that_no_half_holds(scale: float) -> None:
    scales = np.array([[1.0, scale]], np.float32)
    assert as_halves(scales, np.zeros((1, 2), np.bool_)) is None
    halves = as_halves(scales, np.array([[False, True]]))  # nothing is scaled by it
    assert halves is not None
    assert halves.tolist() == [[1.0, 0.0]]
