"""Our engine, through its public API."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import TYPE_CHECKING

from .base import CHILDREN, Setting, run_child

if TYPE_CHECKING:
    from ..figures import Outcome
    from ..models import Model
    from ..works import Work


class Ours:
    """See `Engine`."""

    name = "streamgen"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def unavailable(self) -> str | None:
        """It is the interpreter that runs this."""
        return None

    def version(self) -> str:
        """The package's."""
        try:
            return metadata.version("streamgen")
        except metadata.PackageNotFoundError:
            return "source tree"

    def run(self, work: Work, model: Model) -> Outcome:
        """In a child."""
        fields = {
            "model": str(model.ours),
            "threads": self._setting.threads,
            "options": {**model.options, **self._setting.options},
        }
        return run_child([sys.executable, str(CHILDREN / "run_ours.py")], work, fields)
