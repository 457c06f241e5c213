"""What every engine must do here, and how a child process of one is run."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from ..figures import START, Incomplete, Outcome, Timeline, outcome_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..models import Model
    from ..works import Work

CHILDREN = Path(__file__).parents[1] / "children"
TURN_SECONDS = 300.0


class Unable(Exception):
    """An engine cannot do this work or read this model; the report says why."""


class Setting(Struct, frozen=True, kw_only=True):
    """What all engines share in a run.

    root      where peers are installed, a folder each; None: nowhere
    options   more options of our engine
    """

    threads: int
    root: Path | None = None
    options: dict[str, Any] = {}


class Engine(Protocol):
    """One engine."""

    name: str

    def unavailable(self) -> str | None:
        """Why it cannot be run here; None if it can."""
        ...

    def version(self) -> str:
        """As it says itself."""
        ...

    def run(self, work: Work, model: Model) -> Outcome:
        """Do a work in a process of its own.

        Raises:
            Unable: it cannot, for a reason that stays.
            Incomplete: it did not do what was asked.
        """
        ...


def run_child(
    command: list[str], work: Work, fields: dict[str, Any], environment: dict[str, str] | None = None
) -> Outcome:
    """Run a child of `children/` on a work and return its figures.

    The child gets `fields` and the requests as JSON on its standard input, and prints lines of JSON: `{"first": true}`
    with the first token, at last `{"runs": [[{"submitted", "times", "counts"}]]}`, or `{"unable": why}`.
    """
    requests = [{"ids": r.ids, "max_tokens": r.max_tokens, "arrival": r.arrival} for r in work.requests]
    is_start = work.kind == "start"
    task = {**fields, "requests": requests, "repeats": work.repeats, "warm": not is_start, "longest": work.longest}
    began, first = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        result: dict[str, Any] = {}
        with process, _limit(process):
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(task))
            process.stdin.close()
            for line in process.stdout:
                if not line.startswith("{"):
                    continue  # what a library says to the world
                if first is None:
                    first = time.perf_counter() - began
                result = json.loads(line)
        errors.seek(0)
        said = errors.read().strip()
    if "unable" in result:
        raise Unable(result["unable"])
    if process.returncode != 0 or "runs" not in result:
        raise Incomplete(f"{work.name}: the child ended with {process.returncode}: {said[-400:] or 'nothing said'}")
    return _outcome(work, result, first)


def _outcome(work: Work, result: dict[str, Any], first: float | None) -> Outcome:
    runs = [[Timeline(**timeline) for timeline in run] for run in result["runs"]]
    if work.kind == "start":
        assert first is not None, "a result is a line, so there was a first one"
        return Outcome(values={START.name: first})
    return outcome_of(work, runs)


@contextmanager
def _limit(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kills the process where it takes longer than a turn may, and where this one is told to end."""
    timer = threading.Timer(TURN_SECONDS, process.kill)
    timer.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        timer.cancel()
