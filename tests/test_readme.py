"""The README tells the truth: its Python runs, its commands and files exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block: str, demo_model_path: Path) -> None:
    assert demo_model_path.is_file()  # what `sg.Engine()` opens
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], capture_output=True, text=True, timeout=100, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_there_are_blocks() -> None:
    assert BLOCKS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_commands_exist() -> None:
    from streamgen.cli.main import COMMANDS

    known = {module.__name__.rpartition(".")[2] for module in COMMANDS}
    assert set(re.findall(r"streamgen (run|chat|\w+)(?= (?:MODEL|demo|  |#))", README)) <= known


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (("PYTHON=no-such-python",), "needs Python 3.11 or newer"),
        (("PYTHON=",), "needs Python 3.11 or newer"),
    ],
)
def test_make_says_what_is_missing(variables: tuple[str, ...], sentence: str) -> None:
    done = subprocess.run(
        ["make", "--directory", str(ROOT), "tools", *variables], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert sentence in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_that_a_compiler_is_missing(tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    for tool in ("make", "sh", "echo", "test"):
        found = shutil.which(tool)
        assert found is not None
        (tmp_path / tool).symlink_to(found)
    done = subprocess.run(
        ["make", "--directory", str(ROOT), "tools", "PYTHON=python3"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": str(tmp_path)},
    )
    assert done.returncode != 0
    assert "needs a C++ compiler" in done.stdout
