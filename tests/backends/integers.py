"""Integer weights for kernel tests: stored rows of every type, packed matrices, and quantized activations in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import Struct
from numpy.typing import NDArray

from streamgen.checkpoints.base import RawTensor, TensorInfo
from streamgen.quantization.base import BLOCKS, Packing, TensorType, row_bytes
from streamgen.quantization.gguf_blocks import dequantize
from streamgen.quantization.groups import Groups, store

_cpu = pytest.importorskip("streamgen._cpu")

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

# Every packed type, with the sizes of groups that say something: one block of columns, several, and many.
PACKINGS = (
    *(Packing(type) for type in BLOCKS if type.is_integer),
    *(Packing(type, group) for type in (TensorType.INT4, TensorType.INT8) for group in (32, 64, 128, 160)),
)
ACTIVATION_BLOCK = np.dtype(
    {
        "names": ["codes", "scales", "negative_sums", "sum"],
        "formats": [("i1", 32), ("f4", 2), ("i4", 2), "f4"],
        "offsets": [0, 32, 40, 48],
        "itemsize": 64,
    }
)


def name_of(packing: Packing) -> str:
    """For ids of tests."""
    return packing.type.name + (f"-{packing.group}" if packing.group else "")


ISAS = _cpu.isa_names()
EVERY_KERNEL = pytest.mark.parametrize(
    ("isa", "packing"),
    [(isa, packing) for isa in ISAS for packing in PACKINGS],
    ids=lambda v: v if isinstance(v, str) else name_of(v),
)


def columns_step(packing: Packing) -> int:
    """Columns of a superblock: K is a multiple."""
    return packing.group or BLOCKS[packing.type].values


def random_stored(packing: Packing, rows: int, columns: int, seed: int = 0) -> Bytes:
    """Stored rows [rows, bytes]: codes of any value, scales of any sign below 2, subnormal halves among them."""
    rng = np.random.default_rng([seed, packing.type, packing.group, rows, columns])
    if packing.type not in BLOCKS:
        count = columns // packing.group
        codes = rng.integers(0, 16 if packing.type is TensorType.INT4 else 256, (rows, columns), np.uint8)
        zeros = rng.integers(0, 17 if packing.type is TensorType.INT4 else 256, (rows, count), np.uint8)
        scales = rng.standard_normal((rows, count)).astype(np.float16)
        return store(Groups(codes, scales, zeros), packing.type)
    block = BLOCKS[packing.type]
    data = rng.integers(0, 256, (rows, columns // block.values, block.num_bytes), np.uint8)
    halves = {TensorType.Q6_K: (208,), TensorType.Q4_0: (0,), TensorType.Q5_0: (0,), TensorType.Q8_0: (0,)}
    for offset in halves.get(packing.type, (0, 2)):
        data[..., offset + 1] &= 0xBB  # an exponent bit cleared: finite
    return data.reshape(rows, -1)


def raw_of(packing: Packing, stored: Bytes, columns: int, rope_heads: int | None = None) -> RawTensor:
    """Stored rows as a checkpoint hands them over."""
    shape = (len(stored), columns)
    info = TensorInfo(name="w.weight", type=packing.type, shape=shape, num_bytes=stored.nbytes, group=packing.group)
    return RawTensor(info=info, data=stored.reshape(-1), rope_heads=rope_heads)


def values_of_stored(packing: Packing, stored: Bytes, columns: int) -> Floats:
    """What stored rows mean, [rows, columns]."""
    return dequantize(raw_of(packing, stored, columns))


class PackedMatrix(Struct):
    """A matrix as kernels read it. `holder` keeps it alive."""

    packing: Packing
    rows: int
    columns: int
    address: int
    holder: Bytes

    @classmethod
    def empty(cls, packing: Packing, rows: int, columns: int) -> PackedMatrix:
        """Room for a matrix, zeroed, on a cache line."""
        num_bytes = -(-rows // 16) * _cpu.packed_panel_bytes(packing.type, packing.group, columns)
        holder = np.zeros(num_bytes + 64, np.uint8)
        return cls(packing, rows, columns, holder.ctypes.data + -holder.ctypes.data % 64, holder)

    def pack(
        self,
        isa: str,
        source: Bytes | Floats,
        *,
        first_row: int = 0,
        rope_heads: int = 0,
        panels: tuple[int, int] = (-1, -1),
    ) -> None:
        """Rows of its own type, or floats to round, from `first_row` on."""
        is_float = source.dtype == np.float32
        _cpu.kernel_pack(
            isa, source.ctypes.data, source.strides[0], TensorType.F32 if is_float else self.packing.type,
            self.address, self.packing.type, len(source), self.columns, first_row, rope_heads, *panels,
            self.packing.group, self.packing.symmetric,
        )  # fmt: skip

    @property
    def memory(self) -> Bytes:
        """The packed bytes."""
        start = self.address - self.holder.ctypes.data
        return self.holder[start : start + len(self.holder) - 64]

    def values(self) -> Floats:
        """Every row, unpacked."""
        out = np.full((self.rows, self.columns), np.nan, np.float32)
        for row in range(self.rows):
            _cpu.unpack_row(
                self.packing.type, self.packing.group, self.address, row, self.columns, out[row:].ctypes.data
            )
        return out


def packed_matrix(isa: str, packing: Packing, source: Bytes | Floats, columns: int) -> PackedMatrix:
    """A whole matrix, packed."""
    matrix = PackedMatrix.empty(packing, len(source), columns)
    matrix.pack(isa, source)
    return matrix


def quantized_blocks(x: Floats) -> NDArray[np.void]:
    """x [rows, width] as activation blocks [rows, width / 32], as kernels are to make them."""
    groups = x.reshape(len(x), -1, 2, 16)
    most = np.abs(groups).max(axis=3)
    blocks = np.zeros(groups.shape[:2], ACTIVATION_BLOCK)
    scales = most * np.float32(1 / 127)
    inverse = np.float32(127) / np.maximum(most, np.float32(1e-30))
    codes = np.rint(groups * inverse[..., None])
    sums = codes.sum(axis=3, dtype=np.float32)
    blocks["codes"] = codes.reshape(len(x), -1, 32)
    blocks["scales"] = scales
    blocks["negative_sums"] = -sums
    blocks["sum"] = scales[..., 0] * sums[..., 0] + scales[..., 1] * sums[..., 1]
    return blocks


def values_of_blocks(blocks: NDArray[np.void]) -> NDArray[np.float64]:
    """What activation blocks stand for, [rows, width]."""
    codes = blocks["codes"].reshape(*blocks.shape, 2, 16).astype(np.float64)
    values: NDArray[np.float64] = codes * blocks["scales"][..., None]
    return values.reshape(len(blocks), -1)


def row_bytes_of(packing: Packing, columns: int) -> int:
    """Bytes of a stored row."""
    return row_bytes(packing.type, columns, packing.group)
