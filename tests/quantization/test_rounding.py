"""What rounding does to values; that kernels do the same is in `tests/backends/test_packed.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from streamgen.quantization import rounding
from streamgen.quantization.base import Packing, TensorType
from streamgen.quantization.groups import values_of
from streamgen.quantization.rounding import round_matrix

if TYPE_CHECKING:
    from numpy.typing import NDArray

INT4 = (
    Packing(TensorType.Q4_0),
    *(Packing(TensorType.INT4, group, symmetric) for group in (32, 128) for symmetric in (False, True)),
)
INT8 = (Packing(TensorType.Q8_0), Packing(TensorType.INT8, 64, True))


def normal(rows: int = 64, columns: int = 512) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, columns), dtype=np.float32)


def error(values: np.ndarray, packing: Packing) -> float:
    difference = values_of(round_matrix(values, packing)) - values
    return float(np.sum(difference**2) / np.sum(values**2))


@pytest.mark.parametrize("packing", INT8)
def test_8_bits_are_within_half_a_step(packing: Packing) -> None:
    values = normal()
    size = packing.group or 32
    most = np.abs(values).reshape(64, -1, size).max(axis=2).repeat(size, axis=1)
    difference = np.abs(values_of(round_matrix(values, packing)) - values)
    assert np.all(difference <= most / 127 * 0.51 + most * 2.0**-11)


@pytest.mark.parametrize("packing", INT4)
def test_the_search_pays(packing: Packing, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal()
    searched = error(values, packing)
    monkeypatch.setattr(rounding, "SCALES", (1.0,))
    assert searched < 0.97 * error(values, packing)


@pytest.mark.parametrize("packing", INT4)
def test_a_group_is_never_worse_for_the_search(packing: Packing, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(8) * np.exp(np.random.default_rng(0).standard_normal((8, 512))).astype(np.float32)
    size = packing.group or 32
    searched = (values_of(round_matrix(values, packing)) - values).reshape(-1, size)
    monkeypatch.setattr(rounding, "SCALES", (1.0,))
    plain = (values_of(round_matrix(values, packing)) - values).reshape(-1, size)
    weights = rounding_weights(values.reshape(-1, size))
    assert np.all(np.sum(weights * searched**2, axis=1) <= np.sum(weights * plain**2, axis=1) * 1.0001)


def rounding_weights(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each value's error counts."""
    weights: NDArray[np.float32] = np.abs(groups) + np.sqrt(np.mean(groups**2, axis=1, keepdims=True))
    return weights


@pytest.mark.parametrize("packing", (*INT4, *INT8))
def test_zero_stays_zero(packing: Packing) -> None:
    values = normal()
    values[:, ::5] = 0
    values[3] = 0
    rounded = values_of(round_matrix(values, packing))
    assert not rounded[:, ::5].any() and not rounded[3].any()


def test_what_4_bits_hold_is_kept() -> None:
    values = np.tile(np.arange(16, dtype=np.float32) * 0.25 - 1.5, (4, 8))
    np.testing.assert_array_equal(values_of(round_matrix(values, Packing(TensorType.INT4, 32))), values)
    symmetric = np.tile(np.arange(16, dtype=np.float32) - 8, (4, 8))
    np.testing.assert_array_equal(values_of(round_matrix(symmetric, Packing(TensorType.Q4_0))), symmetric)


def test_chunks_do_not_change_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    values, packing = normal(), Packing(TensorType.INT4, 64)
    whole = values_of(round_matrix(values, packing))
    monkeypatch.setattr(rounding, "_CHUNK_VALUES", 200)
    np.testing.assert_array_equal(values_of(round_matrix(values, packing)), whole)
