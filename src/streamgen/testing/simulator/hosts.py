"""Those who use a simulated engine: what each asks for, how it behaves, and what it must have got in the end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from streamgen.mailbox import Mailbox
from streamgen.messages import Admit, Submit
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.admission import output_limit
from streamgen.testing.simulator.checks import require
from streamgen.testing.simulator.hash_model import VOCABULARY, solo_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from random import Random

    import anyio

    from streamgen.completion import Delta
    from streamgen.scheduling.limits import Limits

WAYS = (
    "reads", "reads", "reads", "reads", "cancel", "scope", "pause", "slow",
    "timeout", "queue_timeout", "first_token_timeout",
)  # fmt: skip
ALONE = ("pause", "slow")  # ways of requests with one sequence
TENANTS = ("", "small", "heavy")
PINS = ("first pin", "second pin")
MOMENT = 1e-6
# How requests of a way may end besides well, and what may happen to everybody.
LATE = ("deadline", "deadline_exceeded")
ENDS = {
    "timeout": LATE,
    "queue_timeout": LATE,
    "first_token_timeout": LATE,
    "slow": ("slow_consumer",),
    "cancel": ("cancelled",),
    "scope": ("cancelled",),
}
FAULTS = ("processor_error", "generation_error")


def text_of(ids: Iterable[int]) -> str:
    """What ids stand for."""
    return "".join(f" {i}" for i in ids)


class Host:
    """One request and its reader.

    way       how it behaves; one of WAYS
    pace      seconds between two looks
    entered, cancelled   when, in virtual seconds
    """

    processors: tuple[Callable[..., object], ...] = ()

    def __init__(self, number: int, random: Random, clock: Callable[[], float]) -> None:
        self.id = str(number)
        self.way = random.choice(WAYS)
        self.arrival = random.random() * 0.04 * number
        self.give_up_after = random.random() ** 2 * 1.5
        self.pace = random.choice((0.0, 0.0, 0.01, 0.1))
        self.prompt = tuple(random.randrange(VOCABULARY) for _ in range(random.randint(1, 70)))
        if random.random() < 0.3:
            self.prompt = (*range(32), *self.prompt)
        self.as_text = random.random() < 0.5
        # Slow readers have to be able to fall behind, by more than the detokenizer allows.
        self.max_tokens = 150 if self.way in ALONE else random.randint(1, 40)
        self.tenant = random.choice(TENANTS)
        self.priority = random.choice((0, 0, 0, 1))
        self.pin = random.choice(("", "", "", *PINS))
        has_stop = self.way not in ALONE and random.random() < 0.3
        self.stop: tuple[str, ...] = (f"{random.randrange(30)} ",) if has_stop else ()
        num_sequences = 1 if self.way in ALONE else random.choice((1, 1, 1, 2, 3))
        self.mailboxes = tuple(Mailbox(self.id, clock=clock) for _ in range(num_sequences))
        self.deltas: list[list[tuple[float, Delta]]] = [[] for _ in range(num_sequences)]
        self.scope: anyio.CancelScope | None = None  # in which it reads
        self.refused: str | None = None
        self.entered = self.cancelled = math.inf
        self._clock, self._seed = clock, number

    def message(self, number: int) -> Submit:
        """The request."""
        late = self.give_up_after
        return Submit(
            request_id=number,
            sampling=ResolvedSampling(seed=self._seed, max_tokens=self.max_tokens, stop=self.stop),
            text=text_of(self.prompt) if self.as_text else None,
            ids=None if self.as_text else self.prompt,
            num_sequences=len(self.mailboxes),
            tenant=self.tenant,
            priority=self.priority,
            pin=self.pin,
            on_slow={"pause": "pause", "slow": "cancel"}.get(self.way, "coalesce"),
            arrival=self._clock(),
            timeout=late if self.way == "timeout" else None,
            queue_timeout=late / 8 if self.way == "queue_timeout" else None,
            first_token_timeout=late / 4 if self.way == "first_token_timeout" else None,
        )

    def moved(self, thread: object, number: int) -> None:
        """There is only one thread."""

    # ---- what it must have got ----------------------------------------------------------------------------------

    def check(self, limits: Limits) -> str:
        """Whether everything it read is right; how it ended.

        Raises:
            InvariantBroken: something is not.
        """
        if self.refused is not None:
            return self.refused
        endings = [self._check_sequence(i, limits) for i in range(len(self.mailboxes))]
        return next((ending for ending in endings if ending not in ("length", "stop")), endings[0])

    def _check_sequence(self, index: int, limits: Limits) -> str:
        mailbox, name = self.mailboxes[index], f"request {self.id}, {index}"
        require(mailbox.end is not None, f"{name} has no end")
        end, result = mailbox.end, mailbox.completion()
        assert end is not None, "was required"
        ids, got = self._alone(index, limits), list(result.ids)
        require(got == ids[: len(got)], f"{name}: said something else than alone")
        require(result.text == self._until_stop(text_of(got)), f"{name}: its text is not that of its ids")
        require(result.usage.completion_tokens == len(got), f"{name}: tokens were counted wrongly")
        read = [i for _, delta in self.deltas[index] for i in delta.ids]
        require(read == got[: len(read)], f"{name}: its reader got something else")
        ending, lived = end.code or str(end.finish_reason), result.timings.finished or 0.0
        if ending in ("length", "stop"):
            is_stopped = any(stop in text_of(ids) for stop in self.stop)
            require(got == ids, f"{name}: ended early")
            if read and read == got:
                late = lived - self.deltas[index][-1][0]
                require(late <= MOMENT, f"{name}: ended {late} s after its last token")
            require((ending == "stop") == (end.stop in self.stop) == is_stopped, f"{name}: ended with {ending}")
        elif ending == "prompt_too_long":
            capacity = min(limits.max_context, limits.num_pages * limits.page_size)
            require(len(self.prompt) >= capacity, f"{name}: its prompt would have fitted")
        else:
            require(ending in (*ENDS.get(self.way, ()), *FAULTS), f"{name}: ended with {ending}")
        self._check_times(name, lived)
        return ending

    def _alone(self, index: int, limits: Limits) -> list[int]:
        """What it gets when nothing goes wrong and nobody else is there: up to the token that completes a stop."""
        sampling = ResolvedSampling(seed=self._seed)
        request = Admit(request_id=0, prompt_ids=self.prompt, sampling=sampling, max_tokens=self.max_tokens)
        ids = solo_output(request, index, output_limit(request, limits), page_size=limits.page_size)
        whole = (n for n in range(len(ids)) if any(stop in text_of(ids[:n]) for stop in self.stop))
        return ids[: next(whole, len(ids))]

    def _until_stop(self, text: str) -> str:
        return text.partition(self.stop[0])[0] if self.stop else text

    def _check_times(self, name: str, lived: float) -> None:
        """Whoever is cancelled ends then, and nobody lives longer than his time limit."""
        # A mailbox's times count from when it was made, which is when virtual time began.
        require(lived <= self.cancelled + MOMENT, f"{name}: ended {lived - self.cancelled} s after its cancel")
        limit = self.entered + self.give_up_after if self.way == "timeout" else math.inf
        require(lived <= limit + MOMENT, f"{name}: ended {lived - limit} s after its time limit")
