"""A bounded share of `make chaos`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import anyio
import pytest

from tests.chaos import run_chaos

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_thousand_requests(backend: str, shared_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "streamgen")
    outcome = anyio.run(
        lambda: run_chaos(shared_data / "models" / "stories260K", num_requests=500, seed=3), backend=backend
    )
    assert outcome.ends["cancelled"] > 100 and outcome.ends["ProcessorError"] > 2
    assert outcome.step_faults > 0
