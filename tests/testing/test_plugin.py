"""The pytest plugin, run by pytest on small suites."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import streamgen

SOURCE = str(Path(streamgen.__file__).parents[1])


def run_suite(folder: Path, code: str) -> str:
    """Run a suite in a process of its own and return what pytest said."""
    (folder / "test_app.py").write_text(code)
    done = subprocess.run(
        [sys.executable, *"-m pytest -q -p streamgen.testing.plugin -p no:cacheprovider test_app.py".split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PYTHONPATH": SOURCE, "PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    return done.stdout


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("engine = sync_open()\n    assert engine.generate('x').text == 'ok'\n    engine.close()", "1 passed"),
        ("sync_open()", "1 passed"),  # dropped, so it closes itself
        ("kept.append(sync_open())", "left behind: <streamgen.sync.Engine"),
        ("e = sync_open(); s = e.stream('x'); next(s); kept.append((e, s))", "is open"),
    ],
)
def test_what_is_left_behind_fails_the_test(body: str, words: str, tmp_path: Path) -> None:
    said = run_suite(
        tmp_path,
        f"""
import warnings
from streamgen import sync
from streamgen.testing.scripted import ScriptedOpener
from streamgen.testing import FakeEngine
from tests_support import sync_open
kept = []
def test_it():
    warnings.simplefilter("ignore")
    {body}
""".replace(
            "from tests_support import sync_open",
            """
from streamgen.testing.fake_engine import _Cue
from streamgen.testing.script import Reply
def sync_open():
    engine = sync.Engine("fake", _opener=ScriptedOpener(None, num_pages=64, load_error=None))
    make = engine._submission
    def scripted(prompt, fields, **how):
        submission = make(prompt, fields, **how)
        submission.processors = (_Cue(Reply(text="ok")),)
        return submission
    engine._submission = scripted
    return engine.open()
""",
        ),
    )
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
