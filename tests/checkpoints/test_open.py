"""Which container opens which path, and what a program's weights are checked against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch

from streamgen.checkpoints.gguf import GgufCheckpoint
from streamgen.checkpoints.open import CheckpointWeights, open_checkpoint
from streamgen.checkpoints.safetensors import SafetensorsCheckpoint
from streamgen.errors import CorruptWeights, ModelNotFound, UnsupportedModel

from .tiny_gguf import write_tiny_gguf

if TYPE_CHECKING:
    from pathlib import Path


def test_gguf_by_its_magic_whatever_its_name(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "weights.dat")
    assert isinstance(open_checkpoint(tmp_path / "weights.dat"), GgufCheckpoint)


def test_folder_with_one_gguf(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "a.gguf")
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, GgufCheckpoint) and checkpoint.path == tmp_path / "a.gguf"
    write_tiny_gguf(tmp_path / "b.gguf")
    with pytest.raises(ModelNotFound, match=r"expected one .gguf file, found a.gguf, b.gguf; name the file"):
        open_checkpoint(tmp_path)


def test_safetensors(tmp_path: Path) -> None:
    safetensors.torch.save_file({"norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert isinstance(open_checkpoint(tmp_path), SafetensorsCheckpoint)
    assert isinstance(open_checkpoint(tmp_path / "model.safetensors"), SafetensorsCheckpoint)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="found nothing"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(ModelNotFound, match="found an empty folder"):
        open_checkpoint(tmp_path)
    for i in range(7):
        (tmp_path / f"{i}.txt").touch()
    with pytest.raises(ModelNotFound, match=r"found 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more"):
        open_checkpoint(tmp_path)
    with pytest.raises(ModelNotFound, match="found another kind of file"):
        open_checkpoint(tmp_path / "0.txt")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickle_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsupportedModel, match=f"{name} may be a pickle file"):
            open_checkpoint(path)


def test_gguf_by_name_only(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<!doctype html>")
    with pytest.raises(CorruptWeights, match="expected a GGUF file"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.fixture
def weights(tmp_path: Path) -> CheckpointWeights:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    return CheckpointWeights(open_checkpoint(tmp_path / "tiny.gguf"))


def test_weights_of_the_right_shape(weights: CheckpointWeights) -> None:
    raw = weights.matrix("model.layers.0.self_attn.k_proj", 16, 32)
    assert (raw.info.shape, raw.rope_heads) == ((16, 32), 2)
    weights.done(raw)
    assert weights.vector("model.layers.0.self_attn.q_proj.bias", 32).rope_heads == 4


def test_weights_of_another_shape(weights: CheckpointWeights) -> None:
    with pytest.raises(
        CorruptWeights, match=r"'model.layers.0.mlp.up_proj.weight': expected shape \[32, 64\].* got \[64, 32\]"
    ):
        weights.matrix("model.layers.0.mlp.up_proj", 32, 64)
    with pytest.raises(CorruptWeights, match=r"'model.norm.weight': expected shape \[31\]"):
        weights.vector("model.norm.weight", 31)
    with pytest.raises(CorruptWeights, match=r"'model.norm.weight': expected shape \[1, 32\]"):
        weights.matrix("model.norm", 1, 32)
    with pytest.raises(CorruptWeights, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        weights.matrix("model.layers.1.mlp.up_proj", 64, 32)
