"""Builds and runs the native tests: here, for arm64 under an emulator, and with sanitizers.

`python -m tests.native.build KIND...` is what the Makefile calls; kinds are the names in `KINDS`. What cannot be built
here is skipped, with the reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).resolve().parent

_SANITIZERS = "-fno-omit-frame-pointer -fno-sanitize-recover=all -g1"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to build the tests, and how they are run.

    options   for cmake
    needs     programs, beside cmake
    runner    what runs the built program; empty where the system does
    suites    which of its suites; empty for all
    """

    options: tuple[str, ...]
    needs: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()


KINDS = {
    "native": Kind(options=("-DSGCPU_OPTIMIZE=-O1",)),  # the optimized kernels are tested from Python
    "arm64": Kind(
        options=(f"-DCMAKE_TOOLCHAIN_FILE={SOURCES / 'aarch64.cmake'}",),
        needs=("aarch64-linux-gnu-g++", "qemu-aarch64"),
        runner=("qemu-aarch64", "-cpu", "max"),
    ),
    "asan": Kind(options=("-DSGCPU_OPTIMIZE=-O1", f"-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined {_SANITIZERS}")),
    "tsan": Kind(
        options=("-DSGCPU_OPTIMIZE=-O1", f"-DCMAKE_CXX_FLAGS=-fsanitize=thread {_SANITIZERS}"),
        suites=("pool", "program", "grammar"),
    ),
}


class NotHere(Exception):
    """A program that a kind needs is missing."""


def program(name: str) -> str:
    """Where a program is, also beside the interpreter. Raises NotHere."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if found is None:
        raise NotHere(f"needs {name}")
    return found


def build(kind: str) -> Path:
    """Configure and build; returns the program. Raises NotHere, and CalledProcessError where it does not compile."""
    cmake = program("cmake")
    for name in KINDS[kind].needs:
        program(name)
    folder = PROJECT / "build" / "tests" / kind
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={program('ninja')}") if _has("ninja") else ()
    run_quietly(cmake, "-S", str(SOURCES), "-B", str(folder), *generator, *KINDS[kind].options)
    run_quietly(cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1))
    return folder / "native_test"


def command(kind: str, binary: Path, *, cpu: str | None = None) -> list[str]:
    """What runs the built program, its arguments to follow; `cpu` is another processor for the emulator."""
    runner = list(KINDS[kind].runner)
    if cpu is not None:
        runner[-1] = cpu
    return [*(program(name) if i == 0 else name for i, name in enumerate(runner)), str(binary)]


def run_quietly(*arguments: str) -> str:
    """The output of a command. Raises CalledProcessError, with the output printed."""
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout)
        raise subprocess.CalledProcessError(done.returncode, arguments[0])
    return done.stdout


def _has(name: str) -> bool:
    try:
        program(name)
    except NotHere:
        return False
    return True


def main(kinds: list[str]) -> int:
    """Build and run each kind; the number of those that fail."""
    failures = 0
    for kind in kinds:
        try:
            print(f"{kind}: building", flush=True)
            binary = build(kind)
        except NotHere as reason:
            print(f"{kind}: skipped, {reason}")
            continue
        except subprocess.CalledProcessError as error:
            print(f"{kind}: {error}")
            failures += 1
            continue
        failures += subprocess.run([*command(kind, binary), *KINDS[kind].suites], check=False).returncode != 0
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
