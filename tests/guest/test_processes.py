"""Hosts that are awkward: no main guard, threads, forks, notebooks, a terminal's Ctrl-C, scripts that just end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guest.conftest import environment, run_host

ASK = "engine.generate('Once upon a time', max_tokens=6, temperature=0)"


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_script_without_a_main_guard(isolation: str, tiny_model: Path, tmp_path: Path) -> None:
    code = f"""
import anyio, streamgen as sg
async def main():
    async with sg.Engine({str(tiny_model)!r}, isolation={isolation!r}) as engine:
        print((await {ASK}).usage.completion_tokens)
anyio.run(main)
"""
    assert run_host(tmp_path / "script.py", code).split() == ["6"]


def test_opened_in_a_thread_that_is_not_the_main_one(tiny_model: Path, tmp_path: Path) -> None:
    code = f"""
import anyio, threading, streamgen as sg
async def main():
    async with sg.Engine({str(tiny_model)!r}) as engine:
        print((await {ASK}).usage.completion_tokens)
def work():
    anyio.run(main, backend="trio")
thread = threading.Thread(target=work); thread.start(); thread.join()
with sg.sync.Engine({str(tiny_model)!r}) as engine:
    print({ASK}.usage.completion_tokens)
"""
    assert run_host(tmp_path / "script.py", code).split() == ["6", "6"]


def test_children_of_a_parent_that_only_imported(tiny_model: Path, tmp_path: Path) -> None:
    code = f"""
import os, streamgen as sg
sg.Engine; sg.sync.Engine
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        with sg.sync.Engine({str(tiny_model)!r}) as engine:
            print({ASK}.usage.completion_tokens, flush=True)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""
    assert run_host(tmp_path / "script.py", code).split() == ["6", "6"]


def test_a_multiprocessing_pool_of_hosts(tiny_model: Path, tmp_path: Path) -> None:
    code = f"""
import multiprocessing, streamgen as sg
def work(i):
    with sg.sync.Engine({str(tiny_model)!r}) as engine:
        return {ASK}.text
if __name__ == "__main__":
    texts = set()
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            texts.update(pool.map(work, range(2)))
            pool.close(); pool.join()
    print(len(texts))
"""
    assert run_host(tmp_path / "script.py", code).split() == ["1"]


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_interrupted_at_the_terminal(isolation: str, tiny_model: Path, tmp_path: Path) -> None:
    """Ctrl-C in a script that streams: it ends within two seconds, with one traceback at most."""
    path = tmp_path / "script.py"
    path.write_text(f"""
import anyio, streamgen as sg
async def ask(engine, i):
    while True:
        async with engine.stream(f"Once {{i}}", max_tokens=200, ignore_eos=True) as stream:
            async for _ in stream:
                print("streaming", flush=True)
async def main():
    async with sg.Engine({str(tiny_model)!r}, isolation={isolation!r}) as engine:
        async with anyio.create_task_group() as group:
            for i in range(8):
                group.start_soon(ask, engine, i)
anyio.run(main)
""")
    with subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == "streaming\n"
        started = time.monotonic()
        host.send_signal(signal.SIGINT)
        _, errors = host.communicate(timeout=20)
        took = time.monotonic() - started
    assert took < 2.0, f"it took {took:.1f} s"
    assert errors.count("KeyboardInterrupt") <= 3 and errors.count("Traceback") <= 3 and "Fatal" not in errors, errors
    assert host.returncode in (-signal.SIGINT, 130, 1)


def test_exiting_while_everything_runs(tiny_model: Path, tmp_path: Path) -> None:
    """Streams open, readers asleep, nothing closed: the interpreter goes down without a word."""
    code = f"""
import sys, streamgen as sg
engine = sg.sync.Engine({str(tiny_model)!r}).open()
streams = [engine.stream(f"Once {{i}}", max_tokens=300, ignore_eos=True) for i in range(8)]
for stream in streams:
    next(stream)
print("leaving", flush=True)
sys.exit(0)
"""
    path = tmp_path / "script.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=30, env=environment(), check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_collecting_garbage_while_threads_run(tiny_model: Path, tmp_path: Path) -> None:
    code = f"""
import gc, threading, warnings, streamgen as sg
warnings.simplefilter("ignore", ResourceWarning)
for i in range(6):
    engine = sg.sync.Engine({str(tiny_model)!r}).open()
    streams = [engine.stream(f"Once {{i}}", max_tokens=300, ignore_eos=True) for i in range(4)]
    for stream in streams:
        next(stream)
    engine.cycle = (engine, streams)
    thread = engine._thread.thread
    del engine, streams, stream
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
print(threading.active_count())
"""
    assert run_host(tmp_path / "script.py", code).split() == ["1"]


def test_a_notebook_cell(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real Jupyter kernel: top-level await, the plain engine inside the running loop, a restart of neither."""
    manager = pytest.importorskip("jupyter_client.manager", reason="needs jupyter_client and ipykernel")
    pytest.importorskip("ipykernel", reason="needs ipykernel")
    kernel, client = manager.start_new_kernel(
        kernel_name="python3", env={**environment(), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    )
    try:
        cells = [
            "import streamgen as sg",
            f"engine = await sg.Engine({str(tiny_model)!r}).open()",
            f"print((await {ASK}).usage.completion_tokens)",
            "async with engine.stream('Once', max_tokens=5) as stream:\n"
            "    n = len([d async for d in stream])\nprint(n > 0)",
            f"with sg.sync.Engine({str(tiny_model)!r}) as plain:\n    "
            "print(plain.generate('Once', max_tokens=4).usage.completion_tokens)",
            "await engine.aclose()\nprint(engine.state.value)",
        ]
        printed = [_run_cell(client, cell) for cell in cells]
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert printed == ["", "", "6\n", "True\n", "4\n", "closed\n"]


def _run_cell(client: object, code: str) -> str:
    said: list[str] = []

    def hear(message: dict[str, dict[str, object]]) -> None:
        if message["header"]["msg_type"] == "stream":
            said.append(str(message["content"]["text"]))

    reply = client.execute_interactive(code, timeout=60, output_hook=hear)  # type: ignore[attr-defined]  # untyped
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(said)


def test_no_child_outlives_a_host_that_is_killed(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(f"""
import os, time, streamgen as sg
engine = sg.sync.Engine({str(tiny_model)!r}, isolation="process").open()
stream = engine.stream("Once", max_tokens=400, ignore_eos=True)
next(stream)
print(*{{t.split()[0] for t in os.popen(f"ps -o pid= --ppid {{os.getpid()}}").read().splitlines() if t}}, flush=True)
time.sleep(60)
""")
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment()) as host:
        assert host.stdout is not None
        children = [int(pid) for pid in host.stdout.readline().split()]
        host.kill()
    deadline = time.monotonic() + 5
    while any(_is_alive(pid) for pid in children):
        assert time.monotonic() < deadline, "a child outlived its host"
        os.sched_yield()


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z" and "streamgen" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
