"""Which continuation does the model find likelier?  python examples/score.py [MODEL]"""

import sys

import anyio

import streamgen as sg

PROMPT = "At night the sky is"
CONTINUATIONS = (" dark.", " bright.", " edible.")


async def main() -> None:
    """Sum the log-probabilities of each continuation's tokens; nothing is generated."""
    async with sg.Engine(*sys.argv[1:2]) as engine:
        for continuation in CONTINUATIONS:
            tokens = await engine.score(PROMPT, continuation)
            print(f"{sum(token.logprob for token in tokens):8.2f}  {PROMPT}{continuation}")


anyio.run(main)
