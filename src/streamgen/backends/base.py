"""What a backend must do: load a program's weights once, then run the whole program for a whole batch per step.

Arrays of a step are numpy, owned by the caller and alive for the call. The same inputs drive every backend, so that the
parity test of an op or a family is one program on two backends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping  # noqa: TC003  # a field of a Struct
from typing import TYPE_CHECKING, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamgen.quantization.base import Packing  # noqa: TC001  # a field of a Struct

if TYPE_CHECKING:
    import streamgen._cpu as _cpu
    from streamgen.checkpoints.base import RawTensor
    from streamgen.models.program import Program

HEAD_ROWS = 64  # most rows through the head at once, so that logits stay bounded

ANY_TOKEN, GRAMMAR = -1, -2  # of SAMPLE_ROW.mask, where it is no row of StepInputs.masks

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]

# One row that goes through the head. Mirrored by SampleRow in csrc/common/program.h, which asserts the offsets.
SAMPLE_ROW = np.dtype(
    [
        ("row", np.int32),  # row of the step
        ("slot", np.int32),
        ("position", np.int32),  # absolute position of that row; the token drawn stands at position + 1
        ("target", np.int32),  # -1: sample a token; else: the id whose log-probability is wanted, nothing is drawn
        ("write", np.int32),  # 1: write the token to tokens[slot, position + 1]
        ("num_top", np.int32),  # -1: no logprobs; k >= 0: logprob and rank of the token, and the k likeliest
        ("num_prompt", np.int32),  # tokens[slot, :num_prompt] is the prompt; what follows, up to position, is output
        ("top_k", np.int32),  # 0: off
        ("temperature", np.float32),  # 0: greedy
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("typical_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("sample_index", np.uint32),
        ("bias_start", np.int32),  # slice of StepInputs.bias_ids / bias_values
        ("bias_count", np.int32),
        ("ban_start", np.int32),  # slice of StepInputs.ban_ids: ids that may not be drawn
        ("ban_count", np.int32),
        ("mask", np.int32),  # row of StepInputs.masks; -1: every token is allowed; -2: StepInputs.grammars is asked
        ("logits", np.int32),  # -1: sample; else: row of StepOutputs.logits that gets its logits, nothing is drawn yet
        ("seed", np.uint64),
    ],
    align=True,
)


class StepInputs(Struct, kw_only=True):
    """One step. Sequence i of num_seqs has `counts[i]` rows at positions starts[i] ... of slot slots[i].

    tokens        int32 [num_slots, max_context + 1]: the ids of every sequence; a row's id is tokens[slot, position].
                  The sampler writes into it (SAMPLE_ROW.write)
    page_tables   int32 [num_slots, max_pages]
    slots, starts, counts   int32 [num_seqs]
    samples       SAMPLE_ROW [num_samples], rows ascending; may be empty
    bias_ids, bias_values, ban_ids   flat, sliced by the sample rows
    masks         uint32 [num_masks, ceil(vocab / 32)]: bit t & 31 of word t >> 5 allows token t
    grammars      what a row with the mask GRAMMAR may draw, by its slot and position; None if there is no such row
    """

    tokens: Int32Array
    page_tables: Int32Array
    slots: Int32Array
    starts: Int32Array
    counts: Int32Array
    samples: NDArray[np.void]
    bias_ids: Int32Array
    bias_values: Float32Array
    ban_ids: Int32Array
    masks: NDArray[np.uint32]
    grammars: _cpu.GrammarSlots | None = None


class StepOutputs(Struct, kw_only=True):
    """What a step writes, one entry per sample row; entries that were not asked for are left as they are.

    token         int32 [n]: the id drawn, or the target
    logprob       float32 [n]; rank int32 [n]: of `token` under log_softmax of the raw logits (1 = likeliest; ties count
                  by lower id)
    top_ids       int32 [n, width], top_logprobs float32 [n, width]: the first num_top of each row
    logits        float32 [num_logits, vocab]: of the rows that ask for them (SAMPLE_ROW.logits), as the head gave them,
                  but NaN is -inf and +inf the largest float. Such a row's other entries are written by `sample`
    """

    token: Int32Array
    logprob: Float32Array
    rank: Int32Array
    top_ids: Int32Array
    top_logprobs: Float32Array
    logits: Float32Array


class LoadOptions(Struct, frozen=True, kw_only=True):
    """Sizes fixed at load.

    dtype       "float32" | "bfloat16": of dense weights and operands, and of pages
    packings    of each matrix, by name; one that is missing is dense
    max_rows    most rows of one step (the head runs in blocks of HEAD_ROWS of them)
    num_pages, page_size   the KV cache
    kv_dtype    "auto": keys and values are kept in dtype; "int8": in 8 bits with a scale for each token and head
    """

    dtype: str
    max_rows: int
    num_pages: int
    page_size: int = 16
    max_context: int
    threads: int
    packings: Mapping[str, Packing] = {}
    kv_dtype: str = "auto"


class Weights(Protocol):
    """Where a backend gets a program's tensors: the checkpoint, checked against the program's shapes."""

    def matrix(self, name: str, rows: int, columns: int) -> RawTensor:
        """`name`.weight, of exactly that shape; raises CorruptWeights."""
        ...

    def vector(self, name: str, size: int) -> RawTensor:
        """A norm weight or a bias."""
        ...

    def done(self, raw: RawTensor) -> None:
        """The tensor was copied; its mapped bytes may be dropped."""
        ...


class LoadedModel(Protocol):
    """A program with its weights and pages on a device. Used by one thread at a time."""

    @property
    def vocab_size(self) -> int:
        """Logits of a row."""
        ...

    def step(self, inputs: StepInputs, outputs: StepOutputs, wake_fd: int | None = None) -> None:
        """Run the whole program once.

        The same two objects as in the step before mean the same arrays, with other values in them.

        wake_fd   a file descriptor to which a byte is written once the step runs without the interpreter
        """
        ...

    def sample(self, inputs: StepInputs, outputs: StepOutputs, changed: Float32Array) -> None:
        """Finish the rows of the last step whose logits it wrote out.

        changed   float32 [num_logits, vocab], overwritten: what to draw from, with the sampler of `step`.
                  Log-probabilities are those of outputs.logits, which the caller left as they were
        """
        ...

    def copy_pages(self, pairs: Int32Array) -> None:
        """Copy pages pairs[i, 0] -> pairs[i, 1], all layers, in order."""
        ...

    def drop_pages(self) -> None:
        """Give the memory of pages and workspace back; both are taken again as they are used. Pages read as zero."""
        ...

    def resident_bytes(self) -> int:
        """Bytes of pages and workspace that are in memory now."""
        ...

    def close(self) -> None:
        """Free weights, pages and threads; idempotent."""
        ...


class Backend(Protocol):
    """A way to run programs."""

    name: str

    def unsupported_reasons(self, program: Program, dtype: str) -> list[str]:
        """Why this backend cannot run the program here; empty if it can."""
        ...

    def weight_bytes(self, program: Program, dtype: str, packings: Mapping[str, Packing]) -> int:
        """Bytes of the packed weights."""
        ...

    def workspace_bytes(self, program: Program, options: LoadOptions) -> int:
        """Bytes of activations and scratch."""
        ...

    def page_bytes(self, program: Program, dtype: str, page_size: int, kv_dtype: str = "auto") -> int:
        """Bytes of one page over all layers."""
        ...

    def load(
        self, program: Program, weights: Weights, options: LoadOptions, on_bytes: Callable[[int], None]
    ) -> LoadedModel:
        """Pack the weights and allocate the pages.

        on_bytes   hears the packed bytes as they grow, many times a second; what it raises ends the loading
        """
        ...


def empty_outputs(num_samples: int, width: int, *, num_logits: int = 0, vocab: int = 0) -> StepOutputs:
    """Outputs for a step."""
    return StepOutputs(
        token=np.full(num_samples, -1, np.int32),
        logprob=np.zeros(num_samples, np.float32),
        rank=np.zeros(num_samples, np.int32),
        top_ids=np.zeros((num_samples, width), np.int32),
        top_logprobs=np.zeros((num_samples, width), np.float32),
        logits=np.empty((num_logits, vocab), np.float32),
    )
