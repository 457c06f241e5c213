"""Hand-made quantized weights: every format written value by value, as its documentation says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamgen.quantization.formats import Module, Part

if TYPE_CHECKING:
    from streamgen.quantization.groups import Groups

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_DTYPES = {"int8": "I8", "int32": "I32", "int64": "I64", "float16": "F16", "float32": "F32"}

Arrays = dict[str, NDArray[Any]]


def module_of(arrays: Arrays, name: str = "layer.proj") -> Module:
    """A module whose parts are these."""
    parts = {part: Part(_DTYPES[array.dtype.name], array.shape) for part, array in arrays.items()}
    return Module(name, parts, arrays.__getitem__)


def bits_at(words: NDArray[np.int64], index: tuple[int, int], shift: int, value: int) -> None:
    """Put a code into a word."""
    words[index] |= value << shift


def as_int32(words: NDArray[np.int64]) -> NDArray[np.int32]:
    """Unsigned words as they are stored."""
    return words.astype(np.uint32).view(np.int32)


def awq(groups: Groups) -> Arrays:
    """AWQ gemm."""
    rows, columns = groups.codes.shape
    qweight = np.zeros((columns, rows // 8), np.int64)
    qzeros = np.zeros((groups.scales.shape[1], rows // 8), np.int64)
    for word in range(rows // 8):
        for nibble, output in enumerate(AWQ_ORDER):
            for column in range(columns):
                bits_at(qweight, (column, word), 4 * nibble, int(groups.codes[8 * word + output, column]))
            for g in range(groups.scales.shape[1]):
                bits_at(qzeros, (g, word), 4 * nibble, int(groups.zeros[8 * word + output, g]))
    scales = np.ascontiguousarray(groups.scales.T)
    return {"qweight": as_int32(qweight), "qzeros": as_int32(qzeros), "scales": scales}


def gptq(groups: Groups, *, bits: int, less: int) -> Arrays:
    """GPTQ; `less` is taken off the zero points, 1 in version 1."""
    rows, columns = groups.codes.shape
    per_word, count = 32 // bits, groups.scales.shape[1]
    qweight = np.zeros((columns // per_word, rows), np.int64)
    qzeros = np.zeros((count, rows // per_word), np.int64)
    for row in range(rows):
        for column in range(columns):
            shift = column % per_word * bits
            bits_at(qweight, (column // per_word, row), shift, int(groups.codes[row, column]))
        for g in range(count):
            bits_at(qzeros, (g, row // per_word), row % per_word * bits, int(groups.zeros[row, g]) - less)
    return {
        "qweight": as_int32(qweight),
        "qzeros": as_int32(qzeros),
        "scales": np.ascontiguousarray(groups.scales.T),
        "g_idx": (np.arange(columns) // groups.group).astype(np.int32),
    }


def pack_quantized(groups: Groups, *, bits: int, symmetric: bool) -> Arrays:
    """compressed-tensors, pack-quantized."""
    rows, columns = groups.codes.shape
    per_word, count = 32 // bits, groups.scales.shape[1]
    packed = np.zeros((rows, columns // per_word), np.int64)
    zeros = np.zeros((-(-rows // per_word), count), np.int64)
    for row in range(rows):
        for column in range(columns):
            shift = column % per_word * bits
            bits_at(packed, (row, column // per_word), shift, int(groups.codes[row, column]))
        for g in range(count):
            bits_at(zeros, (row // per_word, g), row % per_word * bits, int(groups.zeros[row, g]))
    arrays: Arrays = {
        "weight_packed": as_int32(packed),
        "weight_scale": groups.scales,
        "weight_shape": np.array([rows, columns], np.int64),
    }
    return arrays if symmetric else {**arrays, "weight_zero_point": as_int32(zeros)}


def int_quantized(groups: Groups, *, symmetric: bool) -> Arrays:
    """compressed-tensors, int-quantized."""
    weight = (groups.codes.astype(np.int16) - 128).astype(np.int8)
    zeros = (groups.zeros.astype(np.int16) - 128).astype(np.int8)
    arrays: Arrays = {"weight": weight, "weight_scale": groups.scales}
    return arrays if symmetric else {**arrays, "weight_zero_point": zeros}
