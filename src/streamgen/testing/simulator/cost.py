"""How long a step takes: a + b * rows + c * context seconds, fitted to an engine's own steps.

*rows* are the tokens that go through the model in the step, *context* is what they attend to: the row at position p
looks at p + 1 positions. `a` is what a step costs whatever is in it (reading the weights, for a small batch), `b` the
arithmetic of a row, `c` the keys and values of a position.
"""

from __future__ import annotations

import math
import time
from operator import mul
from random import Random
from threading import Thread
from typing import TYPE_CHECKING

from msgspec import Struct

from streamgen.errors import ConfigError
from streamgen.lifecycle import StepCompleted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from streamgen.lifecycle import EventStream
    from streamgen.messages import StepPlan
    from streamgen.sync import Engine

DECODE_RUNS = ((1, 32), (1, 448), (4, 64), (8, 32), (16, 64), (8, 448))  # sequences, prompt tokens
DECODE_TOKENS = 12
PREFILL_RUNS = (24, 96, 200, 512, 900)  # prompt tokens, one sequence each
TURNS = 3
MIN_CONTEXT = 256  # with less, rows and context can hardly be told apart
LOOK_SECONDS = 0.01


class StepSample(Struct, frozen=True, kw_only=True):
    """A step that was measured."""

    rows: int
    context: int
    seconds: float


class CostModel(Struct, frozen=True, kw_only=True):
    """Seconds of a step, and what the host adds.

    step      a: of any step
    row       b: of a row
    context   c: of a position that a row attends to
    error     mean relative error of the fit, 0 where nothing was fitted

    Raises:
        ConfigError: a figure that is no time, or all of them 0: virtual time would stand still.
    """

    step: float
    row: float
    context: float
    error: float = 0.0

    def __post_init__(self) -> None:
        for name in ("step", "row", "context"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(f"cost: {name}: expected seconds >= 0, got {value}", option="cost")
        if not self.step + self.row:
            raise ConfigError("cost: expected step or row > 0, got 0 for both; a step has to take time", option="cost")

    @classmethod
    def parse(cls, text: str) -> CostModel:
        """From `a,b,c` in seconds.

        Raises:
            ConfigError: it is not three numbers that are times.
        """
        try:
            step, row, context = (float(part) for part in text.split(","))
        except ValueError:
            raise ConfigError(
                f"cost: expected three numbers of seconds as STEP,ROW,CONTEXT, got {text!r}; e.g. 8e-3,7e-4,1e-8",
                option="cost",
            ) from None
        return cls(step=step, row=row, context=context)

    def seconds(self, plan: StepPlan) -> float:
        """How long the device takes for a plan."""
        rows = sum(plan.counts)
        context = sum(map(mul, plan.starts, plan.counts)) + (sum(map(mul, plan.counts, plan.counts)) + rows) // 2
        return self.seconds_at(rows, context)

    def seconds_at(self, rows: int, context: int) -> float:
        """How long a step of so many rows takes that attend to so many positions in all."""
        return self.step + self.row * rows + self.context * float(context)

    def describe(self) -> str:
        """For people."""
        step, row, context = 1e3 * self.step, 1e6 * self.row, 1e9 * self.context
        return f"{step:.3g} ms + {row:.3g} us a row + {context:.3g} ns a position"

    def seconds_of(self, num_steps: int, rows: int) -> float:
        """How long so many steps of so many rows take, their context aside."""
        return num_steps * (self.step + self.row * rows)

    @classmethod
    def fit(cls, samples: Iterable[StepSample]) -> CostModel:
        """The model whose relative errors are smallest (least squares), no figure below 0.

        Raises:
            ConfigError: fewer than three different steps.
        """
        points = [((1.0, float(s.rows), float(s.context)), s.seconds) for s in samples if s.seconds > 0]
        if len({features for features, _ in points}) < 3:
            raise ConfigError("cost: expected three different steps or more to fit to", option="cost")
        figures = _fit_nonnegative(points)
        errors = [abs(sum(map(mul, figures, features)) / seconds - 1.0) for features, seconds in points]
        return cls(step=figures[0], row=figures[1], context=figures[2], error=sum(errors) / len(errors))

    @classmethod
    def measure(cls, engine: Engine) -> CostModel:
        """Fit to steps of an open engine that does nothing else: some tens of seconds with a small model.

        Raises:
            ConfigError: the engine's context is too small for the runs that tell rows from context.
        """
        context = engine.plan().max_context
        if context < MIN_CONTEXT:
            raise ConfigError(
                f"cost: expected an engine with max_context >= {MIN_CONTEXT}, got {context}", option="cost"
            )
        best: dict[tuple[int, int], StepSample] = {}
        for sample in _measure(engine):
            key = sample.rows, sample.context
            if key not in best or sample.seconds < best[key].seconds:
                best[key] = sample
        return cls.fit(best.values())


# The demo model (135 million parameters, bfloat16) on two cores of an EPYC server. Step and row go through the figures
# of docs/benchmarks/first-light.json (1, 8 and 32 sequences, a prompt of 512) within 16 %; the context's share of a row
# is that of `CostModel.measure` there. For another machine: `streamgen simulate TRACE --measure MODEL`.
DEMO_ON_TWO_CORES = CostModel(step=8e-3, row=6e-4, context=6e-7)


def _fit_nonnegative(points: Sequence[tuple[tuple[float, float, float], float]]) -> list[float]:
    """Least squares of relative errors; who would be negative is left out, the most negative first."""
    kept = [0, 1, 2]
    while True:
        scaled = [([features[k] / seconds for k in kept], 1.0) for features, seconds in points]
        solution = _solve_normal(scaled, len(kept))
        least = min(range(len(kept)), key=solution.__getitem__)
        if solution[least] >= 0.0:
            figures = [0.0, 0.0, 0.0]
            for k, value in zip(kept, solution, strict=True):
                figures[k] = value
            return figures
        del kept[least]


def _solve_normal(points: Sequence[tuple[list[float], float]], size: int) -> list[float]:
    """The normal equations, by elimination with pivots; columns are scaled to one length first."""
    scale = [math.sqrt(sum(x[k] * x[k] for x, _ in points)) or 1.0 for k in range(size)]
    rows = [
        [sum(x[i] * x[j] for x, _ in points) / (scale[i] * scale[j]) for j in range(size)]
        + [sum(x[i] * y for x, y in points) / scale[i]]
        for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) < 1e-12:
            raise ConfigError("cost: the steps do not tell rows from context; give steps of other sizes", option="cost")
        for r in range(size):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] / scale[i] for i in range(size)]


# ---- measuring ------------------------------------------------------------------------------------------------------


def _measure(engine: Engine) -> Iterator[StepSample]:
    """Steps of all kinds, each several times: whatever else the machine does makes some of them longer."""
    plan = engine.plan()
    most = min(plan.max_context, plan.num_pages * plan.page_size) - 1
    for turn in range(TURNS):
        for i, length in enumerate(PREFILL_RUNS):
            if length <= most:
                yield from _measure_prefill(engine, _prompt(1000 * turn + i, length))
        for number, length in DECODE_RUNS:
            if length + DECODE_TOKENS + number <= most and number <= plan.max_running:
                yield from _measure_decode(engine, number, length, turn)


def _prompt(seed: int, length: int) -> list[int]:
    """Ids that every vocabulary has."""
    return Random(seed).choices(range(3, 256), k=length)


def _measure_prefill(engine: Engine, prompt: list[int]) -> list[StepSample]:
    """One prompt alone, chunk by chunk."""
    with engine.subscribe() as events:
        engine.generate(prompt, max_tokens=1, ignore_eos=True, cache="private")
        steps = _steps_until(events, len(prompt))
    samples, start = [], 0
    for step in steps:
        if start + step.rows > len(prompt):
            break  # a row that was planned ahead
        context = step.rows * start + step.rows * (step.rows + 1) // 2
        samples.append(StepSample(rows=step.rows, context=context, seconds=step.seconds))
        start += step.rows
    return samples


def _measure_decode(engine: Engine, number: int, length: int, turn: int) -> list[StepSample]:
    """Several sequences that draw tokens side by side; only steps in which all do, and nothing else runs."""
    with engine.subscribe() as events:
        streams = [
            engine.stream(
                _prompt(1000 * turn + 20 * number + i + length, length),
                max_tokens=DECODE_TOKENS + number,
                ignore_eos=True,
                cache="private",
            )
            for i in range(number)
        ]
        workers = [Thread(target=stream.final) for stream in streams]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        steps = _steps_until(events, number * length)
    steps = [step for step in steps if step.rows == step.sequences == number]
    # The prompts were computed one after the other, so the first drew some tokens more; `number` is small beside them.
    return [
        StepSample(rows=number, context=number * (length + 1 + i), seconds=step.seconds) for i, step in enumerate(steps)
    ][1:-1]


def _steps_until(events: EventStream, num_rows: int) -> list[StepCompleted]:
    """The steps so far, once they have computed so many rows: events come a moment after the answer."""
    steps: list[StepCompleted] = []
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        steps += [event for event in events.take() if isinstance(event, StepCompleted)]
        if sum(step.rows for step in steps) >= num_rows:
            return steps
        time.sleep(LOOK_SECONDS)
    raise ConfigError("cost: the engine ran no steps while it was measured; is anything else using it?", option="cost")
