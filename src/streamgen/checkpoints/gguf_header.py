"""Parses the header of a GGUF file: metadata, and where each tensor lies. Reads no tensor.

The file is not trusted: every count, length and offset is held against the bytes that remain before anything of that
size is made. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Versions 2 and 3 are laid out alike.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
from msgspec import Struct

from streamgen.errors import CorruptWeights, UnsupportedModel
from streamgen.quantization.base import BLOCKS, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 65535  # of a key or a tensor's name
MAX_DIMS = 4

# Ids that GGUF has given to element types we do not read, so that the message can say the name.
_OTHER_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9
# Numbers of the metadata: value type -> struct format, which is the array type code too.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}

_MIN_PAIR_BYTES = 8 + 4 + 1  # length of the key, type, and a value of one byte
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length of the name, ndim, one dimension, type, offset


class GgufTensor(Struct, frozen=True, kw_only=True):
    """A tensor as the header declares it; shape in torch's order, offset from the start of the file."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufHeader(Struct, frozen=True, kw_only=True):
    """The header of a GGUF file. Arrays of metadata are `array.array`, tuples of bool, or `GgufStrings`."""

    version: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


class GgufStrings(Sequence[str]):
    """An array of strings in the metadata, decoded when it is asked for: a vocabulary has 150 000 of them.

    The bytes are a copy, so it outlives the file. Bytes that are not UTF-8 become lone surrogates (`surrogateescape`):
    a token may be part of a character, and `text.encode("utf-8", "surrogateescape")` gives its bytes back.
    """

    def __init__(self, blob: bytes, bounds: array[int]) -> None:
        """Take strings each behind its 8-byte length; string i with its length is blob[bounds[i]:bounds[i + 1]]."""
        self._blob = blob
        self._bounds = bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self._blob[self._bounds[i] + 8 : self._bounds[i + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return iter(self._decode_together() or self._decode_each())

    def _decode_together(self) -> list[str]:
        """All of them, several times as fast as one by one; empty where they cannot be told apart then."""
        data = np.frombuffer(self._blob, np.uint8)
        starts = np.frombuffer(self._bounds, np.uint64)[:-1].astype(np.int64)
        is_text = np.ones(len(data), np.bool_)
        for i in range(7):
            is_text[starts + i] = False
        joined = data.copy()
        joined[starts + 7] = 0  # the last byte of a length becomes a separator
        try:
            texts = joined[is_text].tobytes().decode("utf-8").split("\0")[1:]
        except UnicodeDecodeError:
            return []
        return texts if len(texts) == len(self) else []  # a text holds a NUL

    def _decode_each(self) -> list[str]:
        blob = self._blob
        return [str(blob[start + 8 : end], "utf-8", "surrogateescape") for start, end in pairwise(self._bounds)]

    def __repr__(self) -> str:
        return f"<GgufStrings of {len(self)}>"


def parse_header(data: mmap.mmap | bytes, source: str) -> GgufHeader:
    """Read the header of the GGUF file `data`; `source` names it in messages.

    Raises:
        CorruptWeights: the bytes contradict the format.
        UnsupportedModel: a version, byte order or element type that this library does not read.
    """
    cursor = _Cursor(data, source)
    version = _read_version(cursor)
    num_tensors, num_pairs = cursor.u64("number of tensors"), cursor.u64("number of metadata pairs")
    cursor.check_count(num_pairs, _MIN_PAIR_BYTES, "metadata pairs")
    metadata = _read_metadata(cursor, num_pairs)
    cursor.check_count(num_tensors, _MIN_TENSOR_BYTES, "tensors")
    tensors = _read_tensors(cursor, num_tensors, _alignment(cursor, metadata))
    return GgufHeader(version=version, metadata=metadata, tensors=tensors)


class _Cursor:
    """A position in the header, which never passes the end of the file."""

    def __init__(self, data: mmap.mmap | bytes, source: str) -> None:
        self.data = data
        self.end = len(data)
        self.at = 0
        self._source = source

    def corrupt(self, message: str) -> CorruptWeights:
        return CorruptWeights(f"{self._source}: {message} (at byte {self.at}); the file is damaged, download it again")

    def unsupported(self, message: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self._source}: {message}")

    def skip(self, count: int, what: str) -> int:
        """Pass over `count` bytes; returns where they start."""
        start = self.at
        if count > self.end - start:
            raise self.corrupt(f"{what}: expected {count} more bytes, the file has {self.end - start}")
        self.at = start + count
        return start

    def take(self, count: int, what: str) -> bytes:
        start = self.skip(count, what)
        return self.data[start : self.at]

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.skip(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.skip(8, what))[0])

    def check_count(self, count: int, min_bytes: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold, before a loop or an allocation trusts it."""
        if count > (self.end - self.at) // min_bytes:
            raise self.corrupt(f"{count} {what} do not fit into the {self.end - self.at} bytes left")

    def text(self, what: str) -> str:
        return self._decode(self.u64(f"length of {what}"), what)

    def name(self, what: str) -> str:
        """A text that is a key: not empty, not long, no NUL that would end it early elsewhere."""
        length = self.u64(f"length of {what}")
        if not 1 <= length <= MAX_NAME_BYTES:
            raise self.corrupt(f"{what}: expected 1 to {MAX_NAME_BYTES} bytes, got {length}")
        name = self._decode(length, what)
        if "\0" in name:
            raise self.corrupt(f"{what} {name!r} holds a NUL")
        return name

    def _decode(self, length: int, what: str) -> str:
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"{what} is not UTF-8") from error


def _read_version(cursor: _Cursor) -> int:
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        raise cursor.corrupt(f"expected a GGUF file, which starts with {MAGIC!r}, got {magic!r}")
    version = cursor.u32("version")
    if version in VERSIONS:
        return version
    if version & 0xFFFF == 0:
        raise cursor.unsupported("a big-endian GGUF file; convert it to little-endian (gguf-convert-endian)")
    raise cursor.unsupported(f"GGUF version {version}; expected one of {', '.join(map(str, VERSIONS))}")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name("metadata key")
        if key in metadata:
            raise cursor.corrupt(f"metadata key {key!r} occurs twice")
        metadata[key] = _read_value(cursor, cursor.u32(f"type of {key}"), key)
    return metadata


def _read_value(cursor: _Cursor, type: int, key: str) -> Any:
    if type in _NUMBERS:
        layout = "<" + _NUMBERS[type]
        return struct.unpack(layout, cursor.take(struct.calcsize(layout), key))[0]
    if type == _BOOL:
        return _bools(cursor, 1, key)[0]
    if type == _STRING:
        return cursor.text(key)
    if type == _ARRAY:
        return _read_array(cursor, key)
    raise cursor.corrupt(f"{key}: unknown value type {type}")


def _read_array(cursor: _Cursor, key: str) -> Any:
    type, count = cursor.u32(f"element type of {key}"), cursor.u64(f"length of {key}")
    if type in _NUMBERS:
        return _numbers(cursor, _NUMBERS[type], count, key)
    if type == _BOOL:
        return _bools(cursor, count, key)
    if type == _STRING:
        return _strings(cursor, count, key)
    # Arrays of arrays are in the format's text, but ggml refuses them, so no model has any.
    raise cursor.corrupt(f"{key}: expected an array of numbers, bools or strings, got element type {type}")


def _numbers(cursor: _Cursor, code: str, count: int, key: str) -> array[Any]:
    values: array[Any] = array(code)
    values.frombytes(cursor.take(count * values.itemsize, key))
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _bools(cursor: _Cursor, count: int, key: str) -> tuple[bool, ...]:
    raw = cursor.take(count, key)
    if raw.translate(None, b"\0\1"):
        raise cursor.corrupt(f"{key}: expected a bool of 0 or 1")
    return tuple(map(bool, raw))


def _strings(cursor: _Cursor, count: int, key: str) -> GgufStrings:
    """Walk over `count` strings, noting where each starts."""
    cursor.check_count(count, 8, f"strings of {key}")
    bounds = _short_bounds(cursor, count) or _bounds(cursor, count, key)
    return GgufStrings(cursor.take(bounds[-1], key), array("Q", bounds))


def _short_bounds(cursor: _Cursor, count: int) -> list[int]:
    """Where each string starts, by the first bytes of their lengths alone; empty if one has 256 bytes or more."""
    data, at, bounds = memoryview(cursor.data)[cursor.at :], 0, [0]
    append = bounds.append
    try:
        for _ in range(count):
            at += 8 + data[at]
            append(at)
    except IndexError:
        return []
    if at > len(data):
        return []
    seen, starts = np.frombuffer(data, np.uint8, at), np.array(bounds[:-1], np.int64)
    return bounds if not any(seen[starts + i].any() for i in range(1, 8)) else []


def _bounds(cursor: _Cursor, count: int, key: str) -> list[int]:
    start, data, unpack = cursor.at, cursor.data, _U64.unpack_from
    at, bounds = start, [0]
    try:
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
            bounds.append(at - start)
    except (struct.error, OverflowError) as error:  # the next length would lie beyond the end of the file
        raise cursor.corrupt(f"{key}: string {len(bounds) - 1} lies beyond the end of the file") from error
    return bounds


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise cursor.corrupt(f"general.alignment: expected a power of two >= 8, got {alignment!r}")
    return alignment


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[GgufTensor, ...]:
    tensors: dict[str, GgufTensor] = {}
    for _ in range(count):
        tensor = _read_tensor(cursor, alignment)
        if tensor.name in tensors:
            raise cursor.corrupt(f"tensor {tensor.name!r} occurs twice")
        tensors[tensor.name] = tensor
    data_start = -(-cursor.at // alignment) * alignment
    placed = sorted((_place(cursor, tensor, data_start) for tensor in tensors.values()), key=lambda t: t.offset)
    for before, after in pairwise(placed):
        if before.offset + before.num_bytes > after.offset:
            raise cursor.corrupt(f"tensors {before.name!r} and {after.name!r} overlap")
    return tuple(placed)


def _read_tensor(cursor: _Cursor, alignment: int) -> GgufTensor:
    """One entry; its offset is still counted from the start of the data."""
    name = cursor.name("tensor name")
    num_dims = cursor.u32(f"dimensions of {name}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.corrupt(f"tensor {name!r}: expected 1 to {MAX_DIMS} dimensions, got {num_dims}")
    dims = tuple(cursor.u64(f"dimension of {name}") for _ in range(num_dims))
    if 0 in dims:
        raise cursor.corrupt(f"tensor {name!r}: expected dimensions above 0, got {list(dims)}")
    type = _tensor_type(cursor, cursor.u32(f"type of {name}"), name)
    offset = cursor.u64(f"offset of {name}")
    block = BLOCKS[type]
    if dims[0] % block.values:
        raise cursor.corrupt(f"tensor {name!r}: {dims[0]} columns are no multiple of the {block.values} of {type.name}")
    if offset % alignment:
        raise cursor.corrupt(f"tensor {name!r}: offset {offset} is no multiple of the alignment {alignment}")
    num_bytes = math.prod(dims) // block.values * block.num_bytes
    return GgufTensor(name=name, type=type, shape=dims[::-1], offset=offset, num_bytes=num_bytes)


def _tensor_type(cursor: _Cursor, id: int, name: str) -> TensorType:
    if id in _OTHER_TYPES:
        readable = ", ".join(type.name for type in TensorType)
        raise cursor.unsupported(f"tensor {name!r} is stored as {_OTHER_TYPES[id]}; this version reads {readable}")
    try:
        return TensorType(id)
    except ValueError as error:
        raise cursor.corrupt(f"tensor {name!r}: unknown element type {id}") from error


def _place(cursor: _Cursor, tensor: GgufTensor, data_start: int) -> GgufTensor:
    offset = data_start + tensor.offset
    if offset + tensor.num_bytes > cursor.end:
        raise cursor.corrupt(
            f"tensor {tensor.name!r}: bytes {offset} to {offset + tensor.num_bytes} pass the file's end at {cursor.end}"
        )
    return GgufTensor(name=tensor.name, type=tensor.type, shape=tensor.shape, offset=offset, num_bytes=tensor.num_bytes)
