"""What each format of quantized safetensors checkpoints answers; `registry.py` has the table of them.

A format answers which of a module's tensors belong to its weight, what matrix of integers they make up, and how they
are turned into `Groups`. It sees headers and arrays, never files; `checkpoints/quantized.py` brings the two together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from msgspec import Struct

from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.quantization.base import TensorType  # noqa: TC001  # a field of a Struct
from streamgen.quantization.groups import GROUP_STEP, Bytes, Floats, Halves, as_halves

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from streamgen.quantization.groups import Groups


class Part(Struct, frozen=True):
    """A stored tensor, as its header declares it. dtype: safetensors' name of it."""

    dtype: str
    shape: tuple[int, ...]


class Module:
    """A module's stored tensors that may make up its weight, by the last words of their names.

    read   the array of one of them; bfloat16 comes as float32
    """

    def __init__(self, name: str, parts: Mapping[str, Part], read: Callable[[str], NDArray[Any]]) -> None:
        self.name = name
        self.parts = parts
        self.read = read

    def expect(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """Check a part's header. Raises CorruptWeights."""
        found = self.parts.get(part)
        if found is None:
            raise CorruptWeights(f"{self.name}.{part}: missing, though other parts of this weight are there")
        if found.dtype not in dtypes or found.shape != shape:
            wanted = f"{' or '.join(dtypes)} {list(shape)}"
            raise CorruptWeights(f"{self.name}.{part}: expected {wanted}, got {found.dtype} {list(found.shape)}")

    def matrix_shape(self, part: str, dtype: str) -> tuple[int, int]:
        """The shape of a part that is a matrix of a dtype. Raises CorruptWeights."""
        found = self.parts.get(part)
        if found is None or found.dtype != dtype or len(found.shape) != 2 or 0 in found.shape:
            shown = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise CorruptWeights(f"{self.name}.{part}: expected a matrix of {dtype}, got {shown}")
        return found.shape[0], found.shape[1]


class IntegerMatrix(Struct, frozen=True):
    """A weight [rows, columns] that is stored as integers. group: columns that share a scale."""

    type: TensorType
    rows: int
    columns: int
    group: int
    is_symmetric: bool = False


class WeightFormat(Protocol):
    """How a kind of quantized checkpoint stores weights.

    parts   last words of the names of tensors that make up a weight
    """

    parts: frozenset[str]

    def find(self, module: Module) -> IntegerMatrix | None:
        """What the parts of a module make up; None where its weight is not quantized. Looks at headers.

        Raises:
            CorruptWeights: they contradict each other.
            UnsupportedModel: they are something that is not read.
        """
        ...

    def read(self, module: Module, matrix: IntegerMatrix) -> Groups:
        """The matrix that was found. Raises as `find`."""
        ...


def unsupported(found: str, wanted: str) -> UnsupportedModel:
    """An error about a variant that is not read."""
    return UnsupportedModel(
        f"quantization_config: {found} cannot be read; this version reads {wanted}: use another quantization, the "
        "unquantized checkpoint, or a GGUF file"
    )


def checked(module: Module, matrix: IntegerMatrix) -> IntegerMatrix:
    """The matrix, if kernels can multiply it. Raises UnsupportedModel."""
    if matrix.group % GROUP_STEP or matrix.columns % matrix.group:
        raise UnsupportedModel(
            f"{module.name}: {matrix.columns} columns in groups of {matrix.group}; this version reads whole groups "
            f"of a multiple of {GROUP_STEP} columns"
        )
    return matrix


def halves(module: Module, scales: Floats, codes: Bytes, zeros: Bytes) -> Halves:
    """Scales f32 [n, k / g] of codes [n, k] as halves. Raises UnsupportedModel where they do not fit."""
    rows, count = scales.shape
    fitting = as_halves(scales, np.zeros(scales.shape, np.bool_))
    if fitting is None:
        zero_groups = np.all(codes.reshape(rows, count, -1) == zeros[..., None], axis=2)
        fitting = as_halves(scales, zero_groups)
    if fitting is None:
        raise UnsupportedModel(
            f"{module.name}: a scale is beyond what half precision holds; use the unquantized checkpoint, or "
            "a GGUF file"
        )
    return fitting


def unpack(words: NDArray[np.int32], bits: int) -> Bytes:
    """Codes of 4 or 8 bits out of words, lowest first: i32 [n, m] -> u8 [n, m * 32 / bits]."""
    packed = np.ascontiguousarray(words, "<i4").view(np.uint8).reshape(len(words), -1)
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=2).reshape(len(words), -1)


def pack(codes: Bytes, bits: int) -> NDArray[np.int32]:
    """The inverse of `unpack`; what is missing of the last word is 0."""
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word)))
    packed = padded if bits == 8 else padded[:, 0::2] | padded[:, 1::2] << 4
    return np.ascontiguousarray(packed).view("<i4")
