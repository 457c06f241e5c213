"""Requests of a scenario, and what becomes of each besides being answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.messages import Admit
from streamgen.sampling import ResolvedSampling
from streamgen.testing.simulator.hash_model import VOCABULARY

if TYPE_CHECKING:
    from random import Random

    from streamgen.testing.simulator.scenario import Scenario

NUM_IDS = 1 << 14  # of the random text that prompts are cut from
NUM_PREFIXES = 6
MAX_PREFIX_PAGES = 4
NUM_PINS = 8
SEEDS = tuple(ResolvedSampling(seed=seed) for seed in range(8))


class Fate(Struct, frozen=True, kw_only=True):
    """What happens to a request; times are in seconds after its arrival."""

    cancel: float | None = None
    reason: str = "cancelled"
    stop: float | None = None
    pause: float | None = None
    resume: float | None = None
    faults_at: int | None = None  # its sequences' first step from that many seconds on is a fault
    is_guilty: bool = False


NO_FATE = Fate()


class Workload:
    """Makes requests, each a function of the scenario, the seed of `random` and the calls before."""

    def __init__(self, scenario: Scenario, random: Random) -> None:
        self._scenario = scenario
        self._random = random
        self._ids = tuple(random.randrange(VOCABULARY) for _ in range(NUM_IDS))
        size = scenario.limits.page_size
        self._prefixes = [self._cut(size * random.randint(1, MAX_PREFIX_PAGES)) for _ in range(NUM_PREFIXES)]
        self._tenants = tuple(scenario.tenants) or ("",)
        self._num_made = 0
        self._life = 10.0 * scenario.cost.seconds_of(scenario.output[1], scenario.limits.step_tokens // 2)
        self._is_plain = not any(
            (scenario.forks, scenario.stops, scenario.pins, scenario.priorities, scenario.deadlines, scenario.tenants)
        )
        self._is_calm = not any(
            (scenario.cancels, scenario.stop_strings, scenario.pauses, scenario.faults, scenario.guilty)
        )

    def _cut(self, length: int) -> tuple[int, ...]:
        start = int(self._random.random() * (NUM_IDS - length))
        return self._ids[start : start + length]

    def next_request(self, now: float) -> tuple[Admit, Fate]:
        """The next request, which arrives now, and its fate."""
        self._num_made += 1
        fate = NO_FATE if self._is_calm else self._fate()
        return self._request(now), fate

    def _request(self, now: float) -> Admit:
        random, scenario, number = self._random, self._scenario, self._num_made
        prompt = self._prompt()
        low, high = scenario.output
        max_tokens = low + int(random.random() * (high - low + 1))
        sampling = SEEDS[number % len(SEEDS)]
        if self._is_plain:
            return Admit(
                request_id=number,
                prompt_ids=prompt,
                sampling=sampling,
                max_tokens=max_tokens,
                arrival=now,
                has_processors=scenario.has_failures,
            )
        return Admit(
            request_id=number,
            prompt_ids=prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            stop_ids=self._stop_ids(),
            num_sequences=random.randint(2, 4) if self._chance("forks") else 1,
            tenant=random.choice(self._tenants),
            scope=random.choice(("", "", "other")),
            priority=random.randint(-2, 3) if self._chance("priorities") else 0,
            arrival=now,
            deadline=now + random.random() * self._life if self._chance("deadlines") else None,
            pin=f"pin {random.randrange(NUM_PINS)}" if self._chance("pins") else "",
            has_processors=scenario.has_failures,
        )

    def _chance(self, name: str) -> bool:
        return self._random.random() < float(getattr(self._scenario, name))

    def _prompt(self) -> tuple[int, ...]:
        random, (low, high) = self._random, self._scenario.prompt
        length = low + int(random.random() * (high - low + 1))
        if self._scenario.shared_prefixes and self._chance("shared_prefixes"):
            prefix = random.choice(self._prefixes)[: length - 1]
            return prefix + self._cut(length - len(prefix))
        return self._cut(length)

    def _stop_ids(self) -> tuple[int, ...]:
        """So many that an answer ends at one of them now and then."""
        return tuple(range(VOCABULARY // 16)) if self._chance("stops") else ()

    def _fate(self) -> Fate:
        random, life = self._random, self._life
        cancel = random.random() ** 2 * life if self._chance("cancels") else None
        pause = random.random() * life / 4 if self._chance("pauses") else None
        return Fate(
            cancel=cancel,
            reason=random.choice(("cancelled", "deadline", "slow_consumer")) if cancel is not None else "cancelled",
            stop=random.random() * life / 4 if self._chance("stop_strings") else None,
            pause=pause,
            resume=None if pause is None else pause + random.random() * life,
            faults_at=random.randrange(8) if self._chance("faults") else None,
            is_guilty=self._chance("guilty"),
        )
