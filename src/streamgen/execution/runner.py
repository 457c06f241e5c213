"""Runs plans: the synchronous heart of an executor, driven by its device thread.

It keeps what the device must know of the running sequences (`Slots`), turns a plan into arrays, makes the one call into
the backend, and hands back the tokens. It decides nothing.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from streamgen.backends.base import LoadedModel, StepOutputs, empty_outputs
from streamgen.execution.grammars import NOTHING_TAKEN, Drawn, Grammars, Taken
from streamgen.execution.inputs import Decode, HeadRows, make_inputs
from streamgen.execution.processors import PROCESSOR_SECONDS, ProcessorFault, ProcessorRow, ProcessorThread
from streamgen.execution.slots import Slots
from streamgen.messages import Fault, StepDone, StepPlan, TokenLogprobs
from streamgen.scheduling.sequence import count_agreeing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from streamgen.backends.base import Float32Array, StepInputs
    from streamgen.grammar.grammar import TokenGrammar


class Runner:
    """One model on one device. Not thread-safe: one thread calls `execute`, and nobody else anything meanwhile.

    processors          logits processors by request id, see `Begin.processors`; owned by who accepts requests
    processor_seconds   how long those of one request may take in one step
    grammars            by key, see `GrammarUse`; owned likewise
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_slots: int,
        max_context: int,
        page_size: int,
        processors: Mapping[int, tuple[Callable[..., object], ...]] | None = None,
        processor_seconds: float = PROCESSOR_SECONDS,
        grammars: Mapping[str, TokenGrammar] | None = None,
    ) -> None:
        self._model: LoadedModel | None = model
        table = {} if grammars is None else grammars
        self._make_grammars = partial(Grammars, table, num_slots=num_slots, vocab_size=model.vocab_size)
        self._make_slots = partial(Slots, num_slots=num_slots, max_context=max_context, page_size=page_size)
        self._slots = self._make_slots(grammars=self._make_grammars())
        self._decode: Decode | None = None  # of the last step, if it was one
        self._processors = {} if processors is None else processors
        self._processor_thread = ProcessorThread(processor_seconds)

    def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
        """Run one step; blocks until the device is done. Plans come in the order of their `step`.

        wake_fd   a file descriptor to which a byte is written once the step runs without the interpreter
        """
        model = self._model
        assert model is not None, "the runner sleeps or is closed"
        self._take(plan, model)
        stale = self._slots.find_stale(plan)
        decode = self._decode
        if decode is not None and not stale and decode.repeats(plan):
            return _run_decode(decode, plan, model, wake_fd)
        inputs, head = make_inputs(plan, self._slots, stale)
        if not stale and Decode.is_one(plan, self._slots, head):
            self._decode = decode = Decode(plan, inputs, head, self._slots.grammars)
            return _run_decode(decode, plan, model, wake_fd)
        self._decode = None
        return self._run(plan, model, inputs, head, wake_fd)

    def _run(
        self, plan: StepPlan, model: LoadedModel, inputs: StepInputs, head: HeadRows, wake_fd: int | None
    ) -> StepDone:
        """A step of any kind."""
        width = int(head.rows["num_top"].max(initial=0))
        vocab = model.vocab_size if head.num_logits else 0
        outputs = empty_outputs(len(head.rows), width, num_logits=head.num_logits, vocab=vocab)
        started = time.perf_counter()
        model.step(inputs, outputs, wake_fd)
        faults = self._process(plan, model, inputs, head, outputs) if head.num_logits else ()
        taken = self._take_drawn(plan, head, outputs)
        seconds = time.perf_counter() - started
        done = _results(plan.step, head, outputs, seconds)
        return _said(done, faults, taken) if faults or taken is not NOTHING_TAKEN else done

    def resident_bytes(self) -> int:
        """Bytes of pages and workspace that are in memory now. Any thread; 0 while there is no model."""
        model = self._model
        return 0 if model is None else model.resident_bytes()

    def sleep(self, *, keep_weights: bool) -> None:
        """Give the pages back, and the weights unless they are kept; what the slots held is forgotten."""
        if self._model is None:
            return
        if keep_weights:
            self._model.drop_pages()
        else:
            self._model.close()
            self._model = None
        self._slots = self._make_slots(grammars=self._make_grammars())
        self._decode = None  # its arrays were the slots'

    @property
    def has_model(self) -> bool:
        """Whether the weights are there."""
        return self._model is not None

    def wake(self, model: LoadedModel) -> None:
        """Go on with a model that was loaded again."""
        self._model = model

    def close(self) -> None:
        """Free the model; idempotent."""
        self._processor_thread.close()
        model, self._model = self._model, None
        if model is not None:
            model.close()

    def _take(self, plan: StepPlan, model: LoadedModel) -> None:
        if plan.copies:
            model.copy_pages(np.array(plan.copies, np.int32))
        for begin in plan.begins:
            self._slots.begin(begin)
        if any(plan.pages):
            for slot, pages in zip(plan.slots, plan.pages, strict=True):
                if pages:
                    self._slots.append_pages(slot, pages)
        for slot, start, drafts in zip(plan.slots, plan.starts, plan.drafts, strict=False):
            if drafts:
                self._slots.write_ids(slot, start + 1, drafts)

    def _take_drawn(self, plan: StepPlan, head: HeadRows, outputs: StepOutputs) -> Taken:
        """What grammars say to the tokens; then those that follow verified drafts are written behind them."""
        slots = self._slots
        taken = NOTHING_TAKEN
        if slots.grammars.concern(head.rows):
            places = np.repeat(np.arange(len(plan.slots), dtype=np.int32), np.add(head.scores, head.samples))
            taken = slots.grammars.take(Drawn(head.rows, outputs.token, slots.tokens, places))
        if max(plan.samples) > 1:
            self._write_verified(plan, list(_split_ids(outputs.token.tolist(), head)))
        return taken

    def _write_verified(self, plan: StepPlan, drawn: list[tuple[int, ...]]) -> None:
        for slot, start, count, drafts, ids in zip(
            plan.slots, plan.starts, plan.counts, plan.drafts, drawn, strict=True
        ):
            if len(ids) > 1:
                kept = count_agreeing(drafts[1 - len(ids) :], ids)
                end = start + count - len(ids) + 1 + kept
                self._slots.tokens[slot, end] = ids[kept]
                if kept + 1 < len(ids):
                    self._slots.behind[slot] = end

    def _process(
        self, plan: StepPlan, model: LoadedModel, inputs: StepInputs, head: HeadRows, outputs: StepOutputs
    ) -> tuple[Fault, ...]:
        """Run the processors of the rows whose logits were written out, and draw their tokens."""
        changed = np.empty_like(outputs.logits)
        faults = []
        for request, group in self._groups(plan, head).items():
            for sequence, found in self._run_processors(request, group, head, outputs):
                if isinstance(found, ProcessorFault):
                    faults.append(Fault(sequence.index, "processor_error", str(found)))
                    self._slots.failed.add(sequence.slot)
                    head.rows["logits"][sequence.rows] = -1  # nothing is drawn
                else:
                    changed[head.rows["logits"][sequence.rows]] = found
        model.sample(inputs, outputs, changed)
        return tuple(faults)

    def _groups(self, plan: StepPlan, head: HeadRows) -> dict[int, list[_Drawing]]:
        """The sequences that have processors and draw in this step, by request."""
        groups: dict[int, list[_Drawing]] = {}
        at = 0
        for index, (slot, scores, samples) in enumerate(zip(plan.slots, head.scores, head.samples, strict=True)):
            request = self._slots.processors.get(slot)
            if request is not None and samples:
                rows = slice(at + scores, at + scores + samples)
                groups.setdefault(request, []).append(_Drawing(index, slot, rows))
            at += scores + samples
        return groups

    def _run_processors(
        self, request: int, group: list[_Drawing], head: HeadRows, outputs: StepOutputs
    ) -> Iterator[tuple[_Drawing, list[Float32Array] | ProcessorFault]]:
        """Per sequence of one request, the changed logits of its rows, or the first fault among them."""
        going = [sequence for sequence in group if sequence.slot not in self._slots.failed]
        functions = self._processors.get(request)
        gone = ProcessorFault("processors: failed before, or their request has ended")
        results: Iterator[Float32Array | ProcessorFault] = iter(())
        if functions is not None and going:
            rows = [self._row(sequence.slot, i, head, outputs) for sequence in going for i in sequence.indices()]
            results = iter(self._processor_thread.run(functions, rows))
        for sequence in group:
            found = list(islice(results, len(sequence.indices()))) if sequence in going else []
            fault = next((f for f in found if isinstance(f, ProcessorFault)), None if found else gone)
            yield sequence, fault or [f for f in found if not isinstance(f, ProcessorFault)]

    def _row(self, slot: int, index: int, head: HeadRows, outputs: StepOutputs) -> ProcessorRow:
        """Copies: a processor that is late must not see, nor change, what the next step works on."""
        row = head.rows[index]
        ids = self._slots.tokens[slot, : row["position"] + 1].copy()
        ids.flags.writeable = False
        return ProcessorRow(ids, outputs.logits[row["logits"]].copy())


class _Drawing(Struct, frozen=True):
    """A sequence that draws from logits which processors change: its place in the plan, its slot, its head rows."""

    index: int
    slot: int
    rows: slice

    def indices(self) -> range:
        return range(self.rows.start, self.rows.stop)


def _run_decode(decode: Decode, plan: StepPlan, model: LoadedModel, wake_fd: int | None) -> StepDone:
    decode.advance(plan.starts)
    started = time.perf_counter()
    model.step(decode.inputs, decode.outputs, wake_fd)
    taken = decode.take()
    seconds = time.perf_counter() - started
    done = StepDone(step=plan.step, tokens=tuple(zip(decode.outputs.token.tolist())), seconds=seconds)
    return done if taken is NOTHING_TAKEN else _said(done, (), taken)


def _said(done: StepDone, faults: tuple[Fault, ...], taken: Taken) -> StepDone:
    """With what processors and grammars said to it."""
    tokens, logprobs = list(done.tokens), list(done.logprobs)
    for place, num_kept in taken.cuts.items():
        tokens[place] = tokens[place][:num_kept]
        if logprobs:
            logprobs[place] = logprobs[place][:num_kept]
    return replace(
        done, tokens=tuple(tokens), logprobs=tuple(logprobs), faults=faults + taken.faults, turns=taken.turns
    )


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
    return StepDone(
        step=step,
        tokens=tuple(tokens),
        logprobs=tuple(drawn),
        scores=tuple(scored),
        seconds=seconds,
    )


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
