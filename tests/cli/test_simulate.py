"""`streamgen simulate`: what it prints and writes, and how it says that an option cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from streamgen.cli import main as cli_main
from streamgen.cli import simulate
from streamgen.testing.simulator import simulate as simulate_in_code

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[int, str, str]]

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:17:{i:02}.5000000,{100 + i},{i % 7 + 1}\n" for i in range(40)
)


@pytest.fixture(autouse=True)
def has_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if simulate not in cli_main.COMMANDS:
        monkeypatch.setattr(cli_main, "COMMANDS", (*cli_main.COMMANDS, simulate))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "some trace.csv"
    path.write_text(TRACE)
    return path


def test_a_seed(run: Run, tmp_path: Path) -> None:
    code, out, err = run("simulate", "--seed", 4, "--requests", 80, "--json", "r.json", "--log", "r.log")
    report = simulate_in_code(4, requests=80)
    assert code == 0 and f"event log   {report.digest}" in out and "requests a second" in err
    assert json.loads((tmp_path / "r.json").read_text())["digest"] == report.digest
    log = (tmp_path / "r.log").read_text()
    assert log.count(" arrives ") == 80 and log.count(" ends ") == sum(report.endings.values())


def test_what_fails_prints_the_command_that_shows_it_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamgen.scheduling.batch.Batch.resume", lambda batch, sequence: None)
    code, out, err = run("simulate", "--seed", 9, "--requests", 60, "--scenario", "slow-readers")
    assert code == simulate.BROKEN and not out
    command = err.splitlines()[-1]
    assert command == "streamgen simulate --seed 9 --requests 60 --scenario slow-readers"
    assert run(*command.split()[1:]) == (code, out, err)


def test_a_trace(run: Run, trace: Path, tmp_path: Path) -> None:
    code, out, err = run("simulate", trace, "--json", "r.json", "--pages", 500, "--max-running", 4)
    assert code == 0 and "the plot is some trace.svg" in err
    figures = {line[:20].strip(): line[20:] for line in out.splitlines()}
    assert figures["requests"] == "40, of which 40 finished" and figures["preemptions"] == "0"
    assert {"throughput", "first token", "per output token", "cache hits", "waiting", "device busy"} <= figures.keys()
    assert (tmp_path / "some trace.svg").read_text().startswith("<svg")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["finished"] == 40 and report["limits"]["num_pages"] == 500 and len(report["points"]) > 5


def test_a_trace_many_times(run: Run, trace: Path, tmp_path: Path) -> None:
    options = (
        "--limit",
        10,
        "--repeat",
        5,
        "--scale",
        3,
        "--cost",
        "1e-3,1e-5,0",
        "--plot",
        "p.svg",
        "--json",
        "r.json",
    )
    assert run("simulate", trace, *options)[0] == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["requests"] == 50 and report["cost"]["step"] == 1e-3 and (tmp_path / "p.svg").is_file()
    assert 14 < report["seconds"] < 19


def test_a_measured_machine(run: Run, trace: Path, stories: Path, tmp_path: Path) -> None:
    code, _, err = run("simulate", trace, "--measure", stories, "--kv-memory", "8MiB", "--json", "r.json")
    assert code == 0 and "a step takes" in err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["cost"]["error"] > 0.0
    page_bytes = (
        5 * 2 * 4 * 8 * 16
    )  # layers, keys and values, heads, sizes of a head, positions; times bytes of a value
    assert report["limits"]["num_pages"] in (8 * 2**20 // (page_bytes * 2), 8 * 2**20 // (page_bytes * 4))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--scenario", "none"), "expected one of 'short'"),
        (("--requests", "0"), "expected >= 1"),
        (("--limit", "3"), "--limit: expected only with a trace"),
        (("--knows-lengths",), "--knows-lengths: expected only with a trace"),
        (("TRACE", "--requests", "3"), "--requests: expected only without a trace"),
        (("TRACE", "--cost", "1,2"), "three numbers"),
        (("TRACE", "--cost", "1,2,3", "--measure", "demo"), "expected without --measure"),
        (("TRACE", "--kv-memory", "1GiB"), "expected with --measure"),
        (("TRACE", "--limit", "0"), "limit: expected >= 1"),
        (("TRACE", "--scale", "-1"), "scale: expected > 0"),
        (("TRACE", "--pages", "0"), "num_pages: expected >= 1"),
        (("nowhere.csv",), "could not read nowhere.csv"),
    ],
)
def test_options_that_cannot_be_used(options: tuple[str, ...], what: str, run: Run, trace: Path) -> None:
    code, out, err = run("simulate", *(str(trace) if option == "TRACE" else option for option in options))
    assert (code, out) == (2, "") and what in err and len(err.splitlines()) == 1


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "streamgen.testing.simulator", "--seed", "1", "--requests", "30"]
    source = Path(cli_main.__file__).parents[2]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True)
    assert simulate_in_code(1, requests=30).digest in done.stdout
    wrong = subprocess.run([*command, "--scenario", "none"], cwd=source, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("streamgen: scenario: expected one of")
