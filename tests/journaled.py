"""Schedulers that tell a recorder what they decide, under a clock that the test moves."""

from __future__ import annotations

from typing import Any

from streamgen.actors.recorder import Recorder
from streamgen.messages import Admit, StepDone
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.scheduler import Scheduler
from tests.scheduling.harness import KEY, Harness
from tests.scheduling.simulation import trust_everyone

PAGE = 4
STEP_SECONDS = 0.01


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Scene(Harness):
    """A harness whose steps take STEP_SECONDS, and whose scheduler has a recorder for its journal."""

    def __init__(self, *, seconds: float = 30.0, call_soon: Any = None, **sizes: int) -> None:
        fields: dict[str, Any] = {"num_pages": 64, "step_tokens": 16, "max_context": 64, "max_running": 8, **sizes}
        super().__init__(Limits(page_size=PAGE, **fields))
        self.clock = Clock()
        self.recorder = Recorder(clock=self.clock, seconds=seconds)
        self.journal = self.recorder.attach(self.name_of, call_soon=call_soon)
        self.scheduler = Scheduler(self.limits, prefix_key=KEY, clock=self.clock, journal=self.journal)

    def name_of(self, number: int) -> str:
        return f"req-{number}"

    def ask(self, number: int, *, prompt: int = 6, max_tokens: int = 4, **fields: Any) -> None:
        """Admit a request of so many prompt tokens."""
        sampling = ResolvedSampling(seed=number)
        ids = tuple((number * 7 + i) % 50 for i in range(prompt))
        fields = {"arrival": self.clock.now, **fields}
        refused = self.admit(
            Admit(request_id=number, prompt_ids=ids, sampling=sampling, max_tokens=max_tokens, **fields)
        )
        assert refused is None

    def crowd(self) -> None:
        """Three requests that outgrow six pages: the last is preempted, once at least."""
        trust_everyone(self)
        for number in (1, 2, 3):
            self.ask(number, max_tokens=12)

    def complete(self) -> None:
        """Execute the oldest plan; it takes STEP_SECONDS."""
        plan, dead = self.plans.popleft()
        self.clock.now += STEP_SECONDS
        done = self.model.execute(plan, dead)
        self.scheduler.complete(
            StepDone(
                step=done.step, tokens=done.tokens, logprobs=done.logprobs, scores=done.scores, seconds=STEP_SECONDS
            )
        )
        self._check()
