"""The plan in bytes: what it says, and that an engine keeps to it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from streamgen.backends.base import LoadOptions
from streamgen.backends.cpu import CpuBackend
from streamgen.checkpoints.open import CheckpointWeights, open_checkpoint
from streamgen.config import make_options
from streamgen.errors import ConfigError, InsufficientMemory
from streamgen.execution import memory
from streamgen.execution.model import plan_model
from streamgen.models.registry import build_program

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


def test_a_size_is_taken_as_it_is(stories: Path) -> None:
    plan = plan_model(make_options(stories, {"kv_memory": "1MiB", "dtype": "float32"}))
    assert plan.page_bytes == 2 * 5 * 16 * 4 * 8 * 4
    assert plan.num_pages == (1 << 20) // plan.page_bytes
    assert plan.cache == plan.num_pages * plan.page_bytes


def test_more_pages_than_sequences_could_fill_are_not_taken(stories: Path) -> None:
    plan = plan_model(make_options(stories, {"kv_memory": "100MiB", "max_running": 2}))
    assert plan.num_pages == 2 * (512 // 16 + 1)


def test_a_small_cache_shortens_the_context(stories: Path) -> None:
    plan = plan_model(make_options(stories, {"kv_memory": f"{10 * 20480}", "dtype": "float32"}))
    assert plan.max_context == 160


def test_a_context_that_was_asked_for_is_kept_or_refused(stories: Path) -> None:
    with pytest.raises(
        ConfigError, match="holds 160 tokens, got 500; ask for at most 160, or for kv_memory of at least"
    ):
        plan_model(make_options(stories, {"kv_memory": f"{10 * 20480}", "dtype": "float32", "max_context": 500}))
    with pytest.raises(ConfigError, match="made for 512 tokens, got 513"):
        plan_model(make_options(stories, {"max_context": 513}))


def test_too_little_memory_names_what_would_fit(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 64 << 20)
    with pytest.raises(InsufficientMemory, match=r"kv_memory up to \d+ bytes would fit, with max_context up to 512"):
        plan_model(make_options(stories, {"kv_memory": "1GiB"}))
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    with pytest.raises(InsufficientMemory, match="would do"):
        plan_model(make_options(stories, {}))


@pytest.mark.parametrize("max_rows", [1, 40, 512])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_planned_workspace_holds_what_the_kernels_take(stories: Path, dtype: str, max_rows: int) -> None:
    checkpoint = open_checkpoint(stories)
    program = build_program(checkpoint.config, max_context=256)
    options = LoadOptions(dtype=dtype, max_rows=max_rows, num_pages=4, max_context=256, threads=2)
    model = CpuBackend().load(program, CheckpointWeights(checkpoint), options, lambda done: None)
    taken = model.workspace_bytes
    model.close()
    checkpoint.close()
    assert taken <= CpuBackend().workspace_bytes(program, options) <= taken + options.threads * (2 << 20)


def test_the_number_that_is_named_fits(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 64 << 20)
    with pytest.raises(InsufficientMemory) as refused:
        plan_model(make_options(stories, {"kv_memory": "1GiB"}))
    found = re.search(r"kv_memory up to (\d+) bytes would fit, with max_context up to (\d+)", str(refused.value))
    assert found is not None
    size, context = int(found[1]), int(found[2])
    assert plan_model(make_options(stories, {"kv_memory": str(size), "max_context": context})).max_context == context
    with pytest.raises(InsufficientMemory):
        plan_model(make_options(stories, {"kv_memory": str(size + 20480)}))


def test_the_kv_memory_that_a_context_wants_is_named(stories: Path) -> None:
    options = {"kv_memory": "100KiB", "dtype": "float32", "max_context": 500}
    with pytest.raises(ConfigError) as refused:
        plan_model(make_options(stories, options))
    found = re.search(r"kv_memory of at least (\d+) bytes", str(refused.value))
    assert found is not None
    assert plan_model(make_options(stories, options | {"kv_memory": found[1]})).max_context == 500
    with pytest.raises(ConfigError):
        plan_model(make_options(stories, options | {"kv_memory": str(int(found[1]) - 1)}))


_MEASURE = """
import json, sys
import streamgen as sg
from streamgen import sync

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

engine = sync.Engine(sys.argv[1], kv_memory="64MiB", max_context=1024)
plan = engine.plan()
with engine:
    loaded = status("VmRSS")
    streams = [engine.stream("Once upon a time " * 20, max_tokens=32, temperature=0, ignore_eos=True) for _ in range(8)]
    for stream in streams:
        stream.__enter__()
    for stream in streams:
        stream.final()
        stream.__exit__(None, None, None)
    used = engine.stats().pages_cached * plan.page_bytes
    peak = status("VmHWM")
print(json.dumps({"total": plan.total, "weights": plan.weights, "workspace": plan.workspace, "used": used,
                  "loaded": loaded, "peak": peak, "torch": "torch" in sys.modules}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_real_engine_keeps_to_its_plan_and_never_imports_torch(demo_model_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(demo_model_path)], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout)
    assert not figures["torch"]
    base = 150 << 20  # interpreter, numpy, tokenizer and all other modules
    assert figures["peak"] <= figures["total"] * 1.05 + base
    assert figures["loaded"] <= figures["weights"] + figures["workspace"] + base
