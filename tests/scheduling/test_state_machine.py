"""Any order of calls: a hypothesis machine over the scheduler with the hash model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from streamgen.scheduling.limits import Limits
from streamgen.scheduling.suspects import MAX_GUILTY
from tests.scheduling.harness import Harness
from tests.scheduling.hash_model import make_request
from tests.scheduling.simulation import TENANTS, RandomDrafter, trust_everyone


class SchedulerMachine(RuleBasedStateMachine):
    """The harness checks invariants after every call, and all outputs at the end."""

    @initialize(
        num_pages=st.integers(2, 12),
        page_size=st.sampled_from([1, 2, 4]),
        max_running=st.integers(1, 4),
        step_tokens=st.integers(1, 12),
        has_drafter=st.booleans(),
        trusts_everyone=st.booleans(),
    )
    def begin(
        self,
        num_pages: int,
        page_size: int,
        max_running: int,
        step_tokens: int,
        has_drafter: bool,
        trusts_everyone: bool,
    ) -> None:
        limits = Limits(
            num_pages=num_pages,
            page_size=page_size,
            max_running=max_running,
            step_tokens=step_tokens,
            max_context=20,
        )
        self.harness = Harness(limits, drafter=RandomDrafter(1) if has_drafter else None, tenants=TENANTS)
        if trusts_everyone:
            trust_everyone(self.harness)
        self.num_requests = self.num_failures = 0

    @rule(
        letters=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        max_tokens=st.integers(0, 10),
        num_sequences=st.integers(1, 3),
        priority=st.integers(0, 1),
        stop_ids=st.lists(st.integers(0, 60), max_size=6).map(tuple),
        score_from=st.none() | st.integers(0, 8),
        seed=st.integers(0, 1),
        arrival=st.sampled_from([0.0, 15.0]),
        deadline=st.none() | st.integers(1, 40).map(float),
        tenant=st.sampled_from(["", "small", "heavy"]),
        pin=st.sampled_from(["", "", "first", "second"]),
    )
    def admit(self, letters: list[int], **fields: object) -> None:
        self.num_requests += 1
        self.harness.admit(make_request(self.num_requests, letters, **fields))

    @precondition(lambda self: len(self.harness.plans) < 3)
    @rule()
    def plan(self) -> None:
        self.harness.plan()

    @precondition(lambda self: self.harness.plans)
    @rule()
    def complete(self) -> None:
        self.harness.complete()

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.harness.cancel(data.draw(st.sampled_from(sorted(self.harness.requests))))

    @precondition(lambda self: any(outcome.ids for outcome in self.harness.outcomes.values()))
    @rule(data=st.data())
    def stop_found(self, data: st.DataObject) -> None:
        speaking = [key for key, outcome in self.harness.outcomes.items() if outcome.ids]
        self.harness.stop_found(*data.draw(st.sampled_from(speaking)))

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data(), is_paused=st.booleans())
    def read(self, data: st.DataObject, is_paused: bool) -> None:
        request_id, index = data.draw(st.sampled_from(sorted(self.harness.outcomes)))
        (self.harness.pause if is_paused else self.harness.resume)(request_id, index)

    @rule(key=st.sampled_from(["first", "second", "unknown"]))
    def unpin(self, key: str) -> None:
        self.harness.unpin(key)

    @precondition(lambda self: self.harness.can_fail and self.num_failures < MAX_GUILTY - 1)
    @rule(kind=st.sampled_from(["error", "error", "lost"]))
    def fail(self, kind: str) -> None:
        self.num_failures += 1
        self.harness.fail(kind)

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data())
    def fault(self, data: st.DataObject) -> None:
        self.harness.faults[data.draw(st.sampled_from(sorted(self.harness.outcomes)))] = "processor_error"

    @precondition(lambda self: not self.harness.plans and not self.harness.scheduler.stats().running)
    @rule()
    def sleep(self) -> None:
        self.harness.scheduler.forget_prefixes()
        stats = self.harness.scheduler.stats()
        assert (stats.pages_cached, stats.pages_pinned) == (0, 0)

    def teardown(self) -> None:
        if hasattr(self, "harness"):
            self.harness.run(depth=2)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
