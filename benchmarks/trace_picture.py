"""Draw a trace that `Engine.trace` wrote as an SVG timeline: one row a sequence, colours by phase, steps below.

python benchmarks/trace_picture.py TRACE.json PICTURE.svg
python benchmarks/trace_picture.py --demo PICTURE.svg      # a crowd on the demo model, in a small cache
"""

import argparse
import json
import math
import random
import sys
import tempfile
import threading
import time
from html import escape
from pathlib import Path
from typing import Any

WIDTH, ROW, LEFT, TOP, STEPS = 1000, 14, 150, 54, 60
COLOURS = {"queued": "#d7dbe0", "prefill": "#f2a65a", "decode": "#5b8bd0"}
CHUNK, STEP, TEXT = "#c9762b", "#7d8793", "#30363d"


class Drawing:
    """Collects SVG elements on a time axis."""

    def __init__(self, end: float) -> None:
        self.scale = (WIDTH - LEFT - 20) / max(end, 1.0)
        self.parts: list[str] = []

    def x(self, micros: float) -> float:
        """Where a time is."""
        return LEFT + micros * self.scale

    def box(self, event: dict[str, Any], y: float, height: float, fill: str) -> None:
        """A slice, with its arguments as a tooltip."""
        width = max(event["dur"] * self.scale, 0.4)
        title = f"{event['name']}, {event['dur'] / 1e3:.1f} ms " + ", ".join(
            f"{k} {v}" for k, v in event["args"].items()
        )
        self.parts.append(
            f'<rect x="{self.x(event["ts"]):.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" fill="{fill}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """A label."""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def mark(self, micros: float, y: float, name: str) -> None:
        """A happening without length."""
        x = self.x(micros)
        if name == "preempted":
            self.parts.append(f'<path d="M{x:.1f} {y}l3.5 6h-7z" fill="#c0392b"><title>preempted</title></path>')
        elif name == "first token":
            self.parts.append(
                f'<circle cx="{x:.1f}" cy="{y + 5}" r="2" fill="#fff" stroke="{TEXT}" stroke-width=".7"/>'
            )
        else:
            self.parts.append(f'<path d="M{x:.1f} {y}v10" stroke="{TEXT}" stroke-width="1.2"/>')


def draw(events: list[dict[str, Any]]) -> str:
    """The events of a trace as SVG."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == 2}
    slices = [e for e in events if e["ph"] == "X"]
    end = max((e["ts"] + e["dur"] for e in slices), default=1.0)
    drawing = Drawing(end)
    bottom = TOP + ROW * len(names)
    rows = {tid: TOP + ROW * i for i, tid in enumerate(names)}
    for tid, name in names.items():
        drawing.text(LEFT - 6, rows[tid] + 9, name[-24:], "end")
    for event in sorted((e for e in slices if e["pid"] == 2), key=lambda e: -e["dur"]):
        if event["name"] in COLOURS:
            drawing.box(event, rows[event["tid"]], ROW - 4, COLOURS[event["name"]])
        else:
            drawing.box(event, rows[event["tid"]] + 2, ROW - 8, CHUNK)
    for event in events:
        if event["ph"] == "i":
            drawing.mark(event["ts"], rows[event["tid"]], event["name"])
    draw_steps(drawing, [e for e in slices if e["pid"] == 1], bottom + 12)
    draw_frame(drawing, end, bottom)
    height = bottom + 12 + STEPS + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="9" fill="{TEXT}">\n<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n'
        + "\n".join(drawing.parts)
        + "\n</svg>\n"
    )


def draw_steps(drawing: Drawing, steps: list[dict[str, Any]], y: float) -> None:
    """Each step, higher the more rows it has."""
    most = max((step["args"]["rows"] for step in steps), default=1)
    drawing.text(LEFT - 6, y + STEPS - 2, "rows of each step", "end")
    drawing.text(LEFT - 6, y + 9, f"at most {most}", "end")
    for step in steps:
        height = max(1.0, STEPS * math.sqrt(step["args"]["rows"] / most))
        drawing.box(step, y + STEPS - height, height, STEP)


def draw_frame(drawing: Drawing, end: float, bottom: float) -> None:
    """Time axis and legend."""
    for i in range(6):
        at = end * i / 5
        drawing.text(drawing.x(at), bottom + 12 + STEPS + 14, f"{at / 1e6:.2f} s", "middle")
        drawing.parts.append(
            f'<path d="M{drawing.x(at):.1f} {TOP - 4}V{bottom + 12 + STEPS}" stroke="{TEXT}" stroke-opacity=".15"/>'
        )
    x = LEFT
    for name, colour in [*COLOURS.items(), ("chunk of a prompt", CHUNK)]:
        drawing.parts.append(f'<rect x="{x}" y="18" width="10" height="10" fill="{colour}"/>')
        drawing.text(x + 14, 27, name)
        x += 34 + 6 * len(name)
    for name in ("first token", "preempted", "finished"):
        drawing.mark((x + 4 - LEFT) / drawing.scale, 18, name)
        drawing.text(x + 14, 27, name)
        x += 34 + 6 * len(name)


def demo(path: Path) -> None:
    """A crowd on the demo model, in a cache that is too small for it; its trace goes to `path`.

    Short answers come first, so that the scheduler expects short ones; then it has to preempt.
    """
    from streamgen import sync

    rng = random.Random(7)
    words = ("river", "stone", "wind", "light")
    with sync.Engine(kv_memory="20MiB", max_context=640, max_running=8) as engine:
        for _ in range(2):
            engine.sample(" ".join(rng.choices(words, k=8)), n=16, max_tokens=4, ignore_eos=True)
        engine._recorder._ended.clear()
        engine._recorder._steps.clear()

        def ask(number: int, length: int, tokens: int) -> None:
            prompt = " ".join(rng.choices(words, k=length))
            engine.generate(prompt, max_tokens=tokens, ignore_eos=True, request_id=f"request {number}")

        sizes = [(8, 6), (560, 20), (60, 160), (40, 170), (90, 180), (120, 170), (200, 60), (16, 100), (150, 30)]
        threads = [threading.Thread(target=ask, args=(i, *size)) for i, size in enumerate(sizes, start=1)]
        for thread in threads:
            thread.start()
            time.sleep(0.03)
        for thread in threads:
            thread.join()
        engine.trace(path)


def main() -> int:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--demo", action="store_true")
    arguments = parser.parse_args()
    if arguments.demo == (arguments.trace is not None):
        parser.error("expected either TRACE.json or --demo")
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.trace or Path(folder) / "trace.json"
        if arguments.demo:
            demo(path)
        try:
            events = json.loads(path.read_bytes())["traceEvents"]
        except (OSError, ValueError, KeyError) as e:
            print(f"{path}: expected a trace that Engine.trace wrote ({type(e).__name__})", file=sys.stderr)
            return 1
    arguments.picture.write_text(draw(events))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
