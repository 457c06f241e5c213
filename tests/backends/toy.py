"""Small programs on real backends: random weights, hand-made pages, and every token's log-probability of every row.

A backend shows its logits only through the sampler, so a run asks for the log-probabilities of the whole vocabulary.
That needs nothing but the interface, and so the same cases run on every backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from streamgen.backends.base import (
    SAMPLE_ROW,
    Backend,
    Float32Array,
    Int32Array,
    LoadOptions,
    StepInputs,
    StepOutputs,
    Weights,
    empty_outputs,
)
from streamgen.backends.reference import ReferenceBackend
from streamgen.checkpoints.base import RawTensor, TensorInfo
from streamgen.errors import CorruptWeights
from streamgen.quantization.base import TensorType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from streamgen.models.program import Program
    from streamgen.quantization.base import Packing

PAGE_SIZE = 16


def available_backends() -> list[Backend]:
    """Every backend that can run here, the CPU's once for each instruction set; the reference comes first."""
    backends: list[Backend] = [ReferenceBackend()]
    try:
        import streamgen._cpu as _cpu
    except ImportError:  # the extension is not built
        return backends
    from streamgen.backends.cpu import CpuBackend

    return [*backends, *(CpuBackend(isa) for isa in _cpu.isa_names())]


class ToyWeights:
    """A `Weights` over float32 arrays by full tensor name."""

    def __init__(self, tensors: Mapping[str, Float32Array]) -> None:
        self.tensors = dict(tensors)
        self.done_names: list[str] = []

    def matrix(self, name: str, rows: int, columns: int) -> RawTensor:
        return self._raw(name + ".weight", (rows, columns))

    def vector(self, name: str, size: int) -> RawTensor:
        return self._raw(name, (size,))

    def done(self, raw: RawTensor) -> None:
        self.done_names.append(raw.info.name)

    def _raw(self, name: str, shape: tuple[int, ...]) -> RawTensor:
        if name not in self.tensors or self.tensors[name].shape != shape:
            raise CorruptWeights(f"{name}: expected shape {shape}")
        return raw_tensor(name, self.tensors[name])


def raw_tensor(name: str, values: Float32Array) -> RawTensor:
    """A float32 tensor as a checkpoint would hand it over."""
    data = np.ascontiguousarray(values, np.float32)
    info = TensorInfo(name=name, type=TensorType.F32, shape=values.shape, num_bytes=data.nbytes)
    return RawTensor(info=info, data=data.reshape(-1).view(np.uint8))


def random_weights(program: Program, seed: int = 0) -> ToyWeights:
    """Weights of a size that keeps activations near 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for weight in program.linear_weights():
        values = rng.standard_normal((weight.rows, weight.columns)) / np.sqrt(weight.columns)
        tensors[weight.name + ".weight"] = values.astype(np.float32)
    for name, size in program.vector_names():
        tensors[name] = (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)
    return ToyWeights(tensors)


class Chunk(Struct, frozen=True):
    """Rows `start` .. `start + count` of the sequence in `slot`."""

    slot: int
    start: int
    count: int


class ToyModel:
    """A loaded program with page tables over shuffled pages, and the tokens of its slots."""

    def __init__(
        self,
        backend: Backend,
        program: Program,
        weights: Weights,
        *,
        dtype: str = "float32",
        num_slots: int = 4,
        max_context: int = 96,
        max_rows: int = 256,
        page_size: int = PAGE_SIZE,
        threads: int = 2,
        packings: Mapping[str, Packing] | None = None,
        kv_dtype: str = "auto",
    ) -> None:
        pages_each = -(-max_context // page_size)
        options = LoadOptions(
            dtype=dtype,
            max_rows=max_rows,
            num_pages=num_slots * pages_each + 1,
            page_size=page_size,
            max_context=max_context,
            threads=threads,
            packings=packings or {},
            kv_dtype=kv_dtype,
        )
        self.vocab = program.vocab_size
        self.bytes_seen: list[int] = []
        self.model = backend.load(program, weights, options, self.bytes_seen.append)
        self.tokens: Int32Array = np.zeros((num_slots, max_context + 1), np.int32)
        order = np.random.default_rng(7).permutation(options.num_pages)[: num_slots * pages_each]
        self.page_tables: Int32Array = order.astype(np.int32).reshape(num_slots, pages_each)

    def put(self, slot: int, ids: Sequence[int], at: int = 0) -> None:
        """Set the tokens of a slot."""
        self.tokens[slot, at : at + len(ids)] = ids

    def run(self, chunks: Sequence[Chunk], samples: NDArray[np.void], **arrays: NDArray[np.generic]) -> StepOutputs:
        """One step. `arrays` replaces fields of StepInputs."""
        inputs = StepInputs(
            tokens=self.tokens,
            page_tables=self.page_tables,
            slots=np.array([c.slot for c in chunks], np.int32),
            starts=np.array([c.start for c in chunks], np.int32),
            counts=np.array([c.count for c in chunks], np.int32),
            samples=samples,
            bias_ids=np.zeros(0, np.int32),
            bias_values=np.zeros(0, np.float32),
            ban_ids=np.zeros(0, np.int32),
            masks=np.zeros((0, -(-self.vocab // 32)), np.uint32),
        )
        inputs = replace(inputs, **arrays)
        outputs = empty_outputs(len(samples), self.vocab)
        self.model.step(inputs, outputs)
        return outputs

    def logprobs(self, *chunks: Chunk) -> Float32Array:
        """One step of which every row samples: log-probabilities [rows, vocab]."""
        samples = sample_rows(chunks)
        samples["num_top"] = self.vocab
        outputs = self.run(chunks, samples)
        by_id = np.empty_like(outputs.top_logprobs)
        np.put_along_axis(by_id, outputs.top_ids.astype(np.int64), outputs.top_logprobs, axis=1)
        return by_id

    def greedy(self, slot: int, prompt: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens after a prompt, one step each, each written by the sampler."""
        self.put(slot, prompt)
        chunk = Chunk(slot, 0, len(prompt))
        for _ in range(count):
            samples = sample_rows([chunk])[-1:]
            samples["write"] = 1
            self.run([chunk], samples)
            chunk = Chunk(slot, chunk.start + chunk.count, 1)
        return [int(t) for t in self.tokens[slot, len(prompt) : len(prompt) + count]]


def sample_rows(chunks: Sequence[Chunk]) -> NDArray[np.void]:
    """Neutral greedy SAMPLE_ROWs for every row of a step; nothing is written."""
    slots = [c.slot for c in chunks for _ in range(c.count)]
    rows = np.zeros(len(slots), SAMPLE_ROW)
    rows["row"] = np.arange(len(slots))
    rows["slot"] = slots
    rows["position"] = [c.start + i for c in chunks for i in range(c.count)]
    rows["target"] = rows["num_top"] = rows["mask"] = rows["logits"] = -1
    rows["top_p"] = rows["typical_p"] = rows["repetition_penalty"] = 1
    return rows
