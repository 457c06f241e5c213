"""How many threads this process may use: affinity and the cgroup's CPU limit."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_threads() -> int:
    """Processors that this process may run on, cut to the cgroup's quota (rounded up); at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    quota = cgroup_quota()
    return max(1, min(cores, cores if quota is None else int(-(-quota // 1))))


def cgroup_quota(root: Path = _CGROUP) -> float | None:
    """Processors' worth of time per period that the cgroup allows; None where it sets no limit."""
    try:
        text = (root / "cpu.max").read_text()  # version 2: "max 100000" or "200000 100000"
        limit, period = text.split()[:2]
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())  # version 1: -1 is no limit
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return None if limit_us <= 0 else limit_us / period_us
    except (OSError, ValueError):
        return None
