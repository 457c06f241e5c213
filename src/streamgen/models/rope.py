"""Rotary position embedding: inverse wavelengths for each kind of context scaling.

Computed once, when a program is recorded. The numbers are those of transformers' `modeling_rope_utils`: rounded to
float32 at the same places, because at long contexts a last bit of a wavelength is seen in the logits. Powers are taken
in float64 and then rounded, so that a table does not depend on the machine's float32 `pow`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamgen.errors import CorruptWeights, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamgen.models.config import RopeConfig

Float32Array = NDArray[np.float32]


class RopeTable(Struct, frozen=True):
    """What a rope op needs: the angle of pair i at position p is p * inv_freq[i], cosine and sine scaled by `scale`.

    inv_freq   rotary_dim / 2 values, float32-representable
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions turn."""
        return 2 * len(self.inv_freq)


def rope_table(config: RopeConfig, *, max_context: int) -> RopeTable:
    """The table of a model whose sequences never pass `max_context` tokens.

    Only `dynamic` depends on `max_context`. There the base grows with the context, and it is fixed here for the longest
    one, instead of following each sequence as it grows: keys that are already in the cache were turned with the old
    base, and a request's numbers would depend on when its prompt was cut. So the same request gives the same bits.

    Raises UnsupportedModel where the kind of scaling is not known.
    """
    scaled = _KINDS.get(config.kind)
    if scaled is None:
        raise UnsupportedModel(f"rope: expected a scaling of {', '.join(sorted(_KINDS))}, got {config.kind!r}")
    inv_freq, scale = scaled(config, max_context)
    return RopeTable(tuple(float(f) for f in inv_freq), scale)


def apply_freq_factors(table: RopeTable, factors: Sequence[float]) -> RopeTable:
    """The table with each wavelength stretched by its factor: how GGUF files carry llama3's scaling.

    factors   one per pair, the tensor `rope_freqs.weight`
    """
    if len(factors) != len(table.inv_freq):
        raise CorruptWeights(f"rope_freqs.weight: expected {len(table.inv_freq)} values, got {len(factors)}")
    divisors = np.asarray(factors, np.float32)
    if not np.all(np.isfinite(divisors) & (divisors > 0)):
        raise CorruptWeights("rope_freqs.weight: expected positive finite values")
    inv_freq = np.asarray(table.inv_freq, np.float32) / divisors
    return RopeTable(tuple(float(f) for f in inv_freq), table.scale)


def _default(config: RopeConfig, max_context: int) -> tuple[Float32Array, float]:
    return np.float32(1) / _wavelengths(config.theta, config.rotary_dim), 1.0


def _linear(config: RopeConfig, max_context: int) -> tuple[Float32Array, float]:
    """Positions divided by the factor."""
    inv_freq, scale = _default(config, max_context)
    return inv_freq / np.float32(config.factor), scale


def _dynamic(config: RopeConfig, max_context: int) -> tuple[Float32Array, float]:
    """NTK: a larger base, so that the longest wavelengths stretch and the shortest stay."""
    dim, factor = config.rotary_dim, config.factor
    if dim <= 2:
        raise UnsupportedModel(f"rope: dynamic scaling needs a head_dim over 2, got {dim}")
    stretch = factor * max(max_context, config.original_context) / config.original_context - (factor - 1)
    base = config.theta * stretch ** (dim / (dim - 2))
    return np.float32(1) / _wavelengths(base, dim), 1.0


def _llama3(config: RopeConfig, max_context: int) -> tuple[Float32Array, float]:
    """Long wavelengths are divided by the factor, short ones kept, and those between interpolated."""
    inv_freq, scale = _default(config, max_context)
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelength = np.float32(2 * math.pi) / inv_freq
    smooth = (np.float32(config.original_context) / wavelength - np.float32(low)) / np.float32(high - low)
    stretched = inv_freq / np.float32(config.factor)
    between = (1 - smooth) * stretched + smooth * inv_freq
    is_long = wavelength > np.float32(config.original_context / low)
    is_short = wavelength < np.float32(config.original_context / high)
    return np.where(is_long, stretched, np.where(is_short, inv_freq, between)).astype(np.float32), scale


def _yarn(config: RopeConfig, max_context: int) -> tuple[Float32Array, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): pairs that turn often are kept, pairs that turn rarely interpolated."""
    wavelengths = _wavelengths(config.theta, config.rotary_dim)
    low, high = _yarn_range(config)
    pairs = np.arange(config.rotary_dim // 2, dtype=np.float32)
    interpolated = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    kept = 1 - interpolated
    inv_freq = (1 / (np.float32(config.factor) * wavelengths)) * (1 - kept) + (1 / wavelengths) * kept
    return inv_freq.astype(np.float32), _yarn_scale(config)


def _yarn_range(config: RopeConfig) -> tuple[float, float]:
    """The pairs between which the ramp runs: those that turn beta_fast and beta_slow times in the original context."""

    def pair_turning(times: float) -> float:
        period = config.original_context / (times * 2 * math.pi)
        return config.rotary_dim * math.log(period) / (2 * math.log(config.theta))

    low, high = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    return low, high if high != low else high + 0.001  # the ramp divides by the difference


def _yarn_scale(config: RopeConfig) -> float:
    """By how much cosine and sine grow, so that attention stays as sharp as in the original context."""
    if config.attention_factor is not None:
        return config.attention_factor

    def growth(mscale: float) -> float:
        return 0.1 * mscale * math.log(config.factor) + 1 if config.factor > 1 else 1.0

    if config.mscale and config.mscale_all_dim:
        return growth(config.mscale) / growth(config.mscale_all_dim)
    return growth(1.0)


def _wavelengths(base: float, dim: int) -> Float32Array:
    """base ** (2 i / dim) of pair i, over 2 pi: [dim / 2]."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float64(base), exponents.astype(np.float64)).astype(np.float32)


_KINDS: dict[str, Callable[[RopeConfig, int], tuple[Float32Array, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "freq_factors": _default,  # the factors are a tensor of the checkpoint: `apply_freq_factors`
}
