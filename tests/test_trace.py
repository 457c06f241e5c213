"""Traces: what the recorder keeps of a schedule, and the file that a trace viewer opens."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import xml.etree.ElementTree as ET
from collections import defaultdict, deque
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from streamgen.config import EngineState
from streamgen.scheduling.sequence import Sequence
from streamgen.scheduling.step import Step
from streamgen.tracefile import (
    PHASES,
    Chunk,
    Phase,
    SequenceTrace,
    StepTrace,
    TraceSnapshot,
    trace_events,
    write_trace,
)
from tests.journaled import STEP_SECONDS, Scene

PICTURE = Path(__file__).parents[1] / "benchmarks" / "trace_picture.py"


def written(scene: Scene, path: Path) -> list[dict[str, Any]]:
    """The events of a trace file, checked to be what viewers take."""
    write_trace(path, scene.recorder.snapshot())
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    for event in events:
        assert event["ph"] in {"X", "M", "C", "i"}
        assert event["name"]
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
        if event["ph"] == "i":
            assert event["s"] == "t"
    check_nesting(events)
    return events


def check_nesting(events: list[dict[str, Any]]) -> None:
    """Slices of one row lie side by side or inside each other; others cannot be shown."""
    rows: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            rows[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for slices in rows.values():
        open_ends: list[float] = []
        for start, end in sorted(slices, key=lambda s: (s[0], -s[1])):
            while open_ends and open_ends[-1] <= start + 1e-3:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 1e-3, "slices overlap"
            open_ends.append(end)


def rows_by_name(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Events of the process "sequences", by the name of their row, in order of time."""
    names = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name" and event["pid"] == 2
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
    for event in sorted(events, key=lambda e: e["ts"]):
        if event["pid"] == 2 and event["ph"] != "M":
            rows[names[event["tid"]]].append(event)
    return rows


def named(row: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [event for event in row if event["name"] in names]


def test_a_request_is_one_row_of_phases_without_gaps(tmp_path: Path) -> None:
    scene = Scene()
    scene.ask(1, prompt=20, max_tokens=3)  # a budget of 16 rows cuts the prompt in two
    scene.run()
    row = rows_by_name(written(scene, tmp_path / "trace.json"))["req-1"]
    phases = named(row, *PHASES)
    assert [event["name"] for event in phases] == ["queued", "prefill", "decode"]
    for before, after in pairwise(phases):
        assert before["ts"] + before["dur"] == pytest.approx(after["ts"])
    assert [event["args"] for event in row if event["name"].startswith("chunk of")] == [
        {"position": 0, "rows": 16},
        {"position": 16, "rows": 4},
    ]
    assert phases[1]["dur"] == pytest.approx(2 * STEP_SECONDS * 1e6)
    assert phases[2]["dur"] == pytest.approx(2 * STEP_SECONDS * 1e6)
    assert named(row, "first token")[0]["ts"] == pytest.approx(phases[2]["ts"])
    assert named(row, "finished")[0]["args"] == {"cause": "length", "completion_tokens": 3}


def test_steps_show_how_they_were_filled(tmp_path: Path) -> None:
    scene = Scene()
    scene.ask(1, prompt=20, max_tokens=3)
    scene.ask(2, prompt=4, max_tokens=3)
    scene.run()
    events = written(scene, tmp_path / "trace.json")
    steps = [event for event in events if event["name"] == "step"]
    assert [(e["args"]["rows"], e["args"]["sequences"]) for e in steps][:2] == [(16, 1), (8, 2)]
    assert all(e["dur"] == pytest.approx(STEP_SECONDS * 1e6) for e in steps)
    assert sum(e["args"]["rows"] for e in steps) == 20 + 2 + 4 + 2
    assert [e["args"]["rows"] for e in events if e["ph"] == "C"] == [e["args"]["rows"] for e in steps]


def test_a_preemption_is_seen_and_what_follows_it(tmp_path: Path) -> None:
    scene = Scene(num_pages=6)
    scene.crowd()
    scene.run()
    assert scene.scheduler.stats().preemptions > 0
    row = rows_by_name(written(scene, tmp_path / "trace.json"))["req-3"]
    phases = [event["name"] for event in named(row, *PHASES)]
    assert phases[:3] == ["queued", "prefill", "decode"]
    assert phases[3:6] == ["queued", "prefill", "decode"]
    assert named(row, "preempted")
    assert len(named(row, "first token")) == 1
    assert len(named(row, "finished")) == 1


def test_plans_under_way_that_became_void_are_no_chunks(tmp_path: Path) -> None:
    scene = Scene(num_pages=6)
    scene.crowd()
    scene.run(depth=2)
    assert scene.scheduler.stats().preemptions > 0
    rows = rows_by_name(written(scene, tmp_path / "trace.json"))
    for row in rows.values():
        assert len(named(row, "prefill")) == len(named(row, "preempted")) + 1
    chunks = [event for row in rows.values() for event in row if event["name"].startswith("chunk of")]
    assert len(chunks) == sum(len(track.chunks) for track in scene.recorder._ended)


def test_results_that_come_after_a_restart_are_no_chunks() -> None:
    scene = Scene()
    scene.ask(1, max_tokens=1)
    scene.plan()
    (sequence,) = scene.scheduler._requests[1]
    scene.scheduler._batch.preempt(sequence, Step(99, 16), bars_starts=False)
    scene.plan()
    scene.complete()  # of the first plan
    (track,) = scene.recorder._tracks.values()
    assert [name for _, name in track.phases] == ["queued", "prefill", "queued", "prefill"]
    assert not track.chunks
    scene.run()
    assert len(track.chunks) == 1


def test_slices_of_a_row_do_not_overlap_where_results_came_late(tmp_path: Path) -> None:
    chunks = (Chunk(1.0, 1.1, 0, 8), Chunk(1.05, 1.15, 8, 8))
    sequence = SequenceTrace(
        name="late",
        index=0,
        prompt_tokens=16,
        cached_tokens=0,
        completion_tokens=1,
        first_token=1.15,
        phases=(Phase(1.0, "queued"), Phase(1.02, "prefill"), Phase(1.15, "length")),
        chunks=chunks,
    )
    steps = tuple(StepTrace(i, chunk.start, chunk.end, 8, 1) for i, chunk in enumerate(chunks))
    snapshot = TraceSnapshot(time=2.0, since=0.0, steps=steps, sequences=(sequence,))
    write_trace(tmp_path / "trace.json", snapshot)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    check_nesting(events)
    assert [e["dur"] for e in events if e["name"] == "step"] == [pytest.approx(100_000), pytest.approx(50_000)]
    assert [e["dur"] for e in events if e["name"] == "chunk of 8"] == [pytest.approx(80_000), pytest.approx(50_000)]


def test_what_still_runs_is_drawn_up_to_now(tmp_path: Path) -> None:
    scene = Scene(max_running=1)
    scene.ask(1, max_tokens=20)
    scene.ask(2, max_tokens=20)
    for _ in range(3):
        scene.step()
    rows = rows_by_name(written(scene, tmp_path / "trace.json"))
    assert [e["name"] for e in named(rows["req-2"], *PHASES)] == ["queued"]
    decode = named(rows["req-1"], "decode")[0]
    assert decode["ts"] + decode["dur"] == pytest.approx(3 * STEP_SECONDS * 1e6)
    assert not named(rows["req-1"], "finished")


def test_continuations_have_rows_of_their_own(tmp_path: Path) -> None:
    scene = Scene()
    scene.ask(1, num_sequences=3)
    scene.run()
    rows = rows_by_name(written(scene, tmp_path / "trace.json"))
    assert list(rows) == ["req-1", "req-1 [1]", "req-1 [2]"]
    assert all(len(named(row, "finished")) == 1 for row in rows.values())


def test_only_the_last_seconds_are_kept() -> None:
    scene = Scene(seconds=1.0)
    scene.ask(1, max_tokens=3)
    scene.run()
    scene.clock.now += 0.9
    scene.ask(2, max_tokens=30)
    for _ in range(15):
        scene.step()
    snapshot = scene.recorder.snapshot()
    assert [s.name for s in snapshot.sequences] == ["req-2"]
    assert all(step.end >= snapshot.time - 1.0 for step in snapshot.steps)
    assert len(snapshot.steps) == 15
    assert len(scene.recorder._steps) == 15  # what is too old is not only hidden
    scene.run()
    scene.clock.now += 2.0
    scene.ask(3, max_tokens=1)
    scene.run()
    assert [track.name for track in scene.recorder._ended] == ["req-3"]


def test_a_sequence_older_than_the_trace_begins_at_its_edge(tmp_path: Path) -> None:
    scene = Scene(seconds=0.05)
    scene.ask(1, max_tokens=40)
    for _ in range(30):
        scene.step()
    row = rows_by_name(written(scene, tmp_path / "trace.json"))["req-1"]
    assert [e["name"] for e in named(row, *PHASES)] == ["decode"]
    assert not named(row, "first token")
    decode = named(row, "decode")[0]
    assert (decode["ts"], decode["dur"]) == (0, pytest.approx(0.06e6, rel=0.2))


def test_a_recorder_of_no_seconds_keeps_nothing() -> None:
    scene = Scene(seconds=0.0)
    scene.ask(1)
    scene.run()
    snapshot = scene.recorder.snapshot()
    assert (snapshot.steps, snapshot.sequences) == ((), ())


def test_what_is_kept_is_bounded() -> None:
    scene = Scene()
    scene.recorder._steps = deque(maxlen=10)
    scene.recorder._ended = deque(maxlen=3)
    for number in range(8):
        scene.ask(number, max_tokens=5)
        scene.run()
    snapshot = scene.recorder.snapshot()
    assert len(snapshot.steps) == 10
    assert [s.name for s in snapshot.sequences] == ["req-5", "req-6", "req-7"]
    list(trace_events(snapshot))


def test_no_sequence_is_kept_alive() -> None:
    scene = Scene()
    scene.ask(1)
    scene.step()
    kept = gc.get_referrers(*scene.scheduler._requests[1])
    scene.run()
    del kept
    gc.collect()
    assert scene.recorder.snapshot().sequences
    assert not [o for o in gc.get_objects() if type(o) is Sequence and o.request.request_id == 1]


def test_failing_ends_what_ran() -> None:
    scene = Scene()
    scene.ask(1, max_tokens=20)
    scene.step()
    scene.recorder.state_changed(EngineState.FAILED)
    (sequence,) = scene.recorder.snapshot().sequences
    assert sequence.phases[-1].name == "engine_failed"
    # The scheduler of the failed life may still say something; nobody is there to hear of it.
    scene.run()
    assert len(scene.recorder.snapshot().sequences) == 1


def test_an_empty_trace_opens(tmp_path: Path) -> None:
    events = written(Scene(), tmp_path / "trace.json")
    assert {event["ph"] for event in events} == {"M"}


def test_a_file_that_cannot_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    scene = Scene()
    path = tmp_path / "there" / "trace.json"
    with pytest.raises(FileNotFoundError):
        write_trace(path, scene.recorder.snapshot())
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="folder"):
        write_trace(target, scene.recorder.snapshot())
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    scene, path = Scene(), tmp_path / "trace.json"
    path.write_text("old")
    with path.open() as old:
        write_trace(path, scene.recorder.snapshot())
        assert old.read() == "old"
    assert json.loads(path.read_text())["displayTimeUnit"] == "ms"
    assert os.listdir(tmp_path) == ["trace.json"]


# ---- the picture -------------------------------------------------------------------------------------------------


@pytest.fixture
def picture() -> Any:
    spec = importlib.util.spec_from_file_location("trace_picture", PICTURE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_shows_every_slice_and_mark(tmp_path: Path, picture: Any) -> None:
    scene = Scene(num_pages=6)
    scene.crowd()
    scene.run()
    events = written(scene, tmp_path / "trace.json")
    svg = picture.draw(events)
    titles = [element.text or "" for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}title")]
    slices = [event for event in events if event["ph"] == "X"]
    assert sum("ms" in title for title in titles) == len(slices)
    preempted = [event for event in events if event["name"] == "preempted"]
    assert titles.count("preempted") == len(preempted) + 1  # the legend's
    assert all(f">req-{number}</text>" in svg for number in (1, 2, 3))


def test_the_picture_of_a_strange_name_is_still_a_picture(tmp_path: Path, picture: Any) -> None:
    scene = Scene()
    scene.name_of = lambda number: '<b>&"'  # type: ignore[method-assign]
    scene.journal._name_of = scene.name_of
    scene.ask(1)
    scene.run()
    ET.fromstring(picture.draw(written(scene, tmp_path / "trace.json")))


def test_the_picture_command(tmp_path: Path, picture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_trace(tmp_path / "trace.json", Scene().recorder.snapshot())
    monkeypatch.setattr("sys.argv", ["trace_picture", str(tmp_path / "trace.json"), str(tmp_path / "out.svg")])
    assert picture.main() == 0
    ET.parse(tmp_path / "out.svg")
    (tmp_path / "trace.json").write_text("no trace")
    assert picture.main() == 1
