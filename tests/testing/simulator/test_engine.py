"""A whole engine in virtual time: everybody ends once, the same seed is the same run, and the exhaustive sweep."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from streamgen.actors.actor import Actor
from streamgen.actors.scheduler import SchedulerActor
from streamgen.errors import ConfigError
from streamgen.mailbox import Mailbox
from streamgen.messages import Cancel, Resume, StepPlan, StopFound, Unpin
from streamgen.scheduling.limits import Limits
from streamgen.testing.simulator import EngineFaults, SimulationFailed, simulate_engine
from streamgen.testing.simulator import engine as simulated
from streamgen.testing.simulator.hosts import ENDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamgen.testing.simulator.hosts import Host


@pytest.mark.parametrize("seed", range(12))
def test_everybody_ends_once_and_nothing_is_left(seed: int) -> None:
    report = simulate_engine(seed, requests=60)
    assert sum(report.endings.values()) == 60


def test_everything_happens() -> None:
    reports = [simulate_engine(seed, requests=80) for seed in range(6)]
    endings = sum((Counter(report.endings) for report in reports), Counter[str]())
    assert {"length", "stop", "cancelled", "slow_consumer", "deadline_exceeded"} <= endings.keys()
    assert {"engine_overloaded", "rate_limited", "processor_error"} <= endings.keys()
    assert any(report.losses for report in reports)


@pytest.mark.parametrize("seed", range(9))
def test_small_engines(seed: int) -> None:
    """Prompts that do not fit, one slot, pages that are soon used up."""
    limits = Limits(
        num_pages=(16, 24, 90)[seed % 3],
        page_size=(16, 4, 16)[seed % 3],
        max_running=(1, 5, 12)[seed % 3],
        step_tokens=(8, 32, 64)[seed % 3],
        max_context=(256, 90, 256)[seed % 3],
        max_queued=200,
    )
    report = simulate_engine(seed, requests=40, limits=limits)
    assert sum(report.endings.values()) == 40
    if seed in (0, 1):
        assert ("prompt_too_long" in report.endings) == (seed == 1)


def test_the_command_of_a_failure_shows_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lose_texts(monkeypatch)
    limits = Limits(num_pages=30, max_running=2, step_tokens=16, max_context=200, max_queued=9)
    with pytest.raises(SimulationFailed) as failure:
        simulate_engine(5, requests=20, limits=limits, faults=simulated.CALM)
    command = str(failure.value).splitlines()[-1]
    with pytest.raises(SimulationFailed) as again:
        exec(command.removeprefix('python -c "').removesuffix('"'), {})
    assert str(again.value) == str(failure.value)


def test_the_same_seed_is_the_same_run() -> None:
    runs = [simulate_engine(seed, requests=40) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]


def test_virtual_time_takes_no_real_time() -> None:
    assert simulate_engine(0, requests=30).seconds > simulated.SETTLE_SECONDS


def test_no_requests() -> None:
    with pytest.raises(ConfigError, match="expected >= 1"):
        simulate_engine(0, requests=0)


# ---- the sweep: something happens at the i-th message between actors, for every i --------------------------------


class Sweep(simulated.EngineSimulation):
    """A few requests; after the i-th message to an actor the first one ends, or the next step goes wrong."""

    at = 0
    action = "cancel"
    count = 0
    fired = False

    def crossed(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.fired = True
            self.act(self.hosts[0])

    def act(self, first: Host) -> None:
        match self.action:
            case "leave":
                if first.scope is not None:
                    first.scope.cancel()
            case "cancel" | "time limit":
                for number in self.routes.numbers():
                    if self.routes.name_of(number) == first.id:
                        self._cancel(number, "cancelled" if self.action == "cancel" else "deadline")
            case "step raises":
                self.fail_once(EngineFaults(step_errors=1.0, losses=0.0, faults=0.0))
            case "executor dies":
                self.fail_once(EngineFaults(step_errors=0.0, losses=1.0, faults=0.0))

    def fail_once(self, faults: EngineFaults) -> None:
        self.runner.faults, execute = faults, self.runner.execute

        def once(plan: StepPlan, wake_fd: int | None = None) -> Any:
            self.runner.execute = execute  # type: ignore[method-assign]
            try:
                return execute(plan, wake_fd)
            finally:
                self.runner.faults = simulated.CALM

        self.runner.execute = once  # type: ignore[method-assign]


SWEPT = {
    "cancel": "cancel",
    "leave": "scope",
    "time limit": "timeout",
    "step raises": "reads",
    "executor dies": "reads",
}


def sweep_once(monkeypatch: pytest.MonkeyPatch, seed: int, action: str, at: int) -> bool:
    """False if everything was over before the i-th message."""
    simulation = Sweep(seed, requests=3, limits=simulated.LIMITS, faults=simulated.CALM)
    simulation.at, simulation.action = at, action
    for host in simulation.hosts:
        host.max_tokens, host.arrival, host.tenant = min(host.max_tokens, 5), host.arrival / 4, ""
        host.way = "reads"
    first, *others = simulation.hosts
    first.way, first.give_up_after = SWEPT[action], 1000.0  # by the sweep only
    post = Actor.post

    def counted(actor: Actor[Any], message: Any) -> None:
        post(actor, message)
        simulation.crossed()

    with monkeypatch.context() as patch:
        patch.setattr(Actor, "post", counted)
        simulation.run()
    endings = {simulation.check_host(host) for host in others}
    assert endings <= {"length", "stop"}, f"message {at}: {endings}"
    ending = simulation.check_host(first)
    assert ending in ("length", "stop", *ENDS.get(first.way, ())), f"message {at}: {ending}"
    return simulation.fired


@pytest.mark.parametrize("action", SWEPT)
@pytest.mark.parametrize("seed", range(5))
def test_at_every_message(seed: int, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 1
    while sweep_once(monkeypatch, seed, action, at):
        at += 1
        assert at < 500, "three short requests never end"
    assert at > 12, "the sweep swept nothing"


# ---- what is broken is noticed -----------------------------------------------------------------------------------


def lose(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = SchedulerActor.handle

    def broken(actor: SchedulerActor, message: Any) -> None:
        if not isinstance(message, kind):
            handle(actor, message)

    monkeypatch.setattr(SchedulerActor, "handle", broken)


def lose_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    put = Mailbox.put
    monkeypatch.setattr(Mailbox, "put", lambda box, text, ids, logprobs: put(box, text[:-1], ids, logprobs))


def lose_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = Mailbox.finish

    def broken(box: Mailbox, end: Any, prompt_logprobs: Any = None) -> list[Any]:
        finish(box, end, prompt_logprobs)
        return []

    monkeypatch.setattr(Mailbox, "finish", broken)


def mix_up_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated.NumberTokenizer, "encode", lambda self, text, **options: [1, 2, 3])


def forget_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgen.actors.detokenizer._new_matcher", lambda message: None)


LOSSES = [partial(lose, kind) for kind in (Cancel, Resume, StopFound, Unpin)]


@pytest.mark.parametrize("breaks", [*LOSSES, lose_texts, lose_wakes, mix_up_prompts, forget_stops])
def test_a_broken_engine_is_noticed(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(SimulationFailed) as failure:
        simulate_engine(1, requests=60)
    assert str(failure.value).splitlines()[-1].endswith('simulate_engine(1, requests=60)"')
