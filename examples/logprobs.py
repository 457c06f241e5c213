"""How sure the model was of each token, and what it weighed against it.  python examples/logprobs.py [MODEL]"""

import math
import sys

import anyio

import streamgen as sg


async def main() -> None:
    """Print each token of an answer with its probability and its rivals."""
    async with sg.Engine(*sys.argv[1:2]) as engine:
        reply = await engine.generate("The capital of France is", max_tokens=6, temperature=0, logprobs=3)
        for token in reply.logprobs or ():
            rivals = ", ".join(f"{top.text!r} {math.exp(top.logprob):.0%}" for top in token.top)
            print(f"{token.text!r:12} {math.exp(token.logprob):4.0%}   of {rivals}")


anyio.run(main)
