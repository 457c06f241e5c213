"""Rotary position embedding: inverse wavelengths for each kind of context scaling."""

from __future__ import annotations

from msgspec import Struct

from streamgen.models.config import RopeConfig


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
