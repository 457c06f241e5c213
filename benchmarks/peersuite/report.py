"""What was measured, as plain data, and as the tables of docs/benchmarks.

A line is one work on one model. Lines of several runs may stand in one report: each knows its own commit, time, load
and machine, and a line that is measured again replaces the one before.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from .figures import BETWEEN_P50, FIGURES, RATE, STEADY, Figure
from .rounds import Machine, Turn  # noqa: TC001  # read when a report is decoded

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .models import Model
    from .works import Work

OURS = "streamgen"


class Sizes(Struct, frozen=True, kw_only=True):
    """Of a model: what its figures are measured against; see `Model`."""

    file_weights: int
    layer_weights: int
    head_weights: int

    @classmethod
    def of(cls, model: Model) -> Sizes:
        """A model's."""
        return cls(file_weights=model.file_weights, layer_weights=model.layer_weights, head_weights=model.head_weights)


class Line(Struct, kw_only=True):
    """One work on one model, measured in rounds.

    options   of our engine; files: what each engine read
    missing   engines that could not do it, and why
    """

    model: str
    work: str
    kind: str
    sequences: int
    tokens_in: int
    tokens_out: int
    sizes: Sizes
    options: dict[str, Any]
    files: dict[str, str]
    threads: int
    commit: str
    when: str
    turns: list[Turn]
    machines: list[Machine]
    missing: dict[str, str]

    @property
    def key(self) -> tuple[str, str]:
        """What it measures."""
        return self.model, self.work

    def runs(self, engine: str, figure: Figure) -> list[float]:
        """An engine's values, a round each."""
        return [turn.values[figure.name] for turn in self.turns if turn.engine == engine]

    @property
    def engines(self) -> list[str]:
        """Ours first, then the others in their order."""
        names = list(dict.fromkeys(turn.engine for turn in self.turns))
        return sorted(names, key=lambda name: name != OURS)

    def best_peer(self, figure: Figure) -> str | None:
        """Whose median is best; None where there was no other engine."""
        best = max if figure.more_is_better else min
        peers = [engine for engine in self.engines if engine != OURS]
        return best(peers, key=lambda engine: median(self.runs(engine, figure))) if peers else None

    def ratios(self, figure: Figure) -> list[float]:
        """Ours through the best peer's, round by round."""
        peer = self.best_peer(figure)
        if peer is None:
            return []
        theirs = {turn.round: turn.values[figure.name] for turn in self.turns if turn.engine == peer}
        ours = {turn.round: turn.values[figure.name] for turn in self.turns if turn.engine == OURS}
        return [ours[number] / theirs[number] for number in ours if number in theirs]

    def limit_share(self, engine: str) -> float | None:
        """Of prefill, the share of torch's matrix product; of one sequence's decode, the share of read bandwidth.

        Both count what the file holds: its weights' operations, its weights' bytes.
        """
        if self.kind == "prefill" and all(machine.matmul for machine in self.machines):
            per_token, limits = 2.0 * self.sizes.layer_weights, [machine.matmul for machine in self.machines]
            figure = RATE
        elif self.kind == "decode" and self.sequences == 1:
            per_token, limits = float(self.sizes.file_weights), [machine.bandwidth for machine in self.machines]
            figure = STEADY
        else:
            return None
        turns = [turn for turn in self.turns if turn.engine == engine]
        if not turns:
            return None
        return median(turn.values[figure.name] * per_token / 1e9 / (limits[turn.round] or 1.0) for turn in turns)


class Report(Struct, kw_only=True):
    """Everything, with the hardware, the versions and the command of the last run."""

    processor: str
    cores: int
    system: str
    versions: dict[str, str]
    commands: list[str] = []
    lines: list[Line] = []

    def add(self, line: Line) -> None:
        """In place of the line that measures the same."""
        self.lines = [other for other in self.lines if other.key != line.key] + [line]

    def markdown(self, name: str, plots: Iterable[str]) -> str:
        """Head, a table for every model, what was not measured, plots."""
        versions = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        head = [f"# {name}", "", f"{self.processor}, {self.cores} cores, {self.system}  ", f"{versions}  ", ""]
        commands = ["```", *self.commands, "```", ""]
        parts = [*head, *commands, _EXPLAINED, ""]
        for model in dict.fromkeys(line.model for line in self.lines):
            parts += self._model_part(model)
        return "\n".join([*parts, *(f"![{plot}]({plot})\n" for plot in plots)])

    def _model_part(self, model: str) -> list[str]:
        lines = [line for line in self.lines if line.model == model]
        engines = sorted({e for line in lines for e in line.engines}, key=lambda name: (name != OURS, name))
        titles = ["work", "figure", *engines, "ours / best", "rounds", "share of limit, ours", "others' cpu"]
        rows = [f"| {' | '.join(titles)} |", "| --- | --- |" + " --: |" * (len(titles) - 2)]
        for line in lines:
            rows += [_row(line, figure, engines) for figure in FIGURES[line.kind] if any(line.turns)]
        files = [f"{engine} read {file}" for engine, file in lines[-1].files.items()]
        options = ", ".join(f"{key}={value}" for key, value in lines[-1].options.items())
        notes = [f"Files: {'; '.join(files)}." + (f" Ours with {options}." if options else "")]
        notes += [_machine_note(lines)]
        notes += [
            f"Not measured: {line.work} of {engine}: {why}" for line in lines for engine, why in line.missing.items()
        ]
        return [f"## {model}", "", *rows, "", *(f"{note}  " for note in notes), ""]


_EXPLAINED = """\
Median of the rounds, least and most in brackets. *ours / best*: our figure through the best other engine's of the same
round, median; that engine is in bold. *Share of limit*: of torch's bfloat16 product of 4096 squares (prefill, layers'
weights only), of read bandwidth (decode of one sequence, bytes as the file holds them). *Others' cpu*: processors kept
busy by others than the engine of a turn, the most of all turns."""


def _row(line: Line, figure: Figure, engines: list[str]) -> str:
    peer = line.best_peer(figure)
    cells = [_cell(line.runs(engine, figure), is_best=engine == peer) for engine in engines]
    ratios = line.ratios(figure)
    ratio = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else ""
    share = line.limit_share(OURS) if figure in (RATE, STEADY) else None
    others = [turn.others for turn in line.turns if turn.others is not None]
    unit = f", {figure.unit}" if figure.unit and "tok/s" not in figure.name else ""
    less = "" if figure.more_is_better else " (less is better)"
    cells = [
        line.work,
        f"{figure.name}{unit}{less}",
        *cells,
        ratio,
        str(len(line.machines)),
        "" if share is None else f"{share:.2f}",
        f"{max(others):.2f}" if others else "",
    ]
    return f"| {' | '.join(cells)} |"


def _cell(runs: list[float], *, is_best: bool) -> str:
    if not runs:
        return ""
    middle = number(median(runs))
    spread = f" ({number(min(runs))}-{number(max(runs))})" if len(runs) > 1 else ""
    return f"**{middle}**{spread}" if is_best else f"{middle}{spread}"


def _machine_note(lines: list[Line]) -> str:
    bandwidths = [machine.bandwidth for line in lines for machine in line.machines]
    products = [machine.matmul for line in lines for machine in line.machines if machine.matmul]
    text = f"Read bandwidth {median(bandwidths):.1f} ({min(bandwidths):.1f}-{max(bandwidths):.1f}) GB/s"
    if products:
        text += f", torch's product {median(products):,.0f} ({min(products):,.0f}-{max(products):,.0f}) GFLOP/s"
    commits = ", ".join(dict.fromkeys(line.commit for line in lines))
    threads = ", ".join(dict.fromkeys(str(line.threads) for line in lines))
    days = ", ".join(dict.fromkeys(line.when for line in lines))
    return f"{text}; {threads} threads; commit {commits}; {days}."


def number(value: float) -> str:
    """Three figures that count, thousands with a comma."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def line_of(work: Work, model: Model, **fields: Any) -> Line:
    """A line with what work and model say of themselves."""
    return Line(
        model=model.name,
        work=work.name,
        kind=work.kind,
        sequences=len(work.requests),
        tokens_in=work.tokens_in,
        tokens_out=work.tokens_out,
        sizes=Sizes.of(model),
        files={"streamgen": model.ours.name, "llama.cpp": model.gguf.name}
        | ({} if model.openvino is None else {"openvino-genai": model.openvino.name}),
        **fields,
    )


def latencies(line: Line) -> dict[str, list[float]]:
    """Quantiles between tokens, by engine, of the round that is the middle one by its median."""
    chosen = {}
    for engine in line.engines:
        turns = sorted((t for t in line.turns if t.engine == engine), key=lambda t: t.values[BETWEEN_P50.name])
        chosen[engine] = turns[len(turns) // 2].between
    return chosen
