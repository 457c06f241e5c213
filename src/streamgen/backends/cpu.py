"""The CPU backend: lowers a program to `csrc/cpu/program.cpp`, which runs a whole step in one call without the GIL.

Weights are packed once, straight from the memory map, into one aligned block in the layouts of `csrc/cpu/kernels.h` and
`csrc/cpu/packed.h`, each in its own type; weights of one type that read the same input lie side by side as one matrix,
and a tied head is the embedding matrix itself. Torch is never imported.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from streamgen.backends.base import (
    HEAD_ROWS,
    Float32Array,
    Int32Array,
    LoadOptions,
    StepInputs,
    StepOutputs,
    Weights,
)
from streamgen.backends.cpu_layout import PANEL, Layout, Region, round_up
from streamgen.errors import KernelUnavailable
from streamgen.models.program import (
    Attend,
    Embed,
    GatedMul,
    Linear,
    LinearWeight,
    Op,
    Program,
    RmsNorm,
    Rope,
    View,
    op_views,
)
from streamgen.quantization.base import Packing, TensorType, row_bytes
from streamgen.quantization.gguf_blocks import dequantize
from streamgen.quantization.packing import DENSE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import streamgen._cpu as _cpu
    from streamgen.checkpoints.base import RawTensor

ISA_VARIABLE = "STREAMGEN_CPU_ISA"  # lowers the instruction set, for tests; read when a model is loaded

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
_ATTEND_UNITS = 1024  # states of rows that attention may leave for later (kUnits in csrc/cpu/attend_plan.h)
_OWN_ROWS = 4  # rows of operands that each worker has for itself (kOwnRows in csrc/cpu/program.cpp)
_SLICE_BYTES = 4 << 20  # of a stored matrix that are packed at a time: from a slow disk, some tens of milliseconds


class CpuBackend:
    """Own kernels for float32, bfloat16 and integer weights; see `docs/kernels.md`.

    isa   an instruction set of `_cpu.isa_names()`; None is `chosen_isa()`
    """

    name = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self._isa = isa

    def __repr__(self) -> str:
        return f"CpuBackend({self._isa or 'best'})"

    def unsupported_reasons(self, program: Program, dtype: str) -> list[str]:
        """Why this backend cannot run the program here; empty if it can."""
        reasons = []
        if dtype not in DENSE:
            reasons.append(f"dtype: expected one of {', '.join(DENSE)}, got {dtype}")
        try:
            chosen_isa()
        except KernelUnavailable as error:
            reasons.append(str(error))
        for op in program.ops:
            if isinstance(op, Attend) and (op.head_dim % 2 or op.head_dim > 256):
                reasons.append(f"head_dim: expected an even number up to 256, got {op.head_dim}")
                break
        return reasons

    def weight_bytes(self, program: Program, dtype: str, packings: Mapping[str, Packing]) -> int:
        """Bytes of the packed weights."""
        vectors = sum(size for _, size in program.vector_names())
        return Layout(program, dtype, packings).num_bytes + 4 * vectors

    def page_bytes(self, program: Program, dtype: str, page_size: int, kv_dtype: str = "auto") -> int:
        """Bytes of one page over all layers, keys and values (csrc/common/paging.h)."""
        tiles = 2 * program.num_layers * program.num_kv_heads
        if kv_dtype == "int8":
            return tiles * (round_up(page_size * program.head_dim, 4) + 4 * page_size)
        return tiles * page_size * program.head_dim * row_bytes(DENSE[dtype], 1)

    def workspace_bytes(self, program: Program, options: LoadOptions) -> int:
        """Bytes of activations, logits, rope tables and sampling scratch."""
        layout = Layout(program, options.dtype, options.packings)
        head_only, total = _head_only(program), 0
        for index, buffer in enumerate(program.buffers):
            rows = _head_rows(options) if index in head_only else options.max_rows
            forms = layout.forms(program, index)
            total += rows * forms.stream_bytes(buffer.width)
            total += (rows + _OWN_ROWS * options.threads) * forms.operand_bytes(buffer.width, DENSE[options.dtype])
        ropes = sum(options.max_rows * len(rope.inv_freq) * 8 for rope in program.ropes)
        heads = max(op.num_heads for op in program.ops if isinstance(op, Attend))
        partials = 4 * _ATTEND_UNITS * heads * (round_up(program.head_dim, 16) + 32)
        return total + ropes + partials + options.threads * (program.vocab_size * 33 + (1 << 20))

    def load(
        self, program: Program, weights: Weights, options: LoadOptions, on_bytes: Callable[[int], None]
    ) -> CpuModel:
        """Pack the weights and allocate the pages; `on_bytes` hears the packed bytes as they grow."""
        return CpuModel(program, weights, options, on_bytes, isa=self._isa or chosen_isa())


class CpuModel:
    """A program with its packed weights, pages and thread pool. Used by one thread at a time."""

    def __init__(
        self,
        program: Program,
        weights: Weights,
        options: LoadOptions,
        on_bytes: Callable[[int], None],
        *,
        isa: str,
    ) -> None:
        import streamgen._cpu as _cpu

        self._dtype = DENSE[options.dtype]
        self._isa = isa
        self.vocab_size = program.vocab_size
        self._pool: _cpu.Pool | None = _cpu.Pool(options.threads)
        self._layout = Layout(program, options.dtype, options.packings)
        self._weights: _cpu.Memory | None = _cpu.Memory(self._layout.num_bytes, True)
        self._known_arrays: tuple[StepInputs, StepOutputs, _cpu.StepArrays] | None = None  # of the last step
        self._vectors: list[Float32Array] = []  # norm weights and biases, alive as long as the program
        try:
            self._pack(weights, on_bytes)
        except BaseException:
            self._weights = self._pool = None  # now: a traceback may keep this object alive
            raise
        self._program: _cpu.Program | None = _cpu.Program(
            self._pool,
            self._isa,
            int(self._dtype),
            int(self._dtype if options.kv_dtype == "auto" else TensorType.INT8),
            options.max_rows,
            _head_rows(options),
            program.num_layers,
            program.num_kv_heads,
            program.head_dim,
            options.page_size,
            options.num_pages,
            program.vocab_size,
        )
        self._lower(program, weights)

    def step(self, inputs: StepInputs, outputs: StepOutputs, wake_fd: int | None = None) -> None:
        """Run the whole program once; see `StepInputs`, `StepOutputs` and `LoadedModel.step`."""
        assert self._program is not None, "the model is closed"
        self._program.step(self._arrays(inputs, outputs), -1 if wake_fd is None else wake_fd)

    def sample(self, inputs: StepInputs, outputs: StepOutputs, changed: Float32Array) -> None:
        """Finish the rows whose logits were written out; see `LoadedModel.sample`."""
        assert self._program is not None, "the model is closed"
        assert changed.shape == outputs.logits.shape and changed.dtype == np.float32 and changed.flags.c_contiguous
        self._program.sample(self._arrays(inputs, outputs), changed.ctypes.data)

    def _arrays(self, inputs: StepInputs, outputs: StepOutputs) -> _cpu.StepArrays:
        """Addresses. The objects of the step before mean the arrays of the step before, with other values in them."""
        known = self._known_arrays
        if known is not None and known[0] is inputs and known[1] is outputs:
            return known[2]
        arrays = self._make_arrays(inputs, outputs)
        # Logits may be many megabytes, which are not kept for a step that may never come.
        self._known_arrays = None if len(outputs.logits) else (inputs, outputs, arrays)
        return arrays

    def _make_arrays(self, inputs: StepInputs, outputs: StepOutputs) -> _cpu.StepArrays:
        import streamgen._cpu as _cpu

        return _cpu.StepArrays(
            inputs.tokens.ctypes.data,
            inputs.tokens.shape[1],
            inputs.page_tables.ctypes.data,
            inputs.page_tables.shape[1],
            inputs.tokens.shape[0],
            inputs.slots.ctypes.data,
            inputs.starts.ctypes.data,
            inputs.counts.ctypes.data,
            len(inputs.slots),
            inputs.samples.ctypes.data,
            len(inputs.samples),
            inputs.bias_ids.ctypes.data,
            inputs.bias_values.ctypes.data,
            inputs.ban_ids.ctypes.data,
            inputs.masks.ctypes.data,
            self.vocab_size,
            outputs.token.ctypes.data,
            outputs.logprob.ctypes.data,
            outputs.rank.ctypes.data,
            outputs.top_ids.ctypes.data,
            outputs.top_logprobs.ctypes.data,
            outputs.top_ids.shape[1],
            outputs.logits.ctypes.data,
            len(outputs.logits),
            inputs.grammars,
        )

    def take_op_seconds(self) -> list[float]:
        """Seconds in each op of the program since the last call, then in the sampler; the first call begins this."""
        assert self._program is not None, "the model is closed"
        return self._program.take_op_seconds()

    def packed_bytes(self, weights: tuple[LinearWeight, ...]) -> int:
        """Bytes that the weights of one linear take."""
        return sum(region.num_bytes for region in self._layout.regions_of(weights))

    @property
    def workspace_bytes(self) -> int:
        """Bytes of activations and scratch that the program took."""
        assert self._program is not None, "the model is closed"
        return self._program.workspace_bytes

    def copy_pages(self, pairs: Int32Array) -> None:
        """Copy pages pairs[i, 0] -> pairs[i, 1], all layers, in order."""
        assert self._program is not None, "the model is closed"
        pairs = np.ascontiguousarray(pairs, np.int32)
        self._program.copy_pages(pairs.ctypes.data, len(pairs))

    def drop_pages(self) -> None:
        """Give the memory of pages and workspace back; pages read as zero."""
        assert self._program is not None, "the model is closed"
        self._program.drop_pages()

    def resident_bytes(self) -> int:
        """Bytes of pages and workspace that are in memory now. Any thread, also while another one closes the model."""
        program = self._program
        return 0 if program is None else program.resident_bytes()

    def close(self) -> None:
        """Free weights, pages and threads; idempotent."""
        self._program = None
        self._pool = None
        self._weights = None
        self._known_arrays = None
        self._vectors.clear()

    def _pack(self, weights: Weights, on_bytes: Callable[[int], None]) -> None:
        packed = 0
        for region in self._layout.regions:
            row = 0
            for weight in region.weights:
                raw = weights.matrix(weight.name, weight.rows, weight.columns)
                for start, stop in _slices(raw, weight):
                    self._pack_rows(raw, weight, start, stop, region, row)
                    weights.done(raw)
                    packed += region.panel_bytes * (stop - start) // PANEL
                    on_bytes(packed)
                row += weight.rows

    def _pack_rows(self, raw: RawTensor, weight: LinearWeight, start: int, stop: int, region: Region, row: int) -> None:
        """Rows [start, stop) of a stored matrix become rows row + start ... of the packed region."""
        import streamgen._cpu as _cpu

        assert self._pool is not None and self._weights is not None
        stored_bytes = row_bytes(raw.info.type, weight.columns, raw.info.group)
        _cpu.pack(
            self._pool,
            self._isa,
            raw.data.ctypes.data + start * stored_bytes,
            stored_bytes,
            int(raw.info.type),
            self._weights.address + region.offset,
            int(region.packing.type),
            stop - start,
            weight.columns,
            row + start,
            (stop - start) * raw.rope_heads // weight.rows if raw.rope_heads else 0,
            region.packing.group,
            region.packing.symmetric,
        )

    def _lower(self, program: Program, weights: Weights) -> None:
        assert self._program is not None
        native = self._program
        head_only = _head_only(program)
        for index, buffer in enumerate(program.buffers):
            forms = self._layout.forms(program, index)
            native.add_buffer(buffer.width, forms.stream, forms.dense, forms.quantized, index in head_only)
        for rope in program.ropes:
            native.add_rope(list(rope.inv_freq), rope.scale)
        for op in program.ops[: program.split]:
            self._add(op, weights)
        native.split(_view(program.selected), _view(program.gathered))
        for op in program.ops[program.split :]:
            self._add(op, weights)
        native.finish(_view(program.logits))

    def _add(self, op: Op, weights: Weights) -> None:
        native = self._program
        assert native is not None
        match op:
            case Embed():
                native.add_embed(_view(op.out), self._packed(self._layout.regions_of((op.weight,))[0]), op.scale)
            case RmsNorm():
                weight = self._vector(dequantize(weights.vector(op.weight, op.x.width // op.groups)))
                native.add_rms_norm(_view(op.x), _view(op.out), weight, op.eps, op.offset, op.groups)
            case Linear():
                parts, first = [], 0
                for region in self._layout.regions_of(op.weights):
                    parts.append((self._packed(region), first, region.rows))
                    first += region.rows
                native.add_linear(_view(op.x), _view(op.out), parts, self._bias(op, weights), op.accumulate)
            case Rope():
                native.add_rotation(_view(op.x), op.num_heads, op.head_dim, op.table)
            case Attend():
                native.add_attend(
                    _view(op.q),
                    _view(op.k),
                    _view(op.v),
                    _view(op.out),
                    op.layer,
                    op.num_heads,
                    op.num_kv_heads,
                    op.head_dim,
                    op.window or 0,
                    op.scale,
                    op.softcap or 0.0,
                )
            case GatedMul():
                native.add_gated_mul(_view(op.gate), _view(op.up), _view(op.out), _ACTIVATIONS[op.activation])

    def _packed(self, region: Region) -> tuple[int, int, int]:
        assert self._weights is not None
        return self._weights.address + region.offset, int(region.packing.type), region.packing.group

    def _vector(self, values: Float32Array) -> int:
        values = np.ascontiguousarray(values, np.float32)
        self._vectors.append(values)
        return values.ctypes.data

    def _bias(self, op: Linear, weights: Weights) -> int:
        if all(weight.bias is None for weight in op.weights):
            return 0
        parts = [
            dequantize(weights.vector(w.bias, w.rows)) if w.bias is not None else np.zeros(w.rows, np.float32)
            for w in op.weights
        ]
        return self._vector(np.concatenate(parts))


def chosen_isa() -> str:
    """The instruction set that will be used: the best one here, or what STREAMGEN_CPU_ISA lowers it to.

    Raises:
        KernelUnavailable: the extension is not built, or the variable names something else than isa_names().
    """
    try:
        import streamgen._cpu as _cpu
    except ImportError as error:
        raise KernelUnavailable(f"the CPU extension is not built: {error}; install streamgen with pip") from error
    names = _cpu.isa_names()
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return names[0]
    if wanted not in names:
        raise KernelUnavailable(f"{ISA_VARIABLE}: expected one of {', '.join(names)} on this processor, got {wanted}")
    return wanted


def _slices(raw: RawTensor, weight: LinearWeight) -> Iterator[tuple[int, int]]:
    """Row ranges to pack one by one: only so much of the file is resident, and loading can be given up between."""
    stored_bytes = row_bytes(raw.info.type, weight.columns, raw.info.group)
    # Rows in rope order are shuffled within heads: these stay whole.
    unit = weight.rows // raw.rope_heads if raw.rope_heads else PANEL
    rows = max(unit, _SLICE_BYTES // stored_bytes // unit * unit)
    for start in range(0, weight.rows, rows):
        yield start, min(start + rows, weight.rows)


def _view(view: View) -> tuple[int, int, int]:
    return view.buffer, view.offset, view.width


def _head_rows(options: LoadOptions) -> int:
    return min(HEAD_ROWS, options.max_rows)


def _head_only(program: Program) -> set[int]:
    """Buffers that no op before the split names: they need only HEAD_ROWS rows."""
    body = {view.buffer for op in program.ops[: program.split] for view in op_views(op).values()}
    return set(range(len(program.buffers))) - body
