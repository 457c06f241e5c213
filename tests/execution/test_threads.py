"""Thread counts from affinity and cgroups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamgen.execution.threads import available_threads, cgroup_quota

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000\n", None), ("200000 100000\n", 2.0), ("50000 100000\n", 0.5), ("nonsense\n", None)]
)
def test_cgroup_version_2(tmp_path: Path, text: str, quota: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cgroup_quota(tmp_path) == quota


@pytest.mark.parametrize(("limit", "quota"), [("-1", None), ("150000", 1.5)])
def test_cgroup_version_1(tmp_path: Path, limit: str, quota: float | None) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(limit)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cgroup_quota(tmp_path) == quota


def test_no_cgroup_no_limit(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None


def test_at_least_one_thread() -> None:
    assert available_threads() >= 1
