"""Whole workloads: same request, same output, whatever else happens; nothing leaks, everything ends once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.scheduling.simulation import OracleDrafter, RandomDrafter, WrongDrafter, simulate

if TYPE_CHECKING:
    from streamgen.scheduling.speculation import Drafter


@pytest.mark.parametrize("seed", range(20))
def test_random_workloads(seed: int) -> None:
    simulate(seed, 25)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "drafter", [OracleDrafter(), WrongDrafter(), RandomDrafter(3)], ids=["oracle", "wrong", "random"]
)
def test_drafts_never_change_the_output(seed: int, drafter: Drafter) -> None:
    simulate(100 + seed, 20, drafter=drafter)


@pytest.mark.slow
def test_ten_thousand_requests() -> None:
    for seed in range(100):
        simulate(1000 + seed, 100, drafter=RandomDrafter(seed) if seed % 4 == 0 else None)
