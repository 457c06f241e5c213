"""Under uvicorn: with reload and with two workers, the application's lifespan owns the engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.guest.conftest import environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

httpx = pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("uvicorn", reason="needs uvicorn")
pytest.importorskip("starlette", reason="needs starlette")

APP = """
import os
from contextlib import asynccontextmanager
import streamgen as sg
from starlette.applications import Starlette
from starlette.responses import StreamingResponse, PlainTextResponse
from starlette.routing import Route

VERSION = "first"

@asynccontextmanager
async def lifespan(app):
    async with sg.Engine(os.environ["MODEL"]) as engine:
        app.state.engine = engine
        yield

async def tell(request):
    async def texts():
        async with request.app.state.engine.stream("Once upon", max_tokens=6, temperature=0) as stream:
            async for text in stream.texts():
                yield text
    return StreamingResponse(texts())

async def who(request):
    return PlainTextResponse(f"{VERSION} {os.getpid()}")

app = Starlette(routes=[Route("/tell", tell), Route("/who", who)], lifespan=lifespan)
"""


@contextmanager
def server(folder: Path, model: Path, *arguments: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A uvicorn in a process of its own."""
    (folder / "app.py").write_text(APP)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder / "log.txt").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), *arguments],
        cwd=folder,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment(MODEL=str(model)),
        start_new_session=True,
    )
    try:
        yield f"http://127.0.0.1:{port}", process
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, -signal.SIGINT, 130)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)
        log.close()


def get(url: str, *, until: float = 30.0) -> str:
    """Ask until somebody answers."""
    deadline = time.monotonic() + until
    while True:
        try:
            response = httpx.get(url, timeout=20)
            assert response.status_code == 200, response.text
            return str(response.text)
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_two_workers(tiny_model: Path, tmp_path: Path) -> None:
    with server(tmp_path, tiny_model, "--workers", "2") as (url, _):
        first = get(f"{url}/tell")
        assert first and {get(f"{url}/tell") for _ in range(6)} == {first}, "every worker says the same"
        workers = {get(f"{url}/who") for _ in range(40)}
    assert 1 <= len(workers) <= 2
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_reload(tiny_model: Path, tmp_path: Path) -> None:
    with server(tmp_path, tiny_model, "--reload", "--reload-dir", ".") as (url, _):
        text = get(f"{url}/tell")
        assert get(f"{url}/who").startswith("first ")
        (tmp_path / "app.py").write_text(APP.replace('VERSION = "first"', 'VERSION = "second"'))
        deadline = time.monotonic() + 30
        while not get(f"{url}/who").startswith("second "):
            assert time.monotonic() < deadline, "it was not reloaded"
            time.sleep(0.2)
        assert get(f"{url}/tell") == text
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
