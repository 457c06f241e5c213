"""The parser, the exit codes, and what a command may import."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from streamgen import errors
from streamgen.cli import doctor, exit_codes
from streamgen.cli import main as cli

if TYPE_CHECKING:
    import argparse

HEAVY = ("numpy", "torch", "anyio", "tokenizers", "jinja2", "streamgen.engine", "streamgen.hub")


@pytest.mark.parametrize("arguments", [[], *([module.__name__.rpartition(".")[2]] for module in cli.COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from streamgen.cli.main import main
try:
    main({[*arguments, "--help"]!r})
except SystemExit as exit:
    assert exit.code == 0, exit.code
loaded = [name for name in {HEAVY!r} if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "exit codes:" in done.stdout


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "streamgen", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("streamgen ")


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["run", "--temperature", "hot"], ["run", "--no-such-option"], ["pull", "moon"]]
)
def test_wrong_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == exit_codes.USAGE
    assert "usage: streamgen" in capsys.readouterr().err


def all_errors() -> list[type[errors.StreamgenError]]:
    """Every class of error, the base left out."""
    found = [errors.StreamgenError]
    for kind in found:
        found.extend(kind.__subclasses__())
    return [kind for kind in found[1:] if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_has_its_familys_code(kind: type[errors.StreamgenError]) -> None:
    families = [code for family, code in exit_codes.FAMILIES if issubclass(kind, family)]
    assert len(families) == 1
    assert exit_codes.exit_code(kind("said")) == families[0]


def test_codes_are_distinct_and_documented() -> None:
    codes = [
        exit_codes.OK,
        exit_codes.UNEXPECTED,
        exit_codes.INTERRUPTED,
        exit_codes.BROKEN_PIPE,
        *(code for _, code in exit_codes.FAMILIES),
    ]
    assert len(set(codes)) == len(codes)
    for code in codes:
        assert f"\n  {code} " in exit_codes.HELP


def run_raising(monkeypatch: pytest.MonkeyPatch, error: BaseException, *argv: str) -> int:
    def fail(arguments: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    return cli.main(["doctor", *argv])


def test_an_error_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(monkeypatch, errors.CorruptWeights("a.gguf: cut off")) == 3
    assert capsys.readouterr() == ("", "streamgen: a.gguf: cut off\n")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(monkeypatch, errors.EngineFailed("died"), "--debug") == 7
    assert "Traceback" in capsys.readouterr().err


def test_an_unexpected_error_names_its_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(monkeypatch, ZeroDivisionError("by zero")) == 1
    assert capsys.readouterr().err == "streamgen: unexpected ZeroDivisionError: by zero (--debug shows where)\n"


def test_an_error_of_one_task_is_not_lost_in_a_group(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    group = ExceptionGroup("tasks", [ExceptionGroup("inner", [errors.EngineFailed("died")])])
    assert run_raising(monkeypatch, group) == 7
    assert capsys.readouterr().err == "streamgen: died\n"


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_raising(monkeypatch, KeyboardInterrupt()) == 130


def test_a_reader_that_left_is_141_and_silent() -> None:
    done = subprocess.run(
        f"{sys.executable} -m streamgen doctor | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
    )
    # The pipe may still be open when the report is written whole: then the command succeeds.
    assert done.returncode in (exit_codes.BROKEN_PIPE, exit_codes.OK)
    assert done.stderr == ""


def test_every_command_says_what_it_does() -> None:
    for module in cli.COMMANDS:
        assert module.SUMMARY and not module.SUMMARY.endswith(".")
        assert module.DESCRIPTION
