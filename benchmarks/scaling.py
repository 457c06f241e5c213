"""How a decode step grows with the number of sequences and with the context: no cliff should show.

    python benchmarks/scaling.py [MODEL] [--name scaling]

Steps of one row per sequence, run directly on the kernels, the best of several; writes docs/benchmarks/NAME.md.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

from peersuite.plots import COLOURS, Curve, draw, linear_axis, log_axis

from streamgen.cli.benchmark.ops import OpTable, StepShape, measure_ops
from streamgen.cli.machine import cpu_model
from streamgen.cli.options import model_or_demo
from streamgen.config import EngineOptions

ROOT = Path(__file__).parents[1]
BATCHES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8000)
BATCH_CONTEXT = 128


def rate(table: OpTable) -> float:
    """Tokens per second of all sequences."""
    return table.shape.rows / sum(cost.seconds for cost in table.costs)


def rows_of(tables: list[OpTable]) -> list[str]:
    """Lines of a Markdown table."""
    head = ["| sequences | context | ms a step | tokens/s | us a sequence |", "| --: | --: | --: | --: | --: |"]
    lines = []
    for table in tables:
        step = table.shape.rows / rate(table)
        lines.append(
            f"| {table.shape.num_seqs} | {table.shape.context} | {1e3 * step:.2f} | {rate(table):,.0f} | "
            f"{1e6 * step / table.shape.num_seqs:,.0f} |"
        )
    return [*head, *lines]


def plot(model: str, label: str, points: list[tuple[float, float]]) -> str:
    """Tokens a second over `label`, as SVG."""
    x = log_axis(label, [at for at, _ in points])
    y = linear_axis("tokens a second, all sequences", max(value for _, value in points))
    curve = Curve(name="streamgen", points=tuple(points), colour=COLOURS["streamgen"])
    return draw(f"{model}: decode steps", f"over {label}", x, y, [curve])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--name", default="scaling")
    arguments = parser.parse_args()
    options = EngineOptions(model=str(model_or_demo(arguments.model)))
    batches = [StepShape(f"{n} sequences", n, 1, BATCH_CONTEXT) for n in BATCHES]
    contexts = [StepShape(f"context {n}", 1, 1, n) for n in CONTEXTS]
    by_batch = measure_ops(options, batches, peak=None)
    by_context = measure_ops(options, contexts, peak=None)
    text = "\n".join(
        [
            f"# {arguments.name}",
            "",
            f"{Path(str(options.model)).name}, {cpu_model()}, python {platform.python_version()}, "
            f"{time.strftime('%Y-%m-%d')}; `python benchmarks/scaling.py`",
            "",
            *rows_of(by_batch),
            "",
            f"![over sequences]({arguments.name}-batch.svg)",
            "",
            *rows_of(by_context),
            "",
            f"![over context]({arguments.name}-context.svg)",
            "",
        ]
    )
    folder, label = ROOT / "docs" / "benchmarks", Path(str(options.model)).stem
    (folder / f"{arguments.name}.md").write_text(text)
    batch_points = [(float(table.shape.num_seqs), rate(table)) for table in by_batch]
    (folder / f"{arguments.name}-batch.svg").write_text(plot(label, "sequences at once", batch_points))
    context_points = [(float(table.shape.context), rate(table)) for table in by_context]
    (folder / f"{arguments.name}-context.svg").write_text(
        plot(label, "tokens of context, one sequence", context_points)
    )
    print(text)


if __name__ == "__main__":
    main()
