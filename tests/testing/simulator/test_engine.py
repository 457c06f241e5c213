"""A whole engine in virtual time: everybody ends once, the same seed is the same run, and the exhaustive sweep."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from streamgen.actors.actor import Actor
from streamgen.actors.scheduler import SchedulerActor
from streamgen.errors import ConfigError
from streamgen.mailbox import Mailbox
from streamgen.messages import Cancel, StepPlan
from streamgen.testing.simulator import EngineFaults, SimulationFailed, simulate_engine
from streamgen.testing.simulator import engine as simulated

if TYPE_CHECKING:
    from collections.abc import Callable

CALM = EngineFaults(step_errors=0.0, faults=0.0)


@pytest.mark.parametrize("seed", range(12))
def test_everybody_ends_once_and_nothing_is_left(seed: int) -> None:
    report = simulate_engine(seed, requests=60)
    assert sum(report.endings.values()) == 60


def test_everything_happens() -> None:
    endings = Counter[str]()
    for seed in range(6):
        endings.update(simulate_engine(seed, requests=80).endings)
    assert {"length", "cancelled", "slow_consumer", "deadline_exceeded", "engine_overloaded"} <= endings.keys()
    assert "processor_error" in endings


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
    """A few requests; after the i-th message to an actor the first one is cancelled, or the next step raises."""

    at = 0
    action = "cancel"
    count = 0
    fired = False

    def crossed(self) -> None:
        self.count += 1
        if self.count != self.at:
            return
        self.fired = True
        if self.action == "cancel":
            first = self.hosts[0]
            for number in self.routes.numbers():
                if self.routes.name_of(number) == first.id:
                    self._give_up(first, number)
        else:
            self.runner.faults = EngineFaults(step_errors=1.0, faults=0.0)
            execute = self.runner.execute

            def once(plan: StepPlan, wake_fd: int | None = None) -> Any:
                self.runner.execute = execute  # type: ignore[method-assign]
                try:
                    return execute(plan, wake_fd)
                finally:
                    self.runner.faults = CALM

            self.runner.execute = once  # type: ignore[method-assign]


def sweep_once(monkeypatch: pytest.MonkeyPatch, seed: int, action: str, at: int) -> bool:
    """False if everything was over before the i-th message."""
    simulation = Sweep(seed, requests=3, limits=simulated.LIMITS, faults=CALM)
    simulation.at, simulation.action = at, action
    for host in simulation.hosts:
        host.way, host.max_tokens, host.arrival = "reads", min(host.max_tokens, 5), host.arrival / 4
    simulation.hosts[0].way = "cancel"
    simulation.hosts[0].give_up_after = 1000.0  # by the sweep only
    post = Actor.post

    def counted(actor: Actor[Any], message: Any) -> None:
        post(actor, message)
        simulation.crossed()

    with monkeypatch.context() as patch:
        patch.setattr(Actor, "post", counted)
        simulation.run()
    endings = [simulation.check_host(host) for host in simulation.hosts]
    assert endings[1:] == ["length", "length"], f"message {at}: {endings}"
    assert endings[0] == "length" or (action == "cancel" and endings[0] == "cancelled")
    return simulation.fired


@pytest.mark.parametrize("action", ["cancel", "step raises"])
@pytest.mark.parametrize("seed", range(10))
def test_at_every_message(seed: int, action: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = 1
    while sweep_once(monkeypatch, seed, action, at):
        at += 1
        assert at < 300, "three short requests never end"
    assert at > 12, "the sweep swept nothing"


# ---- what is broken is noticed -----------------------------------------------------------------------------------


def lose_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = SchedulerActor.handle

    def broken(actor: SchedulerActor, message: Any) -> None:
        if not isinstance(message, Cancel):
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


@pytest.mark.parametrize("breaks", [lose_cancels, lose_texts, lose_wakes, mix_up_prompts])
def test_a_broken_engine_is_noticed(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(SimulationFailed) as failure:
        simulate_engine(1, requests=60)
    assert str(failure.value).splitlines()[-1].endswith('simulate_engine(1, requests=60)"')
