"""What GGUF calls the tensors of a checkpoint, as data. Tensors that are not listed keep their own name."""

from __future__ import annotations

# GGUF's name without its last part (".weight" or ".bias") -> Hugging Face's.
MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

# The same inside a layer: "blk.{i}." + key -> "model.layers.{i}." + value.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hugging_face_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    stem, dot, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2) if stem.count(".") >= 2 else ("", "", "")
        found = LAYER_NAMES.get(part)
        return f"model.layers.{layer}.{found}{dot}{kind}" if found and layer.isdecimal() else name
    known = MODEL_NAMES.get(stem)
    return f"{known}{dot}{kind}" if known else name
