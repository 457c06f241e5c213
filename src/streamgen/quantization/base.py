"""The element types a checkpoint's tensors come in. Numbers are GGUF's, for every container."""

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


def row_bytes(type: TensorType, columns: int) -> int:
    """Bytes of a row of `columns` values; columns is a multiple of the block's values."""
    block = BLOCKS[type]
    assert columns % block.values == 0, f"{type.name}: {columns} columns are no multiple of {block.values}"
    return columns // block.values * block.num_bytes
