"""GPTQ checkpoints of 4 and 8 bits (https://github.com/AutoGPTQ/AutoGPTQ), in both versions of their zero points.

qweight  i32 [k * bits / 32, n]     codes packed down the inputs, from the lowest bits on
qzeros   i32 [k / g, n * bits / 32] packed along the outputs; version 1 stores the zero point less one
scales   f16 [k / g, n]
g_idx    i32 [k]                    the group of each input: k // g, else the inputs are in another order
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.quantization.base import TensorType
from streamgen.quantization.formats import IntegerMatrix, Module, checked, halves, unpack, unsupported
from streamgen.quantization.groups import Bytes, Groups

if TYPE_CHECKING:
    from collections.abc import Mapping

_TYPES = {4: TensorType.INT4, 8: TensorType.INT8}
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point


class Gptq:
    """A `WeightFormat`.

    Raises:
        UnsupportedModel: other bits, another packing, inputs in the order of activations (`desc_act`), or bits that
            differ from module to module (`dynamic`).
    """

    parts = frozenset(("weight", "qweight", "qzeros", "scales", "g_idx"))

    def __init__(self, config: Mapping[str, Any]) -> None:
        layout = config.get("checkpoint_format") or "gptq"
        if layout not in _FORMATS:
            raise unsupported(f"checkpoint_format {str(layout)[:40]!r} of gptq", ", ".join(_FORMATS))
        if config.get("bits") not in _TYPES:
            raise unsupported(f"gptq with {str(config.get('bits'))[:20]} bits", "4 and 8")
        for name in ("desc_act", "dynamic"):
            if config.get(name):
                raise unsupported(f"gptq with {name}", f"checkpoints without {name}")
        self._bits: int = config["bits"]
        self._added = _FORMATS[layout]

    def find(self, module: Module) -> IntegerMatrix | None:
        """See `WeightFormat.find`."""
        if "qweight" not in module.parts:
            return None
        per_word = 32 // self._bits
        words, rows = module.matrix_shape("qweight", "I32")
        columns, count = words * per_word, module.matrix_shape("qzeros", "I32")[0]
        module.expect("qzeros", ("I32",), (count, -(-rows // per_word)))
        module.expect("scales", ("F16", "BF16", "F32"), (count, rows))
        if "g_idx" in module.parts:
            module.expect("g_idx", ("I32",), (columns,))
        if columns % count:
            raise unsupported(f"{module.name}: {columns} columns in {count} groups", "groups of one size")
        return checked(module, IntegerMatrix(_TYPES[self._bits], rows, columns, columns // count))

    def read(self, module: Module, matrix: IntegerMatrix) -> Groups:
        """See `WeightFormat.read`."""
        if "g_idx" in module.parts:
            _check_order(module, matrix)
        codes = unpack(module.read("qweight").T, self._bits)
        zeros = self._zeros(module, matrix)
        scales = np.ascontiguousarray(module.read("scales").T, np.float32)
        return Groups(codes, halves(module, scales, codes, zeros), zeros)

    def _zeros(self, module: Module, matrix: IntegerMatrix) -> Bytes:
        stored = unpack(module.read("qzeros"), self._bits)[:, : matrix.rows].T
        if self._added and np.any(stored == 255):
            raise UnsupportedModel(f"{module.name}.qzeros: a zero point of 256 does not fit 8 bits")
        return np.ascontiguousarray(stored + np.uint8(self._added))


def _check_order(module: Module, matrix: IntegerMatrix) -> None:
    groups = module.read("g_idx")
    if not np.any(groups):
        return  # some writers leave it empty
    if np.any(groups < 0) or np.any(groups >= matrix.columns // matrix.group):
        raise CorruptWeights(f"{module.name}.g_idx: expected groups below {matrix.columns // matrix.group}")
    if not np.array_equal(groups, np.arange(matrix.columns) // matrix.group):
        raise unsupported(f"{module.name}.g_idx: inputs in the order of activations", "inputs in order")
