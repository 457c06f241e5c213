"""How the CPU backend lays a program out in memory: where each packed matrix lies, and which forms operands have."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.models.program import Attend, BufferKind, Embed, Linear, LinearWeight, Program
from streamgen.quantization.base import Packing, TensorType, row_bytes
from streamgen.quantization.packing import DENSE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PANEL = 16  # rows of a packed weight that lie together
_ALIGNMENT = 128  # bytes between packed weights
_BLOCK_BYTES = 64  # of an ActivationBlock, 32 quantized activations (csrc/cpu/kernels.h)


class Region(Struct, frozen=True):
    """Weights packed side by side as one matrix, `offset` bytes into the block."""

    weights: tuple[LinearWeight, ...]
    packing: Packing
    offset: int

    @property
    def rows(self) -> int:
        """Rows of all its weights."""
        return sum(weight.rows for weight in self.weights)

    @property
    def panel_bytes(self) -> int:
        """Bytes of PANEL rows."""
        return _panel_bytes(self.packing, self.weights[0].columns)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole matrix."""
        return round_up(-(-self.rows // PANEL) * self.panel_bytes, _ALIGNMENT)


class Forms(Struct, frozen=True):
    """In which forms a buffer's rows exist. stream: float32, a stream or attention's output before it is quantized."""

    stream: bool
    dense: bool
    quantized: bool
    quantizes_later: bool = False

    def stream_bytes(self, width: int) -> int:
        """Bytes of a row of floats, where there is one."""
        return round_up(4 * width, 64) if self.stream or self.quantizes_later else 0

    def operand_bytes(self, width: int, dtype: TensorType) -> int:
        """Bytes of a row of the operand, in all its forms."""
        dense = round_up(row_bytes(dtype, width), 64) if self.dense else 0
        return dense + (width // 32 * _BLOCK_BYTES if self.quantized else 0)


class Layout:
    """Where each packed matrix lies, and which forms of operands they read."""

    def __init__(self, program: Program, dtype: str, packings: Mapping[str, Packing]) -> None:
        self.regions: list[Region] = []
        self.num_bytes = 0
        self._packings = packings
        self._dense = Packing(DENSE[dtype])
        self._regions_of: dict[tuple[str, ...], list[Region]] = {}
        for op in program.ops:
            weights = op.weights if isinstance(op, Linear) else (op.weight,) if isinstance(op, Embed) else ()
            if weights and names_of(weights) not in self._regions_of:
                self._regions_of[names_of(weights)] = [self._place(part) for part in self._parts(weights)]

    def regions_of(self, weights: tuple[LinearWeight, ...]) -> list[Region]:
        """The matrices that a linear's weights became, in order."""
        return self._regions_of[names_of(weights)]

    def forms(self, program: Program, index: int) -> Forms:
        """What buffer `index` must hold."""
        if program.buffers[index].kind is BufferKind.STREAM:
            return Forms(stream=True, dense=False, quantized=False)
        readers = [op for op in program.ops if isinstance(op, Linear) and op.x.buffer == index]
        packings = [self.packing(weight) for op in readers for weight in op.weights]
        quantized = any(packing.type.is_integer for packing in packings)
        attended = any(isinstance(op, Attend) and op.out.buffer == index for op in program.ops)
        dense = not quantized or any(not packing.type.is_integer for packing in packings)
        return Forms(stream=False, dense=dense, quantized=quantized, quantizes_later=attended and quantized)

    def packing(self, weight: LinearWeight) -> Packing:
        """How a weight is packed."""
        return self._packings.get(weight.name, self._dense)

    def _parts(self, weights: tuple[LinearWeight, ...]) -> Iterator[tuple[LinearWeight, ...]]:
        """Neighbours of one packing."""
        for _, part in groupby(weights, self.packing):
            yield tuple(part)

    def _place(self, weights: tuple[LinearWeight, ...]) -> Region:
        region = Region(weights, self.packing(weights[0]), self.num_bytes)
        self.regions.append(region)
        self.num_bytes += region.num_bytes
        return region


def _panel_bytes(packing: Packing, columns: int) -> int:
    if not packing.type.is_integer:
        return PANEL * round_up(columns, 2) * row_bytes(packing.type, 1)
    import streamgen._cpu as _cpu

    return _cpu.packed_panel_bytes(int(packing.type), packing.group, columns)


def names_of(weights: tuple[LinearWeight, ...]) -> tuple[str, ...]:
    """What tells a linear's weights from another's."""
    return tuple(w.name for w in weights)


def round_up(value: int, multiple: int) -> int:
    """The next multiple, or value itself."""
    return -(-value // multiple) * multiple
