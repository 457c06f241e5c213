"""The quantized weights of a folder of safetensors: tensors that belong together become one matrix of integers.

`quantization/formats.py` says what belongs together. A matrix is turned into its stored rows when it is read, in numpy;
until then only headers are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamgen.checkpoints.base import RawTensor, TensorInfo
from streamgen.errors import LoadError
from streamgen.quantization.base import BLOCKS, TensorType, row_bytes
from streamgen.quantization.formats import IntegerMatrix, Module, Part, WeightFormat
from streamgen.quantization.gguf_blocks import dequantize
from streamgen.quantization.groups import BLOCK_TYPES, GROUP_STEP, store
from streamgen.quantization.registry import weight_format

_NUMPY = {
    "I8": "<i1", "U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "BF16": "<u2",
}  # fmt: skip


class QuantizedWeights:
    """The matrices that `config`, a checkpoint's `quantization_config`, says are quantized.

    parts   every stored tensor's header, by name
    view    the bytes of a stored tensor
    source  names the checkpoint in messages

    Raises:
        CorruptWeights: tensors that belong together contradict each other.
        UnsupportedModel: a method, or a variant of one, that is not read.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        parts: Mapping[str, Part],
        view: Callable[[str], NDArray[np.uint8]],
        source: str,
    ) -> None:
        self._view = view
        self._source = source
        self._modules: dict[str, Module] = {}
        self._matrices: dict[str, IntegerMatrix] = {}
        self.hidden: frozenset[str] = frozenset()  # names of tensors that are parts of the matrices
        with _naming(source):
            self._format: WeightFormat = weight_format(config)
            self._find(parts)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The matrices, by the names their weights would have."""
        return {f"{name}.weight": _info(name, matrix) for name, matrix in self._matrices.items()}

    def __contains__(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self._matrices

    def parts_of(self, name: str) -> list[str]:
        """Names of the stored tensors that make up a matrix."""
        module = self._modules[name.removesuffix(".weight")]
        return [f"{module.name}.{part}" for part in module.parts]

    def read(self, name: str) -> RawTensor:
        """A matrix as stored rows. Raises CorruptWeights and UnsupportedModel, where headers did not tell."""
        module = self._modules[name.removesuffix(".weight")]
        matrix = self._matrices[module.name]
        with _naming(self._source):
            groups = self._format.read(module, matrix)
        info = _info(module.name, matrix)
        return RawTensor(info=info, data=store(groups, info.type).reshape(-1))

    def _find(self, parts: Mapping[str, Part]) -> None:
        by_module: dict[str, dict[str, Part]] = {}
        for name, part in parts.items():
            module, _, last = name.rpartition(".")
            if module and last in self._format.parts:
                by_module.setdefault(module, {})[last] = part
        for name, found in by_module.items():
            with_parts = Module(name, found, self._reader(name, found))
            matrix = self._format.find(with_parts)
            if matrix is not None:
                self._modules[name], self._matrices[name] = with_parts, matrix
        self.hidden = frozenset(part for name in self._matrices for part in self.parts_of(name))

    def _reader(self, module: str, parts: Mapping[str, Part]) -> Callable[[str], NDArray[Any]]:
        return lambda name: _array(self._view(f"{module}.{name}"), parts[name])


class UnpackedWeights:
    """Weights whose groups of integers come as float32, for matrices that are dense in memory.

    Kernels unpack what GGUF stores by themselves, but of INT4 and INT8 they would have to know the group.
    """

    def __init__(self, weights: Any, packed: Mapping[str, object]) -> None:
        self._weights = weights
        self._packed = packed

    def matrix(self, name: str, rows: int, columns: int) -> RawTensor:
        """See `backends.base.Weights.matrix`."""
        raw: RawTensor = self._weights.matrix(name, rows, columns)
        if raw.info.type in BLOCKS or name in self._packed:
            return raw
        values = dequantize(raw)
        info = TensorInfo(name=raw.info.name, type=TensorType.F32, shape=raw.info.shape, num_bytes=values.nbytes)
        return RawTensor(info=info, data=values.reshape(-1).view(np.uint8))

    def vector(self, name: str, size: int) -> RawTensor:
        """See `backends.base.Weights.vector`."""
        raw: RawTensor = self._weights.vector(name, size)
        return raw

    def done(self, raw: RawTensor) -> None:
        """See `backends.base.Weights.done`."""
        self._weights.done(raw)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Put the checkpoint's name before what goes wrong inside."""
    try:
        yield
    except LoadError as error:
        raise type(error)(f"{source}: {error}") from None


def _info(module: str, matrix: IntegerMatrix) -> TensorInfo:
    type, group = matrix.type, matrix.group
    if matrix.is_symmetric and group == GROUP_STEP:
        type, group = BLOCK_TYPES[type], 0
    num_bytes = matrix.rows * row_bytes(type, matrix.columns, group)
    shape = (matrix.rows, matrix.columns)
    return TensorInfo(name=f"{module}.weight", type=type, shape=shape, num_bytes=num_bytes, group=group)


def _array(data: NDArray[np.uint8], part: Part) -> NDArray[Any]:
    """The values of a stored tensor; bfloat16 as float32."""
    values = np.ascontiguousarray(data).view(_NUMPY[part.dtype]).reshape(part.shape)
    return (values.astype(np.uint32) << 16).view(np.float32) if part.dtype == "BF16" else values
