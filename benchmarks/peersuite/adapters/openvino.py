"""openvino-genai: its continuous batching pipeline, in the environment ROOT/ov (or the one that runs this)."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from .base import CHILDREN, Setting, Unable, run_child

if TYPE_CHECKING:
    from pathlib import Path

    from ..figures import Outcome
    from ..models import Model
    from ..works import Work

FOLDERS = ("ov", "openvino")
_VERSION = "import openvino_genai; print(openvino_genai.__version__)"


class OpenVino:
    """See `Engine`."""

    name = "openvino-genai"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.python = find_python(setting.root)

    def unavailable(self) -> str | None:
        """Whether its package can be imported."""
        return None if self.python else f"no Python with openvino_genai, neither this one nor ROOT/{FOLDERS[0]}"

    def version(self) -> str:
        """Of the package."""
        assert self.python is not None, "it is not available"
        return _said(self.python) or "unknown"

    def run(self, work: Work, model: Model) -> Outcome:
        """In a child."""
        if model.openvino is None:
            raise Unable(f"{model.name}: there is no file that it reads")
        fields = {
            "model": str(model.openvino),
            "tokenizer": str(model.tokenizer),
            "threads": self._setting.threads,
        }
        return run_child([str(self.python), str(CHILDREN / "run_openvino.py")], work, fields)


def find_python(root: Path | None) -> str | None:
    """An interpreter that has the package."""
    candidates = [] if root is None else [root / folder / "bin" / "python" for folder in FOLDERS]
    for python in [*(str(path) for path in candidates if path.is_file()), sys.executable]:
        if _said(python):
            return python
    return None


def _said(python: str) -> str | None:
    done = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
