"""A pytest plugin: a test that leaves engines, streams, threads or pages behind fails.

Loaded by itself where streamgen is installed. A suite that never imports an engine pays nothing: all is looked up in
modules that are there already. `@pytest.mark.streamgen_leaks` on a test that leaves something on purpose switches the
check off for it.
"""

from __future__ import annotations

import gc
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

THREAD_PREFIX = "streamgen-"
JOIN_SECONDS = 5.0


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker."""
    config.addinivalue_line("markers", "streamgen_leaks: this test may leave engines or streams behind")


@pytest.fixture
def fake_engine() -> Callable[..., Any]:
    """Makes `FakeEngine`s: `async with fake_engine("what it says") as engine`."""
    from streamgen.testing import FakeEngine

    return FakeEngine


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """After a test and its fixtures: nothing of an engine may be left that was not there before."""
    result = yield
    if "streamgen.engine_base" in sys.modules and item.get_closest_marker("streamgen_leaks") is None:
        before: set[int] = item.stash.get(_BEFORE, set())
        left = find_leaks(before)
        if left:
            pytest.fail(f"{item.nodeid} left behind: {'; '.join(left)}", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """What wider fixtures have open is not this test's."""
    item.stash[_BEFORE] = {thread.ident or 0 for thread in _engine_threads()}
    return (yield)


_BEFORE: pytest.StashKey[set[int]] = pytest.StashKey()


def find_leaks(before: set[int]) -> list[str]:
    """What is open now and was not before, in words. Engines that are being closed get a moment."""
    gc.collect()
    threads = [thread for thread in _engine_threads() if thread.ident not in before]
    if not threads:
        return []
    engines = [engine for engine in _open_engines() if engine._thread.thread.ident not in before]
    if not engines:  # closed, or dropped: their threads end by themselves
        for thread in threads:
            thread.join(JOIN_SECONDS)
        alive = [thread.name for thread in threads if thread.is_alive()]
        return [f"threads {', '.join(sorted(alive))}"] if alive else []
    return [_describe(engine) for engine in engines]


def _describe(engine: Any) -> str:
    stats = engine.stats()
    parts = [f"{engine!r} is open"]
    if stats.open_requests:
        parts.append(f"with {stats.open_requests} streams")
    if stats.pages_used:
        parts.append(f"holding {stats.pages_used} pages")
    return " ".join(parts)


def _engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_PREFIX)]


def _open_engines() -> list[Any]:
    base: Any = sys.modules["streamgen.engine_base"]
    return [
        engine
        for engine in gc.get_objects()
        if isinstance(engine, base.EngineBase) and engine._thread is not None and not engine._thread.closed.is_set()
    ]
