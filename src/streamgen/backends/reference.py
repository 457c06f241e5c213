"""The reference backend: every op in plain torch, one by one, on any torch device. Slow and exact.

What it computes is what the fast backends must compute. Operands, weights and pages are rounded to the engine's dtype
where the program says so, and everything is calculated in float32 from the rounded values.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from streamgen.backends.base import HEAD_ROWS, StepInputs
from streamgen.backends.reference_sampler import finish_row, sample_row
from streamgen.models.program import (
    Attend,
    Embed,
    GatedMul,
    Linear,
    Op,
    Program,
    RmsNorm,
    Rope,
    View,
)
from streamgen.quantization.gguf_blocks import dequantize
from streamgen.quantization.groups import values_of
from streamgen.quantization.rounding import round_matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streamgen.backends.base import Float32Array, Int32Array, LoadOptions, StepOutputs, Weights
    from streamgen.checkpoints.base import RawTensor
    from streamgen.quantization.base import Packing

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class ReferenceBackend:
    """Plain torch on `device`."""

    name = "reference"

    def __repr__(self) -> str:
        return "ReferenceBackend"

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)

    def unsupported_reasons(self, program: Program, dtype: str) -> list[str]:
        """Why this backend cannot run the program here; empty if it can."""
        if dtype not in _DTYPES:
            return [f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype}"]
        return []

    def weight_bytes(self, program: Program, dtype: str, packings: Mapping[str, Packing]) -> int:
        """Bytes of the matrices in the dtype (integers are unpacked to float32), and of the vectors in float32."""
        elements = {True: 4, False: _DTYPES[dtype].itemsize}
        matrices = sum(w.rows * w.columns * elements[w.name in packings] for w in program.linear_weights())
        vectors = sum(dict(program.vector_names()).values())
        return matrices + vectors * 4

    def workspace_bytes(self, program: Program, options: LoadOptions) -> int:
        """Bytes of the activations, and of the largest temporaries that an op makes beside them."""
        buffers = sum(buffer.width for buffer in program.buffers) * options.max_rows
        scores = max((op.num_heads for op in program.ops if isinstance(op, Attend)), default=0) * options.max_context
        widened = max(weight.rows * weight.columns for weight in program.linear_weights())
        return 4 * (buffers + 2 * scores * options.max_rows + widened)

    def page_bytes(self, program: Program, dtype: str, page_size: int, kv_dtype: str = "auto") -> int:
        """Bytes of one page over all layers; what is rounded to 8 bits is kept as float32."""
        element = 4 if kv_dtype == "int8" else _DTYPES[dtype].itemsize
        return 2 * program.num_layers * page_size * program.num_kv_heads * program.head_dim * element

    def load(
        self, program: Program, weights: Weights, options: LoadOptions, on_bytes: Callable[[int], None]
    ) -> ReferenceModel:
        """Read the weights and allocate the pages; `on_bytes` hears the bytes read so far."""
        return ReferenceModel(program, weights, options, on_bytes, self._device)


class ReferenceModel:
    """A program with its weights and pages; a `LoadedModel`."""

    def __init__(
        self,
        program: Program,
        weights: Weights,
        options: LoadOptions,
        on_bytes: Callable[[int], None],
        device: torch.device,
    ) -> None:
        self._program = program
        self._options = options
        self._device = device
        self._dtype = _DTYPES[options.dtype]
        self._integers = {name for name, packing in options.packings.items() if packing.type.is_integer}
        self._matrices: dict[str, Tensor] = {}
        self._vectors: dict[str, Tensor] = {}
        self._read(weights, on_bytes)
        self.vocab_size = program.vocab_size
        self._pages = self._new_pages()

    def step(self, inputs: StepInputs, outputs: StepOutputs, wake_fd: int | None = None) -> None:
        """Run the whole program once; see `StepInputs` and `StepOutputs`."""
        assert self._pages, "the model is closed"
        if wake_fd is not None:
            os.write(wake_fd, b"\0")  # torch gives the interpreter away op by op
        program = self._program
        with torch.inference_mode():
            batch = _Batch(inputs, self._device)
            body = self._new_buffers(batch.num_rows)
            for op in program.ops[: program.split]:
                self._run(op, body, batch)
            for first in range(0, len(inputs.samples), HEAD_ROWS):
                rows = inputs.samples["row"][first : first + HEAD_ROWS].astype("int64")
                selected = _columns(body, program.selected)[torch.from_numpy(rows).to(self._device)]
                logits = self._head(selected, batch).cpu().numpy()
                for i, row_logits in enumerate(logits):
                    finish_row(inputs, outputs, first + i, row_logits)

    def sample(self, inputs: StepInputs, outputs: StepOutputs, changed: Float32Array) -> None:
        """Finish the rows whose logits were written out; see `LoadedModel.sample`."""
        for index, place in enumerate(inputs.samples["logits"].tolist()):
            if place >= 0:
                sample_row(inputs, outputs, index, changed[place], raw=outputs.logits[place])

    def copy_pages(self, pairs: Int32Array) -> None:
        """Copy pages pairs[i, 0] -> pairs[i, 1], all layers, in order."""
        for source, target in pairs.tolist():
            for pages in self._pages:
                pages[:, target] = pages[:, source]

    def drop_pages(self) -> None:
        """Give the pages back: new ones, that nothing has touched, take their place."""
        self._pages = self._new_pages()

    def resident_bytes(self) -> int:
        """Bytes of the pages; which of them were touched is not known."""
        return sum(pages.nbytes for pages in self._pages)

    def close(self) -> None:
        """Free weights and pages; idempotent."""
        self._matrices.clear()
        self._vectors.clear()
        self._pages.clear()

    def _read(self, weights: Weights, on_bytes: Callable[[int], None]) -> None:
        num_bytes = 0

        def take(raw: RawTensor, dtype: torch.dtype, packing: Packing | None = None) -> Tensor:
            nonlocal num_bytes
            tensor = torch.from_numpy(packed_values(raw, packing)).to(self._device, dtype)
            weights.done(raw)
            num_bytes += tensor.nbytes
            on_bytes(num_bytes)
            return tensor

        for w in self._program.linear_weights():
            dtype = torch.float32 if w.name in self._integers else self._dtype
            packing = self._options.packings.get(w.name)
            self._matrices[w.name] = take(weights.matrix(w.name, w.rows, w.columns), dtype, packing)
        for name, size in self._program.vector_names():
            self._vectors[name] = take(weights.vector(name, size), torch.float32)

    def _new_pages(self) -> list[Tensor]:
        """One [2, num_pages, page_size, num_kv_heads, head_dim] per layer: keys, values."""
        program, options = self._program, self._options
        shape = (2, options.num_pages, options.page_size, program.num_kv_heads, program.head_dim)
        dtype = torch.float32 if options.kv_dtype == "int8" else self._dtype
        return [torch.zeros(shape, dtype=dtype, device=self._device) for _ in range(program.num_layers)]

    def _new_buffers(self, num_rows: int) -> list[Tensor]:
        # Operands are float32 too, rounded by the linear that reads them. Host code may have changed torch's default
        # dtype, so it is always named.
        widths = [buffer.width for buffer in self._program.buffers]
        return [torch.zeros(num_rows, width, dtype=torch.float32, device=self._device) for width in widths]

    def _head(self, selected: Tensor, batch: _Batch) -> Tensor:
        """The ops after the split: selected [rows, hidden] -> logits [rows, vocab]."""
        buffers = self._new_buffers(len(selected))
        _columns(buffers, self._program.gathered).copy_(selected)
        for op in self._program.ops[self._program.split :]:
            self._run(op, buffers, batch)
        return _columns(buffers, self._program.logits)

    def _run(self, op: Op, buffers: list[Tensor], batch: _Batch) -> None:
        match op:
            case Embed():
                result = op.scale * self._matrices[op.weight.name][batch.ids].float()
            case RmsNorm():
                result = rms_norm(_columns(buffers, op.x), self._vectors[op.weight], op)
            case Linear():
                result = self._linear(op, _columns(buffers, op.x))
                if op.accumulate:
                    result += _columns(buffers, op.out)
            case Rope():
                table = self._program.ropes[op.table]
                result = rope(_columns(buffers, op.x), batch.positions, op, table.inv_freq, table.scale)
            case Attend():
                result = self._attend(op, buffers, batch)
            case GatedMul():
                result = _ACTIVATIONS[op.activation](_columns(buffers, op.gate)) * _columns(buffers, op.up)
        _columns(buffers, op.x if isinstance(op, Rope) else op.out).copy_(result)

    def _linear(self, op: Linear, x: Tensor) -> Tensor:
        parts = []
        for weight in op.weights:
            bias = None if weight.bias is None else self._vectors[weight.bias]
            operand = quantized(x) if weight.name in self._integers else x.to(self._dtype).float()
            parts.append(F.linear(operand, self._matrices[weight.name].float(), bias))
        return torch.cat(parts, dim=1)

    def _attend(self, op: Attend, buffers: list[Tensor], batch: _Batch) -> Tensor:
        """Store the step's keys and values, then attend: [rows, num_heads * head_dim]."""
        keys, values = self._pages[op.layer]
        page_size = self._options.page_size
        # All rows are stored first: sequences may share pages, and a step may hold several chunks of one.
        pages, offsets = batch.row_pages(page_size), batch.positions % page_size
        for view, stored in ((op.k, keys), (op.v, values)):
            rows = _columns(buffers, view).view(-1, op.num_kv_heads, op.head_dim)
            stored[pages, offsets] = in_8_bits(rows) if self._options.kv_dtype == "int8" else rows.to(self._dtype)
        # Keys and values are operands; q is rounded like them, because the product q . k is one of two operands.
        q = _columns(buffers, op.q).to(self._dtype).float().view(-1, op.num_heads, op.head_dim)
        out = torch.empty_like(q)
        for sequence in batch.sequences:
            context = batch.page_tables[sequence.slot][: -(-sequence.end // page_size)]
            k = keys[context].flatten(0, 1)[: sequence.end].float()
            v = values[context].flatten(0, 1)[: sequence.end].float()
            out[sequence.rows] = attend(q[sequence.rows], k, v, op, first_position=sequence.start)
        return out.flatten(1)


def packed_values(raw: RawTensor, packing: Packing | None) -> Float32Array:
    """The values of a tensor after packing: integers stay what they are, floats become what they are rounded to."""
    values = dequantize(raw)
    if packing is None or not packing.type.is_integer or raw.info.type.is_integer:
        return values
    return values_of(round_matrix(values, packing))


def quantized(x: Tensor) -> Tensor:
    """x [rows, width] as integer weights see it: 8 bits in groups of 16, of which the largest becomes 127."""
    groups = x.view(len(x), -1, 16)
    most = groups.abs().amax(dim=2, keepdim=True)
    inverse = torch.where(most > 0, 127 / most, 0)
    return (torch.round(groups * inverse) * (most * (1 / 127))).view(x.shape)


def in_8_bits(rows: Tensor) -> Tensor:
    """Keys or values [rows, heads, head_dim] as pages of 8 bits hold them: the largest of a head becomes 127."""
    most = rows.abs().amax(dim=2, keepdim=True)
    return torch.round(rows * torch.where(most > 0, 127 / most, 0)) * (most / 127)


def rms_norm(x: Tensor, weight: Tensor, op: RmsNorm) -> Tensor:
    """x [rows, width], weight [width / groups] -> [rows, width]."""
    parts = x.reshape(len(x), op.groups, -1)
    scale = torch.rsqrt(parts.square().mean(-1, keepdim=True) + op.eps)
    return (parts * scale * (weight + op.offset)).flatten(1)


def rope(x: Tensor, positions: Tensor, op: Rope, inv_freq: Sequence[float], scale: float) -> Tensor:
    """x [rows, num_heads * head_dim], positions [rows] -> x turned."""
    half = len(inv_freq)
    angles = positions.float()[:, None] * torch.tensor(inv_freq, dtype=torch.float32, device=x.device)  # [rows, half]
    cos, sin = (scale * angles.cos())[:, None], (scale * angles.sin())[:, None]
    heads = x.reshape(len(x), op.num_heads, op.head_dim)
    a, b, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).flatten(1)


def attend(q: Tensor, k: Tensor, v: Tensor, op: Attend, *, first_position: int) -> Tensor:
    """Causal attention of one sequence.

    q        [rows, num_heads, head_dim]: positions first_position, first_position + 1, ...
    k, v     [context, num_kv_heads, head_dim]: positions 0, 1, ...
    returns  [rows, num_heads, head_dim]
    """
    group = op.num_heads // op.num_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = op.scale * torch.einsum("rhd,chd->hrc", q, k)
    if op.softcap is not None:
        scores = op.softcap * torch.tanh(scores / op.softcap)
    row = torch.arange(first_position, first_position + len(q), device=q.device)[:, None]
    column = torch.arange(len(k), device=q.device)
    is_seen = column <= row
    if op.window is not None:
        is_seen &= column > row - op.window
    probabilities = scores.masked_fill(~is_seen, -math.inf).softmax(-1)
    return torch.einsum("hrc,chd->rhd", probabilities, v)


class _Sequence:
    """One sequence of a step: which rows of the step are its own, and where they stand."""

    def __init__(self, slot: int, start: int, rows: slice) -> None:
        self.slot = slot
        self.start = start
        self.rows = rows
        self.end = start + rows.stop - rows.start


class _Batch:
    """A step's inputs as tensors.

    ids, positions, slots   int64 [rows]
    page_tables             int64 [num_slots, max_pages]
    """

    def __init__(self, inputs: StepInputs, device: torch.device) -> None:
        self.sequences: list[_Sequence] = []
        first = 0
        for slot, start, count in zip(
            inputs.slots.tolist(), inputs.starts.tolist(), inputs.counts.tolist(), strict=True
        ):
            self.sequences.append(_Sequence(slot, start, slice(first, first + count)))
            first += count
        self.num_rows = first
        spans = [torch.arange(s.start, s.end, device=device) for s in self.sequences]
        self.positions = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64, device=device)
        counts = torch.from_numpy(inputs.counts).to(device)
        self.slots = torch.from_numpy(inputs.slots).to(device, torch.int64).repeat_interleave(counts)
        self.ids = torch.from_numpy(inputs.tokens).to(device)[self.slots, self.positions].long()
        self.page_tables = torch.from_numpy(inputs.page_tables).to(device, torch.int64)

    def row_pages(self, page_size: int) -> Tensor:
        """The page of each row: [rows]."""
        return self.page_tables[self.slots, self.positions // page_size]


def _columns(buffers: list[Tensor], view: View) -> Tensor:
    return buffers[view.buffer][:, view.offset : view.offset + view.width]
