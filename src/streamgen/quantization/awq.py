"""AWQ checkpoints, version "gemm" (https://github.com/casper-hansen/AutoAWQ): 4 bits, packed along the outputs.

    qweight  i32 [k, n / 8]        qzeros  i32 [k / g, n / 8]        scales  f16 [k / g, n]

Nibble i of a word, from the lowest, holds output 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. w = (code - zero) scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgen.quantization.base import TensorType
from streamgen.quantization.formats import IntegerMatrix, Module, checked, halves, unpack, unsupported
from streamgen.quantization.groups import Bytes, Groups

if TYPE_CHECKING:
    from collections.abc import Mapping

_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)  # of each of eight outputs: the inverse of the order above


class Awq:
    """A `WeightFormat`.

    Raises:
        UnsupportedModel: another version, other bits, or no zero points.
    """

    parts = frozenset(("weight", "qweight", "qzeros", "scales"))

    def __init__(self, config: Mapping[str, Any]) -> None:
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise unsupported(f"version {version[:40]!r} of awq", "'gemm'")
        if config.get("bits", config.get("w_bit", 4)) != 4:
            raise unsupported(f"awq with {str(config.get('bits'))[:20]} bits", "4")
        if config.get("zero_point", True) is not True:
            raise unsupported("awq without zero points", "zero_point true")

    def find(self, module: Module) -> IntegerMatrix | None:
        """See `WeightFormat.find`."""
        if "qweight" not in module.parts:
            return None
        columns, words = module.matrix_shape("qweight", "I32")
        count = module.matrix_shape("qzeros", "I32")[0]
        module.expect("qzeros", ("I32",), (count, words))
        module.expect("scales", ("F16", "BF16"), (count, 8 * words))
        if columns % count:
            raise unsupported(f"{module.name}: {columns} columns in {count} groups", "groups of one size")
        return checked(module, IntegerMatrix(TensorType.INT4, 8 * words, columns, columns // count))

    def read(self, module: Module, matrix: IntegerMatrix) -> Groups:
        """See `WeightFormat.read`."""
        codes, zeros = _outputs_first(module.read("qweight")), _outputs_first(module.read("qzeros"))
        scales = np.ascontiguousarray(module.read("scales").T, np.float32)
        return Groups(codes, halves(module, scales, codes, zeros), zeros)


def _outputs_first(words: Any) -> Bytes:
    """i32 [k, n / 8] -> u8 [n, k]."""
    nibbles = unpack(words, 4).reshape(len(words), -1, 8)[..., _NIBBLE_OF_OUTPUT]
    return np.ascontiguousarray(nibbles.reshape(len(words), -1).T)
