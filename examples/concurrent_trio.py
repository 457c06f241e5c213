"""The twin of concurrent_asyncio.py, on trio.  python examples/concurrent_trio.py [MODEL]"""

import sys

import trio

import streamgen as sg


async def ask(engine: sg.Engine, number: int) -> None:
    """One request of many; the engine batches what runs at the same time."""
    reply = await engine.generate([sg.user(f"Say something about the number {number}.")], max_tokens=24)
    print(f"{number:2}: {' '.join(reply.text.split())}")


async def main() -> None:
    """Ask sixteen questions at once; answers are printed as they finish."""
    async with sg.Engine(*sys.argv[1:2]) as engine, trio.open_nursery() as nursery:
        for number in range(16):
            nursery.start_soon(ask, engine, number)


trio.run(main)
