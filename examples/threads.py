"""Plain threads, no event loop in sight.  python examples/threads.py [MODEL]"""

import sys
from concurrent.futures import ThreadPoolExecutor

from streamgen import sync, user

COLOURS = ("red", "green", "blue", "yellow")


def ask(engine: sync.Engine, colour: str) -> str:
    """Blocks its own thread only; all threads share the engine's batches."""
    return engine.generate([user(f"Name one thing that is {colour}.")], max_tokens=24).text


with sync.Engine(*sys.argv[1:2]) as engine, ThreadPoolExecutor(len(COLOURS)) as pool:
    for colour, answer in zip(COLOURS, pool.map(lambda colour: ask(engine, colour), COLOURS), strict=True):
        print(f"{colour}: {' '.join(answer.split())}")
