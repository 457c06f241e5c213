"""The cost model: what a plan costs, and that a fit finds what made the figures."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from streamgen import sync
from streamgen.errors import ConfigError
from streamgen.messages import StepPlan
from streamgen.testing.simulator import CostModel, StepSample

if TYPE_CHECKING:
    from pathlib import Path


def plan_of(starts: tuple[int, ...], counts: tuple[int, ...]) -> StepPlan:
    n = len(starts)
    return StepPlan(step=0, slots=tuple(range(n)), starts=starts, counts=counts, samples=(1,) * n, pages=((),) * n)


@pytest.mark.parametrize(
    ("starts", "counts"), [((0,), (1,)), ((9,), (1,)), ((0,), (7,)), ((5, 0, 12), (3, 4, 1)), ((100,), (33,))]
)
def test_a_row_attends_to_itself_and_all_before_it(starts: tuple[int, ...], counts: tuple[int, ...]) -> None:
    context = sum(p + 1 for start, count in zip(starts, counts, strict=True) for p in range(start, start + count))
    plan = plan_of(starts, counts)
    assert CostModel(step=1.0, row=0.0, context=0.5).seconds(plan) == 1.0 + 0.5 * context
    assert CostModel(step=1.0, row=2.0, context=0.0).seconds(plan) == 1.0 + 2.0 * sum(counts)


def samples_of(cost: CostModel, random: Random, *, noise: float = 0.0) -> list[StepSample]:
    made = []
    for _ in range(60):
        rows, context = random.randrange(1, 500), random.randrange(1, 100_000)
        seconds = cost.step + cost.row * rows + cost.context * context
        made.append(StepSample(rows=rows, context=context, seconds=seconds * (1 + noise * (random.random() - 0.5))))
    return made


def test_a_fit_finds_the_figures() -> None:
    cost = CostModel(step=8e-3, row=6e-4, context=2e-7)
    found = CostModel.fit(samples_of(cost, Random(0)))
    assert (found.step, found.row, found.context) == pytest.approx((8e-3, 6e-4, 2e-7), rel=1e-6)
    assert found.error < 1e-9
    noisy = CostModel.fit(samples_of(cost, Random(0), noise=0.1))
    assert noisy.row == pytest.approx(6e-4, rel=0.1) and 0.005 < noisy.error < 0.05


def test_no_figure_of_a_fit_is_negative() -> None:
    made = [StepSample(rows=r, context=10 * r * r, seconds=1e-3 * r) for r in (1, 10, 100, 300)]
    made += [StepSample(rows=200, context=1, seconds=0.21)]
    found = CostModel.fit(made)
    assert found.step >= 0 and found.context >= 0 and found.row == pytest.approx(1e-3, rel=0.1)


def test_too_little_to_fit() -> None:
    with pytest.raises(ConfigError, match="three different steps"):
        CostModel.fit([StepSample(rows=1, context=1, seconds=1.0)] * 5)
    with pytest.raises(ConfigError, match="do not tell rows from context"):
        CostModel.fit([StepSample(rows=r, context=3 * r, seconds=float(r)) for r in (1, 2, 5, 9)])


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "", "1,2,3,4", "-1,0,0", "0,0,1", "nan,1,1"])
def test_costs_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="cost"):
        CostModel.parse(text)


def test_costs_as_text() -> None:
    assert CostModel.parse("8e-3, 7e-4,1e-8") == CostModel(step=8e-3, row=7e-4, context=1e-8)


def test_an_engine_is_measured(shared_data: Path) -> None:
    with sync.Engine(shared_data / "models" / "stories260K", kv_memory="32MiB") as engine:
        cost = CostModel.measure(engine)
        assert 0.0 < cost.seconds(plan_of((0,), (200,))) < 1.0
        assert cost.seconds(plan_of((0,), (200,))) > cost.seconds(plan_of((0,), (1,))) > 0.0
        assert engine.stats().open_requests == 0


def test_an_engine_that_is_too_small_to_be_measured(shared_data: Path) -> None:
    with (
        sync.Engine(shared_data / "models" / "stories260K", kv_memory="32MiB", max_context=64) as engine,
        pytest.raises(ConfigError, match="max_context >= 256, got 64"),
    ):
        CostModel.measure(engine)
