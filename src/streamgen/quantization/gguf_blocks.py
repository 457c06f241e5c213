"""Reference dequantization of every element type a checkpoint may hold, in numpy (groups: `groups.py`).

It defines what the stored bytes mean; the kernels are tested against it. Layouts and the order of operations are those
of ggml (https://github.com/ggml-org/ggml, ggml-common.h and ggml-quants.c), so that float32 results agree to the bit.

Letters of the shapes: n blocks; a block is 32 values, or 256 for the K types, whose sub-blocks (eight of 32, in Q6_K
sixteen of 16) have their own scale (and minimum).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streamgen.quantization.base import BLOCKS, TensorType
from streamgen.quantization.groups import load, values_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.checkpoints.base import RawTensor

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_CHUNK_VALUES = 1 << 20  # values turned at once: temporaries are several times the values, and should stay in cache


def dequantize(raw: RawTensor) -> Floats:
    """The values of a tensor, [*info.shape], with rows in the checkpoint's own order (`rope_heads` undone)."""
    info = raw.info
    if info.type in BLOCKS:
        values = dequantize_bytes(raw.data, info.type).reshape(info.shape)
    else:
        values = values_of(load(raw.data, info.type, rows=info.shape[0], group=info.group))
    return values if raw.rope_heads is None else unpermute_rows(values, raw.rope_heads)


def dequantize_bytes(data: Bytes, type: TensorType) -> Floats:
    """The values of whole blocks: data [n * block bytes] -> [n * block values]."""
    block = BLOCKS[type]
    blocks = data.reshape(-1, block.num_bytes)
    values = np.empty((len(blocks), block.values), np.float32)
    decode = _DECODERS[type]
    step = max(1, _CHUNK_VALUES // block.values)
    for start in range(0, len(blocks), step):
        values[start : start + step] = decode(blocks[start : start + step])
    return values.reshape(-1)


def unpermute_rows(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Rows from interleaved rope order to half-split order: rows [num_heads * head_dim, ...], a copy.

    Within each head, stored row 2 i + j becomes row i + j * head_dim / 2. A row is values, or the bytes of its blocks.
    """
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[n, k] -> [n, 2 k]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """[n, 4] -> [n, 32]: bit i of the little-endian word, shifted to where a fifth bit stands."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Floats:
    scale, quants = _f16(blocks[:, :2]), _nibbles(blocks[:, 2:])
    return scale * (quants.astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    scale, minimum, quants = _f16(blocks[:, :2]), _f16(blocks[:, 2:4]), _nibbles(blocks[:, 4:])
    return scale * quants.astype(np.float32) + minimum


def _q5_0(blocks: Bytes) -> Floats:
    scale, quants = _f16(blocks[:, :2]), _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return scale * (quants.astype(np.float32) - 16)


def _q5_1(blocks: Bytes) -> Floats:
    scale, minimum = _f16(blocks[:, :2]), _f16(blocks[:, 2:4])
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return scale * quants.astype(np.float32) + minimum


def _q8_0(blocks: Bytes) -> Floats:
    return _f16(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_k(blocks: Bytes) -> Floats:
    return _scale_k(blocks, _nibbles_k(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Floats:
    # Byte i of the 32 holds the fifth bits of value i of each of the eight sub-blocks, sub-block 0 in the lowest bit.
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks[:, None, 16:48] >> shifts & np.uint8(1)) << np.uint8(4)
    quants: Bytes = _nibbles_k(blocks[:, 48:]) | fifth
    return _scale_k(blocks, quants)


def _nibbles_k(packed: Bytes) -> Bytes:
    """[n, 128] -> [n, 8, 32]: each 32 bytes hold two sub-blocks, the first in the low nibbles."""
    groups = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(-1, 8, 32)


def _scale_k(blocks: Bytes, quants: Bytes) -> Floats:
    """quants [n, 8, 32] -> values [n, 256]; bytes 0-3: scale and minimum of the block, 4-15: of its sub-blocks."""
    scales, minimums = _sub_scales(blocks[:, 4:16])
    scale = _f16(blocks[:, :2]) * scales.astype(np.float32)
    minimum = _f16(blocks[:, 2:4]) * minimums.astype(np.float32)
    return (scale[:, :, None] * quants.astype(np.float32) - minimum[:, :, None]).reshape(-1, 256)


def _sub_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight 6-bit scales and minimums out of 12 bytes: [n, 12] -> two of [n, 8].

    The first four scales and minimums are the low 6 bits of bytes 0-3 and 4-7. The last four have their low nibbles in
    bytes 8-11 (scale low, minimum high) and their top two bits in the top bits of bytes 0-3 and 4-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minimums = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales, minimums


def _q6_k(blocks: Bytes) -> Floats:
    low, high = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    # Each half of 128 values: 64 bytes of nibbles (all low ones first), 32 bytes with four 2-bit tops each.
    nibbles = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    tops = high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    quants = (nibbles | tops << 4).reshape(-1, 16, 16).astype(np.float32) - 32
    scale = _f16(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    values: Floats = scale[:, :, None] * quants
    return values.reshape(-1, 256)


_DECODERS: dict[TensorType, Callable[[Bytes], Floats]] = {
    TensorType.F32: _f32,
    TensorType.F16: _f16,
    TensorType.BF16: _bf16,
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q8_0: _q8_0,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
}
