"""The ways to end a request early; each frees its memory within a step.  python examples/cancel.py [MODEL]"""

import sys

import anyio

import streamgen as sg

QUESTION = [sg.user("Count from one to one hundred in words.")]


async def main() -> None:
    """Leave the stream, cancel it, cancel the task around it, set a deadline."""
    async with sg.Engine(*sys.argv[1:2]) as engine:
        async with engine.stream(QUESTION, max_tokens=400, ignore_eos=True) as stream:
            async for delta in stream:
                print("left after", repr(delta.text))
                break
        print(stream.result.finish_reason)

        async with engine.stream(QUESTION, max_tokens=400, ignore_eos=True) as stream:
            stream.cancel()  # from any thread
            await stream.final()
        print(stream.result.finish_reason)

        with anyio.move_on_after(0.2):
            await engine.generate(QUESTION, max_tokens=400, ignore_eos=True)
        print("the scope was left")

        try:
            await engine.generate(QUESTION, max_tokens=2000, ignore_eos=True, timeout=0.2)
        except sg.DeadlineExceeded as error:
            print(f"{len(error.partial.ids)} tokens before the deadline")


anyio.run(main)
