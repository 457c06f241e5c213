"""A tiny real model, and ways to run a command."""

from __future__ import annotations

import io
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from streamgen.cli.main import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A trained model of 260K parameters, without a chat template."""
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def golden(stories: Path) -> list[dict[str, Any]]:
    """Greedy float32 runs of it: prompt, text, output_ids."""
    cases: list[dict[str, Any]] = json.loads((stories / "golden.json").read_text())["cases"]
    return cases


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what stdin holds."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit code, stdout, stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
