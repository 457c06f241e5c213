"""Hugging Face checkpoints: safetensors files with config.json and a tokenizer beside them.

The header is parsed here rather than by the safetensors package: that hands out arrays of a framework's dtypes, numpy
has no bfloat16, and what packing needs is the mapped bytes without a copy. The checks are the package's own: tensors
are in range, as large as their shape says, and cover the data without gap or overlap.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamgen.checkpoints.base import RawTensor, TensorInfo, TokenizerSource
from streamgen.checkpoints.generation_config import (
    read_generation_config,
    read_json_object,
    sampling_defaults,
    token_ids,
)
from streamgen.checkpoints.mapped import MappedFile
from streamgen.checkpoints.quantized import QuantizedWeights
from streamgen.errors import CorruptWeights, LoadError, ModelNotFound, UnsupportedModel
from streamgen.models.config import ModelConfig
from streamgen.quantization.base import BLOCKS, TensorType
from streamgen.quantization.formats import Part
from streamgen.sampling import Sampling

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
QUANTIZATION_KEY = "quantization_config"  # of config.json
MAX_HEADER_BYTES = 100_000_000  # the safetensors package's own limit

_TYPES = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}
# Bits of an element of every dtype in the format: a tensor that is not read still has to fit.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "F64": 64,
    "F32": 32, "F16": 16, "BF16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
}  # fmt: skip

_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(Struct, frozen=True):
    """What the header says of a tensor; offsets are counted from the end of the header."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


class _Stored(Struct, frozen=True, kw_only=True):
    """Where a tensor lies: `file` is an index into the checkpoint's files, `offset` from the start of that file."""

    file: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsCheckpoint:
    """An open folder, or single file, of safetensors; implements `checkpoints.base.Checkpoint`.

    Raises:
        ModelNotFound: weights or config.json are not there.
        CorruptWeights: a file contradicts the format or the index.
        UnsupportedModel: a weight has a dtype that this version does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self.model_name = _model_name(path)
        self._files: list[MappedFile] = []
        self._stored: dict[str, _Stored] = {}
        self._quantized: QuantizedWeights | None = None
        try:
            if path.is_dir():
                self._open_folder()
            else:
                self._refuse_lone_shard()
                self._stored = self._open_file(path)
            self._quantized = self._find_quantized()
            self._refuse_dtypes()
        except BaseException:
            self.close()
            raise

    @cached_property
    def config(self) -> ModelConfig:
        """The model's shape, from config.json."""
        from streamgen.models.registry import config_from_hf

        ours = {QUANTIZATION_KEY} if self._quantized is not None else set()
        return config_from_hf({key: value for key, value in self._config_json.items() if key not in ours})

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of a readable dtype by its name; what makes up a quantized matrix is that one tensor."""
        quantized = self._quantized
        dense = {
            name: TensorInfo(name=name, type=_TYPES[stored.dtype], shape=stored.shape, num_bytes=stored.num_bytes)
            for name, stored in self._stored.items()
            if stored.dtype in _TYPES and (quantized is None or name not in quantized.hidden)
        }
        return MappingProxyType(dense | (quantized.tensors if quantized is not None else {}))

    @cached_property
    def tokenizer_source(self) -> TokenizerSource:
        """tokenizer.json, else tokenizer.model, with tokenizer_config.json and the templates beside it."""
        json_path, model_path = self.folder / "tokenizer.json", self.folder / "tokenizer.model"
        if not json_path.is_file() and not model_path.is_file():
            raise ModelNotFound(f"{self.folder}: expected a tokenizer.json or tokenizer.model, found neither")
        config_path = self.folder / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        model, generation = self._config_json, self._generation_config
        bos_ids = token_ids(model.get("bos_token_id"), generation.get("bos_token_id"))
        return TokenizerSource(
            json_path=json_path if json_path.is_file() else None,
            sentencepiece_path=None if json_path.is_file() else model_path,
            config=config,
            chat_templates=_chat_templates(self.folder, config),
            eos_ids=token_ids(model.get("eos_token_id"), generation.get("eos_token_id")),
            bos_id=bos_ids[0] if bos_ids else None,
        )

    @cached_property
    def sampling_defaults(self) -> Sampling:
        """What generation_config.json says."""
        return sampling_defaults(self._generation_config, str(self.folder))

    def read(self, name: str) -> RawTensor:
        """The bytes of a tensor. Raises CorruptWeights where it is missing, UnsupportedModel for its dtype."""
        if self._quantized is not None and name in self._quantized:
            return self._quantized.read(name)
        stored = self._stored.get(name)
        if stored is None:
            raise CorruptWeights(f"{self.path}: tensor {name!r} is missing")
        if stored.dtype not in _TYPES:
            raise self._unsupported(name, stored.dtype)
        data = self._view(name)
        if stored.offset % BLOCKS[_TYPES[stored.dtype]].num_bytes:
            data = data.copy()  # the format does not promise alignment, kernels rely on it
        return RawTensor(info=self.tensors[name], data=data)

    def release(self, name: str) -> None:
        """Tell the system that the tensor's mapped bytes are not needed any more."""
        quantized = self._quantized
        parts = quantized.parts_of(name) if quantized is not None and name in quantized else [name]
        for part in parts:
            stored = self._stored[part]
            if self._files:
                self._files[stored.file].release(stored.offset, stored.num_bytes)

    def close(self) -> None:
        """Unmap the files; idempotent."""
        files, self._files = self._files, []
        for file in files:
            file.close()

    @cached_property
    def _config_json(self) -> dict[str, Any]:
        return read_json_object(self.folder / "config.json")

    @cached_property
    def _generation_config(self) -> dict[str, Any]:
        return read_generation_config(self.folder)

    def _view(self, name: str) -> NDArray[np.uint8]:
        stored = self._stored[name]
        if not self._files:
            raise LoadError(f"{self.path}: the checkpoint is closed; open it again to read from it")
        return self._files[stored.file].view(stored.offset, stored.num_bytes)

    def _find_quantized(self) -> QuantizedWeights | None:
        if all(stored.dtype in _TYPES for stored in self._stored.values()):
            return None  # nothing is quantized, whatever config.json says
        if not (self.folder / "config.json").is_file():
            return None
        config = self._config_json.get(QUANTIZATION_KEY)
        if not config:
            return None
        if not isinstance(config, dict):
            raise CorruptWeights(f"{self.folder / 'config.json'}: {QUANTIZATION_KEY}: expected a mapping")
        parts = {name: Part(stored.dtype, stored.shape) for name, stored in self._stored.items()}
        return QuantizedWeights(config, parts, self._view, str(self.path))

    def _open_folder(self) -> None:
        index = self.path / INDEX_FILE
        if index.is_file():
            self._open_shards(_weight_map(index))
        else:
            self._stored = self._open_file(_only_file(self.path))

    def _open_shards(self, weight_map: dict[str, str]) -> None:
        shards = {}
        for shard in sorted(set(weight_map.values())):
            if not (self.path / shard).is_file():
                raise CorruptWeights(f"{self.path / shard}: named by {INDEX_FILE}, but missing; download it again")
            shards[shard] = self._open_file(self.path / shard)
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                raise CorruptWeights(f"{self.path / shard}: tensor {name!r}, which {INDEX_FILE} puts there, is missing")
            self._stored[name] = shards[shard][name]

    def _open_file(self, path: Path) -> dict[str, _Stored]:
        file = MappedFile(path)
        self._files.append(file)
        return parse_header(file.buffer, str(path), file=len(self._files) - 1)

    def _refuse_lone_shard(self) -> None:
        index = self.folder / INDEX_FILE
        if self.path.name != SINGLE_FILE and index.is_file() and self.path.name in _weight_map(index).values():
            raise UnsupportedModel(f"{self.path}: one shard of a model; open the folder {self.folder} instead")

    def _refuse_dtypes(self) -> None:
        """Fail at once for weights; other tensors (an old checkpoint's position_ids) only if somebody reads them."""
        hidden = self._quantized.hidden if self._quantized is not None else frozenset()
        for name, stored in self._stored.items():
            if stored.dtype not in _TYPES and name not in hidden and name.endswith((".weight", ".bias")):
                raise self._unsupported(name, stored.dtype)

    def _unsupported(self, name: str, dtype: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.path}: tensor {name!r} is stored as {dtype}; this version reads {', '.join(_TYPES)}"
        )


def parse_header(data: mmap.mmap | bytes, source: str, *, file: int = 0) -> dict[str, _Stored]:
    """Where each tensor of the safetensors file `data` lies; `source` names it in messages. Raises CorruptWeights."""
    if len(data) < 8:
        raise CorruptWeights(f"{source}: expected a safetensors file, got {len(data)} bytes; download it again")
    (header_bytes,) = struct.unpack("<Q", data[:8])
    if header_bytes > min(len(data) - 8, MAX_HEADER_BYTES):
        raise CorruptWeights(f"{source}: a header of {header_bytes} bytes in a file of {len(data)}; download it again")
    entries = _decode_header(data[8 : 8 + header_bytes], source)
    _check_entries(entries, len(data) - 8 - header_bytes, source)
    start = 8 + header_bytes
    return {
        name: _Stored(
            file=file,
            dtype=entry.dtype,
            shape=entry.shape,
            offset=start + entry.data_offsets[0],
            num_bytes=entry.data_offsets[1] - entry.data_offsets[0],
        )
        for name, entry in entries.items()
    }


def _decode_header(raw: bytes, source: str) -> dict[str, _Entry]:
    try:
        header = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        return {name: msgspec.json.decode(entry, type=_Entry) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise CorruptWeights(f"{source}: the header is no safetensors header ({error}); download it again") from error


def _check_entries(entries: dict[str, _Entry], data_bytes: int, source: str) -> None:
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in _BITS:
            raise UnsupportedModel(f"{source}: tensor {name!r} is stored as {entry.dtype}, an unknown dtype")
        start, stop = entry.data_offsets
        if start != end or stop < start:
            raise CorruptWeights(f"{source}: tensor {name!r}: expected data from byte {end}, got {start} to {stop}")
        bits = math.prod(entry.shape) * _BITS[entry.dtype]
        if bits != 8 * (stop - start):
            shape = list(entry.shape)
            raise CorruptWeights(f"{source}: tensor {name!r}: {stop - start} bytes do not hold {entry.dtype} {shape}")
        end = stop
    if end != data_bytes:
        raise CorruptWeights(f"{source}: the header declares {end} bytes of data, the file has {data_bytes}")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, out of a shard index; a file name is a name in the same folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptWeights(f"{index}: expected an object 'weight_map'")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\\" in file:
            raise CorruptWeights(f"{index}: expected names of .safetensors files in the same folder, got {file!r}")
    return weight_map


def _only_file(folder: Path) -> Path:
    if (folder / SINGLE_FILE).is_file():
        return folder / SINGLE_FILE
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) != 1:
        listed = ", ".join(found) if found else "none"
        raise ModelNotFound(f"{folder}: expected {SINGLE_FILE}, {INDEX_FILE} or one .safetensors file, found {listed}")
    return folder / found[0]


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; a file beside the tokenizer wins over the one in tokenizer_config.json."""
    templates: dict[str, str] = {}
    declared = config.get("chat_template")
    if isinstance(declared, str):
        templates["default"] = declared
    elif isinstance(declared, list):
        templates |= {t["name"]: t["template"] for t in declared if _is_named_template(t)}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_template(path)
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _read_template(folder / "chat_template.jinja")
    return templates


def _is_named_template(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("name", "template"))


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptWeights(f"{path}: expected a template in UTF-8 ({error})") from error


def _model_name(path: Path) -> str:
    """A name for people: org/name for a snapshot in the hub's cache, else the folder's or the file's own."""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name if path.is_dir() or path.name == SINGLE_FILE else path.stem
