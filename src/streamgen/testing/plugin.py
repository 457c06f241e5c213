"""A pytest plugin: a test that leaves engines, streams, pages, threads or tasks behind fails.

Loaded by itself where streamgen is installed. A suite that never imports an engine pays nothing: all is looked up in
modules that are there already. `@pytest.mark.streamgen_leaks` on a test that leaves something on purpose switches the
check off for it. What a fixture of a wider scope opens belongs to that fixture.

Trio's tasks need no check: none outlives its nursery.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Generator, Mapping

    from streamgen.actors.supervisor import EngineThread

THREAD_PREFIX = "streamgen-"
# What is about to end gets so long. Only a test that leaves something behind waits for it.
THREAD_SETTLE_SECONDS = 5.0
STREAM_SETTLE_SECONDS = 1.0
TASK_SETTLE_SECONDS = 0.2
LOOK_SECONDS = 0.005


class Use(NamedTuple):
    """What is open in an engine."""

    streams: int = 0
    pages: int = 0

    def exceeds(self, other: Use) -> bool:
        """Whether there is more. Pages that belonged to something before may become more, as it goes on."""
        return self.streams > other.streams or (self.streams == 0 and self.pages > 0 and other.pages == 0)


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker, and begin to watch."""
    config.addinivalue_line("markers", "streamgen_leaks: this test may leave engines or streams behind")
    config.pluginmanager.register(LeakWatch(), "streamgen_leaks")


@pytest.fixture
def fake_engine() -> Callable[..., Any]:
    """Makes `FakeEngine`s: `async with fake_engine("what it says") as engine`."""
    from streamgen.testing import FakeEngine

    return FakeEngine


class LeakWatch:
    """Compares what is there after a test with what was there before."""

    def __init__(self) -> None:
        self._known: dict[threading.Thread, Use] = {}
        self._tasks: list[str] = []

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """What is open already is not this test's."""
        self._known = _uses()
        self._tasks = []
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """What a wider fixture opens stays open after the test."""
        if fixturedef.scope == "function":
            return (yield)
        before = _uses()
        try:
            return (yield)
        finally:
            self._known.update({thread: use for thread, use in _uses().items() if use != before.get(thread)})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        """Have a coroutine look for tasks at its end, on the loop that runs it."""
        test = getattr(item, "obj", None)
        if not isinstance(item, pytest.Function) or not inspect.iscoroutinefunction(test):
            return (yield)
        item.obj = self._watched(test)
        try:
            return (yield)
        finally:
            item.obj = test

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        """After a test and its fixtures."""
        result = yield
        if "streamgen.engine_base" in sys.modules and item.get_closest_marker("streamgen_leaks") is None:
            left = [*find_leaks(self._known), *self._tasks]
            if left:
                pytest.fail(f"{item.nodeid} left behind: {'; '.join(left)}", pytrace=False)
        return result

    def _watched(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(test)
        async def watched(*args: Any, **kwargs: Any) -> Any:
            before = _tasks()
            result = await test(*args, **kwargs)
            self._tasks = await _tasks_left(before)
            return result

        return watched


def find_leaks(known: Mapping[threading.Thread, Use]) -> list[str]:
    """What is open now and was not before, in words. What is about to end gets a moment."""
    suspects = _suspects(known)
    if not suspects:
        return []
    gc.collect()  # engines and streams that nobody holds close themselves
    settles = STREAM_SETTLE_SECONDS if suspects.keys() <= known.keys() else THREAD_SETTLE_SECONDS
    deadline = time.monotonic() + settles
    while (suspects := _suspects(known)) and time.monotonic() < deadline:
        if any(_owner(thread) is not None for thread in suspects if thread not in known):
            break  # it will not close by itself
        time.sleep(LOOK_SECONDS)
    return _describe(suspects, known)


def _suspects(known: Mapping[threading.Thread, Use]) -> dict[threading.Thread, Use]:
    """Threads that are new, and those of engines in which more is open than was."""
    return {t: use for t, use in _uses().items() if t not in known or use.exceeds(known[t])}


def _uses() -> dict[threading.Thread, Use]:
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_PREFIX)]
    return {thread: _use(_engine_thread(thread)) for thread in threads}


def _use(engine: EngineThread | None) -> Use:
    scheduler = None if engine is None else engine.scheduler
    if engine is None or scheduler is None:
        return Use()
    return Use(len(engine.routes), scheduler.stats.pages_used + scheduler.stats.pages_pinned)


def _engine_thread(thread: threading.Thread) -> EngineThread | None:
    """The engine that a thread runs; None for the threads that help it, which open nothing."""
    target = getattr(thread, "_target", None)  # gone once it has run
    owner = getattr(target, "__self__", None)
    return owner if hasattr(owner, "routes") else None


def _owner(thread: threading.Thread) -> Any:
    """The engine object that holds a thread open; None where it was closed, or nobody has it any more."""
    engine_thread = _engine_thread(thread)
    base: Any = sys.modules["streamgen.engine_base"]
    if engine_thread is None:
        return None
    for engine in gc.get_objects():
        if issubclass(type(engine), base.EngineBase) and engine._thread is engine_thread and not engine._was_closed:
            return engine
    return None


def _describe(suspects: Mapping[threading.Thread, Use], known: Mapping[threading.Thread, Use]) -> list[str]:
    owners = {thread: _owner(thread) for thread in suspects}
    words = []
    for thread, owner in owners.items():
        use = suspects[thread]
        what = [f"{use.streams} streams"] * (use.streams > 0) + [f"{use.pages} pages"] * (use.pages > 0)
        holding = f" with {' and '.join(what)}" if what else ""
        if owner is not None:
            words.append(f"{owner!r} is open{holding}" if thread not in known else f"{owner!r}{holding}")
    return words or [f"threads {', '.join(sorted(thread.name for thread in suspects))}"] * bool(suspects)


def _tasks() -> set[asyncio.Task[Any]]:
    """The tasks of the asyncio loop that runs this, if one does."""
    if "asyncio" not in sys.modules:
        return set()
    import asyncio

    try:
        return asyncio.all_tasks()
    except RuntimeError:
        return set()


async def _tasks_left(before: set[asyncio.Task[Any]]) -> list[str]:
    """Names of the tasks that a test has made and neither awaited nor cancelled."""
    left = _tasks() - before
    if not left or "streamgen.engine_base" not in sys.modules:
        return []
    import asyncio

    _, left = await asyncio.wait(left, timeout=TASK_SETTLE_SECONDS)
    return sorted(f"task {task.get_name()} of {getattr(task.get_coro(), '__qualname__', '?')}" for task in left)
