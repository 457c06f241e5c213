"""Paged attention of every instruction set, against float64 numpy; and that a row's bits depend on its sequence alone.

Pages start as NaN, so that whatever reads a slot that was never written, or a page of nobody, shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

_cpu = pytest.importorskip("streamgen._cpu")

ISAS = _cpu.isa_names()
F32, BF16 = 0, 30  # DType
DTYPES = {"float32": F32, "bfloat16": BF16}
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # of values of size 1

Floats = NDArray[np.float32]
Rows = list[tuple[int, int, int]]  # (sequence, first position, number of rows)


@dataclass(frozen=True)
class Shape:
    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    window: int = 0
    softcap: float = 0.0
    dtype: str = "float32"

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


def to_bf16(x: Floats) -> NDArray[np.uint16]:
    """Round to nearest even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(x: NDArray[np.uint16]) -> Floats:
    return (x.astype(np.uint32) << 16).view(np.float32)


def rounded(x: Floats, dtype: str) -> Floats:
    return from_bf16(to_bf16(x)) if dtype == "bfloat16" else x


class Sequences:
    """Random queries, keys and values of some sequences, and pages scattered over a cache that starts as NaN."""

    def __init__(self, shape: Shape, lengths: list[int], *, isa: str, seed: int = 0, threads: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.isa, self.lengths = shape, isa, lengths
        self.pool = _cpu.Pool(threads)

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
        size = num_pages * shape.num_kv_heads * shape.page_size * shape.head_dim
        self.k_pages, self.v_pages = self._nans(size), self._nans(size)

    def _nans(self, *size: int) -> NDArray[Any]:
        return np.full(size, np.nan, np.float32) if self.shape.dtype == "float32" else np.full(size, 0x7FC1, np.uint16)

    def attend(self, rows: Rows) -> list[Floats]:
        """One step; the output of each entry of `rows`, [count, num_heads, head_dim]."""
        s, dim = self.shape, self.shape.head_dim
        q, k, v = (np.concatenate([x[i][start : start + n] for i, start, n in rows]) for x in (self.q, self.k, self.v))
        # One buffer, as a fused projection gives it: strides are not the rows' own widths.
        fused = np.concatenate([x.reshape(len(q), -1) for x in (q, k, v)], axis=1)
        widths = [s.num_heads * dim, s.num_kv_heads * dim]
        address, stride = fused.ctypes.data, fused.shape[1]
        out = self._nans(len(q), widths[0] + 5)
        slots, starts, counts = (
            np.array(x, np.int32) for x in zip(*[(self.slots[i], start, n) for i, start, n in rows], strict=True)
        )
        _cpu.kernel_attend(
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
        )
        values = out if s.dtype == "float32" else from_bf16(out)
        assert np.isnan(values[:, widths[0] :]).all(), "wrote beyond its row"
        values = np.ascontiguousarray(values[:, : widths[0]]).reshape(len(q), s.num_heads, dim)
        return np.split(values, np.cumsum(counts)[:-1])

    def expected(self, i: int, start: int, count: int) -> NDArray[np.float64]:
        """Attention of rows start ... of sequence i, in float64 on operands of the engine's dtype."""
        s, group = self.shape, self.shape.num_heads // self.shape.num_kv_heads
        q = rounded(self.q[i][start : start + count], s.dtype).astype(np.float64)
        k, v = (np.repeat(rounded(x[i], s.dtype).astype(np.float64), group, axis=1) for x in (self.k, self.v))
        scores = s.scale * np.einsum("phd,thd->hpt", q, k)
        if s.softcap:
            scores = s.softcap * np.tanh(scores / s.softcap)
        position, token = np.arange(start, start + count)[:, None], np.arange(len(k))[None, :]
        seen = (token <= position) & ((token > position - s.window) if s.window else True)
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=2, keepdims=True))
        return np.asarray(np.einsum("hpt,thd->phd", p / p.sum(axis=2, keepdims=True), v))

    def check(self, rows: Rows) -> None:
        for (i, start, count), got in zip(rows, self.attend(rows), strict=True):
            np.testing.assert_allclose(got, self.expected(i, start, count), rtol=0, atol=TOLERANCE[self.shape.dtype])


def bits(x: Floats) -> NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


RAGGED = [1, 2, 15, 16, 17, 33, 64, 70, 530]
STEPS: list[Rows] = [
    # Fresh prompts, of which some are cut; then chunks, decodes and a late prompt together.
    [(0, 0, 1), (2, 0, 14), (4, 0, 16), (8, 0, 500), (6, 0, 63), (3, 0, 5)],
    [(8, 500, 29), (2, 14, 1), (4, 16, 1), (7, 0, 70), (6, 63, 1), (3, 5, 11), (5, 0, 31)],
    [(1, 0, 2), (8, 529, 1), (5, 31, 1)],
    [(5, 32, 1)],
]


def check_ragged(shape: Shape, isa: str) -> None:
    sequences = Sequences(shape, RAGGED, isa=isa)
    for rows in STEPS:
        sequences.check(rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 96, 128, 256])
def test_head_dims(isa: str, dtype: str, head_dim: int) -> None:
    check_ragged(Shape(num_heads=4, head_dim=head_dim, dtype=dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (4, 1), (8, 1), (7, 1), (14, 2)])
def test_groups_of_query_heads(isa: str, dtype: str, heads: tuple[int, int]) -> None:
    check_ragged(Shape(num_heads=heads[0], num_kv_heads=heads[1], head_dim=32, dtype=dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window", "softcap"), [(0, 2.0), (1, 0), (2, 0), (16, 0), (17, 2.0), (100, 0), (512, 0), (1000, 0)]
)
def test_windows_and_softcaps(isa: str, dtype: str, window: int, softcap: float) -> None:
    check_ragged(Shape(num_heads=2, num_kv_heads=1, window=window, softcap=softcap, head_dim=32, dtype=dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "head_dim"), [(1, 8), (1, 64), (2, 64), (32, 48)])
def test_page_size_changes_no_bit(isa: str, dtype: str, page_size: int, head_dim: int) -> None:
    shape = Shape(num_heads=2, num_kv_heads=2, page_size=page_size, head_dim=head_dim, dtype=dtype)
    other = Sequences(shape, RAGGED, isa=isa)
    usual = Sequences(replace(shape, page_size=16), RAGGED, isa=isa)
    for rows in STEPS:
        for a, b, (i, start, count) in zip(other.attend(rows), usual.attend(rows), rows, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))
            np.testing.assert_allclose(a, usual.expected(i, start, count), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_page_size_in_float32_and_pages_of_one_token(dtype: str) -> None:
    check_ragged(Shape(page_size=3 if dtype == "float32" else 1, dtype=dtype), ISAS[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(head_dim=8),
        Shape(num_heads=3, num_kv_heads=3, head_dim=16),
        Shape(num_heads=7, num_kv_heads=1, head_dim=80),
        Shape(window=37, head_dim=32),
        Shape(window=520, head_dim=32, softcap=3.0),
        Shape(window=1, head_dim=32),
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_however_it_is_computed(isa: str, dtype: str, shape: Shape) -> None:
    """In one prompt, in chunks of any size, one by one, alone or beside others."""
    shape = replace(shape, dtype=dtype)
    length = 1100 if shape.head_dim == 64 else 560  # three splits, or two
    whole = Sequences(shape, [length, 90], isa=isa).attend([(0, 0, length)])[0]
    rng = np.random.default_rng(5)
    for chunks in ("decodes", "random"):
        sequences = Sequences(shape, [length, 90], isa=isa, threads=2)
        position, neighbour = 0, 0
        while position < length:
            count = 1 if chunks == "decodes" else min(length - position, int(rng.integers(1, 90)))
            rows: Rows = [(0, position, count)]
            if neighbour < 90 and rng.random() < 0.4:
                rows.insert(int(rng.integers(2)), (1, neighbour, 1))
                neighbour += 1
            outputs = sequences.attend(rows)
            got = outputs[[i for i, _, _ in rows].index(0)]
            np.testing.assert_array_equal(bits(got), bits(whole[position : position + count]), err_msg=f"at {position}")
            position += count


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(isa: str, dtype: str) -> None:
    shape = Shape(dtype=dtype)
    for rows in STEPS:
        one, three = (Sequences(shape, RAGGED, isa=isa, threads=n) for n in (1, 3))
        before: Rows = [(i, 0, start) for i, start, _ in rows if start]
        for sequences in (one, three):
            if before:
                sequences.attend(before)
        for a, b in zip(one.attend(rows), three.attend(rows), strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_positions_taken_back_leave_nothing_behind(isa: str, dtype: str) -> None:
    """Rejected drafts: positions are written again with other keys and values, and their old ones were NaN."""
    shape = Shape(dtype=dtype)
    clean, dirty = (Sequences(shape, [40], isa=isa) for _ in range(2))
    for sequences in (clean, dirty):
        sequences.attend([(0, 0, 20)])
    k, v = dirty.k[0].copy(), dirty.v[0].copy()
    dirty.k[0][20:30], dirty.v[0][20:30] = np.nan, np.nan
    dirty.attend([(0, 20, 10)])
    dirty.k[0][:], dirty.v[0][:] = k, v
    for position in range(20, 30):
        rows: Rows = [(0, position, 1)]
        np.testing.assert_array_equal(bits(dirty.attend(rows)[0]), bits(clean.attend(rows)[0]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_great_scores_do_not_overflow(isa: str, dtype: str) -> None:
    sequences = Sequences(Shape(dtype=dtype, head_dim=32), [80], isa=isa)
    sequences.q[0] *= 1000
    got = sequences.attend([(0, 0, 80)])[0]
    # The largest score takes all, so each output is one token's value.
    np.testing.assert_allclose(got, sequences.expected(0, 0, 80), rtol=0, atol=2e-2)


def test_instruction_sets_agree() -> None:
    outputs = []
    for isa in ISAS:
        sequences = Sequences(Shape(), RAGGED, isa=isa)
        outputs.append([x for rows in STEPS for x in sequences.attend(rows)])
    for other in outputs[1:]:
        for a, b in zip(outputs[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)
