"""Runs every engine on a work in turns, with what the machine gives measured beside.

A round goes through all engines once, each time beginning with another; so a neighbour on the machine, or its clock,
meets all of them, and ratios are of neighbours in time.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

import streamgen._cpu as _cpu

from .adapters.base import Engine, Unable
from .figures import BUSY, FIGURES, QUIET, SHARE, STEADY, Incomplete, Outcome
from .works import Work, make_work

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .models import Model

BANDWIDTH_BYTES = 512 << 20
BANDWIDTH_SECONDS = 0.5
ATTEMPTS = 3  # at a turn that others disturb
GLANCE_SECONDS = 0.4
_BUSY = "while True: pass"
_STAT = Path("/proc/stat")


class Turn(Struct, kw_only=True):
    """One engine's turn in a round.

    load      the system's load average when it began, which counts earlier turns
    others    processors that others kept busy meanwhile, on average; None where the system does not say
    """

    engine: str
    round: int
    values: dict[str, float]
    between: list[float] = []
    seconds: float
    load: float
    others: float | None


class Machine(Struct, frozen=True, kw_only=True):
    """What the machine gave in one round: GB/s of memory read, GFLOP/s of torch's bfloat16 product (None: no torch)."""

    bandwidth: float
    matmul: float | None


class Measured(Struct, kw_only=True):
    """A work on a model: every turn, the machine of each round, and why an engine is not there."""

    turns: list[Turn]
    machines: list[Machine]
    missing: dict[str, str]


class Manner(Struct, frozen=True, kw_only=True):
    """How a line is measured.

    matmul        whether torch's product is measured too
    most_others   processors that others may keep busy during a turn before it is tried again
    patience      seconds to wait for others to leave the processors alone before a turn
    """

    threads: int
    rounds: int
    matmul: bool
    most_others: float
    patience: float = 30.0


def measure(work: Work, model: Model, engines: Sequence[Engine], manner: Manner) -> Measured:
    """All rounds of a work."""
    measured = Measured(turns=[], machines=[], missing={})
    for number in range(manner.rounds):
        wait_until_quiet(manner)
        measured.machines.append(measure_machine(manner))
        first = number % len(engines)
        for engine in [*engines[first:], *engines[:first]]:
            if engine.name not in measured.missing:
                _measure_turn(measured, engine, work, model, number, manner)
    return measured


def _measure_turn(measured: Measured, engine: Engine, work: Work, model: Model, number: int, manner: Manner) -> None:
    """A turn into `measured`; an engine that fails is out, with what it did before."""
    try:
        turn = quiet_turn(engine, work, model, number, manner)
    except (Unable, Incomplete, subprocess.TimeoutExpired) as error:
        measured.missing[engine.name] = str(error)
        measured.turns = [turn for turn in measured.turns if turn.engine != engine.name]
        print(f"  {engine.name}: {error}", file=sys.stderr, flush=True)
    else:
        measured.turns.append(turn)
        print(f"  {describe(turn, work)}", file=sys.stderr, flush=True)


def quiet_turn(engine: Engine, work: Work, model: Model, number: int, manner: Manner) -> Turn:
    """The first turn that others hardly disturbed, else the least disturbed of some."""
    tried: list[Turn] = []
    for _ in range(ATTEMPTS):
        wait_until_quiet(manner)
        turn = take_turn(engine, work, model, number)
        if turn.others is None or turn.others <= manner.most_others:
            return turn
        tried.append(turn)
        print(f"  disturbed: {describe(turn, work)}", file=sys.stderr, flush=True)
    return min(tried, key=lambda turn: turn.others or 0.0)


def wait_until_quiet(manner: Manner) -> None:
    """Until others leave the processors alone for a moment, but not for ever."""
    for _ in range(int(manner.patience / GLANCE_SECONDS)):
        before = _Usage.now()
        time.sleep(GLANCE_SECONDS)
        others = before.others_until(_Usage.now())
        if others is None or others <= manner.most_others:
            return


def describe(turn: Turn, work: Work) -> str:
    """A turn as a line of text."""
    values = ", ".join(f"{f.name} {turn.values[f.name]:.4g}" for f in FIGURES[work.kind])
    others = "" if turn.others is None else f", others {turn.others:.2f} cpu"
    return f"{turn.engine}: {values} ({turn.seconds:.1f} s, load {turn.load:.2f}{others})"


def take_turn(engine: Engine, work: Work, model: Model, number: int) -> Turn:
    """One engine once."""
    load, before = os.getloadavg()[0], _Usage.now()
    outcome = _foreign(engine, work, model) if work.kind == "foreign" else engine.run(work, model)
    after = _Usage.now()
    return Turn(
        engine=engine.name,
        round=number,
        values=outcome.values,
        between=outcome.between,
        seconds=after.at - before.at,
        load=load,
        others=before.others_until(after),
    )


def _foreign(engine: Engine, work: Work, model: Model) -> Outcome:
    """Decode alone, then beside a process that never rests."""
    decode = make_work(f"decode-{len(work.requests)}", model.vocab)
    quiet = engine.run(decode, model).values[STEADY.name]
    with _busy_process():
        busy = engine.run(decode, model).values[STEADY.name]
    return Outcome(values={SHARE.name: busy / quiet, QUIET.name: quiet, BUSY.name: busy})


@contextmanager
def _busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure_machine(manner: Manner) -> Machine:
    """Memory and arithmetic, as they are now."""
    bandwidth = _cpu.read_bandwidth(manner.threads, BANDWIDTH_BYTES, BANDWIDTH_SECONDS)
    return Machine(bandwidth=bandwidth, matmul=_matmul(manner.threads) if manner.matmul else None)


def _matmul(threads: int) -> float | None:
    command = [sys.executable, "-m", "streamgen.cli.benchmark.children", "matmul", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(json.loads(done.stdout)["gflops"]) if done.returncode == 0 else None


class _Usage(Struct, frozen=True):
    """Seconds of processors, used by all and by us and our ended children, at a moment."""

    at: float
    everybody: float | None
    own: float

    @classmethod
    def now(cls) -> _Usage:
        """As it is."""
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(time.perf_counter(), _busy_seconds(), sum(u.ru_utime + u.ru_stime for u in usages))

    def others_until(self, later: _Usage) -> float | None:
        """Processors that others kept busy from this moment to a later one."""
        if self.everybody is None or later.everybody is None:
            return None
        seconds = later.everybody - self.everybody - (later.own - self.own)
        return max(0.0, seconds / (later.at - self.at))


def _busy_seconds() -> float | None:
    """Seconds that all processors have worked since the system started, or were taken by another guest; Linux only."""
    try:
        fields = [int(field) for field in _STAT.read_text().splitlines()[0].split()[1:]]
    except (OSError, ValueError):
        return None
    idle, waiting = fields[3], fields[4]
    return float(sum(fields[:8]) - idle - waiting) / os.sysconf("SC_CLK_TCK")
