"""Arrays for kernel tests: bf16 in numpy, packed matrices, and outputs surrounded by cells that must not change."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32, BF16 = 0, 30
DTYPES = {"float32": F32, "bfloat16": BF16}

Array = NDArray[Any]


def to_bf16(x: Array) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; for finite values."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Bf16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored(x: Array, dtype: int) -> Array:
    """x as operand elements: float32, or uint16 holding bf16."""
    return np.ascontiguousarray(x, np.float32) if dtype == F32 else to_bf16(x)


def loaded(x: Array) -> NDArray[np.float32]:
    """The inverse of `stored`."""
    return from_bf16(x) if x.dtype == np.uint16 else x


def packed(w: Array, dtype: int) -> Array:
    """w [n, k] in panels of 16 rows: f32 [N/16, k, 16], bf16 [N/16, K/2, 16, 2], zero where there is no element."""
    n, k = w.shape
    width = 1 if dtype == F32 else 2
    panels, steps = -(-n // 16), -(-k // width)
    full = np.zeros((panels * 16, steps * width), np.float32)
    full[:n, :k] = w
    return np.ascontiguousarray(stored(full, dtype).reshape(panels, 16, steps, width).transpose(0, 2, 1, 3))


class Guarded:
    """[rows, width] elements inside a larger array of NaN; `check` fails if anything around them was written."""

    def __init__(self, rows: int, width: int, dtype: int, inside: Array | None = None) -> None:
        self.stride = width + 19
        self._whole = stored(np.full((rows + 2, self.stride), np.nan, np.float32), F32)
        if dtype == BF16:
            self._whole = np.full(self._whole.shape, 0x7FC0, np.uint16)
        self.inside = self._whole[1 : 1 + rows, 3 : 3 + width]
        if inside is not None:
            self.inside[...] = stored(inside, dtype)
        self._before = self._whole.copy()

    @property
    def address(self) -> int:
        """Of the first element inside."""
        return int(self._whole.ctypes.data) + (self.stride + 3) * self._whole.itemsize

    def check(self) -> None:
        """The cells around are as they were."""
        rows, width = self.inside.shape
        self._before[1 : 1 + rows, 3 : 3 + width] = self.inside
        np.testing.assert_array_equal(self._before.view(np.uint8), self._whole.view(np.uint8))

    def values(self) -> NDArray[np.float32]:
        """What is inside, as float32; checks the guard cells first."""
        self.check()
        return loaded(self.inside.copy())
