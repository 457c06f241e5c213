"""After faults and pauses stop, everybody ends within as many steps as there are rows to compute."""

from __future__ import annotations

from random import Random

import pytest

from tests.scheduling.harness import Harness
from tests.scheduling.simulation import TENANTS, Workload, disturb, random_failures, random_limits, trust_everyone


@pytest.mark.parametrize("seed", range(16))
def test_everybody_ends_once_faults_and_pauses_stop(seed: int) -> None:
    random = Random(seed)
    limits = random_limits(random)
    harness = Harness(limits, tenants=TENANTS)
    harness.fails = random_failures(random)
    if random.random() < 0.5:
        trust_everyone(harness)
    workload, depth = Workload(random, limits), random.choice([1, 2, 3])
    for _ in range(60):
        for _ in range(random.choice([0, 0, 1, 1, 2])):
            assert harness.admit(workload.request()) is None
        for _ in range(3):
            disturb(harness, random)
        harness.step(depth=depth)

    harness.fails = lambda sequence: False
    harness.faults.clear()
    harness.resume_all()
    alive = [s for sequences in harness.scheduler._requests.values() for s in sequences]
    harness.run(depth=depth, max_steps=sum(s.num_prompt + s.max_tokens + 1 for s in alive) + depth)
