"""The compiler's process: it answers like the compiler here, and whatever happens to it happens to nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

import streamgen
from streamgen.errors import EngineClosed, SchemaError, SchemaTooComplex
from streamgen.grammar.bounds import CompileLimits
from streamgen.grammar.child import CompileChild
from streamgen.grammar.compiler import compile_source
from streamgen.grammar.source import CfgSource, GrammarSource, RegexSource, SchemaSource

if TYPE_CHECKING:
    from collections.abc import Iterator

# Nothing is estimated: what is built here takes more time and memory than there is.
UNCHECKED = CompileLimits(max_regex_work=10**12, max_states=10**9, max_positions=10**9, max_repeats=10**9)
KILLER = RegexSource(pattern="(a|b)*a(a|b){27}", is_trusted=False)

SOURCES: list[GrammarSource] = [
    RegexSource(pattern="[a-z]+é?", is_trusted=False),
    SchemaSource(text='{"type": "object", "properties": {"a": {"type": "integer"}}}', is_closed=True, is_trusted=False),
    CfgSource(text='start: "a" start?', is_trusted=False),
    CfgSource(text='root ::= "(" root? ")"', syntax="gbnf", is_trusted=False),
]


@pytest.fixture(scope="module")
def child() -> Iterator[CompileChild]:
    child = CompileChild(CompileLimits(max_seconds=60))
    yield child
    child.close()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_it_compiles_what_is_compiled_here(child: CompileChild, source: GrammarSource) -> None:
    there, here = child.compile(source), compile_source(source)
    assert there.stats.backend == here.stats.backend and there.stats.states == here.stats.states
    for text in (b"a", b"aa", "zé".encode(), b"{}", b'{"a": 1}', b"(())", b")", b""):
        assert there.accepts(text) == here.accepts(text)
        assert there.prefix_ok(text) == here.prefix_ok(text)


def test_errors_are_the_same_here_and_there(child: CompileChild) -> None:
    with pytest.raises(SchemaError, match="look-ahead") as caught:
        child.compile(RegexSource(pattern="(?=a)b", is_trusted=False))
    assert caught.value.keyword == "pattern"
    with pytest.raises(SchemaTooComplex) as too_complex:
        child.compile(RegexSource(pattern="a{1000000}", is_trusted=False))
    assert too_complex.value.bound == "max_repeats"
    pid = child.pid
    child.compile(SOURCES[0])
    assert child.pid == pid, "a refusal ends nothing"


def test_it_starts_with_the_first_grammar() -> None:
    child = CompileChild()
    assert child.pid is None
    child.close()
    with pytest.raises(EngineClosed):
        child.compile(SOURCES[0])


def test_it_is_killed_when_it_takes_too_long_and_replaced() -> None:
    child = CompileChild(replace(UNCHECKED, max_seconds=1.0, max_child_bytes=1 << 40))
    try:
        child.compile(SOURCES[0])
        pid = child.pid
        start = time.monotonic()
        with pytest.raises(SchemaTooComplex) as caught:
            child.compile(KILLER)
        assert caught.value.bound == "max_seconds"
        assert time.monotonic() - start < 10
        assert child.pid is None and not is_running(pid)
        assert child.compile(SOURCES[0]).accepts(b"abc")
        assert child.pid not in (None, pid)
    finally:
        child.close()


def test_it_may_run_out_of_memory() -> None:
    child = CompileChild(replace(UNCHECKED, max_seconds=60.0, max_child_bytes=96 << 20))
    try:
        child.compile(SOURCES[0])
        with pytest.raises(SchemaTooComplex) as caught:
            child.compile(KILLER)
        assert caught.value.bound in ("max_child_bytes", "memory")
        assert child.compile(SOURCES[0]).accepts(b"abc")
    finally:
        child.close()


def test_a_death_between_two_grammars_is_an_error_once_at_most(child: CompileChild) -> None:
    child.compile(SOURCES[0])
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(SchemaTooComplex, match="SIGKILL"):
        child.compile(SOURCES[0])
    assert child.compile(SOURCES[0]).accepts(b"abc")


def test_it_ends_when_it_has_nothing_to_do() -> None:
    child = CompileChild(idle_seconds=0.2)
    try:
        child.compile(SOURCES[0])
        pid = child.pid
        assert pid is not None
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # until it has ended; its status is left for its owner
        assert child.compile(SOURCES[0]).accepts(b"abc"), "another one is started, and nobody notices"
        assert child.pid != pid
    finally:
        child.close()


def test_closing_ends_what_is_compiled() -> None:
    child = CompileChild(replace(UNCHECKED, max_seconds=60.0, max_child_bytes=1 << 40))
    child.compile(SOURCES[0])
    errors: list[Exception] = []

    def compile_killer() -> None:
        try:
            child.compile(KILLER)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=compile_killer)
    thread.start()
    pid = child.pid
    child.close()
    child.close()
    thread.join(20)
    assert not thread.is_alive() and not is_running(pid)
    assert [type(error) for error in errors] == [EngineClosed]


def test_threads_take_turns(child: CompileChild) -> None:
    found: list[bool] = []

    def compile_one(number: int) -> None:
        grammar = child.compile(RegexSource(pattern=f"x{number}", is_trusted=False))
        found.append(grammar.accepts(f"x{number}".encode()))

    threads = [threading.Thread(target=compile_one, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 6


def test_it_ends_with_its_host() -> None:
    code = (
        "import os, sys\n"
        "from streamgen.grammar.child import CompileChild\n"
        "from streamgen.grammar.source import RegexSource\n"
        "child = CompileChild()\n"
        "child.compile(RegexSource(pattern='a'))\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(streamgen.__file__).parents[1])},
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        threading.Event().wait(0.02)
    assert not is_running(pid)


def is_running(pid: int | None) -> bool:
    assert pid is not None
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
