"""Real schemas with instances that somebody labelled: each is enforced exactly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.grammar.schema.acceptance import accepts_text

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def files(shared_data: Path) -> list[Path]:
    folder = shared_data / "schemas"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/data/schemas beside the project")
    return sorted(path for path in folder.glob("*.json") if path.name != "index.json")


def test_every_schema_is_exact(files: list[Path]) -> None:
    wrong = []
    for path in files:
        case = json.loads(path.read_text())
        for test in case["tests"]:
            for ensure_ascii in (True, False):
                text = json.dumps(test["data"], ensure_ascii=ensure_ascii)
                if accepts_text(case["schema"], text) != test["valid"]:
                    wrong.append((path.stem, text[:80]))
    assert wrong == []
    assert len(files) >= 40
