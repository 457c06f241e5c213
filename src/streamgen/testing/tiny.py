"""The real engine on generated weights: everything runs as it does on a real model, in a fraction of a second."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamgen.engine import Engine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streamgen.actors.supervisor import EngineThread

BYTES = 256
SPECIALS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": BYTES + len(SPECIALS),
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": BYTES,
    "eos_token_id": BYTES + 1,
}
TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class TinyEngine(Engine):
    """An engine over a folder of its own, which is removed when it is closed."""

    def __init__(self, folder: Path, /, *, weights_seed: int, **options: Any) -> None:
        self._folder = folder  # first of all: it goes with this object even if the options are refused
        self._weights_seed = weights_seed
        super().__init__(folder, **options)

    def _begin_open(self) -> EngineThread:
        if not self._folder.exists():  # it was closed before
            self._folder.mkdir()
            write_tiny_model(self._folder, seed=self._weights_seed)
        return super()._begin_open()

    async def aclose(self) -> None:
        """Close, and remove the folder."""
        try:
            await super().aclose()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __del__(self) -> None:
        super().__del__()
        folder: Path | None = getattr(self, "_folder", None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def tiny_engine(*, weights_seed: int = 0, **options: Any) -> Engine:
    """The real engine on a random llama of two layers, which knows bytes. What it says is noise, the same each time.

    weights_seed   other weights, other noise
    options        as for `Engine`; 16 MiB of cache unless `kv_memory` says otherwise
    """
    folder = Path(tempfile.mkdtemp(prefix="streamgen-tiny-"))
    write_tiny_model(folder, seed=weights_seed)
    return TinyEngine(folder, weights_seed=weights_seed, **{"kv_memory": "16MiB", **options})


def write_tiny_model(folder: Path, *, seed: int = 0) -> None:
    """Write the checkpoint: safetensors, configuration, tokenizer and chat template; about 440 kB."""
    from safetensors.numpy import save_file

    save_file(_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    (folder / "tokenizer.json").write_text(_tokenizer())
    names = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[1], "add_bos_token": True, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def _weights(seed: int) -> dict[str, NDArray[Any]]:
    import numpy as np

    random = np.random.default_rng(seed)
    hidden, inner, heads, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 4, 2
    head_dim = hidden // heads

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        values: NDArray[Any] = random.standard_normal((rows, columns)) / columns**0.5
        return values.astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(CONFIG["vocab_size"], hidden),
        "model.norm.weight": _ones(hidden),
        "lm_head.weight": 3 * matrix(CONFIG["vocab_size"], hidden),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        layer = {
            "input_layernorm": _ones(hidden),
            "self_attn.q_proj": matrix(heads * head_dim, hidden),
            "self_attn.k_proj": matrix(kv * head_dim, hidden),
            "self_attn.v_proj": matrix(kv * head_dim, hidden),
            "self_attn.o_proj": matrix(hidden, heads * head_dim),
            "post_attention_layernorm": _ones(hidden),
            "mlp.gate_proj": matrix(inner, hidden),
            "mlp.up_proj": matrix(inner, hidden),
            "mlp.down_proj": matrix(hidden, inner),
        }
        weights.update({f"model.layers.{i}.{name}.weight": value for name, value in layer.items()})
    return weights


def _ones(size: int) -> NDArray[Any]:
    import numpy as np

    return np.ones(size, np.float32)


def _tokenizer() -> str:
    """A byte-level BPE without merges: one token per byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    text: str = tokenizer.to_str()
    return text
