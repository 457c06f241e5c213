"""Many prompts through one engine, some at a time; an item's error is a value, not the end.

python examples/map.py [MODEL]
"""

import sys
from collections.abc import AsyncIterator

import anyio

import streamgen as sg

COUNTRIES = ("France", "Japan", "", "Kenya", "Peru")


async def questions() -> AsyncIterator[sg.Prompt]:
    """A source may be anything that is iterated, such as rows of a database. It is read only as fast as needed."""
    for country in COUNTRIES:
        await anyio.sleep(0.01)
        yield f"The capital of {country} is" if country else ""


async def main() -> None:
    """Results come as they end, or in order; leaving early cancels the rest and closes the source."""
    async with sg.Engine(*sys.argv[1:2]) as engine:
        async with engine.map(questions(), concurrency=2, ordered=True, max_tokens=8, temperature=0) as results:
            async for result in results:
                match result:
                    case sg.Ok(index, completion):
                        print(f"{COUNTRIES[index]}:{completion.text!r}")
                    case sg.Err(index, error):
                        print(f"item {index}: {error}")

        async with engine.map((f"{i} plus {i} is" for i in range(1_000_000)), max_tokens=4) as results:
            async for result in results:
                print("the first to end:", result.index)
                break


anyio.run(main)
