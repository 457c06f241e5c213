"""What happens in an engine, as typed events, and a trace to look at.  python examples/events.py [MODEL]"""

import sys
import tempfile
from pathlib import Path

import anyio

import streamgen as sg
from streamgen.lifecycle import EventStream, RequestFinished, StepCompleted


async def watch(events: EventStream) -> None:
    """Reads until the engine is closed; it may be as slow as it likes."""
    rows = 0
    async for event in events:
        match event:
            case StepCompleted():
                rows += event.rows
            case RequestFinished():
                how = f"{event.finish_reason}, {event.completion_tokens} tokens, {event.seconds:.2f} s"
                print(f"{event.request_id}: {how}")
    print(f"{rows} tokens went through the model; {events.dropped} events were dropped")


async def main() -> None:
    """Three requests at once, and somebody who watches."""
    engine = sg.Engine(*sys.argv[1:2])
    async with anyio.create_task_group() as watchers:
        watchers.start_soon(watch, engine.subscribe())
        async with engine, anyio.create_task_group() as requests:
            for colour in ("red", "green", "blue"):
                prompt = [sg.user(f"Name one thing that is {colour}.")]
                requests.start_soon(lambda p=prompt, c=colour: engine.generate(p, max_tokens=24, request_id=c))
        path = Path(tempfile.mkdtemp()) / "trace.json"
        await anyio.to_thread.run_sync(engine.trace, path)
        print(f"open {path} in https://ui.perfetto.dev")


anyio.run(main)
