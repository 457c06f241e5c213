"""The pure scheduler and the real runner, step by step on real weights, without an engine.

Verification of drafts, rollback, forks and copies on write all go through the kernels here: whatever the scheduler
plans, a request's output is what it is alone.
"""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

import pytest

from streamgen.backends.base import LoadOptions
from streamgen.backends.cpu import CpuBackend
from streamgen.checkpoints.open import CheckpointWeights, open_checkpoint
from streamgen.execution.runner import Runner
from streamgen.messages import Admit, StepPlan
from streamgen.models.registry import build_program
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.scheduler import Limits, Scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from streamgen.scheduling.sequence import Sequence as ScheduledSequence
    from streamgen.scheduling.speculation import Drafter

PROMPT = (1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 317, 269, 274, 287, 263, 377)
NUM_PAGES, SLOTS, CONTEXT = 64, 8, 256


@pytest.fixture(scope="module")
def runner(shared_data: Path) -> Iterator[Runner]:
    checkpoint = open_checkpoint(shared_data / "models" / "stories260K")
    program = build_program(checkpoint.config, max_context=CONTEXT)
    options = LoadOptions(dtype="bfloat16", max_rows=64, num_pages=NUM_PAGES, max_context=CONTEXT, threads=2)
    model = CpuBackend().load(program, CheckpointWeights(checkpoint), options, lambda done: None)
    yield Runner(model, num_slots=SLOTS, max_context=CONTEXT, page_size=16)
    model.close()
    checkpoint.close()


def request(number: int, *, num_sequences: int = 1, seed: int | None = None, max_tokens: int = 40) -> Admit:
    temperature = 0.0 if seed is None else 0.9
    sampling = ResolvedSampling(temperature=temperature, seed=seed or 0)
    return Admit(
        request_id=number,
        prompt_ids=PROMPT,
        sampling=sampling,
        max_tokens=max_tokens,
        num_sequences=num_sequences,
    )


def run(
    runner: Runner, requests: Sequence[Admit], *, drafter: Drafter | None = None, prefix_cache: bool = False
) -> tuple[dict[tuple[int, int], list[int]], Scheduler]:
    """Outputs by (request, index), with two plans in flight wherever the scheduler gives two."""
    limits = Limits(
        num_pages=NUM_PAGES, max_running=SLOTS, step_tokens=64, max_context=CONTEXT, prefix_cache=prefix_cache
    )
    scheduler = Scheduler(limits, prefix_key=b"key", clock=lambda: 0.0, drafter=drafter)
    for message in requests:
        assert scheduler.admit(message) is None
    outputs: dict[tuple[int, int], list[int]] = {}
    plans: deque[StepPlan] = deque()
    while scheduler.num_open or plans:
        while len(plans) < 2 and (plan := scheduler.plan()) is not None:
            plans.append(plan)
        scheduler.complete(runner.execute(plans.popleft()))
        for progress in scheduler.take_progress():
            outputs.setdefault((progress.request_id, progress.index), []).extend(progress.ids)
    assert scheduler.stats().pages_used == 0
    return outputs, scheduler


class Oracle:
    """Drafts what will come, except that every third guess is wrong."""

    def __init__(self, output: list[int]) -> None:
        self._output = output

    def propose(self, sequence: ScheduledSequence) -> tuple[int, ...]:
        done = sequence.num_outputs
        coming = enumerate(self._output[done : done + 5], done)
        return tuple(token if i % 3 else (token + 1) % 512 for i, token in coming)


class Dice:
    """Drafts at random: nearly everything is rolled back."""

    def __init__(self) -> None:
        self._random = random.Random(3)

    def propose(self, sequence: ScheduledSequence) -> tuple[int, ...]:
        return tuple(self._random.randrange(512) for _ in range(self._random.randrange(5)))


@pytest.mark.parametrize("seed", [None, 11])
def test_drafts_change_no_token(runner: Runner, seed: int | None) -> None:
    expected, _ = run(runner, [request(1, seed=seed)])
    assert len(expected[1, 0]) == 40
    verified, scheduler = run(runner, [request(1, seed=seed)], drafter=Oracle(expected[1, 0]))
    assert verified == expected
    stats = scheduler.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.steps < 40
    assert run(runner, [request(1, seed=seed)], drafter=Dice())[0] == expected


def test_forks_share_the_prompt_and_each_goes_its_own_way(runner: Runner) -> None:
    forked, scheduler = run(runner, [request(1, num_sequences=4, seed=5)])
    assert len({tuple(ids) for ids in forked.values()}) == 4
    assert scheduler.stats().cached_tokens == 3 * (len(PROMPT) - 1)
    alone, _ = run(runner, [request(1, seed=5)])
    assert forked[1, 0] == alone[1, 0]
    beside, _ = run(runner, [request(2, seed=9), request(1, num_sequences=4, seed=5), request(3)])
    assert {key: ids for key, ids in beside.items() if key[0] == 1} == forked


def test_a_cached_prefix_changes_no_token(runner: Runner) -> None:
    expected, _ = run(runner, [request(1, seed=2)])
    several, scheduler = run(runner, [request(n, seed=2, max_tokens=40 - n) for n in range(1, 12)], prefix_cache=True)
    assert scheduler.stats().cached_tokens > 0
    for (number, _), ids in several.items():
        assert ids == expected[1, 0][: 40 - number]
