"""Models of random weights with a real model's shape: the same numbers as safetensors and as GGUF, in bfloat16.

Speed does not depend on what weights say, so shapes for which no file is at hand are measured so. The tokenizer is the
demo model's; a larger vocabulary is filled with ids that stand for nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from streamgen.hub import demo_model_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEED = 20240607
MAX_CONTEXT = 8192
GGUF_FILE = "model.gguf"
_TOKEN_UNUSED = 5  # gguf.TokenType.UNUSED


class Shape(Struct, frozen=True, kw_only=True):
    """A llama with tied embeddings."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int
    rope_theta: float
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Columns of one head."""
        return self.hidden // self.heads


SHAPE_135M = Shape(
    name="135m", hidden=576, layers=30, heads=9, kv_heads=3, inner=1536, vocab=49152, rope_theta=100_000.0
)
SHAPE_1B = Shape(
    name="1b", hidden=2048, layers=16, heads=32, kv_heads=8, inner=8192, vocab=128256, rope_theta=500_000.0
)


class Tensor(Struct, frozen=True):
    """One tensor: its name in either container, and its values as the upper halves of float32."""

    name: str
    gguf_name: str
    values: NDArray[np.uint16]
    rope_heads: int = 0  # GGUF holds the rows of so many heads in interleaved rope order


def generate(shape: Shape, folder: Path) -> None:
    """Write `folder` with both files, configuration and tokenizer; nothing is left of an attempt that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        tensors = _tensors(shape)
        _write_safetensors(tensors, made / "model.safetensors")
        _write_gguf(shape, tensors, made / GGUF_FILE)
        (made / "config.json").write_text(json.dumps(_hf_config(shape), indent=1))
        (made / "generation_config.json").write_text(json.dumps({"do_sample": False}))
        _write_tokenizer(made)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)


def _hf_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": MAX_CONTEXT,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tensors(shape: Shape) -> list[Tensor]:
    random = np.random.default_rng(SEED)
    q_rows, kv_rows = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrix(name: str, gguf_name: str, rows: int, columns: int, rope_heads: int = 0) -> Tensor:
        values = random.standard_normal((rows, columns), dtype=np.float32)
        values *= columns**-0.5
        return Tensor(name, gguf_name, _to_bfloat16(values), rope_heads)

    def norm(name: str, gguf_name: str) -> Tensor:
        return Tensor(name, gguf_name, _to_bfloat16(np.ones(shape.hidden, np.float32)))

    tensors = [matrix("model.embed_tokens.weight", "token_embd.weight", shape.vocab, shape.hidden)]
    for i in range(shape.layers):
        hf, gg = f"model.layers.{i}", f"blk.{i}"
        attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"
        tensors += [
            norm(f"{hf}.input_layernorm.weight", f"{gg}.attn_norm.weight"),
            matrix(f"{attention}.q_proj.weight", f"{gg}.attn_q.weight", q_rows, shape.hidden, shape.heads),
            matrix(f"{attention}.k_proj.weight", f"{gg}.attn_k.weight", kv_rows, shape.hidden, shape.kv_heads),
            matrix(f"{attention}.v_proj.weight", f"{gg}.attn_v.weight", kv_rows, shape.hidden),
            matrix(f"{attention}.o_proj.weight", f"{gg}.attn_output.weight", shape.hidden, q_rows),
            norm(f"{hf}.post_attention_layernorm.weight", f"{gg}.ffn_norm.weight"),
            matrix(f"{mlp}.gate_proj.weight", f"{gg}.ffn_gate.weight", shape.inner, shape.hidden),
            matrix(f"{mlp}.up_proj.weight", f"{gg}.ffn_up.weight", shape.inner, shape.hidden),
            matrix(f"{mlp}.down_proj.weight", f"{gg}.ffn_down.weight", shape.hidden, shape.inner),
        ]
    return [*tensors, norm("model.norm.weight", "output_norm.weight")]


def _to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even. Values are finite."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_safetensors(tensors: list[Tensor], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.values.nbytes
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.values.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            out.write(tensor.values.tobytes())


def _interleave(values: NDArray[np.uint16], heads: int) -> NDArray[np.uint16]:
    """Rows as GGUF's llama has them: within a head, row i + j * head_dim / 2 comes to stand at 2 i + j."""
    rows, columns = values.shape
    return values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_gguf(shape: Shape, tensors: list[Tensor], path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random {shape.name}")
    writer.add_context_length(MAX_CONTEXT)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _copy_tokenizer(writer, shape.vocab)
    for tensor in tensors:
        if tensor.values.ndim == 1:
            writer.add_tensor(tensor.gguf_name, (tensor.values.astype(np.uint32) << 16).view(np.float32))
            continue
        rows = _interleave(tensor.values, tensor.rope_heads) if tensor.rope_heads else tensor.values
        data = np.ascontiguousarray(rows).view(np.uint8)
        writer.add_tensor(tensor.gguf_name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(writer: Any, vocab: int) -> None:
    """The demo model's `tokenizer.*` fields, with ids without a meaning up to `vocab`."""
    import gguf

    reader = gguf.GGUFReader(demo_model_path())
    for name, field in reader.fields.items():
        if not name.startswith("tokenizer."):
            continue
        value = field.contents()
        if name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            missing = range(len(value), vocab)
            value = [*value, *(_TOKEN_UNUSED if name.endswith("type") else f"[unused {i}]" for i in missing)]
        writer.add_key_value(
            name, value, field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        )


def _write_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    path = demo_model_path()
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
