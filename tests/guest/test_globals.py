"""Nothing of the host is touched: a snapshot before import and after close, in a process of its own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.guest.conftest import run_host

if TYPE_CHECKING:
    from pathlib import Path

SNAPSHOT = """
import asyncio, atexit, faulthandler, gc, json, locale, logging, multiprocessing, os, pathlib, random, signal, sys
import threading, warnings

def snapshot():
    state = {
        "signals": {str(s): repr(signal.getsignal(s)) for s in signal.valid_signals()},
        "wakeup fd": signal.set_wakeup_fd(-1),
        "excepthook": repr(sys.excepthook), "threading": repr(threading.excepthook),
        "unraisable": repr(sys.unraisablehook), "displayhook": repr(sys.displayhook),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "policy": repr(type(asyncio.get_event_loop_policy())),
        "random": hash(random.getstate()),
        "environment": dict(os.environ), "cwd": os.getcwd(), "umask": os.umask(0o022),
        "loggers": [repr(logging.root.handlers), logging.root.level, logging.root.manager.disable,
                    repr(logging.lastResort), logging.raiseExceptions, repr(logging.getLoggerClass())],
        "streamgen logs": [repr(logging.getLogger("streamgen").handlers), logging.getLogger("streamgen").level],
        "filters": repr(warnings.filters), "locale": locale.setlocale(locale.LC_ALL),
        "switch": sys.getswitchinterval(), "recursion": sys.getrecursionlimit(),
        "gc": [gc.isenabled(), gc.get_threshold()], "faulthandler": faulthandler.is_enabled(),
        "trace": [repr(sys.gettrace()), repr(sys.getprofile())],
        "threads": sorted(t.name for t in threading.enumerate()),
        "affinity": sorted(os.sched_getaffinity(0)), "nice": os.nice(0),
        "fds": sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in os.listdir("/proc/self/fd")
                      if os.path.exists(f"/proc/self/fd/{fd}")),
        "children": pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
        "path": list(sys.path), "stdout": [repr(sys.stdout), repr(sys.stderr)],
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        state["torch"] = [
            str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.get_num_threads(), torch.get_num_interop_threads(),
            torch.are_deterministic_algorithms_enabled(), int(torch.get_rng_state().sum()),
        ]
        import numpy
        state["numpy"] = [repr(numpy.geterr()), int(numpy.random.get_state()[1].sum())]
    return state
"""

USE = """
async def use(sg, model):
    async with sg.Engine(model, isolation=ISOLATION) as engine:
        await engine.generate("Once", max_tokens=8, temperature=0.8)
        async with engine.stream("There was", max_tokens=8) as stream:
            async for _ in stream:
                break
        await engine.tokenize("hello")
"""


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("host", ["plain", "torch"])
def test_the_host_is_as_it_was(host: str, backend: str, isolation: str, tiny_model: Path, tmp_path: Path) -> None:
    # What the host itself imports and runs comes before the first snapshot, so that it is not counted as ours.
    # numpy adds a warning filter when it is imported.
    warm = "import torch, numpy" if host == "torch" else "import numpy"
    code = f"""
{SNAPSHOT}
{warm}
import anyio, anyio.to_thread, trio
anyio.run(anyio.sleep, 0, backend={backend!r})
ISOLATION = {isolation!r}
{USE}
before = snapshot()
callbacks = atexit._ncallbacks()
import streamgen as sg
imported = snapshot()
anyio.run(use, sg, {str(tiny_model)!r}, backend={backend!r})
gc.collect()
after = snapshot()
print(json.dumps([[k, before[k], imported[k], after[k]] for k in before if not before[k] == imported[k] == after[k]]))
"""
    changed = json.loads(run_host(tmp_path / "host.py", code))
    assert changed == []


def test_importing_starts_and_registers_nothing(tmp_path: Path) -> None:
    code = f"""
{SNAPSHOT}
before = snapshot()
import streamgen as sg
sg.Engine("nowhere")
assert snapshot() == before, [(k, v, before[k]) for k, v in snapshot().items() if v != before[k]]
print("same")
"""
    assert run_host(tmp_path / "host.py", code).strip() == "same"
