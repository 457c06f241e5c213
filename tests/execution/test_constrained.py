"""Constrained sequences through scheduler, runner and kernels on small weights, step by step, without an engine.

Whatever the scheduler plans - two steps at a time, drafts, runs, preemption - an output obeys its grammar and is what
it is alone, and nobody else's changes.
"""

from __future__ import annotations

import json
import re
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from streamgen.backends.base import Backend, LoadOptions, StepInputs, StepOutputs
from streamgen.backends.cpu import CpuBackend
from streamgen.backends.reference import ReferenceBackend
from streamgen.checkpoints.open import CheckpointWeights, open_checkpoint
from streamgen.execution.runner import Runner
from streamgen.grammar.vocabulary import GrammarVocabulary
from streamgen.messages import Admit, GrammarUse, StepPlan
from streamgen.models.registry import build_program
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.scheduler import Limits, Scheduler
from streamgen.testing.tiny import write_tiny_model
from tests.execution.test_grammars import Wrapped
from tests.grammar.automata import STRING, automaton, bound

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from streamgen.grammar.grammar import TokenGrammar
    from streamgen.scheduling.scheduler import SchedulerStats
    from streamgen.scheduling.sequence import Sequence as ScheduledSequence
    from streamgen.scheduling.speculation import Drafter

PAGES, SLOTS, CONTEXT, BOS, EOS, USER = 64, 6, 128, 256, 257, 258
WIDE = [b'{"', b'":', b"name", b"true", b"e,", b'"}', b"ag", b"a" * 8, b"zz"]
RECORD = (
    rf'\{{"name":{STRING},"age":(?:0|[1-9][0-9]{{0,3}}),"tags":\[(?:(?:true|false)(?:,(?:true|false)){{0,3}})?\]\}}'
)
REGEXES = {
    "record": RECORD,
    "short": r'\{"name":"[a-z]{0,8}","is":(?:true|false)\}',
    "choice": "(?:yes|no|maybe so)",
    "number": "-?[0-9]{1,6}",
    "unicode": "[а-яё]{2,9}🙂?",
}
Outputs = dict[tuple[int, int], list[int]]
Finishes = dict[tuple[int, int], str | None]


class Model:
    """The tiny model on one backend, and its grammars."""

    def __init__(self, folder: Path, backend: Backend) -> None:
        self._checkpoint = open_checkpoint(folder)
        program = build_program(self._checkpoint.config, max_context=CONTEXT)
        options = LoadOptions(dtype="float32", max_rows=64, num_pages=PAGES, max_context=CONTEXT, threads=2)
        self.loaded = backend.load(program, CheckpointWeights(self._checkpoint), options, lambda done: None)
        self.grammars: dict[str, TokenGrammar] = {}
        # What control characters stand for are longer tokens here; to the model it is all the same.
        tokens = [WIDE[i - 1] if 0 < i <= len(WIDE) else bytes([i]) for i in _byte_order(folder)] + [b""] * 5
        self.vocabulary = GrammarVocabulary(tokens, (EOS,), vocab_size=self.loaded.vocab_size)
        for name, regex in REGEXES.items():
            made = bound(automaton(regex), self.vocabulary)
            self.grammars[name] = made
            self.grammars[f"{name}-matcher"] = Wrapped(made)

    def runner(self) -> Runner:
        return Runner(self.loaded, num_slots=SLOTS, max_context=CONTEXT, page_size=16, grammars=self.grammars)

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(self.vocabulary.tokens[i] for i in ids).decode()

    def close(self) -> None:
        self.loaded.close()
        self._checkpoint.close()


def _byte_order(folder: Path) -> list[int]:
    """The byte of each id."""
    from streamgen.text.byte_level import byte_level_piece_bytes

    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = sorted(vocab, key=vocab.__getitem__)
    return [byte_level_piece_bytes(piece)[0] for piece in pieces[:256]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    write_tiny_model(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    made = Model(folder, CpuBackend())
    yield made
    made.close()


def request(number: int, grammar: str | GrammarUse | None = None, *, max_tokens: int = 60, **fields: Any) -> Admit:
    use = GrammarUse(key=grammar) if isinstance(grammar, str) else grammar
    prompt = tuple(Random(number).choices(range(256), k=5 + number % 7))
    sampling = {"temperature": 0.0} | fields.pop("sampling", {})
    return Admit(
        request_id=number,
        prompt_ids=prompt,
        sampling=ResolvedSampling(**sampling),
        max_tokens=max_tokens,
        stop_ids=(EOS,),
        grammar=use,
        **fields,
    )


def run(runner: Runner, requests: Sequence[Admit], **options: Any) -> tuple[Outputs, Finishes]:
    """Outputs and how each ended, by (request, index)."""
    return run_counting(runner, requests, **options)[:2]


def run_counting(
    runner: Runner,
    requests: Sequence[Admit],
    *,
    drafter: Drafter | None = None,
    num_pages: int = PAGES,
    depth: int = 2,
) -> tuple[Outputs, Finishes, SchedulerStats]:
    """The same, and what the scheduler counted."""
    limits = Limits(num_pages=num_pages, max_running=SLOTS, step_tokens=48, max_context=CONTEXT, prefix_cache=False)
    scheduler = Scheduler(limits, prefix_key=b"key", clock=lambda: 0.0, drafter=drafter)
    if num_pages < PAGES:  # everybody is let in, and room is made by preemption
        scheduler._admission.fits = lambda *sequences, **options: True  # type: ignore[method-assign]
    for message in requests:
        assert scheduler.admit(message) is None
    outputs: Outputs = {}
    finishes: Finishes = {}
    plans: deque[StepPlan] = deque()
    while scheduler.num_open or plans:
        while len(plans) < depth and (plan := scheduler.plan()) is not None:
            plans.append(plan)
        scheduler.complete(runner.execute(plans.popleft()))
        for progress in scheduler.take_progress():
            key = progress.request_id, progress.index
            outputs.setdefault(key, []).extend(progress.ids)
            if progress.finish is not None:
                finishes[key] = progress.finish
    assert scheduler.stats().pages_used == 0
    return outputs, finishes, scheduler.stats()


def check_obeyed(model: Model, requests: Sequence[Admit], outputs: Outputs, finishes: Finishes) -> int:
    """How many constrained outputs were completed; each obeys its grammar, as does the beginning of the others."""
    completed = 0
    for message in requests:
        if message.grammar is None:
            continue
        name = message.grammar.key.removesuffix("-matcher")
        for index in range(message.num_sequences):
            ids = outputs[message.request_id, index]
            ids = ids[:-1] if ids and ids[-1] == EOS else ids
            found = b"".join(model.vocabulary.tokens[i] for i in ids)
            if finishes[message.request_id, index] in ("stop", "complete"):
                assert re.fullmatch(REGEXES[name], found.decode()), found
                completed += 1
            else:
                assert finishes[message.request_id, index] == "length"
                assert automaton(REGEXES[name]).walk(found) is not None, found
    return completed


def mixed(seed: int, *, count: int = 9, kinds: Sequence[str] = ("", "-matcher")) -> list[Admit]:
    """Requests of every kind, half of them constrained."""
    rng, made = Random(seed), []
    for number in range(1, count + 1):
        grammar = rng.choice([*REGEXES, None, None, None])
        sampling = {
            "temperature": rng.choice([0.0, 1.0, 1.6]),
            "seed": rng.randrange(99),
            "top_k": rng.choice([0, 0, 30]),
            "repetition_penalty": rng.choice([1.0, 1.0, 1.2]),
            "logprobs": rng.choice([None, None, None, 2]),
            "min_tokens": rng.choice([0, 0, 5]),
        }
        key = None if grammar is None else grammar + rng.choice(kinds)
        made.append(
            request(
                number, key, sampling=sampling, max_tokens=rng.randrange(5, 80), num_sequences=rng.choice([1, 1, 2])
            )
        )
    return made


def test_greedy_output_obeys_on_both_backends_with_equal_tokens(folder: Path, model: Model) -> None:
    requests = [request(n, name) for n, name in enumerate(REGEXES, 1)] + [request(9)]
    outputs, finishes = run(model.runner(), requests)
    assert check_obeyed(model, requests, outputs, finishes) >= 3
    reference = Model(folder, ReferenceBackend())
    assert run(reference.runner(), requests) == (outputs, finishes)
    reference.close()


def test_each_is_what_it_is_alone(model: Model) -> None:
    for seed in range(3):
        requests = mixed(seed)
        together, finishes = run(model.runner(), requests)
        check_obeyed(model, requests, together, finishes)
        for message in requests:
            alone, ends = run(model.runner(), [message])
            for key, ids in alone.items():
                assert (together[key], finishes[key]) == (ids, ends[key])


def test_neighbours_do_not_notice(model: Model) -> None:
    free = [request(n, sampling={"temperature": 0.9, "seed": n, "logprobs": 1}) for n in (20, 21, 22)]
    alone, _ = run(model.runner(), free)
    beside, _ = run(model.runner(), [request(1, "record"), *free, request(2, "record-matcher"), request(3, "choice")])
    assert {key: ids for key, ids in beside.items() if key in alone} == alone


def test_matchers_draw_what_automata_do(model: Model) -> None:
    for seed in range(3):
        fast, slow = (mixed(seed, kinds=[kind]) for kind in ("", "-matcher"))
        assert run(model.runner(), fast) == run(model.runner(), slow)


@pytest.mark.parametrize("depth", [1, 2])
def test_preemption_in_the_middle_of_a_value(model: Model, depth: int) -> None:
    requests = [request(n, name, max_tokens=70) for n, name in enumerate(["record", "record-matcher"] * 3, 1)]
    expected = run(model.runner(), requests)
    *crowded, stats = run_counting(model.runner(), requests, num_pages=14, depth=depth)
    assert tuple(crowded) == expected
    assert stats.preemptions > 3


def test_likely_tokens_are_drafted_and_most_come_true(model: Model) -> None:
    requests = [request(n, "short", max_tokens=70) for n in range(1, 3)]
    outputs, finishes, stats = run_counting(model.runner(), requests)
    assert check_obeyed(model, requests, outputs, finishes) > 0
    assert 0 < stats.accepted_tokens <= stats.drafted_tokens
    plain = [request(n, "short", max_tokens=70, sampling={"logprobs": 0}) for n in range(1, 3)]
    assert run(model.runner(), plain) == (outputs, finishes), "with no runs either"


class Guess:
    """Drafts what came when the request ran alone, with every fourth token wrong, or bytes at random."""

    def __init__(self, outputs: Mapping[tuple[int, int], list[int]], *, is_wild: bool = False) -> None:
        self._outputs = outputs
        self._random = Random(1)
        self._is_wild = is_wild

    def propose(self, sequence: ScheduledSequence) -> tuple[int, ...]:
        if self._is_wild:
            return tuple(self._random.randrange(260) for _ in range(self._random.randrange(6)))
        output = self._outputs[sequence.request.request_id, sequence.index]
        done = sequence.num_outputs
        guesses = list(enumerate([*output, EOS, EOS, EOS, EOS, EOS]))[done + 1 : done + 6]
        return tuple(token if i % 4 else (token + 1) % 256 for i, token in guesses)


@pytest.mark.parametrize("is_wild", [False, True])
def test_drafts_change_nothing(model: Model, is_wild: bool) -> None:
    for seed in range(3):
        requests = mixed(seed, count=6)
        expected = run(model.runner(), requests)
        assert run(model.runner(), requests, drafter=Guess(expected[0], is_wild=is_wild)) == expected


def test_free_text_a_beginning_and_again(model: Model) -> None:
    """Ids of special tokens begin the grammar: the sampler is made to draw them by a bias."""
    use = GrammarUse(key="choice", begins_after=(USER,), repeats=True)
    bias = {"logit_bias": {USER: 9.0}, "temperature": 1.0}
    requests = [request(n, use, sampling={**bias, "seed": n}, max_tokens=90) for n in range(1, 6)]
    outputs, _ = run(model.runner(), requests)
    parts = [part for ids in outputs.values() for part in _parts(ids, USER)[1:-1]]
    assert len(parts) > 10
    for part in parts:
        text = b"".join(model.vocabulary.tokens[i] for i in part)
        assert re.match(b"yes|no|maybe so", text), text
    for message in requests:
        assert run(model.runner(), [message])[0][message.request_id, 0] == outputs[message.request_id, 0]


def _parts(ids: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def test_a_grammar_that_is_gone_ends_its_sequence_alone(model: Model) -> None:
    requests = [request(1, "nobody's"), request(2, "short"), request(3)]
    outputs, finishes = run(model.runner(), requests)
    assert finishes[1, 0] == "error" and not outputs[1, 0]
    alone, _ = run(model.runner(), requests[1:])
    assert {key: outputs[key] for key in alone} == alone


def test_a_decode_of_constrained_sequences_is_made_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built anew from step to step as long as nothing is forced."""
    runner = model.runner()
    made: list[int] = []
    step = model.loaded.step

    def counted(inputs: StepInputs, outputs: StepOutputs, wake_fd: int | None = None) -> None:
        made.append(id(inputs))
        step(inputs, outputs, wake_fd)

    monkeypatch.setattr(model.loaded, "step", counted)
    run(runner, [request(n, "unicode-matcher" if n % 2 else "number", max_tokens=6) for n in range(1, 5)], depth=1)
    assert len(set(made)) < len(made)


def test_sleeping_forgets_grammars(model: Model) -> None:
    runner = model.runner()
    requests = [request(1, "record"), request(2)]
    expected = run(runner, requests)
    runner.sleep(keep_weights=True)
    assert run(runner, requests) == expected
    assert np.isfinite(model.loaded.resident_bytes())
