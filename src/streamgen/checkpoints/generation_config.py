"""The JSON files beside a checkpoint: read with bounds, and turned into sampling defaults and end-of-text ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamgen.errors import CorruptWeights, InvalidRequest, ModelNotFound
from streamgen.sampling import Sampling

MAX_JSON_BYTES = 64 << 20  # the index of the largest public checkpoint has about 10 MB

# Fields that mean the same in generation_config.json, with transformers' own defaults. A value equal to its default
# says nothing about the model: older versions of transformers wrote all of them out.
_NEUTRAL: dict[str, float | None] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelNotFound: the file cannot be read.
        CorruptWeights: it is too large, or no JSON object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelNotFound(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(raw) > MAX_JSON_BYTES:
        raise CorruptWeights(f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON")
    return parse_json_object(raw, str(path))


def parse_json_object(raw: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `raw`; `source` names it in messages. Raises CorruptWeights."""
    try:
        value = json.loads(raw)  # not msgspec: Python's writers put NaN and Infinity into configs
    except (ValueError, RecursionError) as error:
        raise CorruptWeights(f"{source}: expected JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptWeights(f"{source}: expected a JSON object, got {type(value).__name__}")
    return value


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json; empty where there is none."""
    path = folder / "generation_config.json"
    return read_json_object(path) if path.is_file() else {}


def sampling_defaults(generation: Mapping[str, Any], source: str) -> Sampling:
    """What a generation config says of sampling. Lengths are left out: they are the request's.

    Raises:
        CorruptWeights: a value that no sampler could use.
    """
    fields = {name: generation[name] for name, neutral in _NEUTRAL.items() if generation.get(name, neutral) != neutral}
    fields = {name: value for name, value in fields.items() if value is not None}
    if generation.get("do_sample") is False:
        fields = {name: value for name, value in fields.items() if name == "repetition_penalty"} | {"temperature": 0.0}
    try:
        return Sampling(**fields)
    except InvalidRequest as error:
        raise CorruptWeights(f"{source}: generation_config.json: {error.message}") from error


def token_ids(*values: object) -> tuple[int, ...]:
    """The ids among `values`, each an id, a list of ids or None; in order, once each."""
    ids: dict[int, None] = {}
    for value in values:
        for id in value if isinstance(value, list) else [value]:
            if isinstance(id, int) and not isinstance(id, bool) and id >= 0:
                ids[id] = None
    return tuple(ids)
