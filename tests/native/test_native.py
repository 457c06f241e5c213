"""The native tests, built and run: kernels of every instruction set against plain loops, the pool, whole programs."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.native import build

if TYPE_CHECKING:
    from pathlib import Path

SUITES = ("attention", "dense", "grammar", "integers", "pool", "program", "rows")
BUILD_SECONDS = 900  # once: builds are kept


def built(kind: str) -> Path:
    """The program of a kind; skips where it cannot be built here."""
    try:
        return build.build(kind)
    except build.NotHere as reason:
        pytest.skip(f"the native tests for {kind}: {reason}")


def output(kind: str, binary: Path, *arguments: str, cpu: str | None = None) -> list[str]:
    """Lines that it prints; fails with them where it does."""
    done = subprocess.run(
        [*build.command(kind, binary, cpu=cpu), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def check_all_suites(kind: str, binary: Path) -> None:
    """Every suite ran, and found nothing."""
    lines = output(kind, binary)
    assert [line.split(":")[0] for line in lines] == list(SUITES)
    assert all(line.endswith(" checks, 0 failures") for line in lines)


@pytest.mark.timeout(BUILD_SECONDS)
def test_every_instruction_set_of_this_processor() -> None:
    _cpu = pytest.importorskip("streamgen._cpu")
    binary = built("native")
    assert output("native", binary, "levels") == _cpu.isa_names()
    check_all_suites("native", binary)


@pytest.mark.slow
@pytest.mark.timeout(2 * BUILD_SECONDS)
def test_arm64_under_an_emulator() -> None:
    binary = built("arm64")
    assert output("arm64", binary, "levels") == ["i8mm", "dotprod", "neon", "generic"]
    assert output("arm64", binary, "levels", cpu="neoverse-n1") == ["dotprod", "neon", "generic"]
    assert output("arm64", binary, "levels", cpu="cortex-a72") == ["neon", "generic"]
    check_all_suites("arm64", binary)
