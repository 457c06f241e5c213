"""The layers of imports in docs/architecture.md, read from the source; and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import streamgen

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(streamgen.__file__).parent

BASE = {"errors", "messages", "sampling", "completion", "config", "faults"}
PURE = {"scheduling", "text", "grammar"}
HOST = {"mailbox", "prompt", "metrics", "latencies", "lifecycle", "tracefile"}
DEVICE = {"quantization", "models", "checkpoints", "backends", "execution"}
FRONT = {
    "request",
    "stream",
    "engine_base",
    "engine",
    "sync",
    "session",
    "sync_session",
    "mapping",
    "sync_mapping",
    "text_engine",
    "tools",
    "tool_loop",
    "values",
    "compiled",
}
ANYTHING = {"cli", "testing", "asgi", "contrib", "__main__"}

# part -> what it may import of the package, beside itself
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "sampling": {"errors"},
    "messages": {"sampling", "grammar"},
    "completion": {"errors"},
    "config": {"errors"},
    "hub_models": BASE,
    "hub_download": BASE | {"hub_models"},
    "hub": BASE | {"hub_download", "hub_models"},
    "scheduling": BASE,
    "child_process": set(),
    "grammar": BASE | {"child_process"},
    "text": BASE | {"grammar"},
    "mailbox": BASE,
    "prompt": BASE | {"text"},
    "faults": set(),
    "latencies": set(),
    "metrics": BASE | {"latencies"},
    "lifecycle": BASE | {"mailbox"},
    "tracefile": BASE,
    "actors": BASE | PURE | HOST,
    "tools": BASE,
    "values": BASE | HOST | {"grammar"},
    "compiled": BASE | {"grammar"},
    "request": BASE | HOST | {"actors", "grammar", "tools"},
    "stream": BASE | HOST | {"request", "values"},
    "tool_loop": BASE | HOST | {"request", "tools"},
    "engine_base": BASE | HOST | {"actors", "request", "execution", "grammar", "values"},
    "session": BASE | HOST | {"request", "stream", "engine_base"},
    "mapping": BASE | HOST | {"request", "engine_base", "values"},
    "engine": BASE
    | HOST
    | {"actors", "request", "stream", "engine_base", "session", "mapping", "compiled", "tool_loop"},
    "sync_mapping": BASE | HOST | {"request", "engine_base", "mapping"},
    "sync": BASE
    | HOST
    | {"actors", "request", "stream", "engine_base", "sync_mapping", "sync_session", "compiled", "tool_loop", "values"},
    "sync_session": BASE | HOST | {"request", "session", "sync"},
    "text_engine": BASE | HOST | {"request"},
    "quantization": BASE,
    "models": BASE | {"quantization", "checkpoints"},
    "checkpoints": BASE | {"quantization", "models"},
    "backends": BASE | {"quantization", "models", "checkpoints"},
    "execution": BASE | PURE | DEVICE | {"hub", "hub_models", "child_process"},
    "__init__": BASE | HOST | FRONT,
}

WITHOUT_NUMPY = BASE | (PURE - {"grammar"}) | HOST | FRONT | {"actors", "__init__", "hub"}
WITH_TORCH = {"backends/reference.py", "backends/reference_sampler.py"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(module, whether importing the file imports it) of every import that runs; those for type checkers do not."""
    tree = ast.parse(path.read_text())
    yield from _walk(tree.body, at_import=True)


def _walk(body: list[ast.stmt], *, at_import: bool) -> Iterator[tuple[str, bool]]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _walk(node.orelse, at_import=at_import)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            yield from ((f"{module}.{alias.name}", at_import) for alias in node.names)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field in ("body", "orelse", "finalbody"):
                yield from _walk(getattr(node, field, []), at_import=at_import and not is_function)
            for part in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
                yield from _walk(part.body, at_import=at_import)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part in ANYTHING:
        return
    assert part in MAY_IMPORT, f"{part} has no place in the layers yet: docs/architecture.md and this table say where"
    allowed = MAY_IMPORT[part] | {part}
    for name, at_import in imports(path):
        root, _, rest = name.partition(".")
        if root == "streamgen":
            target = rest.split(".")[0]
            if target.startswith("_"):  # the extension modules, for who drives them
                assert part in {"backends", "quantization", "execution", "grammar"}, f"{part} imports {name}"
                continue
            assert target in allowed, f"{part} imports {name}"
            assert not (part == "engine" and target == "execution" and at_import), "execution is imported when opening"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_modules_are_kept_where_they_belong(path: Path) -> None:
    roots = {name.split(".")[0] for name, _ in imports(path)}
    if str(path.relative_to(PACKAGE)) not in WITH_TORCH and part_of(path) not in ANYTHING:
        assert "torch" not in roots
    if part_of(path) in WITHOUT_NUMPY:
        assert "numpy" not in roots


def test_the_walk_sees_what_runs_and_only_that(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport a\nif TYPE_CHECKING:\n    import b\nelse:\n    import c\n"
        "def f():\n    try:\n        import d\n    except E:\n        from e.f import g\n"
        "class K:\n    import h\nwith x:\n    import i\n"
    )
    assert list(imports(path)) == [
        ("typing.TYPE_CHECKING", True),
        ("a", True),
        ("c", True),
        ("d", False),
        ("e.f.g", False),
        ("h", True),
        ("i", True),
    ]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(PACKAGE.parent), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_fast_and_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import streamgen; took = time.perf_counter() - start\n"
        "print(took, *sorted({'torch', 'numpy', 'anyio', 'asyncio', 'tokenizers', 'jinja2'} & set(sys.modules)))"
    )
    outputs = [run_python(code).split() for _ in range(3)]
    assert all(output[1:] == [] for output in outputs), f"imported eagerly: {outputs[0][1:]}"
    assert min(float(output[0]) for output in outputs) < 0.150


def test_the_engine_module_brings_neither_torch_nor_numpy() -> None:
    code = "import sys, streamgen as sg; sg.Engine, sg.sync.Engine; print({'torch', 'numpy'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_import_changes_nothing_in_the_host() -> None:
    code = (
        "import atexit, logging, signal, threading\n"
        "before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], atexit._ncallbacks()\n"
        "import streamgen as sg\n"
        "sg.Engine('nowhere'), sg.sync.Engine('nowhere')\n"
        "after = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], atexit._ncallbacks()\n"
        "print(before[0] == after[0], after[1] - before[1], logging.root.handlers, threading.active_count())"
    )
    signals, callbacks, handlers, threads = run_python(code).split()
    assert (signals, handlers, threads) == ("True", "[]", "1")
    # concurrent.futures and logging register their own when they are imported; ours would come on top.
    baseline = run_python(
        "import atexit; n = atexit._ncallbacks(); import anyio, asyncio, logging, msgspec, tokenizers\n"
        "import concurrent.futures, anyio.abc, anyio.lowlevel, weakref; print(atexit._ncallbacks() - n)"
    )
    assert int(callbacks) <= int(baseline)
