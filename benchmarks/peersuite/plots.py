"""The report's plots as SVG, drawn by hand: throughput over batch, the roofline, how long readers wait."""

from __future__ import annotations

import math
from html import escape
from statistics import median
from typing import TYPE_CHECKING

from msgspec import Struct

from .figures import RATE, STEADY
from .report import Line, Report, latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 48, 46
COLOURS = {"streamgen": "#2b6cb0", "llama.cpp": "#c05621", "openvino-genai": "#2f855a", "transformers": "#805ad5"}
OTHER_COLOURS = ("#b7791f", "#97266d", "#285e61")
TEXT, GRID = "#333", "#ddd"
Point = tuple[float, float]


class Curve(Struct, frozen=True, kw_only=True):
    """Points of one engine; joined, unless `dots`. `labels` stand beside the points."""

    name: str
    points: tuple[Point, ...]
    colour: str
    dots: bool = False
    labels: tuple[str, ...] = ()
    dashed: bool = False


class Axis(Struct, frozen=True, kw_only=True):
    """From `low` to `high`, in powers where `log`; `marks` are labelled."""

    label: str
    low: float
    high: float
    log: bool
    marks: tuple[float, ...]

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def log_axis(label: str, values: Sequence[float]) -> Axis:
    """Marks at 1, 2, 5 times powers of ten, the ends at marks, and never less than from one to the next."""
    low, high = min(values), max(values)
    steps = [m * 10.0**p for p in range(-6, 13) for m in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= low * 1.0001)
    last = min(i for i, step in enumerate(steps) if step >= high * 0.9999)
    marks = steps[first : max(last, first + 1) + 1]
    return Axis(label=label, low=marks[0], high=marks[-1], log=True, marks=tuple(marks))


def linear_axis(label: str, most: float) -> Axis:
    """From 0, about five marks."""
    rough = most / 5 or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    count = math.ceil(most / step - 1e-9)
    return Axis(label=label, low=0.0, high=step * count, log=False, marks=tuple(step * i for i in range(count + 1)))


def draw(title: str, note: str, x: Axis, y: Axis, curves: Sequence[Curve]) -> str:
    """An SVG document."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(point: Point) -> Point:
        return LEFT + (right - LEFT) * x.place(point[0]), bottom - (bottom - TOP) * y.place(point[1])

    parts = [_text(LEFT, 20, title, size=14), _text(LEFT, 35, note)]
    for mark in y.marks:
        height = at((x.low, mark))[1]
        parts.append(f'<path d="M{LEFT} {height:.1f}H{right}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 6, height + 3.5, _short(mark), anchor="end"))
    for mark in x.marks:
        place = at((mark, y.low))[0]
        parts.append(f'<path d="M{place:.1f} {bottom}v4" stroke="{TEXT}"/>')
        parts.append(_text(place, bottom + 16, _short(mark), anchor="middle"))
    parts += [_text(right, bottom + 32, x.label, anchor="end"), _text(LEFT, TOP - 3, y.label)]
    for i, curve in enumerate(curves):
        parts += _draw_curve(curve, at)
        parts.append(_text(right + 12, TOP + 12 + 16 * i, curve.name, colour=curve.colour, size=11))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'fill="{TEXT}">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _draw_curve(curve: Curve, at: Callable[[Point], Point]) -> list[str]:
    places = [at(point) for point in curve.points]
    parts = []
    if not curve.dots:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.5"{dash}/>')
    if curve.dots or (len(places) <= 12 and not curve.dashed):
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.colour}"/>' for x, y in places]
    for (x, y), label in zip(places, curve.labels, strict=False):
        parts.append(_text(x + 5, y - 4, label, size=9, colour=curve.colour))
    return parts


def _text(x: float, y: float, text: str, *, size: int = 10, anchor: str = "start", colour: str = TEXT) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"


def _short(value: float) -> str:
    if value >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}"


def colour_of(engine: str, engines: Sequence[str]) -> str:
    """The same engine has the same colour on every plot."""
    others = [name for name in engines if name not in COLOURS]
    return COLOURS.get(engine) or OTHER_COLOURS[others.index(engine) % len(OTHER_COLOURS)]


def plots_of(report: Report) -> dict[str, str]:
    """Documents by the last part of their file's name; only of what was measured."""
    documents = {}
    for model in dict.fromkeys(line.model for line in report.lines):
        lines = [line for line in report.lines if line.model == model]
        decodes = sorted((line for line in lines if line.kind == "decode"), key=lambda line: line.sequences)
        if len(decodes) > 1:
            documents[f"{model}-batch"] = plot_batches(model, decodes)
        if decodes or any(line.kind == "prefill" for line in lines):
            documents[f"{model}-roofline"] = plot_roofline(model, lines)
        for line in lines:
            if any(latencies_of(line).values()):
                documents[f"{model}-{line.kind}"] = plot_latencies(model, line)
    return documents


def latencies_of(line: Line) -> dict[str, list[float]]:
    """Quantiles between tokens by engine, where the work has them."""
    return latencies(line) if line.kind in ("burst", "poisson") else {}


def _names(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(engine for line in lines for engine in line.engines))


def plot_batches(model: str, lines: Sequence[Line]) -> str:
    """Decoded tokens a second over the number of sequences."""
    names = _names(lines)
    curves = []
    for name in names:
        points = [(float(line.sequences), median(runs)) for line in lines if (runs := line.runs(name, STEADY))]
        curves.append(Curve(name=name, points=tuple(points), colour=colour_of(name, names)))
    counts = [line.sequences for line in lines]
    batch = Axis(
        label="sequences at once",
        low=float(counts[0]),
        high=float(counts[-1]),
        log=True,
        marks=tuple(float(n) for n in counts),
    )
    rates = linear_axis("decoded tokens a second, all sequences", max(y for c in curves for _, y in c.points))
    return draw(f"{model}: throughput over batch", "128 ids in, 128 out; median of the rounds", batch, rates, curves)


def plot_roofline(model: str, lines: Sequence[Line]) -> str:
    """Operations a second over operations for each byte of weights, below what memory and arithmetic allow."""
    names = _names(lines)
    machines = [machine for line in lines for machine in line.machines]
    bandwidth = median(machine.bandwidth for machine in machines)
    products = [machine.matmul for machine in machines if machine.matmul]
    by_name: dict[str, list[tuple[float, float, str]]] = {name: [] for name in names}
    for line in lines:
        for name in line.engines:
            if line.kind in ("prefill", "decode"):
                by_name[name].append(_roofline_point(line, name))
    points = [point for found in by_name.values() for point in found]
    peak = median(products) if products else max(y for _, y, _ in points)
    x = log_axis(
        "operations for each byte of weights in the file", [min(p[0] for p in points), *(p[0] for p in points)]
    )
    knee = min(max(peak / bandwidth, x.low), x.high)
    roof = ((x.low, min(peak, bandwidth * x.low)), (knee, min(peak, bandwidth * knee)), (x.high, peak))
    y = log_axis("GFLOP/s", [*(p[1] for p in points), *(h for _, h in roof)])
    curves = [Curve(name="the machine", points=roof, colour=TEXT, dashed=True)]
    for name in names:
        found = by_name[name]
        curves.append(
            Curve(
                name=name,
                points=tuple((a, b) for a, b, _ in found),
                colour=colour_of(name, names),
                dots=True,
                labels=tuple(label for _, _, label in found) if name == names[0] else (),
            )
        )
    note = f"read bandwidth {bandwidth:.1f} GB/s" + (
        f", torch bfloat16 product {peak:,.0f} GFLOP/s" if products else ""
    )
    return draw(f"{model}: roofline", note, x, y, curves)


def _roofline_point(line: Line, engine: str) -> tuple[float, float, str]:
    """Of a step: operations for each byte of weights, GFLOP/s, and what it is."""
    sizes = line.sizes
    if line.kind == "prefill":
        operations, rate = 2.0 * sizes.layer_weights, median(line.runs(engine, RATE))
        return operations * line.tokens_in / sizes.file_weights, operations * rate / 1e9, line.work
    operations, rate = 2.0 * (sizes.layer_weights + sizes.head_weights), median(line.runs(engine, STEADY))
    return operations * line.sequences / sizes.file_weights, operations * rate / 1e9, line.work


def plot_latencies(model: str, line: Line) -> str:
    """The share of waits between tokens that are shorter, over their length."""
    names = line.engines
    curves = []
    for name, quantiles in latencies_of(line).items():
        points = [(max(value, 0.1), 100.0 * i / (len(quantiles) - 1)) for i, value in enumerate(quantiles)]
        curves.append(Curve(name=name, points=tuple(points), colour=colour_of(name, names)))
    x = log_axis("milliseconds between a request's tokens", [value for c in curves for value, _ in c.points])
    y = Axis(label="% of waits that are shorter", low=0.0, high=100.0, log=False, marks=(0, 25, 50, 75, 90, 100))
    note = f"{line.sequences} requests, {line.tokens_in:,} ids in, {line.tokens_out:,} out; the middle round of each"
    return draw(f"{model}: {line.work}, waiting between tokens", note, x, y, curves)
