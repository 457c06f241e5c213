"""The executor's state of every running sequence, by slot: ids, page table, and what its sampler needs.

Owned by the device thread. The scheduler decides which sequence has which slot and page; a slot's rows here are
overwritten when the next sequence takes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from msgspec import Struct

from streamgen.backends.base import SAMPLE_ROW, Int32Array

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streamgen.execution.grammars import Grammars
    from streamgen.messages import Begin, StepPlan

_T = TypeVar("_T")


class ScoreRange(Struct, frozen=True):
    """Prompt positions [first, last) whose tokens' log-probabilities are wanted, with `num_top` alternatives each."""

    first: int
    last: int
    num_top: int


class Bans(Struct, frozen=True):
    """Ids that may not be drawn while the sequence is shorter than `min_length`."""

    ids: tuple[int, ...]
    min_length: int


class Slots:
    """Arrays with one row per slot.

    tokens        int32 [num_slots, max_context + 1], ids by absolute position
    page_tables   int32 [num_slots, max_pages]
    templates     SAMPLE_ROW [num_slots], everything of a sample row that does not change from step to step
    biases, bans, scores   only for the slots that have them, so that others cost nothing
    processors    slot -> the request whose logits processors it has; `failed` are the slots where these failed already
    behind        slot -> where its next row starts, since the draft there did not come true
    grammars      what their outputs have to obey
    """

    def __init__(self, *, num_slots: int, max_context: int, page_size: int, grammars: Grammars) -> None:
        self.tokens: Int32Array = np.zeros((num_slots, max_context + 1), np.int32)
        self.page_tables: Int32Array = np.zeros((num_slots, -(-(max_context + 1) // page_size)), np.int32)
        self.templates: NDArray[np.void] = np.zeros(num_slots, SAMPLE_ROW)
        self.biases: dict[int, dict[int, float]] = {}
        self.bans: dict[int, Bans] = {}
        self.scores: dict[int, ScoreRange] = {}
        self.processors: dict[int, int] = {}
        self.failed: set[int] = set()
        self.behind: dict[int, int] = {}
        self.grammars = grammars
        self._num_pages = [0] * num_slots

    def are_plain(self, slots: tuple[int, ...]) -> bool:
        """Whether none of these has anything that has to be looked at in every step."""
        tables = (self.biases, self.bans, self.scores, self.processors)
        return not any(slot in table for table in tables if table for slot in slots)

    def find_stale(self, plan: StepPlan) -> list[int]:
        """Slots whose rows were planned behind drafts that did not come true: what they give is thrown away."""
        if not self.behind:
            return []
        stale = []
        for slot, start in zip(plan.slots, plan.starts, strict=True):
            if slot in self.behind:
                if start > self.behind[slot]:
                    stale.append(slot)
                else:
                    del self.behind[slot]
        return stale

    def begin(self, begin: Begin) -> None:
        """A sequence takes a slot."""
        slot = begin.slot
        self.behind.pop(slot, None)
        self.tokens[slot, : len(begin.ids)] = begin.ids
        self._num_pages[slot] = 0
        self.append_pages(slot, begin.pages)
        _set_or_drop(self.processors, slot, begin.processors)
        self.failed.discard(slot)
        self._fill_template(begin)
        sampling = begin.sampling
        _set_or_drop(self.biases, slot, sampling.logit_bias or None)
        bans = (
            Bans(begin.stop_ids, begin.min_length) if begin.stop_ids and begin.min_length > begin.num_prompt else None
        )
        _set_or_drop(self.bans, slot, bans)
        score = None
        if begin.score_from is not None:
            score = ScoreRange(begin.score_from, begin.num_prompt, sampling.prompt_logprobs or 0)
        _set_or_drop(self.scores, slot, score)

    def append_pages(self, slot: int, pages: tuple[int, ...]) -> None:
        """More pages at the end of a slot's page table."""
        start = self._num_pages[slot]
        self.page_tables[slot, start : start + len(pages)] = pages
        self._num_pages[slot] = start + len(pages)

    def write_ids(self, slot: int, position: int, ids: tuple[int, ...]) -> None:
        """Drafts to verify, or the correction after a rollback."""
        self.tokens[slot, position : position + len(ids)] = ids
        self.grammars.propose(slot, position, ids)

    def _fill_template(self, begin: Begin) -> None:
        sampling, row = begin.sampling, self.templates[begin.slot]
        row["slot"] = begin.slot
        row["target"] = -1
        row["write"] = 1
        row["num_top"] = -1 if sampling.logprobs is None else sampling.logprobs
        row["num_prompt"] = begin.num_prompt
        row["sample_index"] = begin.sample_index
        row["mask"] = self.grammars.begin(begin)
        row["logits"] = -1 if begin.processors is None else 0  # numbered step by step
        for name in (
            "top_k",
            "temperature",
            "top_p",
            "min_p",
            "typical_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "seed",
        ):
            row[name] = getattr(sampling, name)


def _set_or_drop(table: dict[int, _T], slot: int, value: _T | None) -> None:
    if value is None:
        table.pop(slot, None)
    else:
        table[slot] = value
