"""Random workloads on the harness: bursts, shared prefixes, edge lengths, cancels, stop strings, forks."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from streamgen.config import Tenant
from streamgen.scheduling.limits import Limits
from tests.scheduling.harness import Harness
from tests.scheduling.hash_model import VOCABULARY, make_request, solo_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from streamgen.messages import Admit
    from streamgen.scheduling.sequence import Sequence
    from streamgen.scheduling.speculation import Drafter


TENANTS = {"small": Tenant(max_running=2), "heavy": Tenant(weight=3.0), "light": Tenant(weight=0.5)}


def random_failures(random: Random) -> Callable[[Sequence], bool]:
    """One request of every few fails every step that it is in, from some length on."""
    period, length = random.choice([11, 29]), random.choice([0, 2, 8])

    def fails(sequence: Sequence) -> bool:
        return sequence.request.request_id % period == 1 and sequence.num_outputs >= length

    return fails


def random_limits(random: Random) -> Limits:
    """Sizes from cramped to roomy."""
    page_size = random.choice([1, 2, 4, 4, 16])
    max_context = random.choice([24, 48, 96])
    num_pages = random.choice([3, 8, 16, 40, 200])
    return Limits(
        num_pages=num_pages,
        page_size=page_size,
        max_running=random.choice([1, 2, 5, 16]),
        step_tokens=random.choice([1, 2, 7, 16, 64]),
        max_context=max_context,
        max_queued=1_000_000,
        prefix_cache=random.random() < 0.8,
    )


class Workload:
    """Makes requests that share prefixes with each other, and continue what others said."""

    def __init__(self, random: Random, limits: Limits) -> None:
        self._random = random
        self._limits = limits
        self._texts = [[random.randrange(VOCABULARY) for _ in range(limits.max_context)] for _ in range(3)]
        self._num_made = 0
        self._tenants = random.choice([[""], ["", "small"], ["", "small", "heavy", "light"]])

    def request(self) -> Admit:
        """The next request."""
        random, limits = self._random, self._limits
        prompt = self._prompt()
        self._num_made += 1
        arrival = self._num_made * 0.7
        request = make_request(
            self._num_made,
            prompt,
            max_tokens=random.choice([0, 1, 2, 5, 12, limits.max_context]),
            num_sequences=random.choice([1, 1, 1, 2, 4]),
            stop_ids=tuple(random.sample(range(VOCABULARY), 3)) if random.random() < 0.5 else (),
            score_from=random.randrange(len(prompt) + 1) if random.random() < 0.2 else None,
            scope=random.choice(["", "", "other"]),
            priority=random.choice([0, 0, 0, 1]),
            arrival=arrival,
            deadline=random.choice([None, None, arrival + 5, arrival + 50]),
            tenant=random.choice(self._tenants),
            pin=random.choice(["", "", "", "first", "second"]),
            has_processors=random.random() < 0.1,
            seed=random.choice([0, 0, 7]),
            min_tokens=random.choice([0, 0, 3]),
            logprobs=random.choice([None, 0]),
        )
        if random.random() < 0.2:
            self._texts[random.randrange(3)] = [*prompt, *solo_output(request, 0, 12), *prompt]
        return request

    def _prompt(self) -> list[int]:
        random, size = self._random, self._limits.page_size
        most = min(self._limits.max_context, self._limits.num_pages * size) - 1
        edges = [1, size - 1, size, size + 1, 2 * size, 2 * size + 1, most, random.randrange(1, most + 1)]
        length = min(max(1, random.choice(edges)), most)
        prompt = random.choice(self._texts)[:length]
        if random.random() < 0.3:
            prompt[-1] = random.randrange(VOCABULARY)
        return prompt


def always_fits(running: Iterable[Sequence], candidate: Sequence, **options: object) -> bool:
    return True


def trust_everyone(harness: Harness) -> None:
    """Start whatever can start, as if memory never ran out: leads to preemption."""
    harness.scheduler._admission.fits = always_fits  # type: ignore[method-assign]  # a wrong prediction


def simulate(seed: int, num_requests: int, *, drafter: Drafter | None = None, depth: int | None = None) -> Harness:
    """Run a random workload to its end, with every check on."""
    random = Random(seed)
    limits = random_limits(random)
    harness = Harness(limits, drafter=drafter, tenants=TENANTS)
    if random.random() < 0.3:
        harness.fails = random_failures(random)
    if random.random() < 0.4:
        trust_everyone(harness)
    workload = Workload(random, limits)
    depth = depth or random.choice([1, 2, 2, 3])
    num_left = num_requests
    while num_left:
        for _ in range(min(num_left, random.choice([0, 0, 1, 1, 2, 6]))):
            assert harness.admit(workload.request()) is None
            num_left -= 1
        disturb(harness, random)
        harness.step(depth=depth)
    for _ in range(100_000):
        disturb(harness, random)
        if not harness.step(depth=depth):
            break
    harness.run(depth=depth)
    return harness


def disturb(harness: Harness, random: Random) -> None:
    """Now and then cancel something, or find a stop string, or else; sometimes in what has ended already."""
    chance = random.random()
    if chance > 0.16 or not harness.requests:
        return
    request_id = random.choice(list(harness.requests)[-12:])
    if chance >= 0.08:
        _disturb_more(harness, random, request_id)
        return
    if chance < 0.04:
        harness.cancel(request_id, random.choice(["cancelled", "deadline"]))
        return
    speaking = [key for key, outcome in list(harness.outcomes.items())[-24:] if outcome.ids]
    if speaking:
        harness.stop_found(*random.choice(speaking))


def _disturb_more(harness: Harness, random: Random, request_id: int) -> None:
    index = random.randrange(harness.requests[request_id].num_sequences)
    match random.choice(["pause", "pause", "resume", "resume", "unpin", "error", "lost", "fault"]):
        case "pause":
            harness.pause(request_id, index)
        case "resume":
            harness.resume(request_id, index)
        case "unpin":
            harness.unpin(random.choice(["first", "second", "unknown"]))
        case "fault":
            harness.faults[request_id, index] = "processor_error"
        case kind:
            if harness.can_fail:
                harness.fail(kind)


class OracleDrafter:
    """Knows the output, for requests whose ids are given to it."""

    def __init__(self, length: int = 4) -> None:
        self._length = length

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        output = solo_output(sequence.request, sequence.index, sequence.num_outputs + self._length)
        return tuple(output[sequence.num_outputs : sequence.num_outputs + self._length])


class WrongDrafter:
    """Is wrong at every position."""

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        right = OracleDrafter(3).propose(sequence)
        return tuple((token + 1) % VOCABULARY for token in right)


class RandomDrafter:
    """Right, wrong, or silent, for a random number of tokens."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def propose(self, sequence: Sequence) -> tuple[int, ...]:
        right = OracleDrafter(self._random.randrange(6)).propose(sequence)
        return tuple(t if self._random.random() < 0.7 else self._random.randrange(VOCABULARY) for t in right)
