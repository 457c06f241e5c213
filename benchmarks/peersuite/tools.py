"""Which engines and which of their programs are installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .adapters.llama_cpp import LlamaCpp, find_folder
from .adapters.openvino import OpenVino, find_python
from .adapters.transformers import Transformers
from .models import Tools

if TYPE_CHECKING:
    from .adapters.base import Engine, Setting

PEERS_VARIABLE = "STREAMGEN_PEERS"


def known_peers(setting: Setting) -> list[Engine]:
    """All that there is an adapter for."""
    return [LlamaCpp(setting), OpenVino(setting), Transformers(setting)]


def find_tools(setting: Setting) -> Tools:
    """Peers' programs that make files of other formats."""
    folder, python = find_folder(setting.root), find_python(setting.root)
    return Tools(
        quantize=folder / "llama-quantize" if folder else None, openvino_python=Path(python) if python else None
    )
