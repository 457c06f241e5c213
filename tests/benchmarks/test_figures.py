"""Figures from timelines, works, and what a report says of them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import msgspec
import pytest

from benchmarks.peersuite.figures import (
    BETWEEN_P50,
    BETWEEN_P99,
    FIRST_P50,
    OVERALL,
    RATE,
    STEADY,
    Incomplete,
    Timeline,
    outcome_of,
    quantile,
)
from benchmarks.peersuite.plots import linear_axis, log_axis, plots_of
from benchmarks.peersuite.report import Line, Report, Sizes
from benchmarks.peersuite.rounds import Machine, Turn
from benchmarks.peersuite.works import DEFAULT_WORKS, Request, Work, make_work


def work(kind: str, *, tokens: int, count: int = 1, repeats: int = 1) -> Work:
    requests = tuple(Request(ids=(1, 2, 3, 4), max_tokens=tokens) for _ in range(count))
    return Work(name=f"{kind}-{count}", kind=kind, requests=requests, repeats=repeats)


def test_prefill_is_the_median_of_its_repeats() -> None:
    runs = [[Timeline(submitted=1.0, times=[1.0 + seconds], counts=[1])] for seconds in (0.5, 0.1, 0.2)]
    assert outcome_of(work("prefill", tokens=1, repeats=3), runs).values == {RATE.name: pytest.approx(4 / 0.2)}


def test_steady_decode_counts_while_all_run() -> None:
    early = Timeline(submitted=0.0, times=[1.0, 2.0, 3.0, 4.0], counts=[1, 1, 1, 1])
    late = Timeline(submitted=0.0, times=[2.0, 3.0, 4.0, 5.0], counts=[1, 1, 1, 1])
    values = outcome_of(work("decode", tokens=4, count=2), [[early, late]]).values
    assert values[STEADY.name] == pytest.approx((2 + 2) / (4.0 - 2.0))
    assert values[OVERALL.name] == pytest.approx(8 / 5.0)


def test_tokens_that_come_together_are_one_wait() -> None:
    timeline = Timeline(submitted=10.0, times=[10.5, 10.6, 11.6], counts=[1, 1, 2])
    outcome = outcome_of(work("burst", tokens=4), [[timeline]])
    assert outcome.values[FIRST_P50.name] == pytest.approx(500.0)
    assert outcome.values[BETWEEN_P50.name] == pytest.approx(550.0)
    assert outcome.values[BETWEEN_P99.name] == pytest.approx(100 + 0.99 * 900)
    assert len(outcome.between) == 101 and outcome.between[0] == pytest.approx(100.0)


@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 1, 1], []])
def test_a_request_with_other_tokens_than_asked_is_refused(counts: list[int]) -> None:
    timeline = Timeline(submitted=0.0, times=[float(i) for i in range(len(counts))], counts=counts)
    with pytest.raises(Incomplete, match=rf"expected 3 tokens, got {len(counts)}"):
        outcome_of(work("burst", tokens=3), [[timeline]])


def test_quantiles() -> None:
    assert [quantile([1.0, 2.0, 3.0], share) for share in (0.0, 0.25, 0.5, 1.0)] == [1.0, 1.5, 2.0, 3.0]
    assert quantile([7.0], 0.99) == 7.0


def test_works_are_the_same_each_time_and_as_they_say() -> None:
    for name in DEFAULT_WORKS:
        assert make_work(name, 49152) == make_work(name, 49152)
    burst, poisson = make_work("burst", 49152), make_work("poisson", 49152)
    assert (len(burst.requests), burst.tokens_in, burst.tokens_out) == (32, 7261, 2455)
    assert [len(r.ids) for r in burst.requests] == [len(r.ids) for r in poisson.requests]
    assert all(r.arrival == 0.0 for r in burst.requests)
    arrivals = [r.arrival for r in poisson.requests]
    assert arrivals == sorted(arrivals) and 10 < arrivals[-1] < 40
    decode = make_work("decode-8", 1000)
    assert [(len(r.ids), r.max_tokens) for r in decode.requests] == [(128, 128)] * 8
    assert len({r.ids for r in decode.requests}) == 8
    assert all(125 <= i < 500 for r in decode.requests for i in r.ids)


@pytest.mark.parametrize(
    "name", ["decode", "decode-0", "decode-x", "decode--1", "burst-3", "", "prefill-99999999", "x"]
)
def test_unknown_works_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="work: expected"):
        make_work(name, 1000)


def turn(engine: str, number: int, **values: float) -> Turn:
    return Turn(engine=engine, round=number, values=values, seconds=1.0, load=0.5, others=0.01)


def line(name: str, kind: str, turns: list[Turn], *, sequences: int = 1, **fields: Any) -> Line:
    machines = [Machine(bandwidth=20.0, matmul=400.0), Machine(bandwidth=40.0, matmul=400.0)]
    chosen = {
        "model": "m",
        "work": name,
        "kind": kind,
        "sequences": sequences,
        "tokens_in": 512,
        "tokens_out": 1,
        "sizes": Sizes(file_weights=100_000_000, layer_weights=80_000_000, head_weights=20_000_000),
        "options": {"quantization": "int8"},
        "files": {"streamgen": "m.gguf"},
        "threads": 2,
        "commit": "abc",
        "when": "2024-01-01",
        "machines": machines,
        "missing": {"transformers": "it is | not there"},
        **fields,
    }
    return Line(turns=turns, **chosen)


def decodes() -> Line:
    """Ours varies with the machine, as peer b does; peer a is better than b."""
    rates = {"streamgen": (100.0, 200.0), "a": (80.0, 160.0), "b": (50.0, 100.0)}
    turns = [
        turn(e, i, **{STEADY.name: r, OVERALL.name: r / 2}) for e, both in rates.items() for i, r in enumerate(both)
    ]
    return line("decode-1", "decode", turns)


def test_ratios_are_of_the_same_round_and_the_best_peer() -> None:
    measured = decodes()
    assert measured.engines[0] == "streamgen"
    assert measured.best_peer(STEADY) == "a"
    assert measured.ratios(STEADY) == [1.25, 1.25]
    assert measured.limit_share("streamgen") == pytest.approx(0.5)  # 100 x 0.1 GB of 20, 200 x 0.1 GB of 40


def test_less_is_better_for_latencies() -> None:
    names = (OVERALL.name, FIRST_P50.name, "first token p99", BETWEEN_P50.name, BETWEEN_P99.name)
    turns = [turn(e, 0, **dict.fromkeys(names, v)) for e, v in (("streamgen", 1.0), ("a", 4.0), ("b", 2.0))]
    burst = line("burst", "burst", turns)
    assert burst.best_peer(BETWEEN_P50) == "b" and burst.ratios(BETWEEN_P50) == [0.5]
    assert burst.best_peer(OVERALL) == "a" and burst.ratios(OVERALL) == [0.25]


def test_prefill_is_a_share_of_the_product() -> None:
    prefill = line("prefill-512", "prefill", [turn("streamgen", i, **{RATE.name: 1000.0}) for i in (0, 1)])
    assert prefill.limit_share("streamgen") == pytest.approx(1000 * 2 * 0.08 / 400)
    assert prefill.best_peer(RATE) is None and prefill.ratios(RATE) == []


def report() -> Report:
    return Report(processor="p", cores=2, system="s", versions={"streamgen": "1"}, commands=["python x"])


def test_a_line_replaces_the_one_before() -> None:
    whole = report()
    whole.add(decodes())
    whole.add(line("prefill-512", "prefill", []))
    whole.add(msgspec.structs.replace(decodes(), commit="new"))
    assert [(found.work, found.commit) for found in whole.lines] == [("prefill-512", "abc"), ("decode-1", "new")]
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Report) == whole


def test_the_page_has_every_figure() -> None:
    whole = report()
    whole.add(decodes())
    page = whole.markdown("name", ["name-m-batch.svg"])
    (row,) = [text for text in page.splitlines() if text.startswith("| decode-1 | decode tok/s")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:6] == ["150 (100-200)", "**120** (80.0-160)", "75.0 (50.0-100)", "1.25 (1.25-1.25)"]
    assert "Not measured: decode-1 of transformers: it is | not there" in page
    assert "quantization=int8" in page and "![name-m-batch.svg](name-m-batch.svg)" in page


def test_plots_are_documents() -> None:
    whole = report()
    for count in (1, 8, 32):
        rates = {"streamgen": 100.0, "a<&": 80.0}
        turns = [turn(e, i, **{STEADY.name: r * count, OVERALL.name: r}) for e, r in rates.items() for i in (0, 1)]
        whole.add(line(f"decode-{count}", "decode", turns, sequences=count))
    burst = make_work("burst", 1000)
    runs = [
        Timeline(submitted=0.0, times=[i * 0.01 for i in range(r.max_tokens)], counts=[1] * r.max_tokens)
        for r in burst.requests
    ]
    outcome = outcome_of(burst, [runs])
    whole.add(
        line("burst", "burst", [msgspec.structs.replace(turn("streamgen", 0), **msgspec.structs.asdict(outcome))])
    )
    plots = plots_of(whole)
    assert set(plots) == {"m-batch", "m-roofline", "m-burst"}
    for document in plots.values():
        ElementTree.fromstring(document)
    assert plots["m-batch"].count("<polyline") == 2 and "a&lt;&amp;" in plots["m-batch"]


def test_axes_hold_what_they_are_made_for() -> None:
    axis = log_axis("x", [3.0, 700.0])
    assert axis.marks[0] == 2.0 and axis.marks[-1] == 1000.0
    assert axis.place(2.0) == 0.0 and axis.place(1000.0) == pytest.approx(1.0)
    assert len(log_axis("x", [5.0]).marks) == 2
    linear = linear_axis("y", 790.0)
    assert linear.marks[0] == 0.0 and linear.high >= 790.0 and 4 <= len(linear.marks) <= 7
