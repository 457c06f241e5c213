"""What `bench` measures, as plain data: figures with their ratios, the machine, the versions."""

from __future__ import annotations

from msgspec import Struct


class Figure(Struct, frozen=True, kw_only=True):
    """One measured number.

    runs       every repetition; `value` is the best of them
    ratio      compared with something that bounds or explains it, and `ratio_of` says what; of figures measured in
               rounds the median of the rounds' ratios
    """

    name: str
    value: float
    unit: str
    runs: tuple[float, ...] = ()
    ratio: float | None = None
    ratio_of: str = ""

    def line(self) -> str:
        """The figure as a line of text."""
        ratio = "" if self.ratio is None else f"   {self.ratio:.2f} {self.ratio_of}"
        return f"{self.name:34} {_number(self.value):>9} {self.unit:9}{ratio}"


class BenchReport(Struct, frozen=True, kw_only=True):
    """A run of `bench`. `skipped`: what could not be measured here, and why."""

    model: str
    dtype: str
    threads: int
    isa: str
    processor: str
    system: str
    versions: dict[str, str]
    commit: str | None
    command: str
    figures: tuple[Figure, ...] = ()
    skipped: tuple[str, ...] = ()

    def header(self) -> list[str]:
        """Hardware, versions, commit and command, as lines of text."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"{self.model}, {self.dtype}, {self.threads} threads, kernels {self.isa}",
            f"{self.processor}, {self.system}",
            f"{versions}; commit {self.commit or 'unknown'}",
            f"{self.command}",
        ]

    def markdown(self) -> str:
        """The report as a table for README.md and docs/benchmarks."""
        rows = [f"| {f.name} | {_number(f.value)} {f.unit} | {_markdown_ratio(f)} |" for f in self.figures]
        table = ["| figure | value | ratio |", "| --- | --: | --- |", *rows]
        notes = [f"Not measured: {reason}" for reason in self.skipped]
        return "\n".join([*(f"{line}  " for line in self.header()), "", *table, *([""] if notes else []), *notes, ""])


def _number(value: float) -> str:
    """Three figures that count, thousands with a comma."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _markdown_ratio(figure: Figure) -> str:
    return "" if figure.ratio is None else f"{figure.ratio:.2f} {figure.ratio_of}"
