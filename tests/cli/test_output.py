"""Notes, sizes and the progress bar."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from streamgen import hub
from streamgen.cli.output import ProgressBar, complain, format_bytes
from streamgen.config import LoadProgress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (98_362_432, "93.8 MiB"), (5 * 2**40, "5120.0 GiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_complaints_name_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    complain("no")
    assert capsys.readouterr() == ("", "streamgen: no\n")


def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("loading") as bar:
        bar.update(1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_is_wiped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar("loading") as bar:
        bar.update(512, 1024)
        bar.update(600, 1024)  # too soon to draw again
        bar.update(1024, 1024, "packing")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("loading") == 1
    assert " 50% of 1.0 KiB" in err
    assert "packing" in err and "100%" in err
    assert err.endswith("\r\x1b[K")


def test_pull_prints_the_path(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The puller is replaced by one that writes a small file and reports on the way."""

    def pull(on_progress: Callable[[LoadProgress], None]) -> Path:
        on_progress(LoadProgress(stage="download", done=1, total=None))
        path = tmp_path / "demo.gguf"
        path.write_bytes(bytes(2048))
        return path

    monkeypatch.setattr(hub, "pull_demo", pull)
    code, out, err = run("pull", "demo")
    assert (code, out) == (0, f"{tmp_path / 'demo.gguf'}\n")
    assert "2.0 KiB" in err
