"""Prometheus metrics of engines, in a registry that you name: `pip install streamgen[prometheus]`.

    from prometheus_client import CollectorRegistry, make_asgi_app
    from streamgen.contrib import prometheus

    registry = CollectorRegistry()
    prometheus.register({"small": engine, "large": other}, registry=registry)
    app.mount("/metrics", make_asgi_app(registry))

Numbers are read when somebody scrapes, from snapshots that the engine keeps anyway: no task, no thread, no cost
between. Labels are the model's name and the engine's state; nothing of any request is in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from streamgen.config import EngineState
from streamgen.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from streamgen.latencies import Histogram
    from streamgen.metrics import Stats

GAUGES = {
    "open_requests": "Requests submitted and not ended.",
    "running": "Sequences that hold a slot.",
    "paused": "Running sequences that wait for their readers.",
    "waiting": "Sequences that wait for a slot.",
    "pages_used": "Pages that running sequences hold.",
    "pages_cached": "Idle pages kept for their prefix.",
    "pages_pinned": "Pages kept for sessions.",
}
"""Field of `Stats` -> what it counts; the metric is `streamgen_` and the field."""

COUNTERS = {
    "requests": ("requests", "Requests taken."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests that ended."),
    "cached_tokens": ("cached_tokens", "Prompt tokens that were not computed, as their pages were found."),
    "completion_tokens": ("completion_tokens", "Tokens drawn for requests that ended."),
    "preemptions": ("preemptions", "Times that a sequence lost its slot."),
    "steps": ("steps", "Steps planned."),
    "forward_seconds": ("forward_seconds", "Time in the device's call."),
    "step_seconds": ("busy_seconds", "Time with work at the device, what happens between its calls included."),
}
"""Field of `Stats` -> (metric without `streamgen_` and `_total`, what it counts)."""

HISTOGRAMS = {
    "queue": ("queue_seconds", "From submission until a sequence has a slot."),
    "first_token": ("time_to_first_token_seconds", "From submission until a sequence has its first token."),
    "per_token": ("time_per_output_token_seconds", "Mean time between the tokens of a sequence that ended."),
    "step": ("step_duration_seconds", "The device's time for a step."),
}
"""Field of `Latencies` -> (metric without `streamgen_`, what it measures)."""


class HasStats(Protocol):
    """An engine: async, sync or fake."""

    @property
    def name(self) -> str:
        """What its metrics are labelled with."""
        ...

    def stats(self) -> Stats:
        """A snapshot; any thread, never blocks."""
        ...


class EngineCollector(Collector):
    """Collects one engine, labelled with its name, or several, labelled with their keys.

    A mapping is read at every scrape, so that engines may be added to it and taken out.
    """

    def __init__(self, engines: Mapping[str, HasStats] | HasStats) -> None:
        self._engines = engines if isinstance(engines, Mapping) else {engines.name: engines}

    def describe(self) -> Iterable[Metric]:
        """What will be collected, so that a registry sees names that collide."""
        return _families([])

    def collect(self) -> Iterable[Metric]:
        """A snapshot of every engine."""
        return _families([(name, engine.stats()) for name, engine in list(self._engines.items())])


def register(engines: Mapping[str, HasStats] | HasStats, *, registry: CollectorRegistry) -> EngineCollector:
    """Collect from these engines whenever `registry` is scraped; `registry.unregister(collector)` ends that.

    Raises:
        ConfigError: the registry has metrics of engines already.
    """
    collector = EngineCollector(engines)
    try:
        registry.register(collector)
    except ValueError as e:
        raise ConfigError(
            "registry: expected one without metrics of streamgen, but it has some; register several engines as one "
            "mapping of names to engines",
            option="registry",
        ) from e
    return collector


def _families(snapshots: list[tuple[str, Stats]]) -> Iterator[Metric]:
    yield from _gauges(snapshots)
    for field, (name, help_text) in COUNTERS.items():
        counter = CounterMetricFamily(f"streamgen_{name}", help_text, labels=["model"])
        for model, stats in snapshots:
            counter.add_metric([model], getattr(stats, field))
        yield counter
    for field, (name, help_text) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(f"streamgen_{name}", help_text, labels=["model"])
        for model, stats in snapshots:
            filled: Histogram = getattr(stats.latencies, field)
            if filled.counts:
                histogram.add_metric([model], _cumulative(filled), filled.total)
        yield histogram


def _gauges(snapshots: list[tuple[str, Stats]]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "streamgen_engine_state", "1 for the state that the engine is in.", labels=["model", "state"]
    )
    for model, stats in snapshots:
        for possible in EngineState:
            state.add_metric([model, possible.value], float(stats.state is possible))
    yield state
    pages = GaugeMetricFamily("streamgen_pages", "Pages there are.", labels=["model"])
    for model, stats in snapshots:
        pages.add_metric([model], stats.pages_total)
    yield pages
    for field, help_text in GAUGES.items():
        gauge = GaugeMetricFamily(f"streamgen_{field}", help_text, labels=["model"])
        for model, stats in snapshots:
            gauge.add_metric([model], getattr(stats, field))
        yield gauge


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """Prometheus' buckets: each counts all below its bound."""
    buckets: list[tuple[str, float]] = []
    count = 0
    for bound, number in zip((*map(repr, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        count += number
        buckets.append((bound, count))
    return buckets
