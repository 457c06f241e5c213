"""Runs plans: the synchronous heart of an executor, driven by its device thread.

It keeps what the device must know of the running sequences (`Slots`), turns a plan into arrays, makes the one call into
the backend, and hands back the tokens. It decides nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from streamgen.backends.base import LoadedModel, StepOutputs, empty_outputs
from streamgen.execution.inputs import HeadRows, make_inputs
from streamgen.execution.slots import Slots
from streamgen.messages import StepDone, StepPlan, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Iterator


class Runner:
    """One model on one device. Not thread-safe: one thread calls `execute`."""

    def __init__(self, model: LoadedModel, *, num_slots: int, max_context: int, page_size: int) -> None:
        self._model = model
        self._slots = Slots(num_slots=num_slots, max_context=max_context, page_size=page_size)

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        """Run one step; blocks until the device is done. Plans come in the order of their `step`.

        wake_fd   a file descriptor to which a byte is written once the step runs without the interpreter
        """
        self._take(plan)
        inputs, head = make_inputs(plan, self._slots)
        width = int(head.rows["num_top"].max(initial=0))
        outputs = empty_outputs(len(head.rows), width)
        started = time.perf_counter()
        self._model.step(inputs, outputs, wake_fd)
        seconds = time.perf_counter() - started
        return _results(plan.step, head, outputs, seconds)

    def close(self) -> None:
        """Free the model; idempotent."""
        self._model.close()

    def _take(self, plan: StepPlan) -> None:
        if plan.copies:
            self._model.copy_pages(np.array(plan.copies, np.int32))
        for begin in plan.begins:
            self._slots.begin(begin)
        for slot, pages in zip(plan.slots, plan.pages, strict=True):
            if pages:
                self._slots.append_pages(slot, pages)
        for slot, start, drafts in zip(plan.slots, plan.starts, plan.drafts, strict=False):
            if drafts:
                self._slots.write_ids(slot, start + 1, drafts)


def _results(step: int, head: HeadRows, outputs: StepOutputs, seconds: float) -> StepDone:
    ids = outputs.token.tolist()
    if not any(head.scores) and (head.rows["num_top"] < 0).all():
        return StepDone(step=step, tokens=tuple(_split_ids(ids, head)), seconds=seconds)
    logprobs = _logprobs(head, outputs)
    tokens, drawn, scored = [], [], []
    at = 0
    for num_scores, num_samples in zip(head.scores, head.samples, strict=True):
        middle, end = at + num_scores, at + num_scores + num_samples
        scored.append(tuple(logprobs[at:middle]))
        tokens.append(tuple(ids[middle:end]))
        drawn.append(tuple(logprobs[middle:end]) if end > middle and head.rows["num_top"][middle] >= 0 else ())
        at = end
    return StepDone(step=step, tokens=tuple(tokens), logprobs=tuple(drawn), scores=tuple(scored), seconds=seconds)


def _split_ids(ids: list[int], head: HeadRows) -> Iterator[tuple[int, ...]]:
    at = 0
    for num_samples in head.samples:
        yield tuple(ids[at : at + num_samples])
        at += num_samples


def _logprobs(head: HeadRows, outputs: StepOutputs) -> list[TokenLogprobs]:
    ranks, chosen = outputs.rank.tolist(), outputs.logprob.tolist()
    top_ids, top_logprobs = outputs.top_ids.tolist(), outputs.top_logprobs.tolist()
    return [
        TokenLogprobs(chosen[i], ranks[i], tuple(top_ids[i][:k]), tuple(top_logprobs[i][:k]))
        for i, k in enumerate(max(0, k) for k in head.rows["num_top"].tolist())
    ]
