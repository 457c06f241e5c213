"""A small scheduler and short prompts, for tests of single calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.scheduling.limits import Limits
from tests.scheduling.harness import Harness
from tests.scheduling.hash_model import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamgen.config import Tenant
    from streamgen.messages import StepPlan
    from streamgen.scheduling.speculation import Drafter

PAGE = 4


def make_harness(
    drafter: Drafter | None = None, tenants: Mapping[str, Tenant] | None = None, **fields: object
) -> Harness:
    sizes = {"num_pages": 64, "page_size": PAGE, "step_tokens": 16, "max_context": 64, "max_running": 8, **fields}
    return Harness(Limits(**sizes), drafter=drafter, tenants=tenants)  # type: ignore[arg-type]  # sizes of the tests below


def prompt_of(length: int, start: int = 0) -> list[int]:
    return [(start + i) % VOCABULARY for i in range(length)]


def planned(harness: Harness) -> StepPlan:
    plan = harness.plan()
    assert plan is not None
    return plan
