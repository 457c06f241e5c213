"""Static types flow from `output=` to what comes back: a type checker's word on `flow.py`."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy: pip install streamgen[dev]")
@pytest.mark.timeout(300)
def test_types_flow(tmp_path: Path) -> None:
    flow = Path(__file__).with_name("flow.py")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--follow-imports=silent", str(flow)],
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )
    assert "1 source file" in done.stdout, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if "flow.py" in line] == []
    assert flow.read_text().count("assert_type(") > 30
