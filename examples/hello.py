"""One answer.  python examples/hello.py [MODEL]"""

import sys

import anyio

import streamgen as sg


async def main() -> None:
    """Open a model, ask, close it."""
    async with sg.Engine(*sys.argv[1:2]) as engine:  # no argument: the demo model
        reply = await engine.generate([sg.user("Name three rivers.")], max_tokens=48)
        print(reply.text)
        print(reply.usage, reply.finish_reason)


anyio.run(main)
