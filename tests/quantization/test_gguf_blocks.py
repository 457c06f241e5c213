"""Dequantization against the gguf package, which is ggml's own reader in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import dequantize as gguf_dequantize

from streamgen.checkpoints.base import RawTensor, TensorInfo
from streamgen.checkpoints.gguf import GgufCheckpoint
from streamgen.quantization import gguf_blocks
from streamgen.quantization.base import BLOCKS, TensorType, row_bytes
from streamgen.quantization.gguf_blocks import dequantize, dequantize_bytes, unpermute_rows

if TYPE_CHECKING:
    from pathlib import Path


def random_blocks(type: TensorType, count: int, seed: int) -> np.ndarray:
    """Random bytes: every scale, NaN and infinity included."""
    return np.random.default_rng(seed).integers(0, 256, count * BLOCKS[type].num_bytes, np.uint8)


@pytest.mark.parametrize("type", BLOCKS)
def test_random_bytes_equal_the_gguf_package_to_the_bit(type: TensorType) -> None:
    data = random_blocks(type, 3000, seed=int(type))
    with np.errstate(all="ignore"):
        expected = gguf_dequantize(data.reshape(3000, -1), GGMLQuantizationType(int(type)))
        got = dequantize_bytes(data, type)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected.reshape(-1))


@pytest.mark.parametrize("type", BLOCKS)
def test_chunks_do_not_change_the_values(type: TensorType, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_blocks(type, 37, seed=1)
    with np.errstate(all="ignore"):
        whole = dequantize_bytes(data, type)
        monkeypatch.setattr(gguf_blocks, "_CHUNK_VALUES", 4 * BLOCKS[type].values)
        np.testing.assert_array_equal(dequantize_bytes(data, type), whole)


def test_every_type_has_a_decoder_and_a_block() -> None:
    assert set(gguf_blocks._DECODERS) == set(BLOCKS) == set(TensorType) - {TensorType.INT4, TensorType.INT8}


def test_shape_is_the_tensors() -> None:
    data = np.arange(12, dtype="<f4").view(np.uint8)
    info = TensorInfo(name="x", type=TensorType.F32, shape=(3, 4), num_bytes=48)
    np.testing.assert_array_equal(dequantize(RawTensor(info=info, data=data)), np.arange(12.0).reshape(3, 4))


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """What the converter of llama checkpoints does to query and key rows, row by row."""
    head_dim = rows.shape[0] // num_heads
    stored = np.empty_like(rows)
    for head in range(num_heads):
        for i in range(head_dim // 2):
            for j in range(2):
                stored[head * head_dim + 2 * i + j] = rows[head * head_dim + i + j * head_dim // 2]
    return stored


@pytest.mark.parametrize("shape", [(12, 5), (12,)])
@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_unpermute_undoes_the_converter(shape: tuple[int, ...], num_heads: int) -> None:
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(unpermute_rows(permute(rows, num_heads), num_heads), rows)
    info = TensorInfo(name="q", type=TensorType.F32, shape=shape, num_bytes=rows.nbytes)
    data = permute(rows, num_heads).reshape(-1).view(np.uint8)
    np.testing.assert_array_equal(dequantize(RawTensor(info=info, data=data, rope_heads=num_heads)), rows)


def test_unpermuting_bytes_is_unpermuting_values() -> None:
    size = row_bytes(TensorType.Q4_0, 64)
    stored = random_blocks(TensorType.Q4_0, 2 * 16, seed=3).reshape(16, size)
    with np.errstate(all="ignore"):
        values = unpermute_rows(dequantize_bytes(stored.reshape(-1), TensorType.Q4_0).reshape(16, 64), 2)
        np.testing.assert_array_equal(
            dequantize_bytes(unpermute_rows(stored, 2).reshape(-1), TensorType.Q4_0).reshape(16, 64), values
        )


DEMO_TENSORS = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.7.self_attn.k_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
    "model.layers.3.input_layernorm.weight",
)


@pytest.mark.parametrize("name", DEMO_TENSORS)
def test_tensors_of_the_demo_model(demo_model_path: Path, name: str) -> None:
    checkpoint = GgufCheckpoint(demo_model_path)
    try:
        raw = checkpoint.read(name)
        type, rows = raw.info.type, raw.info.shape[0]
        expected = gguf_dequantize(raw.data.reshape(rows, -1), GGMLQuantizationType(int(type))).reshape(raw.info.shape)
        assert raw.rope_heads == {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
        if raw.rope_heads is not None:
            expected = unpermute_rows(expected, raw.rope_heads)
        np.testing.assert_array_equal(dequantize(raw), expected)
        assert 0.0 < np.abs(expected).max() < 100.0
    finally:
        checkpoint.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_demo_model_equals_transformers(demo_model_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(demo_model_path.parent, gguf_file=demo_model_path.name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    load: Any = load_gguf_checkpoint  # it has no annotations
    loaded = load(str(demo_model_path), return_tensors=True, model_to_load=model)
    checkpoint = GgufCheckpoint(demo_model_path)
    assert set(checkpoint.tensors) == set(loaded["tensors"])
    for name, tensor in loaded["tensors"].items():
        np.testing.assert_array_equal(dequantize(checkpoint.read(name)), tensor.numpy(), err_msg=name)
    checkpoint.close()
