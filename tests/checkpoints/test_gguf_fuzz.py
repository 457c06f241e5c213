"""Some seconds of the GGUF fuzzer: damaged models end in a typed error, or they load."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from streamgen.errors import CorruptWeights, LoadError
from tests.checkpoints.gguf_fuzz import ARRAY, Fuzzer, Pair, models, numbers, open_file, strings

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("streamgen._cpu")
SECONDS = 15
LEAST, MOST = 40, 3000  # files


def test_undamaged_models_load(tmp_path: Path) -> None:
    for i, m in enumerate(models()):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(m.assembled())
        assert open_file(path) is None


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("general.architecture", numbers(4, "I", [1, 2]), LoadError),
        ("tokenizer.ggml.token_type", strings(["a"] * 300), CorruptWeights),
        ("tokenizer.ggml.token_type", numbers(6, "f", [float("nan")] * 300), CorruptWeights),
        ("tokenizer.ggml.scores", strings(["a"] * 300), CorruptWeights),
    ],
)
def test_arrays_of_the_wrong_kind_are_damage(key: str, value: bytes, error: type[LoadError], tmp_path: Path) -> None:
    m = models()[0]
    path = tmp_path / "m.gguf"
    path.write_bytes(
        replace(m, pairs=tuple(Pair(p.key, ARRAY, value) if p.key == key else p for p in m.pairs)).assembled()
    )
    assert isinstance(open_file(path), error)


@pytest.mark.timeout(300)
def test_damaged_models_end_in_an_error_or_load(tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path / "mutant.gguf", seed=5)
    end = time.monotonic() + SECONDS
    while fuzzer.endings.total() < LEAST or (time.monotonic() < end and fuzzer.endings.total() < MOST):
        fuzzer.step()
    assert fuzzer.endings["loaded"] > 0 and fuzzer.endings["CorruptWeights"] > 0, fuzzer.endings
