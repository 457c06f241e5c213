"""Norm, embedding, rope, gated product and the reductions of the sampler, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.backends.arrays import BF16, DTYPES, F32, Array, Guarded, from_bf16, packed, to_bf16

_cpu = pytest.importorskip("streamgen._cpu")

pytestmark = pytest.mark.parametrize("isa", _cpu.isa_names())
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def assert_close(got: Array, wanted: Array, dtype: int, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    """Within float32 rounding, or for bf16 the neighbour of the nearest bf16."""
    if dtype == BF16:
        rtol, atol = 2.0**-8, 1e-6
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=atol)


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("rows", "width", "groups"), [(1, 8, 1), (3, 576, 1), (2, 17, 1), (5, 192, 3), (2, 80, 10), (1, 999, 1)]
)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(isa: str, dtype: int, rows: int, width: int, groups: int, offset: float) -> None:
    x, weight = normal(rows, width) * 3, normal(width // groups, seed=1)
    given, out = Guarded(rows, width, F32, x), Guarded(rows, width, dtype)
    _cpu.kernel_rms_norm(
        isa,
        given.address,
        given.stride,
        weight.ctypes.data,
        out.address,
        out.stride,
        rows,
        width,
        groups,
        1e-5,
        offset,
        dtype,
    )
    parts = x.reshape(rows, groups, -1).astype(np.float64)
    wanted = parts / np.sqrt(np.mean(parts**2, -1, keepdims=True) + 1e-5) * (weight + np.float32(offset))
    assert_close(out.values(), wanted.reshape(rows, width), dtype)


@EVERY_DTYPE
@pytest.mark.parametrize(("vocab", "width"), [(3, 1), (40, 8), (33, 65), (512, 64)])
def test_embed(isa: str, dtype: int, vocab: int, width: int) -> None:
    weight = normal(vocab, width)
    w, ids = packed(weight, dtype), np.array([0, vocab - 1, vocab // 2, 0], np.int32)
    out = Guarded(4, width, F32)
    _cpu.kernel_embed(isa, ids.ctypes.data, w.ctypes.data, out.address, out.stride, 4, width, 1.5, dtype)
    rows = weight if dtype == F32 else from_bf16(to_bf16(weight))
    np.testing.assert_array_equal(out.values(), rows[ids] * np.float32(1.5))


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"), [(1, 8, 8), (9, 64, 64), (2, 80, 80), (3, 96, 24), (4, 256, 256), (2, 6, 2)]
)
def test_rope(isa: str, heads: int, head_dim: int, rotary_dim: int) -> None:
    rows, half = 3, rotary_dim // 2
    x, angles = normal(rows, heads * head_dim), normal(rows, half, seed=1) * 100
    cos, sin = np.cos(angles), np.sin(angles)
    turned = Guarded(rows, heads * head_dim, F32, x)
    _cpu.kernel_rope(
        isa, turned.address, turned.stride, cos.ctypes.data, sin.ctypes.data, rows, heads, head_dim, rotary_dim
    )
    wanted = x.reshape(rows, heads, head_dim).copy()
    first, second = wanted[..., :half].copy(), wanted[..., half:rotary_dim].copy()
    c, s = cos[:, None], sin[:, None]
    wanted[..., :half] = first * c - second * s
    wanted[..., half:rotary_dim] = second * c + first * s
    np.testing.assert_allclose(turned.values(), wanted.reshape(rows, -1), rtol=0, atol=1e-6)


ACTIVATIONS = {
    0: torch.nn.functional.silu,
    1: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    2: torch.nn.functional.gelu,
}


@EVERY_DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("width", [1, 16, 100, 1537])
def test_gated_mul(isa: str, dtype: int, activation: int, width: int) -> None:
    gate, up = normal(2, width) * 4, normal(2, width, seed=1)
    edges = np.array([0.0, -0.0, 1e-6, -1e-6, 30.0, -30.0, 90.0, -90.0, 1000.0, -1000.0], np.float32)[:width]
    gate[0, : len(edges)] = edges
    g, u, out = Guarded(2, width, F32, gate), Guarded(2, width, F32, up), Guarded(2, width, dtype)
    _cpu.kernel_gated_mul(
        isa, g.address, g.stride, u.address, u.stride, out.address, out.stride, 2, width, activation, dtype
    )
    wanted = ACTIVATIONS[activation](torch.from_numpy(gate).double()).numpy() * up
    assert_close(out.values(), wanted, dtype, rtol=1e-5, atol=2e-7)


def ulps(got: Array, exact: Array) -> Array:
    """Distance in units of the last place of a float32."""
    unit = np.spacing(np.maximum(np.abs(exact), np.finfo(np.float32).tiny).astype(np.float32))
    return np.asarray(np.abs(got - exact) / unit)


def test_exp_is_accurate(isa: str) -> None:
    x = np.concatenate([np.linspace(-87, 0, 20001), -np.geomspace(1e-8, 1, 2000)]).astype(np.float32)
    got = np.array([_cpu.kernel_row_exp_sum(isa, x[i:].ctypes.data, 1, 0.0) for i in range(len(x))])
    assert ulps(got, np.exp(x.astype(np.float64))).max() <= 2


@pytest.mark.parametrize(
    ("x", "wanted"), [(-np.inf, 0.0), (-1000.0, 0.0), (0.0, 1.0), (-103.0, 1.4e-45), (1000.0, np.inf), (np.nan, np.nan)]
)
def test_exp_at_its_ends(isa: str, x: float, wanted: float) -> None:
    value = np.array([x], np.float32)
    np.testing.assert_allclose(_cpu.kernel_row_exp_sum(isa, value.ctypes.data, 1, 0.0), wanted, rtol=1e-2)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 1024, 1040, 49153])
def test_row_max_and_exp_sum(isa: str, n: int) -> None:
    logits = Guarded(1, n, F32, normal(1, n) * 10 - 50)  # the guard cells are NaN, the largest is negative
    x = logits.inside[0].astype(np.float64)
    largest = _cpu.kernel_row_max(isa, logits.address, n)
    assert largest == x.max()
    np.testing.assert_allclose(
        _cpu.kernel_row_exp_sum(isa, logits.address, n, largest), np.exp(x - x.max()).sum(), rtol=1e-6
    )


def test_masked_logits_add_nothing(isa: str) -> None:
    x = normal(1000)
    masked = x.copy()
    masked[::3] = -np.inf
    kept = np.delete(x, np.s_[::3]).astype(np.float64)
    assert _cpu.kernel_row_max(isa, masked.ctypes.data, 1000) == kept.max()
    np.testing.assert_allclose(
        _cpu.kernel_row_exp_sum(isa, masked.ctypes.data, 1000, 0.0), np.exp(kept).sum(), rtol=1e-6
    )
    all_masked = np.full(40, -np.inf, np.float32)
    assert _cpu.kernel_row_max(isa, all_masked.ctypes.data, 40) == -np.inf
