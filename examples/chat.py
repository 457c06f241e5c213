"""A conversation: each turn sends all messages, and the prefix cache skips what was computed before.

python examples/chat.py [MODEL]
"""

import sys

import anyio

import streamgen as sg

TURNS = ("My name is Ada. Say hello.", "What is my name?", "Spell it backwards.")


async def main() -> None:
    """Three turns; `cached_tokens` grows with the conversation."""
    async with sg.Engine(*sys.argv[1:2]) as engine:
        messages = [sg.system("You answer in one short sentence.")]
        for turn in TURNS:
            messages.append(sg.user(turn))
            reply = await engine.generate(messages, max_tokens=32, temperature=0)
            messages.append(reply.message)
            print(f"> {turn}\n{reply.text}")
            print(f"({reply.usage.cached_tokens} of {reply.usage.prompt_tokens} prompt tokens were cached)")


anyio.run(main)
