"""A real, tiny model for hosts in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_model(shared_data: Path) -> Path:
    """A checkpoint that opens in a fraction of a second."""
    return shared_data / "models" / "stories260K"


def environment(**more: str) -> dict[str, str]:
    """A clean environment in which a host finds the package."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "STREAMGEN_CPU_ISA") if name in os.environ}
    return {**kept, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **more}


def run_host(path: Path, code: str, *, timeout: float = 60.0) -> str:
    """Run a program to its end and return what it printed; it must end well, and say nothing on stderr."""
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout
