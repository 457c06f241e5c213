"""Unpacking stored rows of every type, and packing them into the panels that the products read."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from streamgen.quantization.base import BLOCKS, TensorType, row_bytes
from tests.backends.arrays import BF16, DTYPES, F32, Array, from_bf16, packed, to_bf16

_cpu = pytest.importorskip("streamgen._cpu")

EVERY_TYPE = pytest.mark.parametrize("type", list(BLOCKS), ids=lambda t: t.name)  # that GGUF has
EVERY_KERNEL = pytest.mark.parametrize(
    ("isa", "dtype"),
    [(isa, dtype) for isa in _cpu.isa_names() for dtype in DTYPES.values()],
    ids=lambda v: {0: "f32", 30: "bf16"}.get(v, v),
)
# Byte offsets of the half-precision numbers of a block.
HALVES = {
    TensorType.F16: (0,),
    TensorType.Q4_0: (0,),
    TensorType.Q4_1: (0, 2),
    TensorType.Q5_0: (0,),
    TensorType.Q5_1: (0, 2),
    TensorType.Q8_0: (0,),
    TensorType.Q4_K: (0, 2),
    TensorType.Q5_K: (0, 2),
    TensorType.Q6_K: (208,),
}


def random_rows(type: TensorType, rows: int, columns: int, seed: int = 0) -> Array:
    """Random bytes [rows, row_bytes] whose numbers are finite."""
    rng = np.random.default_rng([seed, type, rows, columns])
    if type in (TensorType.F32, TensorType.BF16):
        values = rng.standard_normal((rows, columns), dtype=np.float32)
        return (values if type == TensorType.F32 else to_bf16(values)).view(np.uint8).reshape(rows, -1)
    block = BLOCKS[type]
    data = rng.integers(0, 256, (rows, columns // block.values, block.num_bytes), np.uint8)
    for offset in HALVES[type]:
        data[..., offset + 1] &= 0xBB  # an exponent bit cleared: below 2, subnormal scales among them
    return data.reshape(rows, -1)


def expected_rows(type: TensorType, data: Array) -> Array:
    """float32 [rows, columns] as the gguf package reads them."""
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType(type.value))


def unaligned(data: Array) -> tuple[Array, int]:
    """The same bytes at an odd address; the array keeps them alive."""
    holder = np.zeros(data.size + 1, np.uint8)
    holder[1:] = data.reshape(-1)
    start = 1 if holder.ctypes.data % 2 == 0 else 0
    holder[start : start + data.size] = data.reshape(-1)
    return holder, holder.ctypes.data + start


@EVERY_TYPE
def test_dequantize_reads_as_gguf_does(type: TensorType) -> None:
    data = random_rows(type, 1, 2048)
    holder, address = unaligned(data)
    out = np.full(2048 + 1, np.nan, np.float32)
    _cpu.dequantize(type.value, address, 2048, out.ctypes.data)
    np.testing.assert_array_equal(out[:2048], expected_rows(type, data)[0])
    assert np.isnan(out[2048]) and len(holder) == data.size + 1


def test_every_half_is_read_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, np.float32)
    _cpu.dequantize(TensorType.F16, halves.ctypes.data, 1 << 16, out.ctypes.data)
    wanted = halves.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(wanted))


def pack(
    isa: str, type: TensorType, data: Array, dst: Array, dtype: int, k: int, first_row: int = 0, heads: int = 0
) -> None:
    """Every panel by itself, last first: they may not depend on each other."""
    holder, address = unaligned(data)
    panels = (first_row % 16 + len(data) + 15) // 16
    for panel in reversed(range(panels)):
        _cpu.kernel_pack(
            isa,
            address,
            data.shape[1],
            type.value,
            dst.ctypes.data,
            dtype,
            len(data),
            k,
            first_row,
            heads,
            panel,
            panel + 1,
        )
    assert len(holder) == data.size + 1


@EVERY_KERNEL
@EVERY_TYPE
def test_pack_rounds_every_type_to_the_operand(isa: str, dtype: int, type: TensorType) -> None:
    data = random_rows(type, 21, 768)
    wanted = packed(expected_rows(type, data), dtype)
    dst = np.zeros_like(wanted)
    pack(isa, type, data, dst, dtype, 768)
    if dtype == BF16:  # bf16 subnormals may become zero
        wanted, dst = from_bf16(wanted), from_bf16(dst)
        wanted[np.abs(wanted) < np.finfo(np.float32).tiny] = 0
    np.testing.assert_array_equal(dst, wanted)


@EVERY_KERNEL
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 2), (17, 3), (40, 255), (5, 257), (33, 600)])
def test_pack_any_size(isa: str, dtype: int, n: int, k: int) -> None:
    data = random_rows(TensorType.F32, n, k)
    wanted = packed(data.view(np.float32), dtype)
    whole = np.zeros(wanted.size + 64, wanted.dtype)
    whole[-64:] = 7
    pack(isa, TensorType.F32, data, whole, dtype, k)
    np.testing.assert_array_equal(whole[:-64].reshape(wanted.shape), wanted)
    assert np.all(whole[-64:] == 7), "wrote behind the last panel"


@EVERY_KERNEL
@pytest.mark.parametrize("sizes", [(16, 32, 16), (8, 8, 5), (20, 3, 40), (1, 1, 1, 30)])
def test_pack_side_by_side(isa: str, dtype: int, sizes: tuple[int, ...]) -> None:
    k = 70
    parts = [random_rows(TensorType.F32, n, k, seed=i) for i, n in enumerate(sizes)]
    wanted = packed(np.concatenate([part.view(np.float32) for part in parts]), dtype)
    dst = np.zeros_like(wanted)
    first_row = 0
    for part in parts:
        pack(isa, TensorType.F32, part, dst, dtype, k, first_row)
        first_row += len(part)
    np.testing.assert_array_equal(dst, wanted)


@EVERY_KERNEL
@pytest.mark.parametrize(("heads", "head_dim", "first_row"), [(1, 4, 0), (3, 64, 0), (2, 10, 7), (9, 8, 16)])
def test_pack_undoes_the_interleaved_rope_order(
    isa: str, dtype: int, heads: int, head_dim: int, first_row: int
) -> None:
    n, k = heads * head_dim, 12
    rows = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
    # Stored row h D + 2 i + j is row h D + i + j D / 2.
    file_rows = rows.reshape(heads, 2, head_dim // 2, k).swapaxes(1, 2).reshape(n, k)
    before = np.zeros((first_row, k), np.float32)
    wanted = packed(np.concatenate([before, rows]), dtype)
    dst = np.zeros_like(wanted)
    pack(isa, TensorType.F32, np.ascontiguousarray(file_rows).view(np.uint8), dst, dtype, k, first_row, heads)
    np.testing.assert_array_equal(dst, wanted)


@pytest.mark.parametrize("isa", _cpu.isa_names())
def test_bf16_rounds_to_nearest_even(isa: str) -> None:
    tie_down, tie_up, above, below = 0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF
    bits = np.array([tie_down, tie_up, above, below, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x80000000], np.uint32)
    dst = np.zeros((8 // 2, 16, 2), np.uint16)
    pack(isa, TensorType.F32, bits.view(np.uint8).reshape(1, -1), dst, BF16, 8)
    wanted = [0x3F80, 0x3F82, 0x3F81, 0x3F81, 0x7F80, 0xFF80, 0x7F80, 0x8000]
    assert dst[:, 0].reshape(-1).tolist() == wanted
    not_a_number = np.array([[np.nan, 0.0]], np.float32)
    pack(isa, TensorType.F32, not_a_number.view(np.uint8), dst, BF16, 2)
    assert np.isnan(from_bf16(dst[0, 0])[0])


def test_row_bytes_of_the_formats_agree() -> None:
    for type in BLOCKS:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type.value)]
        assert row_bytes(type, 512) == 512 // block * size
    assert {F32, BF16} <= {t.value for t in TensorType}
