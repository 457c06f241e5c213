"""The executor in a child process: the same bits, and whatever happens to the child is told, repaired or refused."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import streamgen
from streamgen import child_process
from streamgen.config import LoadProgress, make_options
from streamgen.errors import ConfigError, LoadError, ModelNotFound
from streamgen.execution import child as child_module
from streamgen.execution import remote
from streamgen.execution.background import LoadCancelled
from streamgen.execution.memory import LEDGER
from streamgen.execution.model import open_model
from streamgen.execution.remote import RemoteModel, RestartBudget, open_remote
from streamgen.execution.wire import (
    MAX_FRAME,
    Connection,
    ConnectionEnded,
    DropPages,
    FrameTooLarge,
    StepError,
    ToChild,
    ToHost,
)
from streamgen.faults import DeviceDead, ExecutorLost, StepRaised
from streamgen.messages import Admit, Begin, StepDone, StepFailed, StepPlan, TokenLogprobs
from streamgen.sampling import ResolvedSampling
from streamgen.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from streamgen.actors.model import RunsPlans
    from streamgen.execution.model import OpenModel
    from streamgen.scheduling.limits import Limits

PROMPT = (1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 317, 269, 274, 287, 263, 377)

Outputs = dict[tuple[int, int], list[tuple[int, TokenLogprobs]]]


def never() -> bool:
    return False


def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> float:
    """Wait for another process; returns how long it took."""
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds, "waited for what never came"
        time.sleep(0.001)
    return time.perf_counter() - start


def when_told(reader: int, *calls: Callable[[], None]) -> threading.Thread:
    """Call these, in another thread, once a byte comes."""

    def run() -> None:
        os.read(reader, 1)
        for call in calls:
            call()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # nobody may be there to reap an orphan


def children() -> set[int]:
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for file in found for pid in file.read_text().split()}


def census() -> tuple[set[str], set[int], list[str]]:
    gc.collect()
    files = {f for f in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{f}")}
    return files, children(), sorted(t.name for t in threading.enumerate() if "keeper" in t.name)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = census()
    yield
    assert census() == before
    assert LEDGER.promised() == 0


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture
def opened(stories: Path) -> Iterator[RemoteModel]:
    model = open_stories(stories)
    yield model
    model.close()


FIELDS = {"kv_memory": "8MiB", "max_running": 8, "threads": 2}


def open_stories(path: Path) -> RemoteModel:
    return open_remote(make_options(path, FIELDS), None, never)


def requests() -> list[Admit]:
    """Greedy, drawn, with log-probabilities, several sequences, a long prompt, penalties."""
    several = [
        Admit(request_id=n, prompt_ids=PROMPT[: 3 + n], max_tokens=20 + n, sampling=sampling, num_sequences=count)
        for n, sampling, count in [
            (1, ResolvedSampling(temperature=0.0), 1),
            (2, ResolvedSampling(temperature=0.9, seed=2**64 - 1, top_p=0.95), 3),
            (3, ResolvedSampling(temperature=0.8, seed=5, repetition_penalty=1.2, logit_bias={7: 1.5}), 1),
        ]
    ]
    drawn = ResolvedSampling(temperature=1.0, seed=9, logprobs=3)
    return [*several, Admit(request_id=4, prompt_ids=PROMPT * 8, max_tokens=15, sampling=drawn)]


class Drive:
    """Scheduler and runner, as the engine joins them, in one thread. `before` is called with each step's number."""

    def __init__(
        self, runner: RunsPlans, limits: Limits, messages: Sequence[Admit], before: Callable[[int], None]
    ) -> None:
        self.runner, self.before = runner, before
        self.failures: list[StepFailed] = []
        self.outputs: Outputs = {}
        self._void = -1
        scheduler = Scheduler(limits, prefix_key=b"key", clock=time.perf_counter)
        for message in messages:
            assert scheduler.admit(message) is None
        plans: deque[StepPlan] = deque()
        while scheduler.num_open or plans:
            while len(plans) < 2 and (plan := scheduler.plan()) is not None:
                plans.append(plan)
            result = self._run(plans.popleft())
            if isinstance(result, StepFailed):
                self.failures.append(result)
                scheduler.fail(result)
            else:
                scheduler.complete(result)
            for progress in scheduler.take_progress():
                assert progress.finish != "error", progress.message
                entries = zip(progress.ids, progress.logprobs or (None,) * len(progress.ids), strict=True)
                self.outputs.setdefault((progress.request_id, progress.index), []).extend(entries)  # type: ignore[arg-type]
        assert scheduler.stats().pages_used == 0

    def _run(self, plan: StepPlan) -> StepDone | StepFailed:
        if plan.generation <= self._void:
            return StepFailed(step=plan.step, message="", kind="skipped")
        try:
            self.before(plan.step)
            return self.runner.execute(plan)
        except ExecutorLost as error:
            self._void = plan.generation
            return StepFailed(step=plan.step, message=str(error), kind="lost")


def drive(model: RemoteModel | OpenModel, before: Callable[[int], None] = lambda step: None) -> Drive:
    return Drive(model.runner, model.limits, requests(), before)


@pytest.fixture(scope="module")
def expected(shared_data: Path) -> Outputs:
    """What a runner in this process gives."""
    model = open_model(make_options(shared_data / "models" / "stories260K", FIELDS), None, never)
    try:
        outputs = drive(model).outputs
    finally:
        model.close()
    assert len(outputs) == 6 and sum(map(len, outputs.values())) == 21 + 3 * 22 + 23 + 15
    return outputs


def first_plan(step: int = 0) -> StepPlan:
    begin = Begin(slot=0, ids=PROMPT, num_prompt=len(PROMPT), sampling=ResolvedSampling(temperature=0.0))
    rows = len(PROMPT)
    return StepPlan(step=step, begins=(begin,), slots=(0,), starts=(0,), counts=(rows,), samples=(1,), pages=((0, 1),))


def next_plan(step: int) -> StepPlan:
    return StepPlan(step=step, slots=(0,), starts=(len(PROMPT),), counts=(1,), samples=(1,), pages=((),))


# ---- the same bits ---------------------------------------------------------------------------------------------------


def test_tokens_and_logprobs_are_those_of_a_runner_in_this_process(opened: RemoteModel, expected: Outputs) -> None:
    driven = drive(opened)
    assert driven.outputs == expected and driven.failures == []
    assert opened.supports_processors is False and opened.processors == {}


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_child_killed_between_steps_costs_no_token(opened: RemoteModel, expected: Outputs, at: int) -> None:
    pid = opened.runner.pid

    def kill(step: int) -> None:
        if step == at and opened.runner.pid == pid and pid is not None:
            os.kill(pid, signal.SIGKILL)
            until(lambda: opened.runner.pid != pid)

    driven = drive(opened, kill)
    assert driven.outputs == expected
    assert [f.kind for f in driven.failures if f.kind != "skipped"] == (["lost"] if at else [])
    assert opened.runner.pid not in (None, pid)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_dies_in_a_step_costs_no_token(
    opened: RemoteModel, expected: Outputs, ending: signal.Signals
) -> None:
    assert opened.runner.pid is not None
    pid: int = opened.runner.pid

    class DiesAt5:
        def execute(self, plan: StepPlan, wake_fd: int | None = None) -> StepDone:
            if plan.step != 5:
                return opened.runner.execute(plan)
            return self.execute_and_kill(plan)

        def execute_and_kill(self, plan: StepPlan) -> StepDone:
            reader, writer = os.pipe()
            os.kill(pid, signal.SIGSTOP)  # it will never get further than this step
            killer = when_told(reader, lambda: os.kill(pid, ending), lambda: resume(pid))
            try:
                return opened.runner.execute(plan, writer)
            finally:
                killer.join()
                os.close(reader)
                os.close(writer)

    driven = Drive(DiesAt5(), opened.limits, requests(), lambda step: None)
    assert driven.outputs == expected
    lost = [f for f in driven.failures if f.kind == "lost"]
    assert [f.step for f in lost] == [5] and ending.name in lost[0].message


def resume(pid: int) -> None:
    if is_alive(pid):
        os.kill(pid, signal.SIGCONT)


def test_a_step_that_raises_leaves_the_child_well(opened: RemoteModel) -> None:
    pid = opened.runner.pid
    done = opened.runner.execute(first_plan())
    local = StepPlan(step=1, slots=(10**6,), starts=(0,), counts=(1,), samples=(1,), pages=((),))
    with pytest.raises(StepRaised, match="IndexError"):
        opened.runner.execute(local)
    assert opened.runner.pid == pid
    assert opened.runner.execute(first_plan(2)).tokens == done.tokens


# ---- the child's end -------------------------------------------------------------------------------------------------


def test_an_idle_child_is_replaced_before_anybody_asks(opened: RemoteModel) -> None:
    runner, deaths = opened.runner, deque[str]()
    noticed = threading.Event()

    def on_death(why: str) -> None:
        deaths.append(why)
        noticed.set()

    runner.on_death = on_death
    runner.execute(first_plan())
    pid = runner.pid
    assert pid is not None
    killed = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    assert noticed.wait(10)
    assert time.perf_counter() - killed < 1.0 and len(deaths) == 1 and "SIGKILL" in deaths[0]
    until(lambda: runner.is_ready)
    assert runner.pid != pid
    with pytest.raises(ExecutorLost, match="SIGKILL"):  # its pages are gone, whoever is there now
        runner.execute(next_plan(1))
    runner.prepare()
    assert runner.execute(first_plan(2)).tokens


def test_a_hung_child_can_be_killed_from_another_thread(opened: RemoteModel) -> None:
    runner = opened.runner
    runner.execute(first_plan())
    assert runner.pid is not None
    os.kill(runner.pid, signal.SIGSTOP)
    reader, writer = os.pipe()
    watchdog = when_told(reader, runner.kill)
    with pytest.raises(ExecutorLost):
        runner.execute(next_plan(1), writer)
    watchdog.join()
    os.close(reader)
    os.close(writer)
    assert runner.execute(first_plan(2)).tokens


def test_over_its_budget_the_device_is_dead_and_says_why(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RestartBudget", lambda: RestartBudget(1, 600.0))
    model = open_stories(stories)
    runner = model.runner
    for step in range(2):
        if step:
            with pytest.raises(ExecutorLost):
                runner.execute(next_plan(step))
            runner.prepare()
        assert runner.execute(first_plan(step)).tokens
        runner.kill()
        until(lambda: not runner.is_ready)
        if not step:
            until(lambda: runner.is_ready)
    with pytest.raises(ExecutorLost):
        runner.execute(next_plan(9))
    for _ in range(2):
        with pytest.raises(DeviceDead, match=r"SIGKILL.*replaced 1 times in 600 s"):
            runner.prepare()
    model.close()


def test_a_budget_forgets_what_is_long_ago() -> None:
    budget = RestartBudget(3, 600.0)
    assert [budget.take(now) for now in (0.0, 1.0, 2.0, 3.0, 599.9, 600.0, 600.5, 601.0)] == [
        True, True, True, False, False, True, False, True,
    ]  # fmt: skip


def test_a_step_under_way_can_be_cancelled_and_closing_leaves_nothing(stories: Path) -> None:
    model = open_stories(stories)
    runner = model.runner
    runner.execute(first_plan())
    pid = runner.pid
    assert pid is not None and children() >= {pid}
    os.kill(pid, signal.SIGSTOP)
    reader, writer = os.pipe()
    closer = when_told(reader, runner.cancel)
    with pytest.raises((ExecutorLost, DeviceDead)):
        runner.execute(next_plan(1), writer)
    closer.join()
    os.close(reader)
    os.close(writer)
    model.close()
    assert not is_alive(pid) and runner.pid is None
    with pytest.raises(DeviceDead, match="closed"):
        runner.execute(first_plan(2))


HOST = """
import os, sys
from streamgen.config import make_options
from streamgen.execution.remote import open_remote
from tests.execution.test_remote import FIELDS, first_plan
model = open_remote(make_options(sys.argv[1], FIELDS), None, lambda: False)
print(model.runner.pid, flush=True)
step = 0
while sys.argv[2] == "busy":
    model.runner.execute(first_plan(step))
    step += 1
if sys.argv[2] == "fork" and os.fork():
    os._exit(0)  # what is left holds our end of the socket
if sys.argv[2] == "exit":
    sys.exit()
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["idle", "busy", "stopped", "exit", "fork"])
def test_no_child_outlives_its_host(stories: Path, how: str) -> None:
    root = Path(streamgen.__file__).parents[2]
    path = os.pathsep.join([str(root / "src"), str(root), *filter(None, sys.path)])
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, str(stories), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert host.stdout is not None and host.stdin is not None
    pid = int(host.stdout.readline())
    if how == "stopped":
        os.kill(pid, signal.SIGSTOP)
    if how not in ("exit", "fork"):
        host.kill()
    host.wait(20)
    assert until(lambda: not is_alive(pid)) < 2.0
    host.stdin.close()
    host.stdout.close()


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_progress_comes_in_the_thread_that_opens(stories: Path) -> None:
    seen: list[tuple[LoadProgress, int]] = []
    model = open_remote(make_options(stories, FIELDS), lambda p: seen.append((p, threading.get_ident())), never)
    model.close()
    assert {ident for _, ident in seen} == {threading.get_ident()}
    assert seen[-1][0].stage == "weights" and seen[-1][0].total == model.plan.weights


def test_a_child_that_dies_while_it_loads_is_replaced(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    start = child_process.start_python

    def start_and_kill(*arguments: Any) -> Any:
        process = start(*arguments)
        started.append(process.pid)
        if len(started) == 1:
            process.kill()
        return process

    monkeypatch.setattr(child_module, "start_python", start_and_kill)
    model = open_stories(stories)
    assert len(started) == 2 and model.runner.pid == started[1]
    model.close()


def stop_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every child hangs from its first moment."""
    start = child_process.start_python

    def start_and_stop(*arguments: Any) -> Any:
        process = start(*arguments)
        os.kill(process.pid, signal.SIGSTOP)
        return process

    monkeypatch.setattr(child_module, "start_python", start_and_stop)


def test_a_silent_child_is_replaced_and_finally_refused(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_start(monkeypatch)
    monkeypatch.setattr(remote, "LOAD_SILENCE", 0.05)
    monkeypatch.setattr(remote, "RestartBudget", lambda: RestartBudget(2, 600.0))
    with pytest.raises(LoadError, match=r"SIGKILL.*replaced 2 times"):
        open_stories(stories)


def test_errors_of_loading_keep_their_type(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound):
        open_remote(make_options(tmp_path / "nowhere", FIELDS), None, never)
    with pytest.raises(ConfigError, match="max_context"):
        open_remote(make_options(stories, {**FIELDS, "max_context": 10**6}), None, never)
    # The child finds it gone, though the host still saw it.
    message = remote.load_message
    elsewhere = make_options(tmp_path / "nowhere", FIELDS)
    monkeypatch.setattr(
        remote,
        "load_message",
        lambda prepared, plan: type(m := message(prepared, plan))(options=elsewhere, plan=m.plan),
    )
    with pytest.raises(ModelNotFound, match="nowhere"):
        open_stories(stories)


def test_without_an_interpreter_to_start_it_says_so(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(LoadError, match=r"isolation: .*sys\.executable"):
        open_stories(stories)


def test_opening_can_be_given_up_at_any_moment(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at_start(monkeypatch)  # so that it is still loading then, however fast the machine
    for after in (0.0, 0.02, 0.1, 0.3):
        start = time.perf_counter()
        with pytest.raises(LoadCancelled):
            open_remote(make_options(stories, FIELDS), None, lambda: time.perf_counter() - start >= after)  # noqa: B023
        assert time.perf_counter() - start - after < 1.0


def test_sleeping_with_weights_keeps_the_child_and_without_ends_it(opened: RemoteModel) -> None:
    runner = opened.runner
    tokens = runner.execute(first_plan()).tokens
    pid = runner.pid
    opened.sleep(keep_weights=True)
    opened.wake(never)
    assert runner.pid == pid and runner.execute(first_plan(1)).tokens == tokens
    opened.sleep(keep_weights=False)
    assert runner.pid is None and LEDGER.promised() == 0
    with pytest.raises(LoadCancelled):
        opened.wake(lambda: True)
    assert runner.pid is None and LEDGER.promised() == 0
    opened.wake(never)
    assert runner.pid not in (None, pid) and runner.execute(first_plan(2)).tokens == tokens


def test_the_child_finds_what_its_host_found_and_nothing_of_the_working_directory(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    model = open_stories(stories)
    assert os.getsid(model.runner.pid or 0) == model.runner.pid != os.getsid(0)
    model.close()


# ---- frames ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Connection[ToHost], Connection[ToChild]]]:
    host, child = socket.socketpair()
    yield child, Connection(host, ToHost), Connection(child, ToChild)
    host.close()
    child.close()


def test_messages_cross_unchanged(ends: Any) -> None:
    _, host, child = ends
    sampling = ResolvedSampling(seed=2**64 - 1, logit_bias={3: -1.5}, stop=("é",), temperature=0.1 + 0.2)
    plan = StepPlan(
        step=1,
        begins=(Begin(slot=0, ids=tuple(range(5000)), num_prompt=4, sampling=sampling, score_from=0),),
        copies=((1, 2),), slots=(0,), starts=(0,), counts=(1,), samples=(1,), pages=((3,),), drafts=((5, 6),),
        generation=3,
    )  # fmt: skip
    done = StepDone(step=1, tokens=((1,),), logprobs=((TokenLogprobs(-0.1, 1, (1, 2), (-0.1, float("-inf"))),),))
    host.send(plan)
    child.send(done)
    child.send(StepError(message="x"))
    assert child.receive() == plan
    assert host.receive() == done and host.receive() == StepError(message="x")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "gone"),
        (b"\x01", "gone"),
        (b"\x05\0\0\0\x81", "gone"),
        (b"\x01\0\0\0\xc0", "Expected"),
        ((MAX_FRAME + 1).to_bytes(4, "little"), "a frame of"),
    ],
)
def test_what_is_no_message_ends_the_connection(ends: Any, data: bytes, words: str) -> None:
    child, host, _ = ends
    child.sendall(data)
    child.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionEnded, match=words):
        host.receive()


def test_silence_ends_it_too_where_a_limit_was_set(ends: Any) -> None:
    with pytest.raises(ConnectionEnded, match="timed out"):
        ends[1].receive(0.01)


def test_a_message_over_the_limit_is_refused_whole(ends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, host, child = ends
    monkeypatch.setattr("streamgen.execution.wire.MAX_FRAME", 100)
    with pytest.raises(FrameTooLarge, match="at most 100"):
        host.send(first_plan().__class__(step=0, slots=tuple(range(200)), starts=(), counts=(), samples=(), pages=()))
    host.send(DropPages())
    assert child.receive() == DropPages()
