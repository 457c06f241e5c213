"""Hugging Face folders: safetensors files read back, and damaged ones refused."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamgen.checkpoints.safetensors import SafetensorsCheckpoint, parse_header
from streamgen.errors import CorruptWeights, LoadError, ModelNotFound, UnsupportedModel
from streamgen.quantization.base import TensorType
from streamgen.quantization.gguf_blocks import dequantize
from streamgen.sampling import Sampling

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = {torch.float32: TensorType.F32, torch.float16: TensorType.F16, torch.bfloat16: TensorType.BF16}
CONFIG = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}


def tiny_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return {f"{str(dtype)[6:]}.weight": torch.randn(3, 5).to(dtype) for dtype in DTYPES} | {
        "norm.weight": torch.randn(7)
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), "utf-8")


def package_reads(raw: bytes) -> set[str]:
    """The names that the safetensors package finds; raises SafetensorError."""
    return {name for name, _ in safetensors.deserialize(raw)}  # type: ignore[no-untyped-call]


def assert_read_back(checkpoint: SafetensorsCheckpoint, written: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(written)
    for name, tensor in written.items():
        raw = checkpoint.read(name)
        assert (raw.info.type, raw.info.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape))
        assert raw.rope_heads is None
        np.testing.assert_array_equal(dequantize(raw), tensor.float().numpy())
        checkpoint.release(name)


def test_one_file(tmp_path: Path) -> None:
    written = tiny_tensors()
    safetensors.torch.save_file(written, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = SafetensorsCheckpoint(path)
        assert_read_back(checkpoint, written)
        assert checkpoint.model_name == tmp_path.name
        checkpoint.close()
        checkpoint.close()
        with pytest.raises(LoadError, match="closed"):
            checkpoint.read("norm.weight")


def write_shards(folder: Path) -> dict[str, torch.Tensor]:
    written = tiny_tensors()
    names = list(written)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[:2], names[2:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        safetensors.torch.save_file({name: written[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    return written


def test_shards(tmp_path: Path) -> None:
    written = write_shards(tmp_path)
    assert_read_back(SafetensorsCheckpoint(tmp_path), written)
    with pytest.raises(UnsupportedModel, match="one shard of a model; open the folder"):
        SafetensorsCheckpoint(tmp_path / "model-00001-of-00002.safetensors")


def test_shard_is_missing(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptWeights, match=r"model-00002-of-00002\.safetensors: named by"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        {},
        {"a": 3},
        {"a": "../model.safetensors"},
        {"a": "/etc/model.safetensors"},
        {"a": "x\\model.safetensors"},
        {"a": "pytorch_model.bin"},
        {"absent.weight": "model-00001-of-00002.safetensors"},
    ],
)
def test_bad_index(tmp_path: Path, weight_map: object) -> None:
    write_shards(tmp_path)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(CorruptWeights):
        SafetensorsCheckpoint(tmp_path)


def test_stories_model(shared_data: Path) -> None:
    checkpoint = SafetensorsCheckpoint(shared_data / "models" / "stories260K")
    path = str(shared_data / "models" / "stories260K" / "model.safetensors")
    with safetensors.safe_open(path, "np") as expected:
        assert set(checkpoint.tensors) == set(expected.keys())
        for name in checkpoint.tensors:
            np.testing.assert_array_equal(dequantize(checkpoint.read(name)), expected.get_tensor(name))
    config = checkpoint.config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (5, 64, 8, 4)
    source = checkpoint.tokenizer_source
    assert source.json_path is not None and source.sentencepiece_path is None
    assert (source.bos_id, source.eos_ids) == (1, (2,))
    checkpoint.close()


def folder_with(tmp_path: Path, **files: Any) -> SafetensorsCheckpoint:
    """A checkpoint folder with JSON files by name (dots as double underscores)."""
    safetensors.torch.save_file({"norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "tokenizer.json").write_text("{}")
    for name, value in files.items():
        write_json(tmp_path / f"{name}.json", value)
    return SafetensorsCheckpoint(tmp_path)


def test_ids_of_config_and_generation_config(tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path, generation_config={"eos_token_id": [7, 2, 9], "bos_token_id": 5})
    assert checkpoint.tokenizer_source.eos_ids == (2, 7, 9)
    assert checkpoint.tokenizer_source.bos_id == 1


def test_sentencepiece_model_only_without_tokenizer_json(tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert checkpoint.tokenizer_source.sentencepiece_path is None
    (tmp_path / "tokenizer.json").unlink()
    source = SafetensorsCheckpoint(tmp_path).tokenizer_source
    assert (source.json_path, source.sentencepiece_path) == (None, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json or tokenizer\.model, found neither"):
        _ = SafetensorsCheckpoint(tmp_path).tokenizer_source


def test_chat_templates_in_every_place(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}, {"name": 3}, "odd"]
    checkpoint = folder_with(tmp_path, tokenizer_config={"chat_template": named, "bos_token": "<s>"})
    source = checkpoint.tokenizer_source
    assert source.chat_templates == {"default": "A", "rag": "B"}
    assert source.config["bos_token"] == "<s>"
    (tmp_path / "chat_template.jinja").write_text("C")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("D")
    source = SafetensorsCheckpoint(tmp_path).tokenizer_source
    assert source.chat_templates == {"default": "C", "rag": "B", "tool_use": "D"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CorruptWeights, match="UTF-8"):
        _ = SafetensorsCheckpoint(tmp_path).tokenizer_source


def test_one_chat_template(tmp_path: Path) -> None:
    checkpoint = folder_with(tmp_path, tokenizer_config={"chat_template": "A"})
    assert checkpoint.tokenizer_source.chat_templates == {"default": "A"}


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True},
         Sampling(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05)),
        ({"min_p": 0.1, "typical_p": 0.9, "max_new_tokens": 5, "max_length": 9}, Sampling(min_p=0.1, typical_p=0.9)),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0, "repetition_penalty": 1.0}, Sampling()),
        ({"do_sample": False, "top_p": 0.9, "repetition_penalty": 1.1},
         Sampling(temperature=0.0, repetition_penalty=1.1)),
        ({"temperature": None, "top_k": None}, Sampling()),
    ],
)  # fmt: skip
def test_sampling_defaults(tmp_path: Path, generation: dict[str, Any], expected: Sampling) -> None:
    assert folder_with(tmp_path, generation_config=generation).sampling_defaults == expected


@pytest.mark.parametrize("generation", [{"top_p": 3}, {"temperature": "hot"}, {"top_k": 2.5}])
def test_unusable_sampling_defaults(tmp_path: Path, generation: dict[str, Any]) -> None:
    with pytest.raises(CorruptWeights, match=r"generation_config.json: (top_p|temperature|top_k): expected"):
        _ = folder_with(tmp_path, generation_config=generation).sampling_defaults


@pytest.mark.parametrize("raw", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_config_that_is_no_json_object(tmp_path: Path, raw: bytes) -> None:
    checkpoint = folder_with(tmp_path)
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(CorruptWeights, match=r"config.json: expected"):
        _ = checkpoint.config


def test_config_with_infinity_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    checkpoint = folder_with(tmp_path / "x", generation_config={"limit": float("inf"), "top_k": 3})
    assert checkpoint.sampling_defaults == Sampling(top_k=3)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="found none"):
        SafetensorsCheckpoint(tmp_path)
    checkpoint = folder_with(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"config.json: cannot be read"):
        _ = checkpoint.config
    with pytest.raises(CorruptWeights, match=r"'lm_head\.weight' is missing"):
        checkpoint.read("lm_head.weight")


def test_a_file_of_another_name(tmp_path: Path) -> None:
    safetensors.torch.save_file(tiny_tensors(), tmp_path / "a.safetensors")
    assert SafetensorsCheckpoint(tmp_path).tensors
    assert SafetensorsCheckpoint(tmp_path / "a.safetensors").model_name == "a"
    safetensors.torch.save_file(tiny_tensors(), tmp_path / "b.safetensors")
    with pytest.raises(ModelNotFound, match=r"found a.safetensors, b.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_name_of_a_hub_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    assert folder_with(folder).model_name == "org/name"


def test_dtypes_that_are_not_read(tmp_path: Path) -> None:
    ids = {"position_ids": torch.arange(3), "norm.weight": torch.ones(2)}
    safetensors.torch.save_file(ids, tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.tensors) == {"norm.weight"}
    with pytest.raises(UnsupportedModel, match="'position_ids' is stored as I64; this version reads F32, F16, BF16"):
        checkpoint.read("position_ids")
    checkpoint.close()
    fp8 = {"q_proj.weight": torch.ones(2).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(fp8, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"'q_proj\.weight' is stored as F8_E4M3"):
        SafetensorsCheckpoint(tmp_path)


# ---- the header -------------------------------------------------------------------------------------------------


def build(header: object, data: int = 24) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "short": b"1234567",
    "header passes the end": struct.pack("<Q", 100) + b"{}",
    "huge header": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no JSON": build(b"{]"),
    "no object": build([]),
    "entry is no object": build({"x": 3}),
    "deep": build(b'{"x":' + b"[" * 100_000),
    "not UTF-8": build(b'{"\xff": 1}'),
    "no dtype": build({"x": {"shape": [6], "data_offsets": [0, 24]}}),
    "dtype is a number": build({"x": entry(dtype=3)}),
    "negative dimension": build({"x": entry(shape=[-2, -3])}),
    "fractional dimension": build({"x": entry(shape=[2.5])}),
    "huge dimension": build({"x": entry(shape=[2**64 - 1, 2**64 - 1])}),
    "beyond 64 bits": build({"x": entry(shape=[2**80])}),
    "three offsets": build({"x": entry(offsets=[0, 24, 24])}),
    "backwards": build({"x": entry(offsets=[24, 0])}),
    "negative offset": build({"x": entry(offsets=[-24, 0])}),
    "passes the end": build({"x": entry(offsets=[0, 24])}, data=23),
    "size is not the shape's": build({"x": entry(shape=[5])}),
    "gap": build({"x": entry(shape=[1], offsets=[0, 4]), "y": entry(shape=[1], offsets=[8, 12])}, data=12),
    "overlap": build({"x": entry(shape=[2], offsets=[0, 8]), "y": entry(shape=[2], offsets=[4, 12])}, data=12),
    "twice the same bytes": build({"x": entry(), "y": entry()}),
    "data without a tensor": build({"x": entry()}, data=25),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_header(case: str) -> None:
    with pytest.raises(CorruptWeights, match=r"^some\.safetensors: "):
        parse_header(BROKEN[case], "some.safetensors")
    with pytest.raises(safetensors.SafetensorError):
        package_reads(BROKEN[case])


def test_unknown_dtype() -> None:
    with pytest.raises(UnsupportedModel, match="'x' is stored as F5, an unknown dtype"):
        parse_header(build({"x": entry(dtype="F5")}), "x")


def test_every_dtype_of_the_package_is_known() -> None:
    for dtype in ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float64"):
        raw = safetensors.torch.save({"x": torch.zeros(4).to(getattr(torch, dtype))})
        assert parse_header(raw, "x")["x"].num_bytes == 4 * getattr(torch, dtype).itemsize


def test_unaligned_data_is_copied_to_an_aligned_place(tmp_path: Path) -> None:
    raw = json.dumps({"x": entry()}).encode()
    raw += b" " * ((3 - len(raw)) % 4)  # the data starts at a byte that is no multiple of 4
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + values.tobytes())
    got = SafetensorsCheckpoint(tmp_path).read("x")
    assert got.data.ctypes.data % 4 == 0
    np.testing.assert_array_equal(dequantize(got), values)


@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    try:
        parse_header(raw, "x")
    except (CorruptWeights, UnsupportedModel):
        return
    package_reads(raw)


SIZES = st.integers(0, 3) | st.sampled_from([8, 12, 24, 2**31, 2**62, 2**63, 2**64 - 1])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "nonsense"]),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2),
    }
)


@given(st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3))
def test_accepts_no_header_that_the_package_refuses(header: dict[str, Any]) -> None:
    raw = build(header)
    try:
        parsed = parse_header(raw, "x")
    except (CorruptWeights, UnsupportedModel):
        return
    assert package_reads(raw) == set(parsed)


def test_flipped_bits() -> None:
    whole = safetensors.torch.save(tiny_tensors())
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    random = np.random.default_rng(2)
    survived = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[int(random.integers(0, size))] ^= 1 << int(random.integers(0, 8))
        try:
            parsed = parse_header(bytes(damaged), "x")
        except (CorruptWeights, UnsupportedModel):
            continue
        survived += 1
        assert all(stored.offset + stored.num_bytes <= len(damaged) for stored in parsed.values())
    assert survived < 300
