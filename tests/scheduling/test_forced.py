"""Tokens that grammars force: several in one step, known before they are computed, cut where the output ends."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.scheduling.hash_model import forcing, make_request, solo_output
from tests.scheduling.simulation import OracleDrafter, WrongDrafter
from tests.scheduling.small import make_harness, planned, prompt_of

if TYPE_CHECKING:
    from streamgen.messages import Admit


def test_forced_tokens_are_the_rows_of_one_step() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(5), max_tokens=10, grammar=forcing(5, 3)))
    harness.step()
    harness.step()  # the second token; the three after it follow without a choice
    assert harness.outcomes[1, 0].ids == solo_output(harness.requests[1], 0, 5)
    plan = planned(harness)
    assert (plan.starts, plan.counts, plan.samples) == ((6,), (4,), (1,))
    harness.complete()
    harness.run()


def test_a_row_that_was_under_way_brings_nothing_new() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(5), max_tokens=10, grammar=forcing(5, 3)))
    harness.step()
    planned(harness)
    planned(harness)
    harness.complete()
    assert len(harness.outcomes[1, 0].ids) == 5
    harness.complete()  # the first of the forced ones, drawn
    assert len(harness.outcomes[1, 0].ids) == 5
    plan = planned(harness)
    assert (plan.starts, plan.counts, plan.samples) == ((7,), (3,), (1,))
    harness.complete()
    harness.run(depth=2)


def test_the_end_of_a_grammar_ends_the_sequence() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(5), max_tokens=20, grammar=forcing(5, 3, end=10)))
    harness.run(depth=2)
    assert harness.outcomes[1, 0].finish == "complete"
    assert len(harness.outcomes[1, 0].ids) == 10


def test_max_tokens_cuts_a_run() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(5), max_tokens=9, grammar=forcing(5, 3, end=10)))
    harness.run(depth=2)
    assert harness.outcomes[1, 0].finish == "length"


def test_what_is_likely_is_drafted_behind_a_row_that_is_under_way() -> None:
    harness = make_harness()
    harness.admit(make_request(1, prompt_of(5), max_tokens=12, grammar=forcing(50, 0, guess=4)))
    output = solo_output(harness.requests[1], 0, 12)
    planned(harness)
    planned(harness)
    harness.complete()
    second = planned(harness)  # behind the row of the first token, which may bring what was guessed
    assert (second.starts, second.counts, second.samples) == ((6,), (4,), (4,))
    assert second.drafts == ((2, 0, 1),)
    third = planned(harness)  # as if all of it came true
    assert (third.starts, third.counts, third.samples) == ((10,), (1,), (1,))
    harness.complete()
    harness.complete()
    assert harness.outcomes[1, 0].ids == output[: len(harness.outcomes[1, 0].ids)]
    harness.run(depth=2)
    assert harness.scheduler.stats().accepted_tokens > 0


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_gives_what_each_gives_alone(seed: int) -> None:
    rng = random.Random(seed)
    drafter = rng.choice([None, None, OracleDrafter(3), WrongDrafter()])
    harness = make_harness(drafter=drafter, num_pages=rng.choice([14, 20, 64]), step_tokens=rng.choice([8, 16, 64]))
    for request_id in range(1, 25):
        harness.admit(_random_request(rng, request_id))
        for _ in range(rng.randrange(4)):
            harness.step(depth=rng.choice([1, 2]))
        if rng.random() < 0.1:
            harness.cancel(rng.randint(1, request_id))
        if rng.random() < 0.05 and harness.can_fail:
            harness.fail(rng.choice(["error", "lost"]))
    harness.run(depth=2)


def _random_request(rng: random.Random, request_id: int) -> Admit:
    period = rng.randint(2, 8)
    end, guess = rng.choice([None, rng.randint(1, 18)]), rng.choice([0, 0, 2, 5])
    grammar = forcing(period, rng.randint(0, min(period - 1, 5)), end=end, guess=guess)
    return make_request(
        request_id,
        prompt_of(rng.randint(1, 12), rng.randint(0, 30)),
        max_tokens=rng.randint(1, 20),
        seed=rng.randint(0, 3),
        stop_ids=rng.choice([(), (5,)]),
        num_sequences=rng.choice([1, 1, 2]),
        grammar=None if rng.random() < 0.3 else grammar,
    )
