"""Small GGUF files: one written by the gguf package, and headers put together by hand to be wrong."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = ["<unk>", "<|im_end|>", "a", "ä", "<|endoftext|>", "x<|im_end|>", "</s>"]
HEADS, KV_HEADS, HIDDEN, VOCAB = 4, 2, 32, len(TOKENS)


def tiny_arrays() -> dict[str, np.ndarray]:
    """The tensors of a one-layer model by GGUF name, in torch's order of dimensions."""
    random = np.random.default_rng(5)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(size=(rows, columns)).astype(np.float32)

    return {
        "token_embd.weight": matrix(VOCAB, HIDDEN),
        "blk.0.attn_norm.weight": matrix(1, HIDDEN)[0],
        "blk.0.attn_q.weight": matrix(HIDDEN, HIDDEN),
        "blk.0.attn_q.bias": matrix(1, HIDDEN)[0],
        "blk.0.attn_k.weight": matrix(HIDDEN // 2, HIDDEN),
        "blk.0.attn_v.weight": matrix(HIDDEN // 2, HIDDEN),
        "blk.0.attn_output.weight": matrix(HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": matrix(1, HIDDEN)[0],
        "blk.0.ffn_gate.weight": matrix(64, HIDDEN),
        "blk.0.ffn_up.weight": matrix(64, HIDDEN),
        "blk.0.ffn_down.weight": matrix(HIDDEN, 64),
        "output_norm.weight": matrix(1, HIDDEN)[0],
        "output.weight": matrix(VOCAB, HIDDEN),
    }


def write_tiny_gguf(path: Path, *, architecture: str = "llama", alignment: int | None = None) -> dict[str, np.ndarray]:
    """Write the model; matrices of the mlp are Q8_0, the rest float32. Returns what was written, by GGUF name."""
    writer = GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([2, 3, 1, 1, 3, 1, 3])
    writer.add_token_scores([0.5 * i for i in range(VOCAB)])
    writer.add_eos_token_id(6)
    writer.add_bos_token_id(100_000)  # outside the vocabulary: how some converters say "none"
    writer.add_add_bos_token(False)
    writer.add_chat_template([{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}])
    arrays = tiny_arrays()
    for name, array in arrays.items():
        if ".ffn_" in name and array.ndim == 2:
            packed = quantize(array, GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, type: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type) + value


def tensor(
    name: str | bytes = "x", dims: tuple[int, ...] = (32,), type: int = 0, offset: int = 0, ndim: int | None = None
) -> bytes:
    count = len(dims) if ndim is None else ndim
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, type, offset)


def header(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    data: int = 4096,
    **counts: Any,
) -> bytes:
    """A file of these pieces and `data` zero bytes; `magic`, `version`, `num_tensors`, `num_pairs` may lie."""
    pairs, tensors = pairs or [], tensors or []
    magic: bytes = counts.get("magic", b"GGUF")
    start = magic + struct.pack(
        "<IQQ", counts.get("version", 3), counts.get("num_tensors", len(tensors)), counts.get("num_pairs", len(pairs))
    )
    return start + b"".join(pairs) + b"".join(tensors) + bytes(data)
