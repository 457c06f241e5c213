"""Real vocabularies in every container that can hold them, each built once."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from streamgen.checkpoints.base import TokenizerSource
from streamgen.text.sentencepiece import parse_model
from streamgen.text.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

FOLDERS = {
    "stories260K": "models/stories260K",
    "llama2": "tokenizers/llama2",
    "mistral-v3": "tokenizers/mistral-v3",
    "phi-3-mini": "tokenizers/phi-3-mini",
    "qwen2": "tokenizers/qwen2",
}

# name/container: "json" is tokenizer.json, "model" is tokenizer.model, "gguf" the same vocabulary as GGUF metadata
ALL = (
    "stories260K/json",
    "stories260K/model",
    "llama2/json",
    "llama2/model",
    "llama2/gguf",
    "mistral-v3/json",
    "mistral-v3/model",
    "mistral-v3/gguf",
    "phi-3-mini/json",
    "qwen2/json",
    "qwen2/gguf",
)


@cache
def load(name: str) -> Tokenizer:
    """The tokenizer of one entry of `ALL`."""
    return load_tokenizer(source(name))


def source(name: str) -> TokenizerSource:
    folder, container = name.split("/")
    path = DATA / FOLDERS[folder]
    config = json.loads((path / "tokenizer_config.json").read_text())
    if container == "json":
        return TokenizerSource(json_path=path / "tokenizer.json", config=config)
    if container == "model":
        return TokenizerSource(sentencepiece_path=path / "tokenizer.model", config=config)
    if folder == "qwen2":
        return TokenizerSource(gguf=byte_level_metadata(path / "tokenizer.json", pre="qwen2", eos_id=151643))
    return TokenizerSource(gguf=sentencepiece_metadata(path / "tokenizer.model"))


def byte_level_metadata(path: Path, *, pre: str, eos_id: int) -> dict[str, Any]:
    """A tokenizer.json as a GGUF converter writes it."""
    file = json.loads(path.read_text())
    ids = {**file["model"]["vocab"], **{token["content"]: token["id"] for token in file["added_tokens"]}}
    special = {token["id"] for token in file["added_tokens"] if token["special"]}
    tokens = sorted(ids, key=ids.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": file["model"]["merges"],
        "tokenizer.ggml.eos_token_id": eos_id,
        "tokenizer.ggml.add_bos_token": False,
    }


def qwen25_metadata() -> dict[str, Any]:
    """Qwen 2.5: Qwen 2's vocabulary and more added tokens, padded to the width of its head, as converters do."""
    metadata = byte_level_metadata(DATA / FOLDERS["qwen2"] / "tokenizer.json", pre="qwen2", eos_id=151645)
    config = json.loads((DATA / "tokenizer_configs" / "qwen2.5" / "tokenizer_config.json").read_text())
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for token_id, token in sorted(config["added_tokens_decoder"].items()):
        if int(token_id) >= len(tokens):
            tokens.append(token["content"])
            types.append(3 if token["special"] else 4)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), 151936)]
    types += [5] * (151936 - len(types))
    return metadata


def sentencepiece_metadata(path: Path) -> dict[str, Any]:
    """A tokenizer.model as a GGUF converter writes it."""
    pieces = parse_model(path)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces.texts,
        "tokenizer.ggml.scores": pieces.scores,
        "tokenizer.ggml.token_type": pieces.types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def encode_cases(folder: str) -> list[dict[str, Any]]:
    """Texts and the ids that the reference tokenizers give, without special tokens."""
    cases: list[dict[str, Any]] = []
    for name in ("encode_cases.json", "encode_cases_long.json"):
        path = DATA / FOLDERS[folder] / name
        if path.is_file():
            found = json.loads(path.read_text())
            cases += found if isinstance(found, list) else found["cases"]
    return cases


def golden(folder: str) -> dict[str, Any]:
    """A golden.json of shared/data."""
    found: dict[str, Any] = json.loads((DATA / folder / "golden.json").read_text())
    return found
