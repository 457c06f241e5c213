"""Replaying traces: what is read, how long everybody waits, by hand, what is shared, and what is printed of it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from array import array
from random import Random
from typing import TYPE_CHECKING

import msgspec
import pytest
from msgspec import structs

from streamgen.errors import ConfigError
from streamgen.scheduling.limits import Limits
from streamgen.testing.simulator import CostModel, Quantiles, ReplayReport, TraceRequest, read_trace, replay
from streamgen.testing.simulator.plot import nice_step, plot_replay, ticks
from streamgen.testing.simulator.series import MAX_POINTS, Series
from streamgen.testing.simulator.traces import BLOCK, Prompts, repeat_trace

if TYPE_CHECKING:
    from pathlib import Path

A_SECOND_A_STEP = CostModel(step=1.0, row=0.0, context=0.0)
LIMITS = Limits(num_pages=4000, max_running=8, step_tokens=256, max_context=4000, max_queued=10**6)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:05.0319600,3180,8
2023-11-16 18:17:03.9799600,4808,10
"""
MOONCAKE = """{"timestamp": 500, "input_length": 600, "output_length": 2, "hash_ids": [4, 7]}
{"timestamp": 1750, "input_length": 1000, "output_length": 3, "hash_ids": [4, 9]}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


# ---- reading -------------------------------------------------------------------------------------------------------


def test_azure_is_read_in_the_order_of_time(tmp_path: Path) -> None:
    first, second = read_trace(write(tmp_path, AZURE))
    assert (first.time, first.prompt_tokens, first.output_tokens, first.blocks) == (0.0, 4808, 10, ())
    assert second.time == pytest.approx(1.052) and second.prompt_tokens == 3180


def test_mooncake_is_read(tmp_path: Path) -> None:
    assert read_trace(write(tmp_path, MOONCAKE)) == [
        TraceRequest(0.0, 600, 2, (4, 7)),
        TraceRequest(1.25, 1000, 3, (4, 9)),
    ]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "expected JSONL, or CSV with the header"),
        ("a,b\n1,2\n", "got 'a,b'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "got none"),
        (AZURE + "yesterday,1,2\n", "line 4"),
        (AZURE + "2023-11-16 18:17:05,0,2\n", "line 4: expected a prompt >= 1"),
        (MOONCAKE + '{"timestamp": 1}\n', "line 3"),
        (MOONCAKE + '{"timestamp": 1, "input_length": "x", "output_length": 1}\n', "line 3"),
    ],
)
def test_what_is_no_trace(text: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=what):
        read_trace(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not read"):
        read_trace(tmp_path / "none")


def test_the_public_traces_are_read(shared_data: Path) -> None:
    paths = sorted((shared_data / "traces").iterdir())
    traces = {path.name: read_trace(path) for path in paths}
    assert len(traces) >= 4
    for name, trace in traces.items():
        assert len(trace) > 1000 and trace[0].time == 0.0
        assert any(request.blocks for request in trace) == ("mooncake" in name)


# ---- prompts -------------------------------------------------------------------------------------------------------


def common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_equal_blocks_are_equal_ids_and_nothing_else_is() -> None:
    prompts = Prompts()
    a, b = (prompts.make(TraceRequest(0.0, 1200, 1, (4, 7, blocks)), 0) for blocks in (1, 2))
    assert (len(a), common_prefix(a, b)) == (1200, 2 * BLOCK)
    same, later = (prompts.make(TraceRequest(0.0, 1200, 1, (4, 7, 1)), turn) for turn in (0, 1))
    assert same == a and common_prefix(later, a) == 0
    own = [prompts.make(TraceRequest(0.0, 5000, 1), 0) for _ in range(2)]
    assert len(own[0]) == 5000 and common_prefix(*own) == 0


def test_a_prompt_longer_than_its_blocks() -> None:
    a, b = (Prompts().make(TraceRequest(0.0, 3 * BLOCK, 1, (4,)), 0) for _ in range(2))
    assert len(a) == 3 * BLOCK and a == b  # two Prompts count alike
    prompts = Prompts()
    a, b = (prompts.make(TraceRequest(0.0, 3 * BLOCK, 1, (4,)), 0) for _ in range(2))
    assert common_prefix(a, b) == BLOCK


def test_a_repeated_trace() -> None:
    trace = [TraceRequest(float(i), 10 + i, 5) for i in range(20)]
    coming = list(repeat_trace(trace, 3, Random(0)))
    assert [turn for turn, _ in coming] == [0] * 20 + [1] * 20 + [2] * 20
    assert [request for _, request in coming[:20]] == trace
    times = [request.time for _, request in coming]
    assert times == sorted(times) and 58 < times[-1] < 61
    assert sorted(r.prompt_tokens for _, r in coming[20:40]) == [r.prompt_tokens for r in trace]
    assert list(repeat_trace(trace, 3, Random(0))) == coming
    with pytest.raises(ConfigError, match="repeat: expected >= 1"):
        list(repeat_trace(trace, 0, Random(0)))


# ---- replaying -----------------------------------------------------------------------------------------------------


def test_one_request_by_hand() -> None:
    report = replay([TraceRequest(0.0, 300, 4)], limits=LIMITS, cost=A_SECOND_A_STEP)
    # 256 rows, 44 rows and the first token, three more tokens; one step more, planned before the end was known.
    assert report.first_token.p50 == 2.0 and report.per_token.p50 == 1.0 and report.queue.most == 0.0
    assert (report.requests, report.finished, report.output_tokens, report.prompt_tokens) == (1, 1, 4, 300)
    assert (report.seconds, report.busy, report.steps) == (6.0, 1.0, 6)
    assert report.output_per_second == pytest.approx(4 / 6)
    assert report.computed_per_second * report.seconds == pytest.approx(303)


def test_one_slot_by_hand() -> None:
    limits = structs.replace(LIMITS, max_running=1)
    trace = [TraceRequest(0.0, 10, 2), TraceRequest(0.5, 10, 2)]
    report = replay(trace, limits=limits, cost=A_SECOND_A_STEP)
    # The first ends at 2; by then its row too many is under way, and the second's prompt runs from 3 to 4.
    assert (report.queue.most, report.first_token.most, report.most_waiting) == (1.5, 3.5, 1)
    knowing = replay(trace, limits=limits, cost=A_SECOND_A_STEP, knows_lengths=True)
    assert knowing.first_token.most < report.first_token.most, "known lengths save the row too many"


def test_equal_prefixes_are_found() -> None:
    trace = [TraceRequest(0.0, 600, 2, (4, 7)), TraceRequest(100.0, 1000, 2, (4, 9))]
    report = replay(trace, limits=LIMITS, cost=A_SECOND_A_STEP)
    assert report.cache_hits == pytest.approx(512 / 1600)
    none = replay(trace, limits=structs.replace(LIMITS, prefix_cache=False), cost=A_SECOND_A_STEP)
    assert none.cache_hits == 0.0 and none.seconds > report.seconds


def test_rounds_share_no_prefix() -> None:
    trace = [TraceRequest(0.0, 600, 2, (4, 7)), TraceRequest(100.0, 1000, 2, (4, 9))]
    once, thrice = (replay(trace, limits=LIMITS, cost=A_SECOND_A_STEP, repeat=n) for n in (1, 3))
    assert thrice.requests == 6 and thrice.finished == 6
    assert thrice.cache_hits == pytest.approx(once.cache_hits)


def test_without_shared_blocks_the_prefix_cache_changes_nothing() -> None:
    random = Random(1)
    sizes = [(float(i), random.randrange(1, 900), random.randrange(1, 60)) for i in range(120)]
    limits = structs.replace(LIMITS, num_pages=120)
    plain = replay(
        [TraceRequest(*size) for size in sizes], limits=limits, cost=CostModel(step=0.01, row=1e-3, context=0)
    )
    unique = [TraceRequest(*size, blocks=(3 * i, 3 * i + 1)) for i, size in enumerate(sizes)]
    cached = replay(unique, limits=limits, cost=CostModel(step=0.01, row=1e-3, context=0))
    assert structs.replace(cached, limits=plain.limits) == plain
    assert plain.limits.prefix_cache is False and cached.limits.prefix_cache is True


def test_a_crowd_is_preempted_and_comes_to_an_end() -> None:
    trace = [TraceRequest(0.1 * i, 40, 30 if i < 60 else 600) for i in range(90)]
    report = replay(trace, limits=structs.replace(LIMITS, num_pages=80), cost=CostModel(step=0.01, row=0, context=0))
    assert report.preemptions > 0 and report.finished == 90
    assert report.output_tokens == 60 * 30 + 30 * 600
    assert 0.0 < report.mean_pages <= 80 and report.mean_running <= 8


def test_faster_arrivals_wait_longer() -> None:
    trace = [TraceRequest(2.0 * i, 100, 10) for i in range(40)]
    cost = CostModel(step=0.1, row=1e-3, context=0)
    slow, fast = (replay(trace, limits=LIMITS, cost=cost, scale=scale) for scale in (1.0, 10.0))
    assert fast.first_token.p90 > slow.first_token.p90 and fast.busy > slow.busy and fast.seconds < slow.seconds


def test_refusals_are_counted() -> None:
    limits = structs.replace(LIMITS, max_running=1, max_queued=1)
    report = replay(
        [TraceRequest(0.0, 100, 10)] * 5 + [TraceRequest(1.0, 9999, 1)], limits=limits, cost=A_SECOND_A_STEP
    )
    assert report.refused == {"engine_overloaded": 3, "prompt_too_long": 1} and report.finished == 2


def test_a_replay_is_the_same_each_time(shared_data: Path) -> None:
    trace = read_trace(shared_data / "traces" / "mooncake_conversation_head.jsonl")[:25]
    limits = structs.replace(LIMITS, max_context=200_000, num_pages=20_000, step_tokens=2048)
    first, second = (replay(trace, limits=limits, repeat=2, seed=4) for _ in range(2))
    assert first == second and first.finished == 50
    assert msgspec.json.decode(msgspec.json.encode(first), type=ReplayReport) == first


@pytest.mark.parametrize(("field", "value"), [("scale", 0.0), ("scale", float("inf")), ("repeat", 0)])
def test_options_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        replay([TraceRequest(0.0, 1, 1)], limits=LIMITS, **{field: value})  # type: ignore[arg-type]


def test_an_empty_trace() -> None:
    with pytest.raises(ConfigError, match="got none"):
        replay([], limits=LIMITS)


# ---- figures -------------------------------------------------------------------------------------------------------


def test_quantiles() -> None:
    assert Quantiles.of(array("d", [])) == Quantiles()
    assert Quantiles.of(array("d", range(100, 0, -1))) == Quantiles(50.0, 90.0, 99.0, 50.5, 100.0)
    assert Quantiles.of(array("d", [3.0])) == Quantiles(3.0, 3.0, 3.0, 3.0, 3.0)


def test_a_series_keeps_its_sums_when_intervals_are_joined() -> None:
    series = Series(width=1.0)
    for i in range(1, 5 * MAX_POINTS + 1):
        series.add(float(i), waiting=i % 7, running=2, pages=3, rows=5, outputs=1)
    points = series.points()
    assert MAX_POINTS // 2 <= len(points) <= MAX_POINTS
    assert sum(point.rows for point in points) == 25 * MAX_POINTS
    assert series.mean("running") == 2.0 and series.mean("pages") == 3.0 and series.most_waiting == 6
    assert series.mean("waiting") == pytest.approx(3.0, rel=0.01)


def test_a_plot_has_its_lines() -> None:
    report = replay([TraceRequest(float(i), 100, 10) for i in range(20)], limits=LIMITS, cost=A_SECOND_A_STEP)
    root = ElementTree.fromstring(plot_replay(report, "a <trace> & more"))
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 5 and all(len(line.get("points", "").split()) > 10 for line in lines)
    assert "a <trace> & more" in "".join(root.itertext())
    width = float(root.get("viewBox", "").split()[2])
    xs = [float(pair.split(",")[0]) for line in lines for pair in line.get("points", "").split()]
    assert 0 < min(xs) and max(xs) <= width


def test_axes_have_round_numbers() -> None:
    assert [nice_step(span, 4) for span in (8.0, 0.07, 900.0, 0.0)] == [2.0, 0.02, 500.0, 1.0]
    assert ticks(9.0, 4) == [0.0, 5.0, 10.0] and ticks(0.0, 4) == [0.0, 1.0]
