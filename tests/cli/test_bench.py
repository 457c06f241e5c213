"""`streamgen bench`: what it counts, what it writes. No test looks at a speed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec
import pytest

from streamgen.cli.benchmark import children, suite
from streamgen.cli.benchmark.engine import Clocked, steady_rate
from streamgen.cli.benchmark.figures import BenchReport, Figure
from streamgen.cli.benchmark.model_size import read_model_size
from streamgen.config import EngineOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REPORT = BenchReport(
    model="m.gguf",
    dtype="bfloat16",
    threads=2,
    isa="generic",
    processor="p",
    system="s",
    versions={"python": "3"},
    commit=None,
    command="streamgen bench",
    figures=(
        Figure(name="decode", value=1234.5, unit="tok/s", runs=(1000.0, 1234.5), ratio=0.5, ratio_of="of bound"),
        Figure(name="import", value=4.25, unit="ms"),
    ),
    skipped=("torch is missing",),
)


def test_a_line_has_value_and_ratio() -> None:
    assert REPORT.figures[0].line().split() == ["decode", "1,234", "tok/s", "0.50", "of", "bound"]
    assert REPORT.figures[1].line().split() == ["import", "4.25", "ms"]


def test_markdown_holds_machine_figures_and_what_is_missing() -> None:
    text = REPORT.markdown()
    assert "| decode | 1,234 tok/s | 0.50 of bound |" in text
    assert "| import | 4.25 ms |  |" in text
    assert "commit unknown" in text
    assert "Not measured: torch is missing" in text


def test_the_report_round_trips() -> None:
    assert msgspec.json.decode(msgspec.json.encode(REPORT), type=BenchReport) == REPORT


def teststeady_rate_counts_only_while_all_decode() -> None:
    early = Clocked([0.0, 1.0, 2.0, 3.0], [1, 5, 5, 5])
    late = Clocked([1.0, 2.0, 3.0, 4.0], [1, 3, 3, 3])
    # From 1.0 (the last first token) to 3.0 (the first last token): 5 + 5 of one, 3 + 3 of the other.
    assert steady_rate([early, late]) == pytest.approx(8.0)


def test_weights_are_counted_from_headers(stories: Path) -> None:
    hidden, layers, feed_forward, kv = 64, 5, 172, 4 * 8
    per_layer = hidden * (hidden + 2 * kv + hidden) + 3 * hidden * feed_forward
    for dtype, element in (("float32", 4), ("bfloat16", 2)):
        size = read_model_size(EngineOptions(model=str(stories), dtype=dtype))
        assert (size.vocab, size.layer_weights) == (512, layers * per_layer)
        # Packed in panels of 16 rows, on borders of 128 bytes.
        weights = element * (layers * per_layer + 512 * hidden)
        assert weights <= size.step_bytes <= 1.05 * weights


def test_quick_bench_measures_the_engine(
    run: Callable[..., tuple[int, str, str]], stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "BANDWIDTH_BYTES", 2**20)
    monkeypatch.setattr(suite, "BANDWIDTH_SECONDS", 0.05)
    path = tmp_path / "report.json"
    code, out, err = run("bench", stories, "--quick", "--threads", 1, "--kv-memory", "64MiB", "--json", path)
    assert code == 0
    report = msgspec.json.decode(path.read_bytes(), type=BenchReport)
    names = [figure.name for figure in report.figures]
    assert names[0] == suite.BANDWIDTH
    assert {"decode 1 seq", "decode 8 seq", "decode 32 seq"} <= set(names)
    assert any(name.startswith("prefill") for name in names)
    assert all(figure.value > 0 for figure in report.figures)
    assert len(out.splitlines()) == len(names)
    assert report.command in err
    assert report.threads == 1


def test_memory_child_reports_bytes(stories: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not children.PROCESS_STATUS.exists():
        pytest.skip("resident memory is read from /proc")
    children.main(["memory", str(stories), json.dumps({"threads": 1})])
    sizes = json.loads(capsys.readouterr().out)
    assert 0 < sizes["planned"] < sizes["now"] <= sizes["peak"]


def test_matmul_child_counts_operations(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "MATMUL_SIZE", 64)
    monkeypatch.setattr(children, "MATMUL_SECONDS", 0.01)
    pytest.importorskip("torch")
    children.main(["matmul", "1"])
    assert json.loads(capsys.readouterr().out)["gflops"] > 0
