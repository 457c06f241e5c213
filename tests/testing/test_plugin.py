"""The pytest plugin, run by pytest on small suites."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import streamgen

COMMAND = "-m pytest -q -p streamgen.testing.plugin -p no:cacheprovider test_app.py"
SOURCE = str(Path(streamgen.__file__).parents[1])


def run_suite(folder: Path, code: str, *options: str) -> str:
    """Run a suite in a process of its own and return what pytest said."""
    (folder / "test_app.py").write_text(code)
    done = subprocess.run(
        [sys.executable, *COMMAND.split(), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": SOURCE, "PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    return done.stdout


def run_body(folder: Path, body: str, *, more: str = "") -> str:
    """Run a suite of one test with this body."""
    return run_suite(
        folder,
        f"""
import anyio, asyncio, pytest, threading, warnings
import streamgen as sg
from streamgen.testing import FakeEngine as AsyncFakeEngine, Reply
from streamgen.testing.sync import FakeEngine
kept = []
long = Reply(text="ok", never_ends=True, seconds_per_token=0.001)
@pytest.fixture(scope="module")
def wide():
    engine = FakeEngine(long).open()
    yield engine
    engine.close()
@pytest.fixture
def forgetful():
    return FakeEngine().open()
@pytest.fixture(scope="module", params=["asyncio"])
def anyio_backend(request):
    return request.param
{more}
def test_it(wide):
    warnings.simplefilter("ignore")
    {body}
def test_last(wide):  # so that the wide engine outlives the other tests
    pass
""",
        *("-p", "anyio"),
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("engine = FakeEngine().open(); assert engine.generate('x').text == 'ok'; engine.close()", "2 passed"),
        ("FakeEngine().open()", "2 passed"),  # dropped, so it closes itself
        ("engine = FakeEngine().open(); engine.me = engine", "2 passed"),  # in a cycle
        ("kept.append(FakeEngine().open())", "left behind: <streamgen.testing.sync.FakeEngine 'fake' ready> is open"),
        ("e = FakeEngine(long).open(); s = e.stream('x'); next(s); kept.append((e, s))", "with 1 streams and 1 pages"),
        ("next(wide.stream('x'))", "2 passed"),  # a stream that nobody has is cancelled
        ("with wide.stream('x') as stream: next(stream)", "2 passed"),
        ("kept.append(wide.stream('x')); next(kept[0])", "left behind: <streamgen.testing.sync.FakeEngine"),
        ("s = wide.session(pin=True); s.ask('x' * 99, max_tokens=2); s.close()", "2 passed"),
        ("kept.append(wide.session(pin=True)); kept[0].ask('x' * 99, max_tokens=2)", "'fake' ready> with 7 pages"),
    ],
)
def test_what_is_left_behind_fails_the_test(body: str, words: str, tmp_path: Path) -> None:
    said = run_body(tmp_path, body)
    assert words in said, said


def test_a_fixture_that_forgets_fails_the_test_and_one_of_a_wider_scope_does_not(tmp_path: Path) -> None:
    said = run_body(tmp_path, "wide.generate('x', max_tokens=2)", more="def test_fixture(wide, forgetful): pass")
    assert "3 passed, 1 error" in said and "test_fixture left behind" in said, said


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("kept.append(asyncio.create_task(asyncio.sleep(60), name='lost'))", "left behind: task lost of sleep"),
        ("await asyncio.create_task(asyncio.sleep(0))", "3 passed"),
        ("kept.append(asyncio.create_task(asyncio.sleep(60))); kept[0].cancel()", "3 passed"),
        ("asyncio.create_task(asyncio.sleep(0.01))", "3 passed"),  # it is about to end
    ],
)
def test_tasks_left_behind_fail_the_test(body: str, words: str, tmp_path: Path) -> None:
    more = f"""
@pytest.fixture(scope="module")
async def busy(anyio_backend):
    async with anyio.create_task_group() as group, AsyncFakeEngine() as engine:
        group.start_soon(anyio.sleep_forever)
        yield engine
        group.cancel_scope.cancel()
@pytest.mark.anyio
async def test_task(busy):
    assert (await busy.generate("x")).text == "ok"
    {body}
"""
    said = run_body(tmp_path, "pass", more=more)
    assert words in said, said


def test_the_fixture_and_the_marker(tmp_path: Path) -> None:
    said = run_suite(
        tmp_path,
        """
import anyio, pytest
kept = []
def test_fixture(fake_engine):
    async def main():
        async with fake_engine("hello") as engine:
            assert (await engine.generate("x")).text == "hello"
    anyio.run(main)
@pytest.mark.streamgen_leaks
def test_leaks(fake_engine):
    engine = fake_engine("hello")
    anyio.run(engine.open)
    kept.append(engine)
def test_not_mine():
    pass
def test_end():
    anyio.run(kept.pop().aclose)
""",
    )
    assert "4 passed" in said, said


def test_a_suite_without_engines_pays_nothing(tmp_path: Path) -> None:
    said = run_suite(
        tmp_path,
        """
import sys
def test_it():
    assert not {"streamgen.engine_base", "anyio", "torch", "numpy", "msgspec"} & set(sys.modules)
""",
    )
    assert "1 passed" in said, said
