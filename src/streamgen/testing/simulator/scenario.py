"""What a simulation is like: sizes, who asks for what, and what goes wrong how often."""

from __future__ import annotations

import math
from difflib import get_close_matches

from msgspec import Struct

from streamgen.config import Tenant
from streamgen.errors import ConfigError
from streamgen.scheduling.limits import Limits
from streamgen.testing.simulator.cost import DEMO_ON_TWO_CORES, CostModel

CHANCES = (
    "shared_prefixes", "forks", "stops", "pins", "priorities", "deadlines",
    "cancels", "stop_strings", "pauses", "faults", "guilty", "step_errors", "losses",
)  # fmt: skip


class Scenario(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of load. Lengths are (least, most) tokens; what is a chance is of each request, unless it says else.

    load              requests that come, over what the device could compute if every step were full
    shared_prefixes   begins with one of a few texts, of up to four pages; forks: asks for 2 to 4 continuations
    stops             ends at one of some token ids; pins: keeps its pages under one of a few keys
    priorities, deadlines   has one
    cancels           is cancelled, anywhere between its arrival and long after its end; stop_strings: likewise stopped
    pauses            its reader stops reading for a while
    faults            one of its rows fails alone, in some step; guilty: makes each step raise that it is in
    step_errors       of each step: it raises for no reason in the requests
    losses            of each step: the executor dies, with all pages
    tenants           options by name; requests belong to each alike. Without any, all belong to ""

    Raises:
        ConfigError: a value out of its range.
    """

    limits: Limits
    cost: CostModel = DEMO_ON_TWO_CORES
    load: float = 0.9
    prompt: tuple[int, int] = (16, 64)
    output: tuple[int, int] = (4, 4)
    shared_prefixes: float = 0.0
    forks: float = 0.0
    stops: float = 0.0
    pins: float = 0.0
    priorities: float = 0.0
    deadlines: float = 0.0
    cancels: float = 0.0
    stop_strings: float = 0.0
    pauses: float = 0.0
    faults: float = 0.0
    guilty: float = 0.0
    step_errors: float = 0.0
    losses: float = 0.0
    tenants: dict[str, Tenant] = {}

    def __post_init__(self) -> None:
        for name in CHANCES:
            chance = getattr(self, name)
            if not 0.0 <= chance <= 1.0:
                raise ConfigError(f"{name}: expected a chance from 0 to 1, got {chance}", option=name)
        if not (math.isfinite(self.load) and self.load > 0.0):
            raise ConfigError(f"load: expected > 0, got {self.load}", option="load")
        _check_range("prompt", self.prompt, low=1)
        _check_range("output", self.output, low=0)

    @property
    def has_failures(self) -> bool:
        """Whether anything goes wrong at the device. Then each request has processors, whose number names it there."""
        return bool(self.faults or self.guilty or self.step_errors or self.losses)

    @property
    def requests_per_second(self) -> float:
        """How many come, on average."""
        rows = sum(self.prompt) / 2 + sum(self.output) / 2
        steps = max(rows / self.limits.step_tokens, sum(self.output) / 2 / self.limits.max_running)
        return self.load / (self.cost.row * rows + self.cost.step * steps)


def _check_range(name: str, value: tuple[int, int], *, low: int) -> None:
    least, most = value
    if not low <= least <= most:
        raise ConfigError(f"{name}: expected {low} <= least <= most, got {value}", option=name)


SCENARIOS: dict[str, Scenario] = {
    # How fast the simulator is, is said of this one.
    "short": Scenario(
        limits=Limits(num_pages=256, max_running=16, step_tokens=512, max_context=256, max_queued=10**9),
        load=1.0,
    ),
    "mixed": Scenario(
        limits=Limits(num_pages=96, max_running=12, step_tokens=64, max_context=160, max_queued=200),
        load=1.1, prompt=(1, 90), output=(0, 24), shared_prefixes=0.4, forks=0.08, stops=0.3, pins=0.05, priorities=0.2,
        deadlines=0.2, cancels=0.12, stop_strings=0.05, pauses=0.1, faults=0.02, guilty=0.004, step_errors=0.004,
        losses=0.001,
        tenants={"small": Tenant(max_running=2), "heavy": Tenant(weight=3.0), "light": Tenant(weight=0.5)},
    ),
    "cramped": Scenario(
        limits=Limits(num_pages=20, max_running=16, step_tokens=32, max_context=200, max_queued=100),
        load=1.0, prompt=(1, 40), output=(1, 120), shared_prefixes=0.2, stops=0.8, cancels=0.1, pauses=0.1,
    ),
    "prefixes": Scenario(
        limits=Limits(num_pages=160, max_running=16, step_tokens=128, max_context=256, max_queued=10**9),
        prompt=(20, 120), output=(1, 16), shared_prefixes=0.9, forks=0.2, pins=0.2, cancels=0.05,
    ),
    "faults": Scenario(
        limits=Limits(num_pages=256, max_running=16, step_tokens=64, max_context=160, max_queued=10**9),
        load=0.6, prompt=(1, 60), output=(1, 20), shared_prefixes=0.3, forks=0.05, faults=0.03, guilty=0.01,
        step_errors=0.01, losses=0.004,
    ),
    "slow-readers": Scenario(
        limits=Limits(num_pages=64, max_running=8, step_tokens=64, max_context=200, max_queued=10**9),
        load=0.8, prompt=(1, 60), output=(8, 60), pauses=0.6, cancels=0.05,
    ),
    "flood": Scenario(
        limits=Limits(num_pages=128, max_running=8, step_tokens=64, max_context=160, max_queued=32),
        load=4.0, prompt=(8, 60), output=(1, 20), priorities=0.2, deadlines=0.3,
        tenants={"a": Tenant(), "b": Tenant(), "limited": Tenant(max_running=1, max_queued=4)},
    ),
}  # fmt: skip


def scenario_named(name: str) -> Scenario:
    """One of SCENARIOS.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in SCENARIOS:
        near = get_close_matches(name, SCENARIOS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"scenario: expected one of {', '.join(map(repr, SCENARIOS))}, got {name!r}{hint}", option="scenario"
        )
    return SCENARIOS[name]
