"""The quantized safetensors checkpoints of other tools: one table that picks a format by `quantization_config`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamgen.quantization.awq import Awq
from streamgen.quantization.compressed_tensors import CompressedTensors
from streamgen.quantization.formats import WeightFormat, unsupported
from streamgen.quantization.gptq import Gptq

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FORMATS: dict[str, Callable[[Mapping[str, Any]], WeightFormat]] = {
    "compressed-tensors": CompressedTensors,
    "awq": Awq,
    "gptq": Gptq,
}


def weight_format(config: Mapping[str, Any]) -> WeightFormat:
    """The format of a checkpoint whose config.json has this `quantization_config`.

    Raises:
        UnsupportedModel: a method, or a variant of one, that is not read.
        CorruptWeights: a value makes no sense.
    """
    method = config.get("quant_method")
    if method not in FORMATS:
        raise unsupported(f"method {str(method)[:40]!r}", f"{', '.join(FORMATS)}")
    return FORMATS[method](config)
