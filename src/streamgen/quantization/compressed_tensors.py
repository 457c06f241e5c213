"""Checkpoints in the layout of compressed-tensors (https://github.com/vllm-project/compressed-tensors): read, written.

    pack-quantized   weight_packed i32 [n, k * bits / 32], codes from the lowest bits on; weight_shape i64 [2];
                     weight_zero_point i32 [n * bits / 32, k / g], packed down the rows, where it is not symmetric
    int-quantized    weight i8 [n, k]; weight_zero_point i8 [n, k / g] where it is not symmetric
    both             weight_scale [n, k / g]

Stored codes and zero points are signed in int-quantized, and moved up by 2^(bits - 1) in pack-quantized. What the
layout says of activations is not used: ours are quantized finer than any of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from streamgen.errors import CorruptWeights
from streamgen.quantization.base import Packing, TensorType
from streamgen.quantization.formats import (
    IntegerMatrix,
    Module,
    Part,
    checked,
    halves,
    pack,
    unpack,
    unsupported,
)
from streamgen.quantization.groups import Groups, middle

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from streamgen.config import Quantization

_FLOATS = ("F16", "BF16", "F32")
_LAYOUTS = ("pack-quantized", "int-quantized", "naive-quantized", "mixed-precision")
_TYPES = {4: TensorType.INT4, 8: TensorType.INT8}


class CompressedTensors:
    """A `WeightFormat`. Bits, groups and symmetry are the tensors' own: one checkpoint may mix them.

    Raises:
        UnsupportedModel: something else than integers, or weights that are transformed or sparse.
    """

    parts = frozenset(("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"))

    def __init__(self, config: Mapping[str, Any]) -> None:
        layout = config.get("format")
        if layout not in _LAYOUTS:
            raise unsupported(f"compressed-tensors format {str(layout)[:40]!r}", ", ".join(_LAYOUTS))
        if config.get("transform_config"):
            raise unsupported("transform_config of compressed-tensors", "weights that are not transformed")
        sparsity = config.get("sparsity_config")
        if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
            raise unsupported("sparsity_config of compressed-tensors", "weights that are not sparse")

    def find(self, module: Module) -> IntegerMatrix | None:
        """See `WeightFormat.find`."""
        if "weight_packed" in module.parts:
            return self._find_packed(module)
        if "weight_scale" not in module.parts:
            return None
        weight = module.parts.get("weight")
        if weight is not None and weight.dtype != "I8":
            raise unsupported(f"{module.name}.weight of {weight.dtype}", "integers of 4 and 8 bits")
        rows, columns = module.matrix_shape("weight", "I8")
        return _matrix(module, TensorType.INT8, rows, columns, zeros=("I8", rows))

    def read(self, module: Module, matrix: IntegerMatrix) -> Groups:
        """See `WeightFormat.read`."""
        bits, zeros = 4 if matrix.type is TensorType.INT4 else 8, None
        if "weight_packed" in module.parts:
            codes = unpack(module.read("weight_packed"), bits)
            if not matrix.is_symmetric:
                zeros = unpack(module.read("weight_zero_point").T, bits).T[: matrix.rows]
        else:
            codes = module.read("weight").view(np.uint8) ^ np.uint8(0x80)
            if not matrix.is_symmetric:
                zeros = module.read("weight_zero_point").view(np.uint8) ^ np.uint8(0x80)
        scales = module.read("weight_scale").astype(np.float32)
        if zeros is None:
            zeros = np.full(scales.shape, middle(matrix.type), np.uint8)
        return Groups(codes, halves(module, scales, codes, zeros), zeros)

    def _find_packed(self, module: Module) -> IntegerMatrix:
        if "weight_g_idx" in module.parts:
            raise unsupported(f"{module.name}: columns in the order of their activations", "columns in order")
        if not any(module.parts.get("weight_shape") == Part(dtype, (2,)) for dtype in ("I64", "I32")):
            raise CorruptWeights(f"{module.name}.weight_shape: expected two integers")
        rows, columns = (int(size) for size in module.read("weight_shape"))
        stored_rows, words = module.matrix_shape("weight_packed", "I32")
        bits = next((bits for bits in _TYPES if words * 32 == columns * bits), None)
        if bits is None or stored_rows != rows:
            found = f"{module.name}.weight_packed: {[stored_rows, words]} for a matrix of {[rows, columns]}"
            raise unsupported(found, "4 and 8 bits")
        return _matrix(module, _TYPES[bits], rows, columns, zeros=("I32", -(-rows * bits // 32)))


def _matrix(module: Module, type: TensorType, rows: int, columns: int, *, zeros: tuple[str, int]) -> IntegerMatrix:
    """zeros: dtype and rows of the zero points, where there are any."""
    count = module.matrix_shape("weight_scale", _scale_dtype(module))[1]
    module.expect("weight_scale", _FLOATS, (rows, count))
    is_symmetric = "weight_zero_point" not in module.parts
    if not is_symmetric:
        module.expect("weight_zero_point", zeros[:1], (zeros[1], count))
    if columns % count:
        raise CorruptWeights(f"{module.name}: {columns} columns are not {count} whole groups")
    return checked(module, IntegerMatrix(type, rows, columns, columns // count, is_symmetric))


def _scale_dtype(module: Module) -> str:
    scale = module.parts.get("weight_scale")
    return scale.dtype if scale is not None and scale.dtype in _FLOATS else _FLOATS[0]


def written_parts(groups: Groups, packing: Packing) -> dict[str, NDArray[Any]]:
    """The tensors that make up a weight: pack-quantized for 4 bits, int-quantized for 8."""
    if packing.type in (TensorType.Q8_0, TensorType.INT8):
        return {"weight": (groups.codes ^ np.uint8(0x80)).view(np.int8), "weight_scale": groups.scales}
    parts: dict[str, NDArray[Any]] = {
        "weight_packed": pack(groups.codes, 4),
        "weight_scale": groups.scales,
        "weight_shape": np.array(groups.codes.shape, np.int64),
    }
    if packing.type is TensorType.INT4 and not packing.symmetric:
        parts["weight_zero_point"] = np.ascontiguousarray(pack(np.ascontiguousarray(groups.zeros.T), 4).T)
    return parts


def part_infos(rows: int, columns: int, packing: Packing) -> dict[str, Part]:
    """Headers of what `written_parts` makes of a matrix."""
    count = columns // (packing.group or 32)
    if packing.type in (TensorType.Q8_0, TensorType.INT8):
        return {"weight": Part("I8", (rows, columns)), "weight_scale": Part("F16", (rows, count))}
    parts = {
        "weight_packed": Part("I32", (rows, -(-columns // 8))),
        "weight_scale": Part("F16", (rows, count)),
        "weight_shape": Part("I64", (2,)),
    }
    if packing.type is TensorType.INT4 and not packing.symmetric:
        parts["weight_zero_point"] = Part("I32", (-(-rows // 8), count))
    return parts


def written_config(asked: Quantization, *, ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint all of whose linears but the ignored ones were rounded."""
    weights: dict[str, Any] = {"num_bits": asked.bits, "type": "int", "symmetric": asked.is_symmetric, "dynamic": False}
    if asked.group is None:
        weights |= {"strategy": "channel"}
    else:
        weights |= {"strategy": "group", "group_size": asked.group}
    layout = "pack-quantized" if asked.bits == 4 else "int-quantized"
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme, "format": layout}},
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
