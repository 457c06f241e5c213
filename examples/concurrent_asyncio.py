"""Sixteen streams in one batch, on asyncio.  python examples/concurrent_asyncio.py [MODEL]"""

import asyncio
import sys

import streamgen as sg


async def ask(engine: sg.Engine, number: int) -> str:
    """One request of many; the engine batches what runs at the same time."""
    reply = await engine.generate([sg.user(f"Say something about the number {number}.")], max_tokens=24)
    return f"{number:2}: {' '.join(reply.text.split())}"


async def main() -> None:
    """Ask sixteen questions at once."""
    async with sg.Engine(*sys.argv[1:2]) as engine, asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(engine, number)) for number in range(16)]
        for task in tasks:
            print(await task)


asyncio.run(main())
