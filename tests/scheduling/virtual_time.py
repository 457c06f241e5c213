"""A device that only takes time: a + b * rows seconds a step, two plans under way. For fairness and forecasts."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.messages import StepDone
from streamgen.scheduling.limits import Limits
from streamgen.scheduling.scheduler import Scheduler
from tests.scheduling.hash_model import make_request

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from streamgen.config import Tenant
    from streamgen.messages import Admit, StepPlan

STEP_SECONDS, ROW_SECONDS = 0.005, 0.0005
DEPTH = 2


class Seen(Struct):
    """What a request's owner saw of it."""

    request: Admit
    first_token: float | None = None
    end: float | None = None

    @property
    def wait(self) -> float:
        """Seconds to the first token."""
        assert self.first_token is not None, f"request {self.request.request_id} has no token"
        return self.first_token - self.request.arrival


class Timeline:
    """A scheduler and a device in virtual time. Requests are admitted when their `arrival` comes."""

    def __init__(self, tenants: Mapping[str, Tenant] | None = None, /, **sizes: int) -> None:
        fields = {"num_pages": 4000, "max_running": 16, "step_tokens": 128, "max_context": 1000, "max_queued": 100_000}
        self.limits = Limits(**(fields | sizes))  # type: ignore[arg-type]  # sizes of the tests
        self.now = 0.0
        self.scheduler = Scheduler(self.limits, prefix_key=b"key", clock=lambda: self.now, tenants=tenants)
        self.seen: dict[int, Seen] = {}
        self.tokens: Counter[str] = Counter()  # outputs by tenant
        self.row_seconds = ROW_SECONDS
        self._plans: deque[tuple[StepPlan, float]] = deque()
        self._free_at = 0.0

    def run(self, requests: Iterable[Admit], *, until: float = float("inf")) -> None:
        """Let time pass until all requests have ended, or until then."""
        coming = deque(sorted(requests, key=lambda request: request.arrival))
        while self.now < until:
            while len(self._plans) < DEPTH and (plan := self.scheduler.plan()) is not None:
                self._free_at = max(self._free_at, self.now) + STEP_SECONDS + self.row_seconds * sum(plan.counts)
                self._plans.append((plan, self._free_at))
            end = self._plans[0][1] if self._plans else float("inf")
            if coming and coming[0].arrival <= end:
                self.now = max(self.now, coming[0].arrival)
                request = coming.popleft()
                assert self.scheduler.admit(request) is None
                self.seen[request.request_id] = Seen(request)
            elif self._plans:
                self._complete()
            else:
                return

    def _complete(self) -> None:
        plan, self.now = self._plans.popleft()
        self.scheduler.complete(StepDone(step=plan.step, tokens=tuple([(1,) * count for count in plan.samples])))
        for entry in self.scheduler.take_progress():
            seen = self.seen[entry.request_id]
            self.tokens[seen.request.tenant] += len(entry.ids)
            if entry.ids and seen.first_token is None:
                seen.first_token = self.now
            if entry.finish is not None:
                seen.end = self.now

    def waits(self, tenant: str) -> list[float]:
        """Seconds to the first token of a tenant's requests, sorted."""
        return sorted(s.wait for s in self.seen.values() if s.request.tenant == tenant and s.first_token is not None)


def stream(
    first_id: int, tenant: str, *, num: int, every: float, start: float = 0.0, prompt: int = 64, max_tokens: int = 32
) -> list[Admit]:
    """Requests of a tenant that arrive evenly, no two of them with a page in common."""
    return [
        make_request(
            first_id + i,
            [first_id + i, *range(1, prompt)],
            tenant=tenant,
            arrival=start + i * every,
            max_tokens=max_tokens,
        )
        for i in range(num)
    ]
