"""A model that books a table with two functions of this program.  python examples/tools.py [MODEL]

The demo model is too small to choose tools well; Qwen2.5-0.5B-Instruct books it.
"""

import sys

import anyio

import streamgen as sg

TABLES = {"18:00": 2, "19:30": 4, "21:00": 6}
BOOKED: list[str] = []


def find_table(people: int) -> list[str]:
    """Times at which a table is free this evening.

    Args:
        people: how many will come
    """
    return [time for time, seats in TABLES.items() if seats >= people]


async def book_table(time: str, people: int, name: str) -> str:
    """Book a table this evening.

    Args:
        time: one of the free times, as in 19:30
        people: how many will come
        name: under which name
    """
    BOOKED.append(f"{time} for {people}, {name}")
    return f"booked: {time} for {people} people, {name}"


async def main() -> None:
    """The engine calls the functions, and hands the model what they return, until it answers."""
    async with sg.Engine(*sys.argv[1:2]) as engine:
        question = [
            sg.system("You book tables. First find the free times, then book one."),
            sg.user("A table for 4 under the name Ada, please, at any time."),
        ]
        reply = await engine.run_tools(
            question, tools=[find_table, book_table], max_rounds=4, max_tokens=120, temperature=0
        )
        print("booked:", BOOKED)
        print("answer:", reply.text, reply.finish_reason)


anyio.run(main)
