"""GGUF files read back: names, shapes, bytes, tokenizer metadata."""

from __future__ import annotations

import json
from array import array
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

from streamgen.checkpoints.gguf import GgufCheckpoint
from streamgen.checkpoints.gguf_names import LAYER_NAMES, MODEL_NAMES, hugging_face_name
from streamgen.errors import CorruptWeights, LoadError, ModelNotFound, UnsupportedModel
from streamgen.quantization.base import TensorType
from streamgen.quantization.gguf_blocks import dequantize, unpermute_rows
from streamgen.sampling import Sampling

from .tiny_gguf import HEADS, HIDDEN, KV_HEADS, TOKENS, VOCAB, header, pair, write_tiny_gguf

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def tiny(tmp_path: Path) -> GgufCheckpoint:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    return GgufCheckpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("alignment", [None, 8, 4096])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_tensor_is_read_back(tmp_path: Path, architecture: str, alignment: int | None) -> None:
    written = write_tiny_gguf(tmp_path / "m.gguf", architecture=architecture, alignment=alignment)
    checkpoint = GgufCheckpoint(tmp_path / "m.gguf")
    assert set(checkpoint.tensors) == {hugging_face_name(name) for name in written}
    for name, expected in written.items():
        raw = checkpoint.read(hugging_face_name(name))
        assert raw.info == checkpoint.tensors[hugging_face_name(name)]
        assert raw.info.shape == expected.shape
        assert not raw.data.flags.writeable
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2]) if architecture == "llama" else None
        assert raw.rope_heads == heads
        wanted = expected if heads is None else unpermute_rows(expected, heads)
        tolerance = 0.03 if raw.info.type is TensorType.Q8_0 else 0.0
        np.testing.assert_allclose(dequantize(raw), wanted, atol=tolerance, rtol=0)
    checkpoint.close()


def test_config_comes_from_the_registry(tiny: GgufCheckpoint) -> None:
    config = tiny.config
    assert (config.family, config.num_heads, config.num_kv_heads) == ("llama", HEADS, KV_HEADS)
    assert (config.hidden_size, config.vocab_size, config.tied_head) == (HIDDEN, VOCAB, False)


def test_metadata_values_are_plain_sequences(tiny: GgufCheckpoint) -> None:
    metadata = tiny.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    assert list(tokens) == TOKENS
    assert tokens[3] == "ä" and tokens[-1] == "</s>" and tokens[2:4] == ["a", "ä"]
    with pytest.raises(IndexError):
        tokens[VOCAB]
    assert metadata["tokenizer.ggml.token_type"] == array("i", [2, 3, 1, 1, 3, 1, 3])
    assert metadata["tokenizer.ggml.scores"] == array("f", [0.5 * i for i in range(VOCAB)])
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["llama.rope.freq_base"] == 10000.0
    with pytest.raises(TypeError):
        metadata["x"] = 1  # type: ignore[index]  # it is a read-only view


def test_tokenizer_source(tiny: GgufCheckpoint) -> None:
    source = tiny.tokenizer_source
    assert source.eos_ids == (6,)
    assert source.bos_id is None
    assert source.chat_templates == {"default": "plain", "tool_use": "tools"}
    assert source.gguf is not None and set(source.gguf) == {k for k in tiny.metadata if k.startswith("tokenizer.")}
    tiny.close()
    assert list(source.gguf["tokenizer.ggml.tokens"]) == TOKENS  # outlives the file


def test_odd_tokenizer_metadata_gives_no_ids(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(header([pair("tokenizer.ggml.tokens", 4, bytes(4))]))
    source = GgufCheckpoint(tmp_path / "m.gguf").tokenizer_source
    assert (source.eos_ids, source.bos_id, source.chat_templates) == ((), None, {})


def test_sampling_defaults_lie_beside_the_file(tiny: GgufCheckpoint) -> None:
    folder = tiny.path.parent
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.2, "top_p": 0.9}))
    assert tiny.sampling_defaults == Sampling(temperature=0.2, top_p=0.9)
    (folder / "generation_config.json").unlink()
    assert GgufCheckpoint(tiny.path).sampling_defaults == Sampling()


def test_missing_tensor_is_named(tiny: GgufCheckpoint) -> None:
    with pytest.raises(CorruptWeights, match=r"'model\.norm\.bias' is missing"):
        tiny.read("model.norm.bias")


def test_released_bytes_can_be_read_again(tiny: GgufCheckpoint) -> None:
    before = dequantize(tiny.read("model.layers.0.mlp.down_proj.weight"))
    for name in tiny.tensors:
        tiny.release(name)
    np.testing.assert_array_equal(dequantize(tiny.read("model.layers.0.mlp.down_proj.weight")), before)


def test_close_twice_with_a_view_alive(tiny: GgufCheckpoint) -> None:
    raw = tiny.read("model.norm.weight")
    before = raw.data.copy()
    tiny.close()
    tiny.close()
    tiny.release("model.norm.weight")
    np.testing.assert_array_equal(raw.data, before)
    with pytest.raises(LoadError, match="closed"):
        tiny.read("model.norm.weight")


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    key = b"llama.attention.head_count"
    at = raw.index(key + b"\x04\0\0\0") + len(key) + 4
    (tmp_path / "m.gguf").write_bytes(raw[:at] + b"\x05\0\0\0" + raw[at + 4 :])
    with pytest.raises(CorruptWeights, match="32 rows, which 5 heads"):
        GgufCheckpoint(tmp_path / "m.gguf").read("model.layers.0.self_attn.q_proj.weight")


def test_parts_of_a_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(header([pair("split.count", 2, b"\x03\0")]))
    with pytest.raises(UnsupportedModel, match="one of 3 parts"):
        GgufCheckpoint(tmp_path / "m.gguf")


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="cannot be opened"):
        GgufCheckpoint(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CorruptWeights, match="empty"):
        GgufCheckpoint(tmp_path / "empty.gguf")


def test_names_are_those_of_the_gguf_package() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    for stem, found in MODEL_NAMES.items():
        assert names.get_name(found) == stem
    for stem, found in LAYER_NAMES.items():
        assert names.get_name(f"model.layers.2.{found}") == f"blk.2.{stem}"
        assert hugging_face_name(f"blk.2.{stem}.bias") == f"model.layers.2.{found}.bias"


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.weight", "blk.x.attn_q.weight", "blk.0.odd.weight", "blk", ""]
)
def test_unknown_names_stay(name: str) -> None:
    assert hugging_face_name(name) == name


def test_demo_model(demo_model_path: Path) -> None:
    checkpoint = GgufCheckpoint(demo_model_path)
    source = checkpoint.tokenizer_source
    checkpoint.close()
    assert source.eos_ids == (2,) and source.bos_id == 1 and "default" in source.chat_templates
    assert len(checkpoint.tensors) == 272
