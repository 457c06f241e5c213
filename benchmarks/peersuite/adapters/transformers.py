"""transformers: `generate` on a padded batch, bfloat16, in the environment that runs this.

It has no server here: its continuous batching is far slower on a CPU, so works with mixed requests are left out.
"""

from __future__ import annotations

import sys
from importlib import metadata, util
from typing import TYPE_CHECKING

from .base import CHILDREN, Setting, Unable, run_child

if TYPE_CHECKING:
    from ..figures import Outcome
    from ..models import Model
    from ..works import Work

KINDS = ("prefill", "decode", "start")


class Transformers:
    """See `Engine`."""

    name = "transformers"

    def __init__(self, setting: Setting) -> None:
        self._threads = setting.threads

    def unavailable(self) -> str | None:
        """Whether it and torch are installed."""
        missing = [name for name in ("transformers", "torch") if util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    def version(self) -> str:
        """Of the package."""
        return metadata.version("transformers")

    def run(self, work: Work, model: Model) -> Outcome:
        """In a child."""
        if work.kind not in KINDS:
            raise Unable("its continuous batching is not made for a CPU; it is asked for equal batches only")
        fields = {"model": str(model.ours), "threads": self._threads}
        return run_child([sys.executable, str(CHILDREN / "run_transformers.py")], work, fields)
