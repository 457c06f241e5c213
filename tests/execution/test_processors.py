"""Logits processors on real weights: what they may do, what becomes of bad ones, and that neighbours see nothing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from msgspec.structs import replace

from streamgen.backends.base import LoadOptions
from streamgen.backends.cpu import CpuBackend, CpuModel
from streamgen.backends.reference import ReferenceBackend
from streamgen.checkpoints.open import CheckpointWeights, open_checkpoint
from streamgen.execution.processors import MAX_STUCK, ProcessorFault, ProcessorRow, ProcessorThread
from streamgen.execution.runner import Runner
from streamgen.messages import Begin, StepDone, StepPlan
from streamgen.models.registry import build_program
from streamgen.sampling import ResolvedSampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from streamgen.backends.base import Backend, Float32Array, Int32Array, LoadedModel

PROMPT = (1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 317, 269, 274, 287, 263, 377)
VOCAB = 512
PAGES_EACH = 5
SAMPLINGS = {
    "greedy": ResolvedSampling(temperature=0.0),
    "drawn": ResolvedSampling(temperature=0.9, seed=5),
    "all": ResolvedSampling(
        temperature=1.3,
        seed=7,
        top_k=60,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
        frequency_penalty=0.3,
        logit_bias={5: 2.0, 300: -4.0},
        logprobs=4,
    ),
}


def load(path: Path, backend: Backend, dtype: str = "bfloat16") -> LoadedModel:
    checkpoint = open_checkpoint(path)
    program = build_program(checkpoint.config, max_context=80)
    options = LoadOptions(dtype=dtype, max_rows=96, num_pages=5 * PAGES_EACH, max_context=80, threads=2)
    model = backend.load(program, CheckpointWeights(checkpoint), options, lambda done: None)
    checkpoint.close()
    return model


@pytest.fixture(scope="module", params=["cpu", "reference"])
def model(request: pytest.FixtureRequest, shared_data: Path) -> Iterator[LoadedModel]:
    backend = CpuBackend() if request.param == "cpu" else ReferenceBackend()
    loaded = load(shared_data / "models" / "stories260K", backend)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def cpu_model(shared_data: Path) -> Iterator[LoadedModel]:
    loaded = load(shared_data / "models" / "stories260K", CpuBackend())
    yield loaded
    loaded.close()


class Batch:
    """Sequences that start together and draw one token each a step; nothing is ever stopped."""

    def __init__(self, model: LoadedModel, *, seconds: float = 5.0) -> None:
        self.table: dict[int, tuple[Callable[..., object], ...]] = {}
        self.runner = Runner(
            model,
            num_slots=5,
            max_context=80,
            page_size=16,
            processors=self.table,
            processor_seconds=seconds,
        )
        self.done: list[StepDone] = []
        self._begins: list[Begin] = []

    def add(
        self,
        sampling: ResolvedSampling,
        *processors: Callable[..., object],
        request: int | None = None,
        sample_index: int = 0,
        prompt: tuple[int, ...] = PROMPT,
    ) -> None:
        """A sequence in the next slot; `request` is one whose processors are in the table already."""
        slot = len(self._begins)
        if processors:
            request = 100 + slot
            self.table[request] = processors
        self._begins.append(
            Begin(
                slot=slot,
                ids=prompt,
                num_prompt=len(prompt),
                sampling=sampling,
                pages=tuple(range(slot * PAGES_EACH, (slot + 1) * PAGES_EACH)),
                sample_index=sample_index,
                processors=request,
            )
        )

    def plan(self, step: int) -> StepPlan:
        slots = tuple(range(len(self._begins)))
        lengths = [len(begin.ids) for begin in self._begins]
        return StepPlan(
            step=step,
            begins=tuple(self._begins) if step == 0 else (),
            slots=slots,
            starts=tuple(n + step - 1 if step else 0 for n in lengths),
            counts=tuple(1 if step else n for n in lengths),
            samples=(1,) * len(slots),
            pages=((),) * len(slots),
        )

    def run(self, steps: int) -> list[list[int]]:
        """Outputs of each sequence."""
        for step in range(steps):
            self.done.append(self.runner.execute(self.plan(step)))
        return [[done.tokens[slot][0] for done in self.done] for slot in range(len(self._begins))]

    def faults(self) -> dict[int, str]:
        """Per slot its first fault."""
        found: dict[int, str] = {}
        for done in self.done:
            for fault in done.faults:
                assert fault.code == "processor_error"
                found.setdefault(fault.index, fault.message)
        return found


def alone(model: LoadedModel, sampling: ResolvedSampling, steps: int = 20, *processors: Callable[..., object]) -> Any:
    batch = Batch(model)
    batch.add(sampling, *processors)
    return batch.run(steps)[0], [done.logprobs for done in batch.done]


def nothing(ids: Int32Array, logits: Float32Array) -> None:
    pass


def forbid(*banned: int) -> Callable[[Int32Array, Float32Array], None]:
    def processor(ids: Int32Array, logits: Float32Array) -> None:
        logits[list(banned)] = -np.inf

    return processor


def force(tokens: Sequence[int]) -> Callable[[Int32Array, Float32Array], Float32Array]:
    def processor(ids: Int32Array, logits: Float32Array) -> Float32Array:
        only = np.full_like(logits, -np.inf)
        only[tokens[len(ids) - len(PROMPT)]] = 0
        return only

    return processor


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("same", [nothing, lambda ids, logits: logits, lambda ids, logits: logits.copy()])
def test_a_processor_that_changes_nothing_changes_no_bit(
    model: LoadedModel, sampling: ResolvedSampling, same: Callable[..., object]
) -> None:
    expected, logprobs = alone(model, sampling)
    got, got_logprobs = alone(model, sampling, 20, same)
    assert got == expected
    assert got_logprobs == logprobs


@pytest.mark.parametrize("name", ["greedy", "drawn"])
def test_a_forbidden_token_never_comes(model: LoadedModel, name: str) -> None:
    free, _ = alone(model, SAMPLINGS[name])
    banned = {free[0], free[5]}
    held, _ = alone(model, SAMPLINGS[name], 20, forbid(*banned))
    assert banned.isdisjoint(held)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_forced_text_comes_and_logprobs_stay_the_models_own(model: LoadedModel, sampling: ResolvedSampling) -> None:
    wanted = [7, 7, 450, 12, 3, 400]
    sampling = replace(sampling, logprobs=2, repetition_penalty=1.0)
    batch = Batch(model)
    batch.add(sampling, force(wanted))
    assert batch.run(6)[0] == wanted
    first = batch.done[0].logprobs[0][0]
    _, free = alone(model, replace(sampling, temperature=0.0), 1)
    assert first.logprob < free[0][0][0].logprob < 0  # not 0, which is what the processor made of it
    assert first.top_ids == free[0][0][0].top_ids and first.top_logprobs == free[0][0][0].top_logprobs


def test_changes_in_place_do_not_touch_logprobs(model: LoadedModel) -> None:
    sampling = ResolvedSampling(temperature=0.0, logprobs=3)
    free, logprobs = alone(model, sampling, 1)
    batch = Batch(model)
    batch.add(sampling, forbid(free[0]))
    assert batch.run(1)[0] != free
    held = batch.done[0].logprobs[0][0]
    likeliest = logprobs[0][0][0]
    assert held.top_ids == likeliest.top_ids and held.top_logprobs == likeliest.top_logprobs
    assert (held.rank, held.logprob) == (2, likeliest.top_logprobs[1])


def test_what_one_returns_the_next_can_write(model: LoadedModel) -> None:
    one = np.broadcast_to(np.float32(0), (VOCAB,))
    assert not one.flags.writeable
    got, _ = alone(model, SAMPLINGS["greedy"], 2, lambda ids, logits: one, forbid(0, 1))
    assert got == [2, 2] and not one.any()


def test_processors_run_in_order_and_see_every_id(model: LoadedModel) -> None:
    seen: list[tuple[list[int], str]] = []

    def first(ids: Int32Array, logits: Float32Array) -> Float32Array:
        seen.append((ids.tolist(), "first"))
        assert ids.dtype == np.int32 and logits.shape == (VOCAB,) and logits.dtype == np.float32
        return np.zeros_like(logits)

    def second(ids: Int32Array, logits: Float32Array) -> None:
        seen.append((ids.tolist(), "second"))
        logits[9 + logits.any()] = 1.0  # 9, if the first one came before

    got, _ = alone(model, SAMPLINGS["greedy"], 4, first, second)
    assert got == [9] * 4
    expected = [[*PROMPT, *got[:n]] for n in range(4)]
    assert seen == [(ids, name) for ids in expected for name in ("first", "second")]


def test_what_follows_the_processors(model: LoadedModel) -> None:
    flat = lambda ids, logits: np.zeros_like(logits)  # noqa: E731
    bias = ResolvedSampling(temperature=0.0, logit_bias={44: 1.0})
    assert alone(model, bias, 1, flat)[0] == [44]
    penalty = ResolvedSampling(temperature=0.0, presence_penalty=1.0)
    assert alone(model, penalty, 4, flat)[0] == [0, 1, 2, 3]
    top_k = ResolvedSampling(temperature=1.0, top_k=1, seed=3)
    assert alone(model, top_k, 3, lambda ids, logits: np.arange(VOCAB, dtype=np.float32))[0] == [VOCAB - 1] * 3


def test_sequences_of_one_request_each_have_their_own_ids(model: LoadedModel) -> None:
    sampling = SAMPLINGS["drawn"]
    batch = Batch(model)
    batch.table[7] = (forbid(261),)
    for index in range(3):
        batch.add(sampling, request=7, sample_index=index)
    together = batch.run(12)
    assert len({tuple(ids) for ids in together}) == 3
    for index, ids in enumerate(together):
        single = Batch(model)
        single.table[1] = (forbid(261),)
        single.add(sampling, request=1, sample_index=index)
        assert single.run(12)[0] == ids


def test_ids_cannot_be_written_and_logits_are_private(model: LoadedModel) -> None:
    kept: list[Float32Array] = []

    def keeper(ids: Int32Array, logits: Float32Array) -> None:
        assert not ids.flags.writeable
        kept.append(logits)
        for old in kept[:-1]:
            old[:] = 1e9  # late writes

    assert alone(model, SAMPLINGS["all"], 12, keeper) == alone(model, SAMPLINGS["all"], 12)


def raises(ids: Int32Array, logits: Float32Array) -> None:
    raise ZeroDivisionError("the prompt was secret")


def leaves(ids: Int32Array, logits: Float32Array) -> None:
    raise SystemExit("secret")


def writes_nan(ids: Int32Array, logits: Float32Array) -> None:
    logits[3] = np.nan


def writes_ids(ids: Int32Array, logits: Float32Array) -> None:
    ids[0] = 3


BAD: dict[str, tuple[Callable[..., object], str]] = {
    "raise": (raises, "processors[0]: raised ZeroDivisionError"),
    "exit": (leaves, "processors[0]: raised SystemExit"),
    "nan": (writes_nan, "processors[0]: expected numbers as logits, got NaN"),
    "ids": (writes_ids, "processors[0]: raised ValueError"),
    "nothing left": (
        lambda ids, logits: np.full_like(logits, -np.inf),
        "processors[0]: expected a logit above -inf, got none: no token is left",
    ),
    "shape": (
        lambda ids, logits: logits[:-1],
        "processors[0]: expected None or a float32 array of shape (512,), got float32 of shape (511,)",
    ),
    "two rows": (
        lambda ids, logits: logits[None],
        "processors[0]: expected None or a float32 array of shape (512,), got float32 of shape (1, 512)",
    ),
    "dtype": (
        lambda ids, logits: logits.astype(np.float64),
        "processors[0]: expected None or a float32 array of shape (512,), got float64 of shape (512,)",
    ),
    "type": (
        lambda ids, logits: logits.tolist(),
        "processors[0]: expected None or a float32 array of shape (512,), got list",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("when", [0, 3])
def test_a_bad_processor_ends_its_own_sequence_alone(model: LoadedModel, kind: str, when: int) -> None:
    bad, message = BAD[kind]
    others = [(SAMPLINGS["greedy"], ()), (SAMPLINGS["all"], (forbid(261),)), (SAMPLINGS["drawn"], ())]
    expected = [alone(model, sampling, 10, *processors) for sampling, processors in others]
    batch = Batch(model)
    batch.add(*_flat(others[0]))
    calls: list[int] = []

    def turns_bad(ids: Int32Array, logits: Float32Array) -> object:
        calls.append(len(ids))
        return bad(ids, logits) if len(ids) >= len(PROMPT) + when else None

    batch.add(SAMPLINGS["drawn"], turns_bad)
    for other in others[1:]:
        batch.add(*_flat(other))
    outputs = batch.run(10)
    assert batch.faults() == {1: message}
    assert [[fault.index for fault in done.faults] for done in batch.done] == [[]] * when + [[1]] * (10 - when)
    assert len(calls) == when + 1  # it is not asked again
    assert {done.tokens[1] for done in batch.done[when:]} == {(-1,)}  # nothing was drawn
    for slot, (ids, logprobs) in zip((0, 2, 3), expected, strict=True):
        assert outputs[slot] == ids
        if isinstance(model, CpuModel):  # torch's products of other shapes have other bits
            got = [done.logprobs[slot] if done.logprobs else () for done in batch.done]
            assert got == [step[0] if step else () for step in logprobs]


def _flat(other: tuple[ResolvedSampling, tuple[Callable[..., object], ...]]) -> Any:
    return other[0], *other[1]


def test_the_guilty_one_of_several_is_named(model: LoadedModel) -> None:
    batch = Batch(model)
    batch.add(SAMPLINGS["greedy"], nothing, writes_nan, raises)
    batch.run(1)
    assert batch.faults() == {0: "processors[1]: expected numbers as logits, got NaN"}


def test_a_processor_that_blocks_is_left_behind(cpu_model: LoadedModel) -> None:
    expected = [alone(cpu_model, SAMPLINGS["drawn"], 8), alone(cpu_model, SAMPLINGS["all"], 8, forbid(261))]
    free = threading.Event()
    late: list[threading.Thread] = []

    def blocks(ids: Int32Array, logits: Float32Array) -> None:
        if len(ids) == len(PROMPT) + 2:
            late.append(threading.current_thread())
            free.wait()
            logits[:] = 1e9

    batch = Batch(cpu_model, seconds=0.05)
    batch.add(SAMPLINGS["drawn"])
    batch.add(SAMPLINGS["greedy"], blocks)
    batch.add(SAMPLINGS["all"], forbid(261))
    for step in range(4):
        batch.done.append(batch.runner.execute(batch.plan(step)))
    assert batch.faults() == {1: "processors: took longer than 0.05 s"}
    assert late[0].is_alive() and late[0].daemon
    free.set()
    late[0].join(10)
    assert not late[0].is_alive()  # replaced: it has nothing to do any more
    for step in range(4, 8):
        batch.done.append(batch.runner.execute(batch.plan(step)))
    for slot, (ids, _) in zip((0, 2), expected, strict=True):
        assert [done.tokens[slot][0] for done in batch.done] == ids
    batch.runner._processor_thread.close()


def test_rows_that_were_done_in_time_count(cpu_model: LoadedModel) -> None:
    free = threading.Event()
    calls: list[threading.Thread] = []

    def blocks_the_second(ids: Int32Array, logits: Float32Array) -> None:
        calls.append(threading.current_thread())
        if len(calls) == 2:
            free.wait()

    batch = Batch(cpu_model, seconds=0.05)
    batch.table[7] = (blocks_the_second,)
    for index in range(3):
        batch.add(SAMPLINGS["drawn"], request=7, sample_index=index)
    outputs = batch.run(1)
    free.set()
    calls[0].join(10)
    assert len(calls) == 2  # the third was given up before it began
    assert sorted(batch.faults()) == [1, 2]
    assert outputs[0] == alone(cpu_model, SAMPLINGS["drawn"], 1)[0]


def test_a_request_that_has_ended_gets_a_fault_and_a_new_sequence_in_its_slot_none(cpu_model: LoadedModel) -> None:
    batch = Batch(cpu_model)
    batch.add(SAMPLINGS["greedy"], forbid(261))
    batch.run(1)
    batch.table.clear()
    assert batch.runner.execute(batch.plan(1)).faults[0].code == "processor_error"
    again = batch.plan(0)
    done = batch.runner.execute(replace(again, begins=(replace(again.begins[0], processors=None),)))
    assert done.faults == () and done.tokens[0] == (alone(cpu_model, SAMPLINGS["greedy"], 1)[0][0],)
    batch.table[9] = (force([77]),)
    done = batch.runner.execute(replace(again, begins=(replace(again.begins[0], processors=9),)))
    assert done.faults == () and done.tokens[0] == (77,)


def test_without_processors_no_logits_are_written_and_no_thread_runs(cpu_model: LoadedModel) -> None:
    class Watched:
        vocab_size = VOCAB
        sizes: list[int] = []  # noqa: RUF012

        def step(self, inputs: Any, outputs: Any, wake_fd: int | None = None) -> None:
            self.sizes.append(outputs.logits.size)
            cpu_model.step(inputs, outputs, wake_fd)

    before = {t.name for t in threading.enumerate()}
    batch = Batch(Watched())  # type: ignore[arg-type]  # `sample` is not there: it must not be called
    batch.add(SAMPLINGS["drawn"])
    batch.run(3)
    assert Watched.sizes == [0, 0, 0]
    assert {t.name for t in threading.enumerate()} <= before | {"streamgen-processors"}


def test_drafts_and_prompt_scores_beside_processors(cpu_model: LoadedModel) -> None:
    """k + 1 rows of one sequence draw, each after its own ids; rows that only score are left alone."""
    expected, _ = alone(cpu_model, SAMPLINGS["drawn"], 6, forbid(261))
    batch = Batch(cpu_model)
    batch.add(replace(SAMPLINGS["drawn"], prompt_logprobs=0), forbid(261))
    first = batch.plan(0)
    done = batch.runner.execute(replace(first, begins=(replace(first.begins[0], score_from=1),)))
    assert done.tokens == ((expected[0],),) and len(done.scores[0]) == len(PROMPT) - 1
    length = len(PROMPT)
    drafts = (*expected[1:3], 300, 301)
    done = batch.runner.execute(
        StepPlan(step=1, slots=(0,), starts=(length,), counts=(5,), samples=(5,), pages=((),), drafts=(drafts,))
    )
    assert list(done.tokens[0][:3]) == expected[1:4]


# ---- the thread ----


def row() -> ProcessorRow:
    return ProcessorRow(np.zeros(3, np.int32), np.zeros(8, np.float32))


def test_stuck_threads_are_counted() -> None:
    thread = ProcessorThread(0.01)
    free = threading.Event()

    def blocks(ids: Int32Array, logits: Float32Array) -> None:
        free.wait()

    for _ in range(MAX_STUCK):
        (fault,) = thread.run((blocks,), [row()])
        assert isinstance(fault, ProcessorFault) and "took longer than 0.01 s" in str(fault)
    (fault,) = thread.run((nothing,), [row()])
    assert isinstance(fault, ProcessorFault) and "have not returned yet" in str(fault)
    free.set()
    for worker in thread._stuck:
        worker.join(10)
    patient = ProcessorThread(10.0)
    patient._stuck = thread._stuck
    (result,) = patient.run((nothing,), [row()])
    assert isinstance(result, np.ndarray)
    patient.close()
    patient.close()


def test_a_closed_thread_ends() -> None:
    threads: list[threading.Thread] = []
    thread = ProcessorThread(10.0)
    thread.run((lambda ids, logits: threads.append(threading.current_thread()),), [row()])
    thread.close()
    assert not threads[0].is_alive()
