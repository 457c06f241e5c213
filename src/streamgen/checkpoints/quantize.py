"""Writes a quantized copy of a folder of safetensors, in the layout of `quantization/compressed_tensors.py`.

Tensors are read, rounded and written one by one. The copy appears under its name when it is whole, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from streamgen.checkpoints.base import TensorInfo
from streamgen.checkpoints.generation_config import read_json_object
from streamgen.checkpoints.safetensors import QUANTIZATION_KEY, SINGLE_FILE, SafetensorsCheckpoint
from streamgen.config import Quantization
from streamgen.errors import ConfigError, LoadError
from streamgen.quantization.base import Packing, TensorType
from streamgen.quantization.compressed_tensors import part_infos, written_config, written_parts
from streamgen.quantization.formats import Part
from streamgen.quantization.gguf_blocks import dequantize
from streamgen.quantization.rounding import round_matrix

# What is copied as it is, where it is there: the tokenizer, its templates, and how the model likes to be sampled.
COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
COPIED_FOLDERS = ("additional_chat_templates",)
_WIDTHS = {"I8": 1, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4}

OnTensor = Callable[[int, int], None]  # values done, of how many


def write_quantized(
    source: SafetensorsCheckpoint,
    folder: Path,
    asked: Quantization,
    packings: Mapping[str, Packing],
    on_tensor: OnTensor = lambda done, total: None,
) -> None:
    """Write `source` to a new `folder` with some of its matrices rounded.

    packings   how, by the module's name; the rest stays as it is, but float32 matrices become bfloat16
    on_tensor  hears after each tensor how many values are done; what it raises ends the writing

    Raises:
        ConfigError: the folder is there already.
        LoadError: it cannot be written.
    """
    if os.path.lexists(folder):
        raise ConfigError(f"{folder}: expected a folder that is not there yet; name another, or remove it")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            whole = Path(temporary) / "model"
            whole.mkdir()
            _copy_files(source.folder, whole)
            _write_config(source, whole, asked, packings)
            with (whole / SINGLE_FILE).open("wb") as file:
                _write_tensors(file, source, packings, on_tensor)
                os.fsync(file.fileno())
            whole.rename(folder)
    except OSError as error:
        raise LoadError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _copy_files(source: Path, folder: Path) -> None:
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for name in COPIED_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


def _write_config(
    source: SafetensorsCheckpoint, folder: Path, asked: Quantization, packings: Mapping[str, Packing]
) -> None:
    config = read_json_object(source.folder / "config.json")
    for key in ("torch_dtype", "dtype"):
        if config.get(key) == "float32":
            config[key] = "bfloat16"
    ignored = [] if "lm_head" in packings else ["lm_head"]  # a tied head is a linear to others, without a tensor
    config[QUANTIZATION_KEY] = written_config(asked, ignored=ignored)
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _write_tensors(
    file: IO[bytes], source: SafetensorsCheckpoint, packings: Mapping[str, Packing], on_tensor: OnTensor
) -> None:
    file.write(_header(source.tensors, packings))
    total, done = sum(_size(info.shape) for info in source.tensors.values()), 0
    for name, info in source.tensors.items():
        raw = source.read(name)
        packing = packings.get(name.removesuffix(".weight"))
        if packing is not None:
            parts = written_parts(round_matrix(dequantize(raw), packing), packing)
            for part in part_infos(info.shape[0], info.shape[1], packing):
                file.write(np.ascontiguousarray(parts[part]).data)
        else:
            file.write(_as_bfloat16(raw.data.view("<f4")).data if _narrows(info) else raw.data.data)
        source.release(name)
        done += _size(info.shape)
        on_tensor(done, total)


def _header(tensors: Mapping[str, TensorInfo], packings: Mapping[str, Packing]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, part in _written(tensors, packings):
        start, end = end, end + _size(part.shape) * _WIDTHS[part.dtype]
        header[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _written(tensors: Mapping[str, TensorInfo], packings: Mapping[str, Packing]) -> Iterator[tuple[str, Part]]:
    """Every tensor of the copy, in the order of its data."""
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        if module in packings:
            for part, header in part_infos(info.shape[0], info.shape[1], packings[module]).items():
                yield f"{module}.{part}", header
        else:
            yield name, Part("BF16" if _narrows(info) else info.type.name, info.shape)


def _narrows(info: TensorInfo) -> bool:
    return info.type is TensorType.F32 and len(info.shape) > 1


def _as_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
