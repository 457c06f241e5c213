"""What the tests of paged attention have in common: sequences with random queries, keys and values, their pages, and
the same attention in float64.

Pages start as NaN (8-bit ones with NaN scales), so that whatever reads a slot that was never written, or a page of
nobody, shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

_cpu = pytest.importorskip("streamgen._cpu")

ISAS = _cpu.isa_names()
INT8 = 1001  # DType
DTYPES = {"float32": 0, "bfloat16": 30, "int8": INT8}
OPERANDS = ["float32", "bfloat16"]
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # of values of size 1

Floats = NDArray[np.float32]
Rows = list[tuple[int, int, int]]  # (sequence, first position, number of rows)

RAGGED = [1, 2, 15, 16, 17, 33, 64, 70, 530]
STEPS: list[Rows] = [
    # Fresh prompts, of which some are cut; then chunks, decodes and a late prompt together.
    [(0, 0, 1), (2, 0, 14), (4, 0, 16), (8, 0, 500), (6, 0, 63), (3, 0, 5)],
    [(8, 500, 29), (2, 14, 1), (4, 16, 1), (7, 0, 70), (6, 63, 1), (3, 5, 11), (5, 0, 31)],
    [(1, 0, 2), (8, 529, 1), (5, 31, 1)],
    [(5, 32, 1)],
]


@dataclass(frozen=True)
class Shape:
    """A layer's attention. kv_dtype and out_dtype: dtype unless said."""

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    window: int = 0
    softcap: float = 0.0
    dtype: str = "float32"
    kv: str = ""
    out: str = ""

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def kv_dtype(self) -> str:
        return self.kv or self.dtype

    @property
    def out_dtype(self) -> str:
        return self.out or self.dtype

    @property
    def tile_bytes(self) -> int:
        elements = self.page_size * self.head_dim
        if self.kv_dtype == "int8":
            return -(-elements // 4) * 4 + 4 * self.page_size
        return elements * (4 if self.dtype == "float32" else 2)


@dataclass(frozen=True)
class Cut:
    """How a step is cut into items: for so many workers; from how many common tokens on they are read once, 0 never."""

    workers: int = 1
    shared_tokens: int = 128


ALONE = Cut(workers=1, shared_tokens=0)  # every tile on its own: nothing goes ahead


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    """Round to nearest even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(x: NDArray[np.uint16]) -> Floats:
    return (x.astype(np.uint32) << 16).view(np.float32)


def rounded(x: Floats, dtype: str) -> Floats:
    """What is left of numbers [..., head_dim] in a dtype."""
    if dtype == "int8":
        most = np.abs(x).max(axis=-1, keepdims=True)
        codes = np.clip(np.rint(x * (np.float32(127) / np.where(most > 0, most, np.float32(1)))), -127, 127)
        return np.asarray(codes * (most / np.float32(127)), np.float32)
    return from_bf16(to_bf16(x)) if dtype == "bfloat16" else x


def bits(x: Floats) -> NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


def turned(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Heads [n, heads, dim] turned by [n, rotary / 2], as RopeArgs says."""
    half = cos.shape[1]
    a, b, c, s = x[..., :half], x[..., half : 2 * half], cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], axis=2)


class Sequences:
    """Sequences of some lengths, with pages scattered over a cache.

    common[i] = (j, n): sequence i begins with the n tokens of j, an earlier one, and has its pages.
    """

    def __init__(
        self,
        shape: Shape,
        lengths: list[int],
        *,
        isa: str,
        seed: int = 0,
        threads: int = 1,
        cut: Cut | None = None,
        common: dict[int, tuple[int, int]] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.isa, self.lengths = shape, isa, lengths
        self.pool = _cpu.Pool(threads)
        self.cut = cut or Cut(workers=threads)
        self.ahead = 0  # pieces of work that went ahead of tiles, in the last step

        def random(heads: int) -> list[Floats]:
            return [rng.standard_normal((n, heads, shape.head_dim)).astype(np.float32) for n in lengths]

        self.q, self.k, self.v = random(shape.num_heads), random(shape.num_kv_heads), random(shape.num_kv_heads)
        pages = [-(-n // shape.page_size) for n in lengths]
        num_pages = sum(pages) + 3
        order = rng.permutation(num_pages).astype(np.int32)
        self.slots = rng.permutation(len(lengths) + 2)[: len(lengths)].astype(np.int32)
        self.tables = np.full((len(lengths) + 2, max(pages) + 1), -1, np.int32)
        for slot, n in zip(self.slots, pages, strict=True):
            self.tables[slot, :n], order = order[:n], order[n:]
        for i, (j, n) in (common or {}).items():
            assert j < i and n % shape.page_size == 0
            self.k[i][:n], self.v[i][:n] = self.k[j][:n], self.v[j][:n]
            self.tables[self.slots[i], : n // shape.page_size] = self.tables[self.slots[j], : n // shape.page_size]
        # 0xff is NaN in every float, and scales of 8-bit pages are floats.
        size = num_pages * shape.num_kv_heads * shape.tile_bytes
        self.k_pages, self.v_pages = (np.full(size, 0xFF, np.uint8) for _ in range(2))

    def attend(self, rows: Rows, *, rotary: tuple[Floats, Floats] | None = None) -> list[Floats]:
        """One step; the output of each entry of `rows`, [count, num_heads, head_dim].

        rotary: cos and sin [rows, rotary_dim / 2]: attention turns heads and stores keys and values itself.
        """
        s, dim = self.shape, self.shape.head_dim
        q, k, v = (np.concatenate([x[i][start : start + n] for i, start, n in rows]) for x in (self.q, self.k, self.v))
        # One buffer, as a fused projection gives it: strides are not the rows' own widths.
        fused = np.concatenate([x.reshape(len(q), -1) for x in (q, k, v)], axis=1)
        before = fused.copy()
        widths = [s.num_heads * dim, s.num_kv_heads * dim]
        address, stride = fused.ctypes.data, fused.shape[1]
        out: NDArray[Any] = np.full((len(q), widths[0] + 5), np.nan, np.float32)
        if s.out_dtype == "bfloat16":
            out = to_bf16(out)
        slots, starts, counts = (
            np.array(x, np.int32) for x in zip(*[(self.slots[i], start, n) for i, start, n in rows], strict=True)
        )
        cos, sin = rotary or (np.zeros((0, 0), np.float32),) * 2
        _, self.ahead = _cpu.kernel_attend(
            self.pool,
            self.isa,
            DTYPES[s.dtype],
            address,
            address + 4 * widths[0],
            address + 4 * sum(widths),
            stride,
            stride,
            stride,
            out.ctypes.data,
            out.shape[1],
            self.k_pages.ctypes.data,
            self.v_pages.ctypes.data,
            s.num_heads,
            s.num_kv_heads,
            dim,
            s.page_size,
            s.window,
            s.scale,
            s.softcap,
            len(rows),
            slots.ctypes.data,
            starts.ctypes.data,
            counts.ctypes.data,
            self.tables.ctypes.data,
            self.tables.shape[1],
            DTYPES[s.kv_dtype],
            DTYPES[s.out_dtype],
            cos.ctypes.data,
            sin.ctypes.data,
            2 * cos.shape[1],
            rotary is not None,
            self.cut.workers,
            self.cut.shared_tokens,
        )
        np.testing.assert_array_equal(bits(fused), bits(before), err_msg="wrote to its inputs")
        values = out if s.out_dtype == "float32" else from_bf16(out)
        assert np.isnan(values[:, widths[0] :]).all(), "wrote beyond its row"
        values = np.ascontiguousarray(values[:, : widths[0]]).reshape(len(q), s.num_heads, dim)
        return np.split(values, np.cumsum(counts)[:-1])

    def expected(self, i: int, start: int, count: int) -> NDArray[np.float64]:
        """Attention of rows start ... of sequence i, in float64 on numbers as queries and pages have them."""
        s, group = self.shape, self.shape.num_heads // self.shape.num_kv_heads
        q = rounded(self.q[i][start : start + count], s.dtype).astype(np.float64)
        k, v = (np.repeat(rounded(x[i], s.kv_dtype).astype(np.float64), group, axis=1) for x in (self.k, self.v))
        scores = s.scale * np.einsum("phd,thd->hpt", q, k)
        if s.softcap:
            scores = s.softcap * np.tanh(scores / s.softcap)
        position, token = np.arange(start, start + count)[:, None], np.arange(len(k))[None, :]
        seen = (token <= position) & ((token > position - s.window) if s.window else True)
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=2, keepdims=True))
        return np.asarray(np.einsum("hpt,thd->phd", p / p.sum(axis=2, keepdims=True), v))

    def check(self, rows: Rows) -> None:
        """Attend, and compare with `expected`."""
        for (i, start, count), got in zip(rows, self.attend(rows), strict=True):
            np.testing.assert_allclose(got, self.expected(i, start, count), rtol=0, atol=TOLERANCE[self.shape.dtype])


def same_bits(some: list[Floats], others: list[Floats]) -> None:
    for a, b in zip(some, others, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def check_ragged(shape: Shape, isa: str) -> None:
    sequences = Sequences(shape, RAGGED, isa=isa)
    for rows in STEPS:
        sequences.check(rows)
