"""A model as a program: a flat list of ops over named buffers and packed weights.

A family's function runs once, at load, with a `Builder`; what it records is a `Program`, plain data. A backend runs a
whole program for a whole batch (`backends/base.py`). New ops are added here, in `backends/reference.py`, and then in
each fast backend.

Buffers hold one row per token of the step. There are two kinds:

    stream    float32: the residual stream, and what linears produce
    operand   the engine's dtype: what linears and attention consume (norm outputs, attention outputs, gated products)

so that rounding to the engine's dtype happens at the same places in every backend. The ops after `Program.split` run
only on the rows that sample.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from streamgen.models.rope import RopeTable  # noqa: TC001  # a field of a Struct

if TYPE_CHECKING:
    from collections.abc import Iterator


class BufferKind(StrEnum):
    """Which dtype a buffer has."""

    STREAM = "stream"
    OPERAND = "operand"


class Buffer(Struct, frozen=True):
    """Activations of the step: [rows, width]."""

    kind: BufferKind
    width: int


class View(Struct, frozen=True):
    """Columns [offset, offset + width) of a buffer."""

    buffer: int
    offset: int
    width: int


class LinearWeight(Struct, frozen=True):
    """One projection: `name`.weight is [rows, columns] (out, in) in the checkpoint; `bias` names its bias, if any."""

    name: str
    rows: int
    columns: int
    bias: str | None = None


class Embed(Struct, frozen=True, tag=True):
    """out[r] = scale * weight[id of row r].  weight [vocab, hidden], packed as a linear; out: stream."""

    weight: LinearWeight
    out: View
    scale: float = 1.0


class RmsNorm(Struct, frozen=True, tag=True):
    """out = x / sqrt(mean(x^2) + eps) * (weight + offset).  x: stream; out: operand.

    With groups > 1 each of that many equal parts of a row is normalized by itself with the same weight (q and k norms).
    """

    x: View
    weight: str
    out: View
    eps: float
    offset: float = 0.0
    groups: int = 1


class Linear(Struct, frozen=True, tag=True):
    """out = x @ concat(weights).T + concat(biases), or out += that where `accumulate`.

    x: operand [rows, K]; out: stream [rows, sum of the weights' rows]. Weights that read the same input are one op.
    Each output element is one sum over K in a fixed order, whatever the number of rows.
    """

    x: View
    weights: tuple[LinearWeight, ...]
    out: View
    accumulate: bool = False


class Rope(Struct, frozen=True, tag=True):
    """Turn each head of x in place by its row's position (half-split pairs: dimension i with i + rotary_dim / 2).

    x: stream [rows, heads * head_dim]; table: index into Program.ropes.
    """

    x: View
    num_heads: int
    head_dim: int
    table: int


class Attend(Struct, frozen=True, tag=True):
    """Store k and v of the step's rows in layer `layer`'s pages, then attend causally to all pages of each sequence.

    q [rows, num_heads * head_dim], k, v [rows, num_kv_heads * head_dim]: stream; out like q: operand.
    score = scale * q . k, then cap * tanh(score / cap) where a softcap is given. Row at position p sees positions
    max(0, p - window + 1) .. p. Query head h reads key-value head h // (num_heads // num_kv_heads).
    """

    q: View
    k: View
    v: View
    out: View
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


class GatedMul(Struct, frozen=True, tag=True):
    """out = activation(gate) * up.  gate, up: stream; out: operand.  activation: silu | gelu_tanh | gelu"""

    gate: View
    up: View
    out: View
    activation: str = "silu"


Op = Embed | RmsNorm | Linear | Rope | Attend | GatedMul


class Program(Struct, frozen=True, kw_only=True):
    """What one step of a model runs.

    ops[:split] run on every row of the step; then the rows that sample are gathered from `selected` into `gathered`
    (a stream buffer of the same width) and ops[split:] run on them. `logits` is a stream view [sampling rows, vocab].
    """

    buffers: tuple[Buffer, ...]
    ops: tuple[Op, ...]
    split: int
    selected: View
    gathered: View
    logits: View
    ropes: tuple[RopeTable, ...]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def linear_weights(self) -> Iterator[LinearWeight]:
        """Every packed matrix once, in the order of use (a tied head once)."""
        seen: set[str] = set()
        for op in self.ops:
            weights = op.weights if isinstance(op, Linear) else (op.weight,) if isinstance(op, Embed) else ()
            for weight in weights:
                if weight.name not in seen:
                    seen.add(weight.name)
                    yield weight

    def vector_names(self) -> Iterator[tuple[str, int]]:
        """Names and lengths of the norm weights and biases."""
        for op in self.ops:
            if isinstance(op, RmsNorm):
                yield op.weight, op.x.width // op.groups
            elif isinstance(op, Linear):
                for weight in op.weights:
                    if weight.bias is not None:
                        yield weight.bias, weight.rows


class Builder:
    """Records a program. Methods take and return views; names are relative to the current layer's prefix.

    `biases` tells for a projection's full name whether the checkpoint gives it a bias.
    """

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self._ops: list[Op] = []
        self._ropes: list[RopeTable] = []
        self._prefix = ""
        self._num_layers = 0
        self._layer = -1
        self._split: int | None = None
        self._selected: View | None = None
        self._gathered: View | None = None

    def layers(self, count: int, prefix: str) -> Iterator[int]:
        """Iterate over layers; inside, names are under `prefix.format(i)`."""
        self._num_layers = count
        for i in range(count):
            self._layer, self._prefix = i, prefix.format(i) + "."
            yield i
        self._layer, self._prefix = -1, ""

    def rope_table(self, table: RopeTable) -> int:
        """Register a rope table; the index goes to `rope`."""
        if table not in self._ropes:
            self._ropes.append(table)
        return self._ropes.index(table)

    def embed(self, name: str, *, vocab: int, hidden: int, scale: float = 1.0) -> View:
        """Rows of the embedding matrix for the step's ids: a new stream buffer."""
        out = self._new(BufferKind.STREAM, hidden)
        self._ops.append(Embed(LinearWeight(self._name(name), vocab, hidden), out, scale))
        return out

    def rms_norm(self, x: View, name: str, *, eps: float, offset: float = 0.0, groups: int = 1) -> View:
        """Normalized x as an operand."""
        out = self._new(BufferKind.OPERAND, x.width)
        self._ops.append(RmsNorm(x, self._name(name) + ".weight", out, eps, offset, groups))
        return out

    def linears(self, x: View, *projections: tuple[str, int], bias: bool = False) -> tuple[View, ...]:
        """Several projections (name, rows) of one input as one op; one view each, side by side in one buffer."""
        weights = tuple(self._weight(name, rows, x.width, bias=bias) for name, rows in projections)
        out = self._new(BufferKind.STREAM, sum(w.rows for w in weights))
        self._ops.append(Linear(x, weights, out))
        views, offset = [], 0
        for weight in weights:
            views.append(View(out.buffer, offset, weight.rows))
            offset += weight.rows
        return tuple(views)

    def linear(self, x: View, name: str, rows: int, *, bias: bool = False) -> View:
        """One projection."""
        return self.linears(x, (name, rows), bias=bias)[0]

    def add(self, x: View, y: View) -> View:
        """x += y, where y is what the last linear produced: the linear then accumulates into x."""
        last = self._ops[-1]
        assert isinstance(last, Linear) and last.out == y, "add: expected the output of the linear just recorded"
        self._ops[-1] = replace(last, out=x, accumulate=True)
        self._buffers.pop()  # the linear's own output is not needed
        return x

    def rope(self, x: View, *, num_heads: int, head_dim: int, table: int) -> View:
        """x turned in place."""
        self._ops.append(Rope(x, num_heads, head_dim, table))
        return x

    def attend(
        self,
        q: View,
        k: View,
        v: View,
        *,
        head_dim: int,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> View:
        """Causal attention of the current layer over its pages; a new operand like q."""
        out = self._new(BufferKind.OPERAND, q.width)
        num_heads, num_kv_heads = q.width // head_dim, k.width // head_dim
        self._ops.append(Attend(q, k, v, out, self._layer, num_heads, num_kv_heads, head_dim, scale, window, softcap))
        return out

    def gated_mlp(self, x: View, gate: str, up: str, down: str, *, size: int, act: str, bias: bool = False) -> View:
        """down(act(gate(x)) * up(x))."""
        g, u = self.linears(x, (gate, size), (up, size), bias=bias)
        h = self._new(BufferKind.OPERAND, size)
        self._ops.append(GatedMul(g, u, h, act))
        return self.linear(h, down, x.width, bias=bias)

    def sampled(self, x: View) -> View:
        """Only the rows that sample, from here on."""
        self._split = len(self._ops)
        self._selected, self._gathered = x, self._new(BufferKind.STREAM, x.width)
        return self._gathered

    def head(self, x: View, name: str, *, vocab: int, tied: str | None = None) -> View:
        """Logits: the projection `name`, or the embedding matrix `tied`."""
        return self.linear(x, tied or name, vocab)

    def finish(self, logits: View) -> Program:
        """The program, with buffers that are never alive together sharing memory."""
        assert self._split is not None and self._selected is not None and self._gathered is not None, (
            "head before sampled()"
        )
        attends = [op for op in self._ops if isinstance(op, Attend)]
        program = Program(
            buffers=tuple(self._buffers),
            ops=tuple(self._ops),
            split=self._split,
            selected=self._selected,
            gathered=self._gathered,
            logits=logits,
            ropes=tuple(self._ropes),
            num_layers=self._num_layers,
            num_kv_heads=attends[0].num_kv_heads,
            head_dim=attends[0].head_dim,
            vocab_size=logits.width,
        )
        return share_buffers(program)

    def _new(self, kind: BufferKind, width: int) -> View:
        self._buffers.append(Buffer(kind, width))
        return View(len(self._buffers) - 1, 0, width)

    def _weight(self, name: str, rows: int, columns: int, *, bias: bool) -> LinearWeight:
        full = self._name(name)
        return LinearWeight(full, rows, columns, full + ".bias" if bias else None)

    def _name(self, name: str) -> str:
        return self._prefix + name


_VIEW_FIELDS = ("x", "out", "q", "k", "v", "gate", "up")


def op_views(op: Op) -> dict[str, View]:
    """The views of an op by field name."""
    return {field: getattr(op, field) for field in _VIEW_FIELDS if hasattr(op, field)}


def share_buffers(program: Program) -> Program:
    """Give buffers of the same kind and width whose lifetimes do not overlap one and the same index.

    A buffer lives from the first op that names it to the last; the gathered and selected views live across the split.
    """
    last_use = _last_uses(program)
    renamed: dict[int, int] = {}
    buffers: list[Buffer] = []
    free: dict[Buffer, list[int]] = {}
    for index, op in enumerate(program.ops):
        if index == program.split:
            _place(program.gathered.buffer, program.buffers, renamed, buffers, free)
        for view in op_views(op).values():
            _place(view.buffer, program.buffers, renamed, buffers, free)
        for old in {view.buffer for view in op_views(op).values()}:
            if last_use[old] == index:
                free.setdefault(program.buffers[old], []).append(renamed[old])

    def rename(view: View) -> View:
        return View(renamed[view.buffer], view.offset, view.width)

    ops = tuple(replace(op, **{f: rename(v) for f, v in op_views(op).items()}) for op in program.ops)
    return replace(
        program,
        buffers=tuple(buffers),
        ops=ops,
        selected=rename(program.selected),
        gathered=rename(program.gathered),
        logits=rename(program.logits),
    )


def _last_uses(program: Program) -> dict[int, int]:
    last: dict[int, int] = {}
    for index, op in enumerate(program.ops):
        for view in op_views(op).values():
            last[view.buffer] = index
    end = len(program.ops)
    # NOTE: the head runs in blocks of rows, so what crosses the split must not be overwritten by the head's ops.
    for view in (program.selected, program.logits, program.gathered):
        last[view.buffer] = end
    return last


def _place(
    old: int, sizes: tuple[Buffer, ...], renamed: dict[int, int], buffers: list[Buffer], free: dict[Buffer, list[int]]
) -> None:
    if old in renamed:
        return
    pool = free.get(sizes[old])
    if pool:
        renamed[old] = pool.pop()
        return
    renamed[old] = len(buffers)
    buffers.append(sizes[old])
