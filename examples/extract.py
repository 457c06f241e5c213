"""Text in, a list of objects out, each as it closes.  python examples/extract.py [MODEL]"""

import sys
from typing import Annotated

import anyio
from msgspec import Meta, Struct

import streamgen as sg

TEXT = """Invoice 2024-118, Harbour Supplies: 3 coils of rope at 14.50 each, 2 lanterns at 39.00, and a dozen shackles,
4.25 apiece. Delivery within five days."""


class Line(Struct):
    """One line of an invoice."""

    item: Annotated[str, Meta(max_length=40)]
    quantity: Annotated[int, Meta(ge=1, le=999)]
    unit_price: Annotated[float, Meta(ge=0)]


Lines = Annotated[list[Line], Meta(min_length=1, max_length=8)]


async def main() -> None:
    """Each line is printed the moment its object closes, while the model goes on with the next."""
    async with sg.Engine(*sys.argv[1:2]) as engine:
        question = [sg.user(f"Extract the lines of this invoice as JSON.\n\n{TEXT}")]
        async with engine.stream(question, output=Lines, max_tokens=200, temperature=0) as stream:
            try:
                async for line in stream.items():
                    print(line)
            except sg.IncompleteOutput:
                print("(cut at max_tokens; the lines above are whole)")


anyio.run(main)
