"""Everything here but the pure parts needs the real vocabularies beside the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.text import vocabularies

NEED_NO_DATA = {"test_stops.py", "test_sandbox.py", "test_messages.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if vocabularies.DATA.is_dir():
        return
    skip = pytest.mark.skip(reason="needs the folder shared/data beside the project")
    here = Path(__file__).parent
    for item in items:
        if item.path.parent == here and item.path.name not in NEED_NO_DATA:
            item.add_marker(skip)
