"""`streamgen doctor`: the facts it reports, and its verdict."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from streamgen import hub
from streamgen.backends import cpu
from streamgen.cli import machine
from streamgen.errors import KernelUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., tuple[int, str, str]]


def test_json_holds_the_facts(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert platform.python_version() in report["python"]
    assert report["chosen_isa"] in report["instruction_sets"]
    assert "generic" in report["instruction_sets"]
    assert 1 <= report["threads"] <= report["affinity_cpus"]
    assert report["packages"]["msgspec"]
    assert {backend["name"]: backend["usable"] for backend in report["backends"]}["cpu"]


def test_text_names_every_backend(run: Run) -> None:
    _, out, _ = run("doctor")
    for name in ("cpu", "reference", "cuda"):
        assert f"backend      {name}" in out


def test_a_lower_instruction_set_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMGEN_CPU_ISA", "generic")
    assert json.loads(run("doctor", "--json")[1])["chosen_isa"] == "generic"


def test_no_kernels_is_a_failure_with_a_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise KernelUnavailable("no kernels were built")

    monkeypatch.setattr(cpu, "chosen_isa", fail)
    code, out, _ = run("doctor")
    assert code == 1
    assert "- no kernels were built" in out


def test_a_missing_demo_model_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "demo_model_path", lambda: tmp_path / "none.gguf")
    assert "streamgen pull demo" in run("doctor")[1]


def test_it_does_not_import_torch() -> None:
    code = "import sys; from streamgen.cli.main import main; main(['doctor']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")
def test_the_processor_has_a_name() -> None:
    assert machine.cpu_model()
