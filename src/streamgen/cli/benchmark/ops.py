"""Where a step's time goes, op by op, each beside what bounds it: reading its weights, or its arithmetic.

The program is run directly, without an engine: a step of so many rows again and again. Ops of one kind are added up
over the layers; what an op waits for at its end counts as its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

import streamgen._cpu as _cpu
from streamgen.backends.base import SAMPLE_ROW, LoadOptions, StepInputs, empty_outputs
from streamgen.backends.cpu import CpuModel, chosen_isa
from streamgen.checkpoints.open import CheckpointWeights
from streamgen.execution.memory import PAGE_SIZE, STEP_ROWS
from streamgen.execution.model import Prepared
from streamgen.hub import resolve_model
from streamgen.models.program import Attend, Embed, Linear, LinearWeight, Op, Program

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamgen.config import EngineOptions

WARM_STEPS, STEPS = 3, 20
CONTEXT = 128  # tokens before the rows of a decode step


class StepShape(Struct, frozen=True):
    """num_seqs sequences of `count` rows each, after `context` tokens."""

    name: str
    num_seqs: int
    count: int
    context: int

    @property
    def rows(self) -> int:
        """Of the step."""
        return self.num_seqs * self.count


class OpCost(Struct):
    """One kind of op over all layers, in one step. weight_bytes: of weights that it reads; flops: linears alone."""

    name: str
    seconds: float = 0.0
    calls: int = 0
    weight_bytes: int = 0
    flops: int = 0


class OpTable(Struct):
    """A step op by op. bandwidth: GB/s of a plain read here; peak: GFLOP/s of the arithmetic bound, where known."""

    shape: StepShape
    costs: list[OpCost]
    bandwidth: float
    peak: float | None

    def lines(self) -> list[str]:
        """The table as text."""
        total = sum(cost.seconds for cost in self.costs)
        head = (
            f"{self.shape.name}: {1e3 * total:.2f} ms, {self.shape.rows} rows; read bandwidth {self.bandwidth:.1f} GB/s"
        )
        names = f"  {'op':26} {'calls':>5} {'us':>9} {'share':>6} {'MB':>8} {'GB/s':>7} {'GFLOP/s':>8}  of its limit"
        costs = sorted(self.costs, key=lambda cost: -cost.seconds)
        return [head, names, *(self._line(cost, total) for cost in costs)]

    def _line(self, cost: OpCost, total: float) -> str:
        rate = f"{cost.weight_bytes / cost.seconds / 1e9:7.1f}" if cost.weight_bytes and cost.seconds else " " * 7
        flops = f"{cost.flops / cost.seconds / 1e9:8.0f}" if cost.flops and cost.seconds else " " * 8
        share = self._share(cost)
        limit = "" if share is None else f"  {share:.2f}"
        return (
            f"  {cost.name:26} {cost.calls:5} {1e6 * cost.seconds:9.1f} {cost.seconds / total:6.1%} "
            f"{cost.weight_bytes / 1e6:8.1f} {rate} {flops}{limit}"
        )

    def _share(self, cost: OpCost) -> float | None:
        """Of the time that reading the weights or the arithmetic takes at least, whichever is longer."""
        if not cost.weight_bytes or not cost.seconds:
            return None
        least = cost.weight_bytes / self.bandwidth / 1e9
        if self.peak is not None:
            least = max(least, cost.flops / self.peak / 1e9)
        return least / cost.seconds


def measure_ops(options: EngineOptions, shapes: Sequence[StepShape], *, peak: float | None) -> list[OpTable]:
    """Load the model once and time a step of each shape."""
    prepared = Prepared(options, Path(resolve_model(options.model)))
    try:
        pages = max(s.num_seqs * (-(-(s.context + s.count) // PAGE_SIZE)) for s in shapes)
        load = LoadOptions(
            dtype=prepared.dtype,
            max_rows=max(STEP_ROWS, *(s.rows for s in shapes)),
            num_pages=pages,
            max_context=max(s.context + s.count for s in shapes) + 1,
            threads=prepared.threads,
            packings=prepared.packings,
        )
        weights = CheckpointWeights(prepared.checkpoint)
        model = CpuModel(prepared.program, weights, load, lambda done: None, isa=chosen_isa())
        try:
            return [_measure(model, prepared.program, shape, load, peak) for shape in shapes]
        finally:
            model.close()
    finally:
        prepared.checkpoint.close()


def _measure(model: CpuModel, program: Program, shape: StepShape, load: LoadOptions, peak: float | None) -> OpTable:
    inputs, outputs = _inputs(program, shape, load), empty_outputs(shape.num_seqs, 1)
    bandwidth = _cpu.read_bandwidth(load.threads, 256 << 20, 0.5)
    for _ in range(WARM_STEPS):
        model.step(inputs, outputs)
    model.take_op_seconds()
    best: list[float] | None = None
    for _ in range(STEPS):
        model.step(inputs, outputs)
        seconds = model.take_op_seconds()
        best = seconds if best is None or sum(seconds) < sum(best) else best
    assert best is not None
    return OpTable(shape, _costs(model, program, shape, best), bandwidth, peak)


def _inputs(program: Program, shape: StepShape, load: LoadOptions) -> StepInputs:
    pages = -(-(shape.context + shape.count) // PAGE_SIZE)
    rows = np.zeros(shape.num_seqs, SAMPLE_ROW)
    rows["row"] = np.arange(1, shape.num_seqs + 1) * shape.count - 1
    rows["slot"] = np.arange(shape.num_seqs)
    rows["position"] = shape.context + shape.count - 1
    rows["target"] = rows["num_top"] = rows["mask"] = rows["logits"] = -1
    rows["top_p"] = rows["typical_p"] = rows["repetition_penalty"] = 1
    tokens = np.random.default_rng(0).integers(0, program.vocab_size, (shape.num_seqs, load.max_context + 1))
    return StepInputs(
        tokens=tokens.astype(np.int32),
        page_tables=np.arange(shape.num_seqs * pages, dtype=np.int32).reshape(shape.num_seqs, pages),
        slots=np.arange(shape.num_seqs, dtype=np.int32),
        starts=np.full(shape.num_seqs, shape.context, np.int32),
        counts=np.full(shape.num_seqs, shape.count, np.int32),
        samples=rows,
        bias_ids=np.zeros(0, np.int32),
        bias_values=np.zeros(0, np.float32),
        ban_ids=np.zeros(0, np.int32),
        masks=np.zeros((0, 0), np.uint32),
    )


def _costs(model: CpuModel, program: Program, shape: StepShape, seconds: list[float]) -> list[OpCost]:
    costs: dict[str, OpCost] = {}
    for index, (op, spent) in enumerate(zip(program.ops, seconds, strict=False)):
        cost = costs.setdefault(_name(op), OpCost(_name(op)))
        cost.seconds += spent
        cost.calls += 1
        if isinstance(op, Linear):
            rows = shape.num_seqs if index >= program.split else shape.rows
            cost.weight_bytes += model.packed_bytes(op.weights)
            cost.flops += 2 * rows * op.x.width * op.out.width
    costs["sample"] = OpCost("sample", seconds[-1], 1)
    return [cost for cost in costs.values() if cost.seconds > 0]


def _name(op: Op) -> str:
    if isinstance(op, Linear):
        return "linear " + ",".join(_last_part(weight) for weight in op.weights)
    return "embed" if isinstance(op, Embed) else "store, attend" if isinstance(op, Attend) else type(op).__name__


def _last_part(weight: LinearWeight) -> str:
    return weight.name.rsplit(".", 1)[-1].removesuffix("_proj")
