"""Which packing a matrix gets: what its checkpoint says, or what `quantization` asks for when it is loaded."""

from __future__ import annotations

from streamgen.quantization.base import BLOCKS, Packing, TensorType

DENSE = {"float32": TensorType.F32, "bfloat16": TensorType.BF16}


def choose_packing(stored: TensorType, columns: int, *, group: int = 0, dtype: str) -> Packing:
    """How a matrix of `columns` inputs, stored as `stored`, is packed.

    Integers stay as they are, at their own size, so that a quantized checkpoint is not unpacked. With dtype float32
    everything is float32: that is the exact path.
    """
    if dtype == "float32" or not stored.is_integer or columns % 32 != 0:
        return Packing(DENSE[dtype])
    return Packing(stored, group if stored not in BLOCKS else 0)
