"""Plots as SVG, drawn by hand: panels of lines over one axis, in a page's width."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamgen.testing.simulator.replay import ReplayReport

WIDTH, PANEL, GAP, LEFT, RIGHT, TOP, BOTTOM = 760, 120, 46, 64, 16, 62, 34
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5")
TEXT, GRID = "#333", "#ddd"


class Line(Struct, frozen=True, kw_only=True):
    """Some points in one colour; `dots` draws each instead of joining them."""

    name: str
    points: tuple[tuple[float, float], ...]
    dots: bool = False


class Panel(Struct, frozen=True, kw_only=True):
    """Lines over one axis. `most_y` draws a line there, and has the axis reach it."""

    title: str
    lines: tuple[Line, ...]
    x_label: str = ""
    most_y: float | None = None


def nice_step(span: float, num_steps: int) -> float:
    """1, 2 or 5 times a power of ten, so that about so many steps are in a span."""
    if span <= 0:
        return 1.0
    rough = span / num_steps
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1.0, 2.0, 5.0, 10.0) if power * factor >= rough * 0.999)


def ticks(most: float, num_steps: int) -> list[float]:
    """From 0 to `most`, or just beyond."""
    step = nice_step(most, num_steps)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)] if most > 0 else [0.0, 1.0]


def draw(title: str, notes: Sequence[str], panels: Sequence[Panel]) -> str:
    """An SVG document of panels below each other; notes stand under the title."""
    top = TOP + 13 * max(0, len(notes) - 1)
    height = top + len(panels) * (PANEL + GAP) + BOTTOM - GAP
    parts = [_text(LEFT, 22, title, size=15)]
    parts += [_text(LEFT, 38 + 13 * i, note, size=10) for i, note in enumerate(notes)]
    for i, panel in enumerate(panels):
        parts += _draw_panel(panel, top + i * (PANEL + GAP))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'fill="{TEXT}">\n<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _draw_panel(panel: Panel, y: int) -> list[str]:
    points = [point for line in panel.lines for point in line.points] or [(0.0, 0.0)]
    xs = ticks(max(x for x, _ in points), 8)
    ys = ticks(max([panel.most_y or 0.0, *(value for _, value in points)]), 4)
    right, most_x, most_y = WIDTH - RIGHT, max(x for x, _ in points) or xs[-1], ys[-1]

    def place(x: float, value: float) -> tuple[float, float]:
        return LEFT + (right - LEFT) * x / most_x, y + PANEL * (1.0 - value / most_y)

    parts = [_text(LEFT, y - 8, panel.title, size=11)]
    for value in ys:
        at = place(0.0, value)[1]
        parts.append(f'<path d="M{LEFT} {at:.1f}H{right}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 6, at + 3.5, _number(value), anchor="end"))
    shown = [value for value in xs if value <= most_x * 1.0001]
    parts += [_text(place(value, 0.0)[0], y + PANEL + 13, _number(value), anchor="middle") for value in shown]
    if panel.x_label:
        parts.append(_text(right, y + PANEL + 25, panel.x_label, anchor="end"))
    if panel.most_y is not None:
        at = place(0.0, panel.most_y)[1]
        parts.append(f'<path d="M{LEFT} {at:.1f}H{right}" stroke="{TEXT}" stroke-dasharray="4 3"/>')
    legend = right
    for number, line in reversed([*enumerate(panel.lines)]):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_draw_line(line, [place(*point) for point in line.points], colour))
        if len(panel.lines) > 1:
            parts.append(_text(legend, y - 8, line.name, anchor="end", colour=colour))
            legend -= 14 + 6 * len(line.name)
    return parts


def _draw_line(line: Line, points: list[tuple[float, float]], colour: str) -> str:
    if line.dots:
        return "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>'


def _text(x: float, y: float, text: str, *, size: int = 10, anchor: str = "start", colour: str = TEXT) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"


def _number(value: float) -> str:
    """As short as it can be read: 20k, 1.5, 0.003."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:.4g}"


def plot_replay(report: ReplayReport, title: str) -> str:
    """A replay over time: queue, batch, pages, and tokens a second."""
    points = report.points

    def line(name: str, field: str, *, per_second: bool = False) -> Line:
        values = [(p.time, getattr(p, field) / (p.seconds if per_second else 1.0)) for p in points]
        return Line(name=name, points=tuple(values))

    notes = [
        f"{report.requests:,} requests in {report.seconds:,.0f} s; first token p50 {report.first_token.p50:.2f} s, "
        f"p99 {report.first_token.p99:.2f} s; per token p50 {1000 * report.per_token.p50:.1f} ms; "
        f"{report.output_per_second:,.0f} tokens/s",
        f"cache hits {report.cache_hits:.1%}, {report.preemptions:,} preemptions, device busy {report.busy:.0%}; "
        f"a step is {report.cost.describe()}",
    ]
    panels = [
        Panel(title="waiting requests", lines=(line("waiting", "waiting"),)),
        Panel(title="running sequences", lines=(line("running", "running"),)),
        Panel(title="pages held (dashed: all)", lines=(line("pages", "pages"),), most_y=report.limits.num_pages),
        Panel(
            title="tokens a second",
            lines=(line("rows computed", "rows", per_second=True), line("tokens drawn", "outputs", per_second=True)),
            x_label="seconds of virtual time",
        ),
    ]
    return draw(title, notes, panels)
