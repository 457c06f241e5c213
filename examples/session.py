"""A session remembers what was said, and computes only what is new; forks go separate ways from one beginning.

python examples/session.py [MODEL]
"""

import sys

import anyio

import streamgen as sg


async def main() -> None:
    """Two turns, then two different third ones; a turn that is cut leaves no trace."""
    async with (
        sg.Engine(*sys.argv[1:2]) as engine,
        engine.session(system="You answer in one short sentence.", pin=True, max_tokens=32, temperature=0) as session,
    ):
        for turn in ("My name is Ada. Say hello.", "What is my name?"):
            reply = await session.ask(turn)
            print(f"> {turn}\n{reply.text}")
            print(f"({reply.usage.cached_tokens} of {reply.usage.prompt_tokens} prompt tokens were cached)")

        fork = session.fork()
        async with session.stream("Spell it backwards.") as stream:
            async for text in stream.texts():
                print(text, end="", flush=True)
        print("\nthe fork:", (await fork.ask("Who else has that name?")).text)

        async with session.stream("Tell me a long story.") as stream:
            await anext(stream)  # and leave: the turn is dropped
        print(f"{len(session.messages)} messages, the last by the {session.messages[-1]['role']}")


anyio.run(main)
