"""Metrics, read back with the client library's own parser."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

pytest.importorskip("prometheus_client")

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition, parser
from prometheus_client.parser import text_string_to_metric_families

import streamgen as sg
from streamgen import sync
from streamgen.config import EngineState
from streamgen.contrib import prometheus
from streamgen.latencies import WAIT_BOUNDS, Buckets, Histogram, Latencies
from streamgen.metrics import Stats
from tests.fakes import FakeOpener

CANARY = "xyzzy canary"


def new_engine() -> sync.Engine:
    return sync.Engine(name="tiny", _opener=FakeOpener())


def openmetrics_names(registry: Any) -> set[str]:
    """The families in the newer text format; the library's functions for it have no types."""
    generate: Any = exposition.generate_latest
    parse: Any = parser.text_string_to_metric_families
    return {family.name for family in parse(generate(registry).decode())}


class Scrape:
    """What one scrape brought."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.text = generate_latest(registry).decode()
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}

    def value(self, sample: str, **labels: str) -> float:
        """The one sample of this name that has these labels."""
        found = [
            s.value
            for family in self.families.values()
            for s in family.samples
            if s.name == sample and labels.items() <= s.labels.items()
        ]
        assert len(found) == 1, f"{sample} {labels}: {found}"
        return float(found[0])


def test_counts_of_an_engine() -> None:
    registry = CollectorRegistry()
    with new_engine() as engine:
        prometheus.register(engine, registry=registry)
        for _ in range(2):
            engine.generate("0123456789" * 4, max_tokens=5)
        scrape = Scrape(registry)
        stats = engine.stats()
    assert scrape.value("streamgen_requests_total", model="tiny") == 2
    assert scrape.value("streamgen_prompt_tokens_total") == 2 * 41
    assert scrape.value("streamgen_cached_tokens_total") == stats.cached_tokens == 32
    assert scrape.value("streamgen_completion_tokens_total") == 10
    assert scrape.value("streamgen_pages") == stats.pages_total
    assert scrape.value("streamgen_pages_cached") > 0
    assert scrape.value("streamgen_open_requests") == 0
    assert scrape.value("streamgen_time_to_first_token_seconds_count", model="tiny") == 2
    assert scrape.value("streamgen_queue_seconds_bucket", le="+Inf") == 2
    assert scrape.value("streamgen_step_duration_seconds_count") >= 9
    assert scrape.value("streamgen_time_per_output_token_seconds_sum") > 0
    assert scrape.value("streamgen_engine_state", state="ready") == 1
    assert scrape.value("streamgen_engine_state", state="failed") == 0


def test_every_family_keeps_to_the_conventions() -> None:
    registry = CollectorRegistry()
    with new_engine() as engine:
        prometheus.register(engine, registry=registry)
        engine.generate("hello", max_tokens=2)
        families = Scrape(registry).families
        openmetrics = openmetrics_names(registry)
    assert len(families) == len(openmetrics) == 9 + len(prometheus.COUNTERS) + len(prometheus.HISTOGRAMS)
    for name, family in families.items():
        assert name.startswith("streamgen_")
        assert family.documentation.endswith(".")
        assert "_ms" not in name
        assert all(set(s.labels) <= {"model", "state", "le"} for s in family.samples)
        if family.type == "counter":
            assert all(s.name.endswith("_total") for s in family.samples)


def test_several_engines_come_under_their_keys_and_may_come_and_go() -> None:
    registry = CollectorRegistry()
    with new_engine() as first, new_engine() as second:
        engines = {"a": first}
        prometheus.register(engines, registry=registry)
        engines["b"] = second
        second.generate("hello", max_tokens=2)
        scrape = Scrape(registry)
        assert scrape.value("streamgen_requests_total", model="a") == 0
        assert scrape.value("streamgen_requests_total", model="b") == 1
        del engines["a"]
        assert 'model="a"' not in Scrape(registry).text


def test_an_engine_in_any_state_can_be_scraped() -> None:
    registry = CollectorRegistry()
    engine = new_engine()
    prometheus.register(engine, registry=registry)
    assert Scrape(registry).value("streamgen_engine_state", state="new") == 1
    with engine:
        engine.generate("hello", max_tokens=2)
    scrape = Scrape(registry)
    assert scrape.value("streamgen_engine_state", state="closed") == 1
    assert scrape.value("streamgen_time_to_first_token_seconds_count") == 1


def test_a_second_registration_says_what_to_do() -> None:
    registry = CollectorRegistry()
    engine = new_engine()
    collector = prometheus.register(engine, registry=registry)
    with pytest.raises(sg.ConfigError, match="one mapping"):
        prometheus.register(engine, registry=registry)
    registry.unregister(collector)
    prometheus.register(engine, registry=registry)


def test_the_global_registry_is_left_alone() -> None:
    prometheus.register(new_engine(), registry=CollectorRegistry())
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("streamgen")]
    with pytest.raises(TypeError):
        prometheus.register(new_engine())  # type: ignore[call-arg]  # that is the test


def test_no_text_of_a_request_is_in_it() -> None:
    registry = CollectorRegistry()
    with new_engine() as engine:
        prometheus.register(engine, registry=registry)
        engine.generate(CANARY, max_tokens=4, stop=["zzzcanary"], request_id="canary-id")
        assert "canary" not in Scrape(registry).text


@pytest.mark.parametrize("value", [0.0, 0.005, 0.0050001, 1e9])
def test_buckets_are_cumulative_with_their_bounds_included(value: float) -> None:
    buckets = Buckets(WAIT_BOUNDS)
    buckets.add(value)
    cumulative = dict(prometheus._cumulative(buckets.histogram()))
    for bound, count in cumulative.items():
        assert count == (value <= float(bound))


def test_stats_with_histograms_round_trip_through_json() -> None:
    filled = Histogram(bounds=(1.0,), counts=(1, 2), total=5.0)
    stats = Stats(state=EngineState.READY, latencies=Latencies(queue=filled))
    assert msgspec.json.decode(msgspec.json.encode(stats), type=Stats) == stats
