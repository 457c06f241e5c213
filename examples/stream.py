"""Text as it is generated.  python examples/stream.py [MODEL]"""

import sys

import anyio

import streamgen as sg


async def main() -> None:
    """Print deltas; the whole is on `stream.result` afterwards, also after a break."""
    async with sg.Engine(*sys.argv[1:2]) as engine:
        async with engine.stream([sg.user("Tell me a short story.")], max_tokens=64, temperature=0) as stream:
            async for delta in stream:
                print(delta.text, end="", flush=True)
        print()
        usage, timings = stream.result.usage, stream.result.timings
        print(f"{usage.completion_tokens} tokens in {timings.finished:.2f} s, first after {timings.first_token:.2f} s")


anyio.run(main)
