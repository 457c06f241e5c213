"""Fixtures shared by all tests: where real data and real models are, if they are here at all."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis  # noqa: F401  # before trio is: later it warns of trio, and warnings are errors
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data beside the project."""
    path = PROJECT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the folder shared/data beside the project")
    return path


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The demo model in the user's cache (`streamgen pull demo` puts it there)."""
    from streamgen.hub import demo_model_path

    path = demo_model_path()
    if not path.is_file():
        pytest.skip("needs the demo model: run `streamgen pull demo`")
    return path


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> Iterator[None]:
    """Many tests collect garbage, and what earlier modules have imported and cached need not be looked at each time."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Async tests run on both loops."""
    return str(request.param)


def pytest_report_header() -> str:
    """Say which kernels the tests run on."""
    return f"STREAMGEN_CPU_ISA={os.environ.get('STREAMGEN_CPU_ISA', '(best available)')}"
