"""Rounding float weights to integers, in numpy: bit for bit what csrc/cpu/round.inl does while it packs.

It says what that code computes, writes quantized checkpoints, and lets the reference backend run the same weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgen.quantization.base import Packing, TensorType
from streamgen.quantization.groups import Floats, Groups, Halves, middle

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Shares of the scale at which a group's whole range fits the codes of 4 bits; the one with the least error is taken.
SCALES = (1.0, 1.1, 1.05, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
SEARCHED_COLUMNS = 1024  # longer groups take the first of them
_LARGEST = np.float32(65504)  # half
_CHUNK_VALUES = 1 << 18  # rounded at once, so that temporaries stay in cache


def round_matrix(values: Floats, packing: Packing) -> Groups:
    """values f32 [n, k] -> the groups of a packing of Q4_0, Q8_0, INT4 or INT8; `packing.group` divides k."""
    rows, columns = values.shape
    size = packing.group or 32
    groups = values.reshape(-1, size)
    codes = np.empty(groups.shape, np.uint8)
    scales, zeros = np.empty(len(groups), np.float16), np.empty(len(groups), np.uint8)
    step = max(1, _CHUNK_VALUES // size)
    with np.errstate(all="ignore"):  # infinities become the largest numbers, NaN the least code
        for start in range(0, len(groups), step):
            part = slice(start, start + step)
            grid = _best_grid(groups[part], packing)
            codes[part] = (grid.rounded(groups[part]) + grid.zeros).astype(np.uint8)
            scales[part], zeros[part] = grid.halves[:, 0], grid.zeros[:, 0].astype(np.uint8)
    return Groups(codes.reshape(rows, columns), scales.reshape(rows, -1), zeros.reshape(rows, -1))


class _Grid:
    """A scale and zero point for each of m groups: halves f16 [m, 1], zeros f32 [m, 1]."""

    def __init__(self, halves: Halves, zeros: Floats, num_codes: int) -> None:
        self.halves = halves
        self.zeros = zeros
        self.scales = halves.astype(np.float32)
        self._inverse = np.where(self.scales == 0, np.float32(0), np.float32(1) / self.scales)
        self._num_codes = np.float32(num_codes)

    def rounded(self, values: Floats) -> Floats:
        """values [m, g] as multiples of their scales."""
        scaled = values * self._inverse
        above = np.where(scaled > -self.zeros, scaled, -self.zeros)  # NaN is not
        most = self._num_codes - self.zeros
        return np.rint(np.where(above < most, above, most))

    def errors(self, values: Floats, weights: Floats) -> Floats:
        """Weighted sums of squared errors, [m, 1]."""
        difference = values - self.scales * self.rounded(values)
        return _sums(weights * (difference * difference))

    def take(self, other: _Grid, where: NDArray[np.bool_]) -> _Grid:
        """The other's groups where told, [m, 1]."""
        halves, zeros = np.where(where, other.halves, self.halves), np.where(where, other.zeros, self.zeros)
        return _Grid(halves, zeros, int(self._num_codes))


def _best_grid(values: Floats, packing: Packing) -> _Grid:
    """The grid of least error for each group: values [m, g]."""
    low = np.fmin(np.fmin.reduce(values, axis=1, keepdims=True), np.float32(0))
    high = np.fmax(np.fmax.reduce(values, axis=1, keepdims=True), np.float32(0))
    best = _grid(low, high, packing, 1.0)
    if packing.type in (TensorType.Q8_0, TensorType.INT8) or values.shape[1] > SEARCHED_COLUMNS:
        return best
    weights = _weights(values)
    least = best.errors(values, weights)
    for scale in SCALES[1:]:
        grid = _grid(low, high, packing, scale)
        errors = grid.errors(values, weights)
        is_less = errors < least
        best, least = best.take(grid, is_less), np.where(is_less, errors, least)
    return best


def _weights(values: Floats) -> Floats:
    """What an error counts: the value's magnitude plus its group's, the root of the mean square."""
    mean = _sums(values * values) / np.float32(values.shape[1])
    weights: Floats = np.sqrt(mean) + np.abs(values)
    return weights


def _sums(values: Floats) -> Floats:
    """values [m, g] -> [m, 1], as kernels sum: 16 lanes down the group, then lane i and i + 8, i + 4, i + 2, i + 1."""
    lanes = values.reshape(len(values), -1, 16)
    sums = np.zeros((len(values), 16), np.float32)
    for i in range(lanes.shape[1]):
        sums += lanes[:, i]
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    return sums


def _grid(low: Floats, high: Floats, packing: Packing, scale: float) -> _Grid:
    """low, high [m, 1]: the range of each group, 0 within."""
    share = np.float32(scale)
    most: Floats = np.where(-low > high, low, high)  # of largest magnitude
    zeros = np.full(low.shape, middle(packing.type), np.float32)
    if packing.type in (TensorType.Q8_0, TensorType.INT8):
        return _Grid(_halves(np.abs(most) / np.float32(127)), zeros, 255)
    if packing.type is TensorType.Q4_0 or packing.symmetric:
        return _Grid(_halves(most / np.float32(-8) * share), zeros, 15)
    halves = _halves((high - low) / np.float32(15) * share)
    wide = halves.astype(np.float32)
    zeros = np.where(wide == 0, np.float32(0), np.rint(-low * share / wide))
    return _Grid(halves, np.minimum(zeros, np.float32(15)), 15)


def _halves(scales: NDArray[Any]) -> Halves:  # f32; numpy's types say f64 of some of its quotients
    halves: Halves = np.clip(scales, -_LARGEST, _LARGEST).astype(np.float16)
    return halves
