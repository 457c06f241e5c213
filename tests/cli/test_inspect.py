"""`streamgen inspect` reads headers only, and says what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamgen.checkpoints import open as opening

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight fails the test."""

    def fail(self: object, checkpoint: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(opening.CheckpointWeights, "__init__", fail)


def test_a_folder_of_safetensors(run: Run, stories: Path) -> None:
    code, out, err = run("inspect", stories, "--kv-memory", "1MiB")
    assert (code, err) == (0, "")
    assert "family llama" in out
    assert "5 layers of 64" in out
    assert "8 heads, 4 of keys and values" in out
    assert "F32" in out
    assert "chat template none" in out
    assert "head tied to the embedding" in out
    assert "cache" in out and "workspace" in out


def test_the_demo_model(run: Run, demo_model_path: Path) -> None:
    code, out, _ = run("inspect", demo_model_path)
    assert code == 0
    assert "272, 134.5 M values" in out
    assert "Q4_1    210 tensors" in out
    assert "chat template default" in out


def test_every_tensor_on_demand(run: Run, stories: Path) -> None:
    short = run("inspect", stories)[1]
    long = run("inspect", stories, "--tensors")[1]
    listed = long.splitlines()[len(short.splitlines()) :]
    num_tensors = int(short.partition("tensors       ")[2].partition(",")[0])
    assert len(listed) == num_tensors
    assert any("model.embed_tokens.weight" in line and "512 x 64" in line for line in listed)


def test_a_model_that_does_not_fit_can_still_be_read(run: Run, stories: Path) -> None:
    code, out, _ = run("inspect", stories, "--kv-memory", "100TB")
    assert code == 0
    assert "cannot be opened here" in out


def test_a_broken_file_is_3(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"not a model")
    assert run("inspect", path)[0] == 3
