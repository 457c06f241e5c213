"""Every example runs as its docstring says, on the demo model."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
MAX_LINES = 60


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path: Path, demo_model_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), str(demo_model_path)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_is_short_and_says_what_it_shows(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) < MAX_LINES
    assert ast.get_docstring(ast.parse(source))


def test_the_site(tmp_path: Path) -> None:
    """Its own tests, as its author runs them; torch and the kernels must not be needed."""
    pytest.importorskip("fastapi", reason="needs fastapi and httpx")
    (tmp_path / "block.py").write_text(
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'numpy', 'outlines') or name == 'streamgen._cpu':\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    root = Path(__file__).parents[1]
    command = "-m pytest -q -p block -p anyio -p no:cacheprovider -c /dev/null --rootdir . test_app.py"
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=root / "examples" / "fastapi",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": f"{root / 'src'}{os.pathsep}{tmp_path}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_site_where_torch_is_not_installed() -> None:
    script = Path(__file__).parents[1] / "examples" / "fastapi" / "check_without_torch.sh"
    done = subprocess.run(
        ["bash", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout + done.stderr


def test_there_are_examples() -> None:
    assert {"hello", "stream", "concurrent_asyncio", "concurrent_trio", "threads"} <= {p.stem for p in EXAMPLES}
