"""Opening, sleeping, waking, closing a real model: its memory, its answers, and giving up at any stage of loading."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from streamgen.config import make_options
from streamgen.errors import InsufficientMemory, LoadError, ModelNotFound
from streamgen.execution import memory, model
from streamgen.execution.background import LoadCancelled
from streamgen.execution.memory import LEDGER
from streamgen.execution.model import OpenModel, load_runner, open_model, plan_model
from streamgen.execution.runner import Runner
from streamgen.messages import Begin, StepPlan
from streamgen.sampling import ResolvedSampling

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = (1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298)
GIB = 1 << 30


def never() -> bool:
    return False


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No promise and no thread outlives a test; threads that were left to themselves end by themselves."""
    assert LEDGER.promised() == 0
    yield
    assert LEDGER.promised() == 0
    for thread in threading.enumerate():
        if thread.name == "streamgen-loading":
            thread.join(30)
            assert not thread.is_alive()


def open_stories(path: Path, **fields: Any) -> OpenModel:
    return open_model(make_options(path, {"kv_memory": "32MiB", "max_running": 8, **fields}), None, never)


def answer(opened: OpenModel | Runner, *, tokens: int = 30, seed: int = 3) -> list[int]:
    """A sequence run by hand, in slot 0 and pages 3 ..."""
    sampling = ResolvedSampling(temperature=0.8, seed=seed)
    begin = Begin(slot=0, ids=PROMPT, num_prompt=len(PROMPT), sampling=sampling, pages=tuple(range(3, 8)))
    ids: list[int] = []
    runner = opened if isinstance(opened, Runner) else opened.runner
    for step in range(tokens):
        start, count = (len(PROMPT) + step - 1, 1) if step else (0, len(PROMPT))
        plan = StepPlan(
            step=step,
            begins=() if step else (begin,),
            slots=(0,),
            starts=(start,),
            counts=(count,),
            samples=(1,),
            pages=((),),
        )
        ids += runner.execute(plan).tokens[0]
    return ids


# ---- sleep and wake ----


@pytest.mark.parametrize("keep_weights", [True, False])
def test_sleep_and_wake_keep_the_answers(stories: Path, keep_weights: bool) -> None:
    opened = open_stories(stories)
    expected = answer(opened)
    runner, limits = opened.runner, opened.limits
    for _ in range(3):
        opened.sleep(keep_weights=keep_weights)
        opened.sleep(keep_weights=keep_weights)
        assert opened.runner.resident_bytes() == 0
        opened.wake(never)
        opened.wake(never)
        assert answer(opened) == expected
    assert opened.runner is runner and opened.limits is limits
    opened.sleep(keep_weights=keep_weights)
    opened.close()
    opened.close()


def test_pages_read_as_zero_after_sleep(stories: Path) -> None:
    """An answer over pages that were never filled is the same before and after: nothing is left in them."""
    opened = open_stories(stories)

    def blind() -> list[int]:
        begin = Begin(slot=0, ids=(1,) * 40, num_prompt=40, sampling=ResolvedSampling(temperature=0.0), pages=(5, 6, 7))
        plan = StepPlan(step=0, begins=(begin,), slots=(0,), starts=(39,), counts=(1,), samples=(1,), pages=((),))
        return list(opened.runner.execute(plan).tokens[0])

    fresh = blind()
    answer(opened)
    opened.sleep(keep_weights=True)
    assert blind() == fresh
    opened.close()


def test_waking_can_be_given_up_and_tried_again(stories: Path) -> None:
    opened = open_stories(stories)
    expected = answer(opened)
    opened.sleep(keep_weights=False)
    assert LEDGER.promised() == 0
    with pytest.raises(LoadCancelled):
        opened.wake(lambda: True)
    assert LEDGER.promised() == 0
    opened.wake(never)
    assert answer(opened) == expected
    opened.close()


def test_waking_without_the_file(stories: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(stories, place)
    opened = open_stories(place)
    expected = answer(opened)
    opened.sleep(keep_weights=False)
    place.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelNotFound, match="found nothing"):
        opened.wake(never)
    (tmp_path / "elsewhere").rename(place)
    opened.wake(never)
    assert answer(opened) == expected
    opened.close()


def test_waking_without_the_memory(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_stories(stories)
    opened.sleep(keep_weights=False)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: 1 << 20)
        with pytest.raises(InsufficientMemory, match="waking takes"):
            opened.wake(never)
    opened.wake(never)
    opened.close()


def test_a_runner_alone_answers_as_the_model_does(stories: Path) -> None:
    opened = open_stories(stories)
    expected = answer(opened)
    progress: list[int] = []
    options = make_options(stories, {"kv_memory": "32MiB", "max_running": 8})
    runner = load_runner(options, opened.plan, lambda p: progress.append(p.done), never)
    assert answer(runner) == expected
    assert progress == sorted(progress) and progress[-1] <= opened.plan.weights
    with pytest.raises(LoadCancelled):
        load_runner(options, opened.plan, None, lambda: True)
    runner.close()
    opened.close()


# ---- several engines in stated budgets ----


def test_a_second_engine_plans_with_what_is_really_left(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: GIB)
    options = make_options(stories, {})
    alone = plan_model(options)
    first = open_stories(stories)
    promised = first.plan.cache + first.plan.workspace
    assert LEDGER.promised() == promised - first.runner.resident_bytes()
    beside = plan_model(options)
    assert alone.headroom + alone.cache - beside.headroom - beside.cache == LEDGER.promised()
    answer(first)  # what is touched now is the system's to count
    touched = first.runner.resident_bytes()
    assert touched > 0 and LEDGER.promised() == promised - touched
    second = open_stories(stories, kv_memory=0.3)
    assert second.plan.cache <= 0.3 * (GIB - LEDGER.promised()) + promised
    first.close()
    second.close()
    assert plan_model(options) == alone


def test_a_sleeping_engine_leaves_its_memory_to_others(stories: Path) -> None:
    opened = open_stories(stories)
    answer(opened)
    opened.sleep(keep_weights=True)
    assert LEDGER.promised() == opened.plan.cache + opened.plan.workspace  # it takes them without asking
    opened.sleep(keep_weights=False)
    assert LEDGER.promised() == 0
    opened.wake(never)
    assert LEDGER.promised() > 0
    opened.close()


def test_an_engine_that_is_loading_has_promised_already(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = make_options(stories, {"kv_memory": "2MiB"})
    need = plan_model(options).total
    monkeypatch.setattr(memory, "available_memory", lambda: need * 3 // 2)
    loading, go_on = threading.Event(), threading.Event()
    opened: list[OpenModel] = []

    def wait(progress: object) -> None:
        loading.set()
        go_on.wait()

    thread = threading.Thread(target=lambda: opened.append(open_model(options, wait, never)))
    thread.start()
    loading.wait()
    try:
        with pytest.raises(InsufficientMemory):
            open_model(options, None, never)
    finally:
        go_on.set()
        thread.join()
        opened[0].close()
    open_model(options, None, never).close()


@pytest.mark.parametrize("stage", ["open_text", "OpenModel"])
def test_what_fails_while_opening_promises_nothing(stories: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise LoadError("no")

    monkeypatch.setattr(model, stage, fail)
    with pytest.raises(LoadError, match="no"):
        open_stories(stories)


# ---- giving up ----


def test_loading_is_given_up_at_every_look(stories: Path) -> None:
    options = make_options(stories, {"kv_memory": "2MiB"})
    for stop_at in range(1000):
        looks = 0

        def is_cancelled() -> bool:
            nonlocal looks
            looks += 1
            return looks > stop_at  # noqa: B023

        try:
            opened = open_model(options, None, is_cancelled)
        except LoadCancelled:
            assert LEDGER.promised() == 0
            continue
        opened.close()
        break
    assert 10 < stop_at < 999


@pytest.mark.parametrize("stage", ["load_tokenizer", "resolve_model"])
def test_a_library_that_is_busy_is_not_waited_for(stories: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    entered, free = threading.Event(), threading.Event()
    real = getattr(model, stage)

    def slow(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        free.wait()
        return real(*args, **kwargs)

    monkeypatch.setattr(model, stage, slow)
    with pytest.raises(LoadCancelled):
        open_model(make_options(stories, {"kv_memory": "2MiB"}), None, entered.is_set)
    free.set()


def test_a_load_of_a_real_model_is_given_up_soon(demo_model_path: Path) -> None:
    options = make_options(demo_model_path, {"kv_memory": "16MiB"})
    started = time.perf_counter()
    open_model(options, None, never).close()
    whole = time.perf_counter() - started
    chance, reactions = random.Random(4), []
    for _ in range(20):
        cancelled = threading.Event()
        timer = threading.Timer(chance.random() * whole, cancelled.set)
        timer.start()
        at: list[float] = []

        def is_cancelled(flag: threading.Event = cancelled, at: list[float] = at) -> bool:
            if flag.is_set() and not at:
                at.append(time.perf_counter())
            return flag.is_set()

        try:
            open_model(options, None, is_cancelled).close()
        except LoadCancelled:
            reactions.append(time.perf_counter() - at[0])
        timer.join()
    assert len(reactions) >= 5
    assert max(reactions) < 0.2


# ---- the process's memory ----

_RESIDENT = """
import json, sys
from streamgen.config import make_options
from streamgen.execution.model import open_model
from streamgen.execution.runner import Runner
from streamgen.messages import Begin, StepPlan
from streamgen.sampling import ResolvedSampling

def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

def fill(model):
    for slot in range(2):
        pages = tuple(range(slot * 32, slot * 32 + 32))
        begin = Begin(slot=slot, ids=(5,) * 500, num_prompt=500, sampling=ResolvedSampling(), pages=pages)
        model.runner.execute(
            StepPlan(
                step=slot, begins=(begin,), slots=(slot,), starts=(0,), counts=(500,), samples=(1,), pages=((),)
            )
        )

def open_filled():
    options = make_options(sys.argv[1], {"kv_memory": "128MiB", "max_running": 64})
    model = open_model(options, None, lambda: False)
    fill(model)
    return model
"""

_SLEEP = (
    _RESIDENT
    + """
model = open_filled()
figures = {"page": model.plan.page_bytes, "weights": model.plan.weights, "used": [resident()]}
for keep in (True, False, True, False):
    model.sleep(keep_weights=keep)
    figures.setdefault("kept" if keep else "asleep", []).append(resident())
    model.wake(lambda: False)
    fill(model)
    figures["used"].append(resident())
print(json.dumps(figures))
"""
)

_CYCLES = (
    _RESIDENT
    + """
figures = []
for _ in range(25):
    model = open_model(make_options(sys.argv[1], {"kv_memory": "128MiB", "max_running": 64}), None, lambda: False)
    open_at = resident()
    model.close()
    del model
    figures.append((open_at, resident()))
print(json.dumps(figures))
"""
)


def run_python(source: str, path: Path) -> Any:
    done = subprocess.run([sys.executable, "-c", source, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sleep_gives_memory_back(demo_model_path: Path) -> None:
    figures = run_python(_SLEEP, demo_model_path)
    pages, weights = 2 * 32 * figures["page"], figures["weights"]
    assert max(figures["kept"]) < min(figures["used"]) - 0.95 * pages
    assert max(figures["asleep"]) < min(figures["used"]) - 0.95 * (pages + weights)
    assert max(figures["used"]) < 1.05 * min(figures["used"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_opening_and_closing_twenty_times_does_not_grow(demo_model_path: Path) -> None:
    figures = run_python(_CYCLES, demo_model_path)
    warm = figures[5:]  # allocators keep what the first few asked for
    while_open = [open_at for open_at, _ in warm]
    assert sum(while_open[-5:]) < 1.02 * sum(while_open[:5])
    closed = [closed for _, closed in warm]
    assert max(closed) < min(while_open) / 2
