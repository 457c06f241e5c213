"""A small client for servers that stream events over HTTP: posts requests, notes when each event came."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from msgspec import Struct


class Events(Struct):
    """The events of one request, unread, and when each came."""

    times: list[float]
    lines: list[bytes]


class Refused(RuntimeError):
    """The server answered with something else than events."""


async def post(port: int, path: str, body: dict[str, Any]) -> Events:
    """Post JSON to the local machine and read `data:` lines to the end. Each event is expected within one line.

    Raises:
        Refused: the status is not 200.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            answer = (await reader.read(4000)).decode(errors="replace")
            why = answer.rpartition("\r\n\r\n")[2].strip()
            raise Refused(f"{path}: {status.decode().strip()}: {why}")
        events = Events([], [])
        while line := await reader.readline():
            if line.startswith(b"data: "):
                events.times.append(time.perf_counter())
                events.lines.append(line[6:].strip())
        return events
    finally:
        writer.close()


async def wait_until_up(port: int, path: str, seconds: float) -> None:
    """Until the server answers 200; asked every 2 ms, so that a start-up is timed well.

    Raises:
        TimeoutError: it does not within so many seconds.
    """
    async with asyncio.timeout(seconds):
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
                status = await reader.readline()
                writer.close()
                if b" 200 " in status:
                    return
            except OSError:
                pass
            await asyncio.sleep(0.002)
