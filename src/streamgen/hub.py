"""Where models come from: paths, the demo model, and repositories of the Hugging Face hub.

The one module that downloads. `pull_demo` does when it is called, `resolve_model` for a hub id when it is not offline;
nothing else in the library opens a connection. What is in `hub_models`, how in `hub_download`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from streamgen.errors import ModelNotFound
from streamgen.hub_models import DEMO, PackagedModel

if TYPE_CHECKING:
    from streamgen.hub_models import OnProgress

__all__ = ["DEMO", "PackagedModel", "cache_folder", "demo_model_path", "pull_demo", "resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")
_MODEL_SUFFIXES = (".gguf", ".safetensors", ".json", ".bin", ".pt", ".pth")


def cache_folder() -> Path:
    """Where models are kept: STREAMGEN_CACHE, else the user's cache folder. It need not be there."""
    chosen = os.environ.get("STREAMGEN_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("streamgen", appauthor=False))


def demo_model_path() -> Path:
    """Where `pull_demo` puts the demo model, whether or not it is there."""
    return cache_folder() / "models" / DEMO.name / DEMO.file


def pull_demo(on_progress: OnProgress = None) -> Path:
    """Bring the demo model into the cache unless an undamaged copy is there; blocking. Returns its path.

    Two processes that pull at once fetch it once; an interrupted pull leaves no half file.

    Raises:
        ModelNotFound: it could not be fetched; the message lists what was tried, and what to do.
    """
    from streamgen.hub_download import pull_packaged_model

    return pull_packaged_model(DEMO, demo_model_path(), on_progress)


def resolve_model(
    model: str | Path | None,
    *,
    offline: bool = False,
    revision: str | None = None,
    on_progress: OnProgress = None,
) -> Path:
    """The file or folder that `model` means: None (the demo model), its name, a path, or a hub id "org/name".

    offline    nothing is fetched: a hub id is only looked up in the hub's cache
    revision   branch, tag or commit of a hub id

    Raises:
        ModelNotFound: there is none; the message says where was looked and what to do.
    """
    if model is None or model in ("demo", DEMO.name):
        return _demo()
    text = str(model)
    path = _existing_path(text)
    if path is not None:
        return path
    if isinstance(model, Path) or _looks_like_path(text):
        raise ModelNotFound(f"{text}: no such file or folder")
    if _HUB_ID.fullmatch(text) and ".." not in text:
        return _resolve_hub_id(text, offline=offline, revision=revision, on_progress=on_progress)
    raise ModelNotFound(
        f"{text!r}: no such file or folder, and no model of that name; expected a path, a hub id 'org/name' or 'demo'"
    )


def _demo() -> Path:
    path = demo_model_path()
    if not path.is_file():
        raise ModelNotFound(f"the demo model is not here yet (expected {path}): run `streamgen pull demo`, once")
    return path


def _existing_path(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # a name no file system takes, or ~ of an unknown user
        return None


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or text.endswith(_MODEL_SUFFIXES)


def _resolve_hub_id(id: str, *, offline: bool, revision: str | None, on_progress: OnProgress) -> Path:
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise ModelNotFound(f"revision {revision!r}: expected a branch, a tag or a commit of {id}")
    if not offline:
        from streamgen.hub_download import fetch_snapshot

        fetched = fetch_snapshot(id, revision, on_progress)
        if fetched is not None:
            return fetched
    cached = _cached_snapshot(id, revision or "main")
    if cached is not None:
        return cached
    remedy = "offline=True forbids to fetch it" if offline else "fetching it needs pip install 'streamgen[hub]'"
    raise ModelNotFound(f"{id}: no such file or folder, not in the hub's cache ({_hub_cache()}), and {remedy}")


def _hub_cache() -> Path:
    """The cache of huggingface_hub, found as it finds it itself, without the cost of importing it."""
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def _cached_snapshot(id: str, revision: str) -> Path | None:
    repository = _hub_cache() / ("models--" + id.replace("/", "--"))
    reference = repository / "refs" / revision
    try:
        commit = reference.read_text("utf-8").strip() if reference.is_file() else revision
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if re.fullmatch(r"[0-9a-f]{40}", commit) and snapshot.is_dir() else None
