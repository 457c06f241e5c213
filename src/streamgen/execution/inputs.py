"""A plan as arrays: which rows run, and which of them go through the head.

A step leaves every cache full of weights, so that what Python does before the next one costs several times what a quick
loop over it shows. Hence `Decode`: as long as the same sequences draw a token each, nothing is built anew.
"""

from __future__ import annotations

from struct import Struct as Layout
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from streamgen.backends.base import (
    SAMPLE_ROW,
    Float32Array,
    Int32Array,
    StepInputs,
    StepOutputs,
    empty_outputs,
)
from streamgen.execution.grammars import NOTHING_TAKEN, Drawn, Taken

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from streamgen.execution.grammars import Grammars
    from streamgen.execution.slots import ScoreRange, Slots
    from streamgen.messages import StepPlan

_NO_IDS: Int32Array = np.zeros(0, np.int32)
_NO_VALUES: Float32Array = np.zeros(0, np.float32)


class HeadRows(Struct):
    """The rows of a step that go through the head.

    rows       SAMPLE_ROW [n], ascending by row
    samples    per sequence, how many of its rows draw a token; scores likewise how many only score the next id.
               A sequence's scoring rows come before its drawing rows
    num_logits how many rows have their logits written out, for processors
    """

    rows: NDArray[np.void]
    samples: tuple[int, ...]
    scores: list[int]
    num_logits: int = 0


class Decode:
    """The arrays of a step in which each sequence has one row and draws one token, to be used for those after it.

    Made of such a step; `repeats` says whether another one is alike in all but its positions, `advance` fills these in.
    """

    def __init__(self, plan: StepPlan, inputs: StepInputs, head: HeadRows, grammars: Grammars) -> None:
        self.inputs = inputs
        self.head = head
        self.outputs: StepOutputs = empty_outputs(len(head.rows), 0)
        self._slots = plan.slots
        self._ones = plan.counts
        self._starts = inputs.starts.data
        self._layout = Layout(f"{len(plan.slots)}i")
        self._positions = head.rows["position"]
        self._grammars = grammars
        self._drawn = Drawn(head.rows, self.outputs.token, inputs.tokens) if grammars.concern(head.rows) else None

    @staticmethod
    def is_one(plan: StepPlan, slots: Slots, head: HeadRows) -> bool:
        """Whether a step is a decode, of sequences that want nothing but tokens."""
        ones = (1,) * len(plan.slots)
        return (
            plan.counts == ones == plan.samples
            and slots.are_plain(plan.slots)
            and bool((head.rows["num_top"] < 0).all())
        )

    def repeats(self, plan: StepPlan) -> bool:
        """Whether these arrays do for a plan that comes next after those that they were used for."""
        return (
            plan.slots == self._slots
            and plan.counts == self._ones
            and plan.samples == self._ones
            and not plan.begins  # else a slot may be another sequence's
        )

    def advance(self, starts: tuple[int, ...]) -> None:
        """Make them those of a step at these positions."""
        self._layout.pack_into(self._starts, 0, *starts)
        self._positions[:] = self.inputs.starts
        if len(self.inputs.masks):
            self._grammars.fill_masks(self.head.rows, self.inputs.tokens, self.inputs.masks)

    def take(self) -> Taken:
        """What the sequences' grammars say, once the step was run."""
        return NOTHING_TAKEN if self._drawn is None else self._grammars.take(self._drawn)


def make_inputs(plan: StepPlan, slots: Slots, stale: Collection[int] = ()) -> tuple[StepInputs, HeadRows]:
    """The arrays of a step; `slots` has taken the plan's begins, pages and drafts already.

    stale   slots whose rows count for nothing: they draw no token
    """
    slot_array = np.array(plan.slots, np.int32)
    starts = np.array(plan.starts, np.int32)
    counts = np.array(plan.counts, np.int32)
    first_rows = np.cumsum(counts, dtype=np.int32) - counts
    if max(plan.samples) <= 1 and not slots.scores:
        head = _one_row_each(plan, slots, slot_array, starts, counts, first_rows)
    else:
        head = _several_rows(plan, slots, first_rows.tolist())
    if stale:
        _draw_nothing(head.rows, stale)
    if slots.processors:
        head.num_logits = _number_logits(head.rows)
    bias_ids, bias_values = _fill_biases(head.rows, slots)
    masks = slots.grammars.make_masks(head.rows, slots.tokens)
    inputs = StepInputs(
        tokens=slots.tokens,
        page_tables=slots.page_tables,
        slots=slot_array,
        starts=starts,
        counts=counts,
        samples=head.rows,
        bias_ids=bias_ids,
        bias_values=bias_values,
        ban_ids=_fill_bans(head.rows, slots),
        masks=masks,
        grammars=slots.grammars.automata,
    )
    return inputs, head


def _one_row_each(
    plan: StepPlan, slots: Slots, slot_array: Int32Array, starts: Int32Array, counts: Int32Array, first_rows: Int32Array
) -> HeadRows:
    """The usual step: a sequence draws one token from its last row, or none."""
    drawing = np.array(plan.samples, np.int32) > 0
    rows = slots.templates[slot_array[drawing]]
    last = counts[drawing] - 1
    rows["row"] = first_rows[drawing] + last
    rows["position"] = starts[drawing] + last
    return HeadRows(rows, plan.samples, [0] * len(plan.slots))


def _several_rows(plan: StepPlan, slots: Slots, first_rows: list[int]) -> HeadRows:
    """Some sequence verifies drafts or scores its prompt."""
    parts: list[NDArray[np.void]] = []
    num_scores: list[int] = []
    for slot, start, count, samples, first in zip(
        plan.slots, plan.starts, plan.counts, plan.samples, first_rows, strict=True
    ):
        wanted = slots.scores.get(slot)
        scored = range(0) if wanted is None else _score_positions(wanted, start, count)
        num_scores.append(len(scored))
        if wanted is not None and scored:
            parts.append(_score_rows(slots, slot, scored, first - start, wanted.num_top))
        if wanted is not None and start + count >= wanted.last - 1:
            del slots.scores[slot]  # nothing is left to score: later steps of this slot take the usual path
        if samples:
            positions = np.arange(start + count - samples, start + count, dtype=np.int32)
            rows = np.repeat(slots.templates[slot : slot + 1], samples)
            rows["row"] = positions + (first - start)
            rows["position"] = positions
            rows["write"] = samples == 1
            parts.append(rows)
    rows = np.concatenate(parts) if parts else np.zeros(0, SAMPLE_ROW)
    return HeadRows(rows, plan.samples, num_scores)


def _score_positions(wanted: ScoreRange, start: int, count: int) -> range:
    """Positions of this chunk whose next id is a prompt token that wants a log-probability."""
    return range(max(start, wanted.first - 1), min(start + count, wanted.last - 1))


def _score_rows(slots: Slots, slot: int, positions: range, row_offset: int, num_top: int) -> NDArray[np.void]:
    where = np.arange(positions.start, positions.stop, dtype=np.int32)
    rows = np.repeat(slots.templates[slot : slot + 1], len(where))
    rows["row"] = where + row_offset
    rows["position"] = where
    rows["target"] = slots.tokens[slot, where + 1]
    rows["write"] = 0
    rows["logits"] = -1
    rows["num_top"] = num_top
    return rows


def _draw_nothing(rows: NDArray[np.void], slots: Collection[int]) -> None:
    """As if the token after each row were known."""
    where = np.flatnonzero(np.isin(rows["slot"], list(slots)))
    rows["target"][where] = 0
    rows["write"][where] = 0


def _number_logits(rows: NDArray[np.void]) -> int:
    wanted = np.flatnonzero(rows["logits"] >= 0)
    rows["logits"][wanted] = np.arange(len(wanted), dtype=np.int32)
    return len(wanted)


def _fill_biases(rows: NDArray[np.void], slots: Slots) -> tuple[Int32Array, Float32Array]:
    if not slots.biases:
        return _NO_IDS, _NO_VALUES
    ids: list[int] = []
    values: list[float] = []
    for index, slot in enumerate(rows["slot"].tolist()):
        bias = slots.biases.get(slot)
        if bias:
            row = rows[index]
            row["bias_start"], row["bias_count"] = len(ids), len(bias)
            ids.extend(bias.keys())
            values.extend(bias.values())
    return np.array(ids, np.int32), np.array(values, np.float32)


def _fill_bans(rows: NDArray[np.void], slots: Slots) -> Int32Array:
    if not slots.bans:
        return _NO_IDS
    ids: list[int] = []
    for index, slot in enumerate(rows["slot"].tolist()):
        bans = slots.bans.get(slot)
        if bans is not None and rows[index]["position"] + 1 < bans.min_length:
            row = rows[index]
            row["ban_start"], row["ban_count"] = len(ids), len(bans.ids)
            ids.extend(bans.ids)
    return np.array(ids, np.int32)
