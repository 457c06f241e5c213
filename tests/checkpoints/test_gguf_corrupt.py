"""Damaged and hostile GGUF files end in a typed error, without another exception and without a large allocation."""

from __future__ import annotations

import struct
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen.checkpoints.gguf import GgufCheckpoint
from streamgen.checkpoints.gguf_header import GgufHeader, parse_header
from streamgen.errors import CorruptWeights, LoadError, UnsupportedModel

from .tiny_gguf import header, pair, tensor, text, write_tiny_gguf

if TYPE_CHECKING:
    from pathlib import Path

U32, U64, STRING, ARRAY = 4, 10, 8, 9
HUGE = (2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def parse_bounded(raw: bytes) -> GgufHeader | None:
    """The header, or None for a typed error. Anything else, or memory out of proportion to the file, fails."""
    tracemalloc.start()
    try:
        return parse_header(raw, "test.gguf")
    except (CorruptWeights, UnsupportedModel):
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000 + 20 * len(raw), f"{peak} bytes for a file of {len(raw)}"


def assert_well_formed(parsed: GgufHeader, size: int) -> None:
    end = 0
    for entry in parsed.tensors:
        assert entry.offset >= end and 1 <= len(entry.shape) <= 4 and all(entry.shape) and entry.num_bytes > 0
        end = entry.offset + entry.num_bytes
    assert end <= size


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path.read_bytes()


def header_size(raw: bytes) -> int:
    return min(entry.offset for entry in parse_header(raw, "tiny").tensors)


def test_the_hand_made_file_is_right() -> None:
    parsed = parse_bounded(header([pair("k", U32, u32(7))], [tensor("x", (64, 2), 8), tensor("y", (3,), 0, 160)]))
    assert parsed is not None and parsed.metadata == {"k": 7}
    assert [(t.name, t.shape, t.num_bytes) for t in parsed.tensors] == [("x", (2, 64), 136), ("y", (3,), 12)]
    assert parsed.tensors[0].offset % 32 == 0


BROKEN = {
    "magic": (header(magic=b"GGML"), "starts with b'GGUF'"),
    "too short for the magic": (b"GG", "magic: expected 4 more bytes"),
    "twice the same key": (header([pair("k", U32, u32(1)), pair("k", U32, u32(2))]), "'k' occurs twice"),
    "twice the same tensor": (header([], [tensor("x"), tensor("x", offset=128)]), "'x' occurs twice"),
    "key is not UTF-8": (header([pair(b"\xff", U32, u32(1))]), "metadata key is not UTF-8"),
    "key with NUL": (header([pair("a\0b", U32, u32(1))]), "holds a NUL"),
    "empty key": (header([pair("", U32, u32(1))]), "1 to 65535 bytes, got 0"),
    "value is not UTF-8": (header([pair("k", STRING, text(b"\xc3"))]), "k is not UTF-8"),
    "unknown value type": (header([pair("k", 13, bytes(8))]), "unknown value type 13"),
    "bool of 2": (header([pair("k", 7, b"\2")]), "bool of 0 or 1"),
    "bools of 2": (header([pair("k", ARRAY, u32(7) + u64(2) + b"\1\2")]), "bool of 0 or 1"),
    "array of arrays": (header([pair("k", ARRAY, u32(ARRAY) + u64(1) + u32(U32) + u64(1) + u32(1))]), "element type 9"),
    "alignment 0": (header([pair("general.alignment", U32, u32(0))]), "power of two >= 8, got 0"),
    "alignment 48": (header([pair("general.alignment", U32, u32(48))]), "power of two >= 8, got 48"),
    "alignment is a text": (header([pair("general.alignment", STRING, text("32"))]), "power of two >= 8"),
    "no dimensions": (header([], [tensor("x", ())]), "1 to 4 dimensions, got 0"),
    "5 dimensions": (header([], [tensor("x", (1, 1, 1, 1, 1))]), "1 to 4 dimensions, got 5"),
    "dimension 0": (header([], [tensor("x", (4, 0))]), "dimensions above 0"),
    "columns cut a block": (header([], [tensor("x", (33,), 8)]), "33 columns are no multiple of the 32 of Q8_0"),
    "offset is not aligned": (header([], [tensor("x", offset=16)]), "no multiple of the alignment 32"),
    "data passes the end": (header([], [tensor("x", (2000,))]), "pass the file's end"),
    "offset passes the end": (header([], [tensor("x", (1,), offset=2**63)]), "pass the file's end"),
    "size wraps around 64 bits": (header([], [tensor("x", (2**62, 4))]), "pass the file's end"),
    "overlap": (header([], [tensor("x", (32,)), tensor("y", (32,), offset=96)]), "'x' and 'y' overlap"),
    "nonsense element type": (header([], [tensor("x", type=4000)]), "unknown element type 4000"),
    "empty tensor name": (header([], [tensor("")]), "tensor name: expected 1 to"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_contradiction_is_named(case: str) -> None:
    raw, message = BROKEN[case]
    with pytest.raises(CorruptWeights) as caught:
        parse_header(raw, "test.gguf")
    assert message in str(caught.value) and str(caught.value).startswith("test.gguf: ")
    parse_bounded(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (header(version=1), "GGUF version 1; expected one of 2, 3"),
        (header(version=4), "GGUF version 4"),
        (header(version=3 << 24), "big-endian"),
        (header([], [tensor("w", (256,), 10)]), "tensor 'w' is stored as Q2_K; this version reads F32"),
        (header([], [tensor("w", (256,), 39)]), "tensor 'w' is stored as MXFP4"),
    ],
)
def test_what_other_versions_may_read_is_unsupported(raw: bytes, message: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        parse_header(raw, "test.gguf")
    assert message in str(caught.value)


def test_version_2_is_read() -> None:
    assert parse_header(header([], [tensor()], version=2), "x").version == 2


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize(
    "build",
    [
        lambda n: header(num_pairs=n),
        lambda n: header(num_tensors=n),
        lambda n: header([u64(n)], num_pairs=1),
        lambda n: header([pair("k", STRING, u64(n))]),
        lambda n: header([pair("k", ARRAY, u32(U64) + u64(n))]),
        lambda n: header([pair("k", ARRAY, u32(7) + u64(n))]),
        lambda n: header([pair("k", ARRAY, u32(STRING) + u64(n))]),
        lambda n: header([pair("k", ARRAY, u32(STRING) + u64(3) + text("a") + u64(n))]),
        lambda n: header([], [u64(n)], num_tensors=1),
        lambda n: header([], [tensor("x", (n,))]),
        lambda n: header([], [tensor("x", (1, n, n, n))]),
        lambda n: header([], [tensor("x", (n, n), type=12)]),
        lambda n: header([], [tensor("x", offset=n // 32 * 32)]),
    ],
    ids=[
        "pairs",
        "tensors",
        "key",
        "string",
        "numbers",
        "bools",
        "strings",
        "inner",
        "name",
        "dim",
        "dims",
        "blocks",
        "at",
    ],
)
def test_lying_sizes(build: object, count: int) -> None:
    assert callable(build)
    assert parse_bounded(build(count)) is None


def test_truncated_at_every_byte_of_the_header(tiny_bytes: bytes) -> None:
    for size in range(header_size(tiny_bytes) + 1):
        with pytest.raises(CorruptWeights):
            parse_header(tiny_bytes[:size], "tiny")


def test_truncated_data(tiny_bytes: bytes) -> None:
    last = parse_header(tiny_bytes, "tiny").tensors[-1]
    with pytest.raises(CorruptWeights, match="pass the file's end"):
        parse_header(tiny_bytes[: last.offset + last.num_bytes - 1], "tiny")


def test_flipped_bits(tiny_bytes: bytes, tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    size = header_size(tiny_bytes)
    opened = 0
    for _ in range(400):
        damaged = bytearray(tiny_bytes)
        for at in random.integers(0, size, random.integers(1, 4)):
            damaged[at] ^= 1 << int(random.integers(0, 8))
        parsed = parse_bounded(bytes(damaged))
        if parsed is not None:
            assert_well_formed(parsed, len(damaged))
            opened += open_whole(bytes(damaged), tmp_path / "m.gguf")
    assert 0 < opened < 400


def open_whole(raw: bytes, path: Path) -> bool:
    """Read everything of a damaged file whose header was well formed: a typed error, or all of it is there."""
    path.write_bytes(raw)
    try:
        checkpoint = GgufCheckpoint(path)
        try:
            assert checkpoint.tokenizer_source.gguf is not None
            assert all(checkpoint.read(name).data.nbytes == info.num_bytes for name, info in checkpoint.tensors.items())
            return checkpoint.config is not None
        finally:
            checkpoint.close()
    except LoadError:
        return False


@given(st.binary(max_size=300))
def test_any_bytes_after_the_magic(raw: bytes) -> None:
    parse_bounded(b"GGUF\3\0\0\0" + raw)


NAMES = st.text(max_size=4) | st.binary(max_size=4)
PAIRS = st.builds(pair, NAMES, st.integers(0, 13), st.binary(max_size=40))
SIZES = st.integers(0, 70) | st.sampled_from(HUGE)
TENSORS = st.builds(
    tensor,
    NAMES,
    st.lists(SIZES, max_size=5).map(tuple),
    st.integers(0, 45),
    st.integers(0, 40).map(lambda n: 32 * n) | SIZES,
    st.none() | st.integers(0, 6),
)


@given(st.lists(PAIRS, max_size=3), st.lists(TENSORS, max_size=3), st.integers(0, 4), st.integers(0, 4))
def test_any_pieces(pairs: list[bytes], tensors: list[bytes], num_pairs: int, num_tensors: int) -> None:
    raw = header(pairs, tensors, num_pairs=num_pairs, num_tensors=num_tensors)
    parsed = parse_bounded(raw)
    if parsed is not None:
        assert_well_formed(parsed, len(raw))


@given(st.lists(st.binary(max_size=6), max_size=8))
def test_tokens_of_any_bytes_keep_their_bytes(tokens: list[bytes]) -> None:
    raw = header([pair("t", ARRAY, u32(STRING) + u64(len(tokens)) + b"".join(map(text, tokens)))])
    parsed = parse_header(raw, "x").metadata["t"]
    assert [token.encode("utf-8", "surrogateescape") for token in parsed] == tokens
    for i, token in enumerate(parsed):
        assert parsed[i] == token
