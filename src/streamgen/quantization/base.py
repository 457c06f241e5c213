"""The element types a checkpoint's tensors come in, and those that weights have in memory.

Numbers are GGUF's, for every container; what GGUF does not have counts from 1000.
"""

from __future__ import annotations

from enum import IntEnum

from msgspec import Struct


class TensorType(IntEnum):
    """How a tensor's values are stored. The value is the type's id in GGUF (ggml.h) and in csrc/common/dtypes.h."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30
    # Groups of a size said beside: w = scale * (code - zero). Stored: scale f16, zero u8, 0, then a byte a code.
    INT4 = 1000
    INT8 = 1001

    @property
    def is_integer(self) -> bool:
        """Whether values are codes that kernels multiply as integers."""
        return self not in (TensorType.F32, TensorType.F16, TensorType.BF16)


class Packing(Struct, frozen=True):
    """How a matrix lies in memory: csrc/cpu/packed.h, docs/kernels.md.

    type        F32 and BF16: dense; else integers, whose input is quantized to 8 bits in groups of 16 on the fly
    group       columns that share a scale: of INT4 and INT8 alone, else 0
    symmetric   of INT4 and INT8 rounded from floats: the zero point is the middle of the codes
    """

    type: TensorType
    group: int = 0
    symmetric: bool = False


class BlockShape(Struct, frozen=True):
    """A storage unit: `values` consecutive elements of a row in `num_bytes`."""

    values: int
    num_bytes: int


BLOCKS: dict[TensorType, BlockShape] = {
    TensorType.F32: BlockShape(1, 4),
    TensorType.F16: BlockShape(1, 2),
    TensorType.BF16: BlockShape(1, 2),
    TensorType.Q4_0: BlockShape(32, 18),
    TensorType.Q4_1: BlockShape(32, 20),
    TensorType.Q5_0: BlockShape(32, 22),
    TensorType.Q5_1: BlockShape(32, 24),
    TensorType.Q8_0: BlockShape(32, 34),
    TensorType.Q4_K: BlockShape(256, 144),
    TensorType.Q5_K: BlockShape(256, 176),
    TensorType.Q6_K: BlockShape(256, 210),
}


def row_bytes(type: TensorType, columns: int, group: int = 0) -> int:
    """Bytes of a stored row of `columns` values; columns is a multiple of the block's values, or of `group`."""
    if type in (TensorType.INT4, TensorType.INT8):
        assert group > 0 and columns % group == 0, f"{type.name}: {columns} columns are no multiple of {group}"
        return columns // group * (4 + group)
    block = BLOCKS[type]
    assert columns % block.values == 0, f"{type.name}: {columns} columns are no multiple of {block.values}"
    return columns // block.values * block.num_bytes
