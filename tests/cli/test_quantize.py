"""`streamgen quantize` writes a folder that this engine and others open, whole or not at all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from streamgen.checkpoints import quantize as writing
from streamgen.checkpoints.open import open_checkpoint
from streamgen.quantization import rounding
from streamgen.quantization.base import TensorType
from streamgen.quantization.gguf_blocks import dequantize
from streamgen.testing.tiny import write_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., tuple[int, str, str]]

OPTIONS = {
    "int4": ("--to", "int4"),
    "int4-64": ("--to", "int4", "--group", "64"),
    "int4-32-symmetric": ("--to", "int4", "--symmetric"),
    "int4-channel-symmetric": ("--to", "int4", "--symmetric", "--group", "channel"),
    "int8": ("--to", "int8"),
    "int8-64": ("--to", "int8", "--group", "64"),
    "int8-channel": ("--to", "int8", "--group", "channel"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tiny_model(folder)
    (folder / "README.md").write_text("not copied")
    return folder


def tie(folder: Path) -> None:
    """Drop the head of its own."""
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


def values(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(folder)
    try:
        return {name: dequantize(checkpoint.read(name)) for name in checkpoint.tensors}
    finally:
        checkpoint.close()


def types(folder: Path) -> dict[str, TensorType]:
    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    return {name: info.type for name, info in checkpoint.tensors.items()}


def test_a_folder_is_written(run: Run, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "small"
    code, stdout, stderr = run("quantize", model, out, "--to", "int4")
    assert (code, stdout.strip()) == (0, str(out))
    assert "int4-32" in stderr
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert list(out.parent.iterdir()) == [out]  # nothing half written
    stored = types(out)
    assert stored["model.embed_tokens.weight"] is TensorType.BF16
    assert stored["lm_head.weight"] is TensorType.BF16
    assert stored["model.norm.weight"] is TensorType.F32
    assert stored["model.layers.1.mlp.down_proj.weight"] is TensorType.INT4
    assert set(stored) == set(types(model))
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    size, before = (out / "model.safetensors").stat().st_size, (model / "model.safetensors").stat().st_size
    assert size < before * 0.3


def test_values_are_near_the_originals(run: Run, model: Path, tmp_path: Path) -> None:
    before = values(model)
    for (name, options), bound in zip(OPTIONS.items(), (0.09, 0.1, 0.1, 0.11, 0.006, 0.007, 0.01), strict=True):
        assert run("quantize", model, tmp_path / name, *options)[0] == 0
        for tensor, after in values(tmp_path / name).items():
            error = np.sqrt(np.mean((after - before[tensor]) ** 2) / np.mean(before[tensor] ** 2))
            assert error < bound, (name, tensor)


def test_8_bits_take_the_head_as_well(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("quantize", model, tmp_path / "untied", "--to", "int8")[0] == 0
    assert types(tmp_path / "untied")["lm_head.weight"] is TensorType.Q8_0
    tie(model)
    assert run("quantize", model, tmp_path / "tied", "--to", "int8")[0] == 0
    assert types(tmp_path / "tied")["model.embed_tokens.weight"] is TensorType.BF16
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        (("--to", "int4", "--group", "128"), 2, "has 64 columns, which are not whole groups of 128"),
        (("--to", "int4", "--group", "33"), 2, "a multiple of 32"),
        (("--to", "int8", "--symmetric"), 2, "of int4 perhaps '-symmetric'"),
    ],
)
def test_options_that_do_not_fit(
    run: Run, model: Path, tmp_path: Path, options: tuple[str, ...], code: int, match: str
) -> None:
    got, out, err = run("quantize", model, tmp_path / "out", *options)
    assert (got, out) == (code, "")
    assert match in err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    code, _, err = run("quantize", model, tmp_path / "out", "--to", "int8")
    assert code == 2 and "expected a folder that is not there yet" in err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_quantized_model_is_not_quantized_again(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("quantize", model, tmp_path / "once", "--to", "int8")[0] == 0
    code, _, err = run("quantize", tmp_path / "once", tmp_path / "twice", "--to", "int8")
    assert code == 2 and "quantized already" in err


def test_a_gguf_file_is_refused(run: Run, demo_model_path: Path, tmp_path: Path) -> None:
    code, _, err = run("quantize", demo_model_path, tmp_path / "out", "--to", "int8")
    assert code == 3 and "a GGUF file holds no config.json" in err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_is_given_up_leaves_nothing(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    done = 0

    def fail_later(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 9:
            raise error
        return real(*args)

    real = rounding.round_matrix
    monkeypatch.setattr(writing, "round_matrix", fail_later)
    code, _, err = run("quantize", model, tmp_path / "to" / "out", "--to", "int4")
    is_disk = isinstance(error, OSError)
    assert code == (3 if is_disk else 130)
    assert list((tmp_path / "to").iterdir()) == []
    assert not is_disk or "No space left on device" in err


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_others_read_it(run: Run, model: Path, tmp_path: Path, name: str, is_tied: bool) -> None:
    """The values that compressed-tensors unpacks, and what transformers then computes."""
    pytest.importorskip("compressed_tensors", reason="needs the package compressed-tensors")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if is_tied:
        tie(model)
    assert run("quantize", model, tmp_path / "out", *OPTIONS[name])[0] == 0
    ours = {tensor: torch.from_numpy(value) for tensor, value in values(tmp_path / "out").items()}
    # Zero points do not load into its compressed modules (0.20), only when weights are unpacked at once.
    is_asymmetric = name.startswith("int4") and "symmetric" not in name
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if is_asymmetric else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **options)
    plain = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model)).float()
    plain.load_state_dict({**ours, **({"lm_head.weight": ours["model.embed_tokens.weight"]} if is_tied else {})})
    ids = torch.arange(24)[None]
    with torch.no_grad():
        wanted, got = plain(ids).logits, theirs(ids).logits
    # Unpacked at once, values are rounded to the half precision of their scales.
    tolerance = 5e-3 * float(wanted.abs().max()) if is_asymmetric else 0
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=0)
