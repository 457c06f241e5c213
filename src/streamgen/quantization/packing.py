"""Which packing a matrix gets: what its checkpoint says, or what `quantization` asks for when it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.errors import ConfigError
from streamgen.quantization.base import BLOCKS, Packing, TensorType
from streamgen.quantization.groups import GROUP_STEP

if TYPE_CHECKING:
    from streamgen.config import Quantization

DENSE = {"float32": TensorType.F32, "bfloat16": TensorType.BF16}
EDGE = Packing(TensorType.Q8_0)  # of embeddings and heads, when weights are rounded: see `asked_packing`
_USUAL_GROUPS = (32, 64, 128, 256)


def choose_packing(stored: TensorType, columns: int, *, group: int = 0, dtype: str) -> Packing:
    """How a matrix of `columns` inputs, stored as `stored`, is packed.

    Integers stay as they are, at their own size, so that a quantized checkpoint is not unpacked. With dtype float32
    everything is float32: that is the exact path.
    """
    if dtype == "float32" or not stored.is_integer or columns % 32 != 0:
        return Packing(DENSE[dtype])
    return Packing(stored, group if stored not in BLOCKS else 0)


def asked_packing(asked: Quantization, name: str, columns: int, *, is_edge: bool) -> Packing:
    """What the option `quantization` makes of the float matrix `name` of `columns` inputs.

    is_edge   an embedding or a head. They take 8 bits in groups of 32 whatever is asked for: on a model of 135M
              parameters a head in 4 bits alone cost a third of the divergence that all layers together did (0.09 and
              0.27), in 8 bits next to nothing

    Raises:
        ConfigError: groups of that size do not divide the columns.
    """
    packing = EDGE if is_edge else packing_of(asked, columns)
    group = packing.group or GROUP_STEP
    if group % GROUP_STEP or columns % group:
        raise ConfigError(
            f"quantization: {asked}: tensor {name!r} has {columns} columns, which are not whole groups of {group}; "
            + _what_would_do(columns),
            option="quantization",
        )
    return packing


def packing_of(asked: Quantization, columns: int) -> Packing:
    """The packing of a matrix that is neither embedding nor head; symmetric groups of 32 are GGUF's blocks."""
    type = TensorType.INT4 if asked.bits == 4 else TensorType.INT8
    group = asked.group or columns
    if group == GROUP_STEP and asked.is_symmetric:
        return Packing(TensorType.Q4_0 if asked.bits == 4 else TensorType.Q8_0)
    return Packing(type, group, asked.is_symmetric)


def is_what_was_asked(asked: Quantization, stored: Packing, columns: int, *, is_edge: bool) -> bool:
    """Whether a matrix that is stored as integers is already what `quantization` would make of it.

    Whether it was rounded symmetrically is not looked at.
    """
    wanted = packing_of(asked, columns)
    return (is_edge and stored == EDGE) or (stored.type, stored.group) == (wanted.type, wanted.group)


def _what_would_do(columns: int) -> str:
    fitting = [str(group) for group in _USUAL_GROUPS if columns % group == 0]
    if not fitting:
        return "this model cannot be quantized: integer kernels take columns by 32"
    return f"groups of {' or '.join(fitting)} would do, or 'channel'"
