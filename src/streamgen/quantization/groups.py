"""Matrices of integers with a scale and a zero point for each group of columns, taken apart: w = scale (code - zero).

Every format that stores integers this way comes down to `Groups`; here they become the stored rows that kernels pack
(`TensorType.INT4` and `INT8`, and GGUF's Q4_0 and Q8_0, which are their symmetric groups of 32) and back.

Letters of the shapes: n rows, k columns, g columns of a group.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamgen.quantization.base import TensorType, row_bytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Halves = NDArray[np.float16]

GROUP_STEP = 32  # columns: groups are multiples of it, as the kernels multiply 32 columns at a time
BLOCK_TYPES = {TensorType.INT4: TensorType.Q4_0, TensorType.INT8: TensorType.Q8_0}  # of symmetric groups of 32
_MIDDLE: dict[TensorType, int] = {TensorType.Q4_0: 8, TensorType.Q8_0: 128, TensorType.INT4: 8, TensorType.INT8: 128}
_HEAD_BYTES = 4  # of a stored group of INT4 and INT8: scale f16, zero u8, 0


class Groups(Struct, frozen=True):
    """A matrix of integers.

    codes    u8 [n, k]
    scales   f16 [n, k / g]
    zeros    u8 [n, k / g]
    """

    codes: Bytes
    scales: Halves
    zeros: Bytes

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[1] // self.scales.shape[1])


def middle(type: TensorType) -> int:
    """The zero point of symmetric codes."""
    return _MIDDLE[type]


def values_of(groups: Groups) -> Floats:
    """f32 [n, k], with the operations of the kernels, so the same bits."""
    rows, columns = groups.codes.shape
    codes = groups.codes.reshape(rows, -1, groups.group).astype(np.float32)
    values: Floats = groups.scales[..., None].astype(np.float32) * (codes - groups.zeros[..., None].astype(np.float32))
    return values.reshape(rows, columns)


def store(groups: Groups, type: TensorType) -> Bytes:
    """Stored rows, u8 [n, row_bytes]. Q4_0 and Q8_0 keep no zero points: theirs are the middle."""
    rows, columns = groups.codes.shape
    codes = groups.codes.reshape(rows, -1, groups.group)
    if type in (TensorType.INT4, TensorType.INT8):
        stored = np.zeros((rows, codes.shape[1], _HEAD_BYTES + groups.group), np.uint8)
        stored[..., 2] = groups.zeros
        stored[..., _HEAD_BYTES:] = codes
    else:
        assert groups.group == GROUP_STEP, f"{type.name}: a block has 32 values, not {groups.group}"
        stored = np.empty((rows, codes.shape[1], row_bytes(type, GROUP_STEP)), np.uint8)
        stored[..., 2:] = codes[..., :16] | codes[..., 16:] << 4 if type is TensorType.Q4_0 else codes ^ 0x80
    stored[..., :2] = np.ascontiguousarray(groups.scales, "<f2").view(np.uint8).reshape(*groups.scales.shape, 2)
    return stored.reshape(rows, row_bytes(type, columns, groups.group))


def load(data: Bytes, type: TensorType, *, rows: int, group: int) -> Groups:
    """The inverse of `store`: stored rows of INT4 or INT8, of any shape."""
    stored = data.reshape(rows, -1, _HEAD_BYTES + group)
    return Groups(
        codes=stored[..., _HEAD_BYTES:].reshape(rows, -1),
        scales=np.ascontiguousarray(stored[..., :2]).view("<f2")[..., 0],
        zeros=stored[..., 2],
    )


def as_halves(scales: Floats, zero_groups: NDArray[np.bool_]) -> Halves | None:
    """Scales as halves, or None where one is beyond a half's range, or lost in it.

    What the 11 bits of a half do not hold is rounded: of bfloat16, nothing above 2^-17. The scale of a group whose
    values are all zero says nothing, and may be anything.

    scales        f32 [n, k / g]
    zero_groups   bool [n, k / g]
    """
    with np.errstate(all="ignore"):
        halves = scales.astype(np.float16)
        error = np.abs(halves.astype(np.float32) - scales)
    fits = error <= np.abs(scales) * np.float32(2.0**-11)  # false for NaN and infinity
    if not np.all(fits | zero_groups):
        return None
    halves[zero_groups & ~fits] = 0
    return halves
