"""A model that books a table with two functions of this program.  python examples/tools.py [MODEL]

The demo model is too small to use tools well; Qwen2.5-Coder-1.5B-Instruct finds a time, then books it.
"""

import sys

import anyio

import streamgen as sg

TABLES = {"18:00": 2, "19:30": 4, "21:00": 6}
BOOKED: list[str] = []


def find_table(people: int) -> list[str]:
    """List the times at which a table for so many people is free this evening.

    Args:
        people: how many will come
    """
    return [time for time, seats in TABLES.items() if seats >= people]


async def book_table(time: str, people: int, name: str) -> str:
    """Book a table for this evening at one of the free times.

    Args:
        time: one of the free times, such as 19:30
        people: how many will come
        name: under which name
    """
    BOOKED.append(f"{time} for {people}, {name}")
    return f"Success. Tell the guest that the table is booked at {time}."


async def main() -> None:
    """The engine calls the functions, and hands the model what they return, until it answers."""
    async with sg.Engine(*sys.argv[1:2]) as engine:
        question = [
            sg.system("You book tables at a restaurant."),
            sg.user("Find a table for 4 people this evening and book it under the name Ada."),
        ]
        try:
            reply = await engine.run_tools(
                question, tools=[find_table, book_table], max_rounds=4, max_tokens=120, temperature=0
            )
            print("answer:", reply.text, reply.usage)
        except sg.IncompleteOutput as error:
            print(error)
        print("booked:", BOOKED)


anyio.run(main)
