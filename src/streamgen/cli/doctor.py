"""`streamgen doctor`: what this machine and this installation can do, and why not where they cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.cli import exit_codes, machine
from streamgen.cli.output import format_bytes
from streamgen.errors import KernelUnavailable

if TYPE_CHECKING:
    import argparse

    from streamgen.cli.report import BackendReport, DoctorReport

SUMMARY = "what this machine and installation can do"
DESCRIPTION = "Report Python, processor, kernels, memory, packages and backends. Exit code 1: no backend can be used."

PACKAGES = ("streamgen", "torch", "numpy", "anyio", "msgspec", "tokenizers", "safetensors", "outlines", "jinja2")
FOR_TESTS = "reference"  # the backend that an engine never chooses
EXTRAS = {"cuda": "xformers", "hub": "huggingface_hub"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Only the form of the output."""
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Look, and print the report."""
    import msgspec

    report = examine()
    print(msgspec.json.format(msgspec.json.encode(report)).decode() if arguments.json else render(report))
    usable = [backend.name for backend in report.backends if backend.usable and backend.name != FOR_TESTS]
    return exit_codes.OK if usable else exit_codes.UNEXPECTED


def examine() -> DoctorReport:
    """Collect the facts; loads neither torch nor a model."""
    import platform

    from streamgen.cli.report import BackendReport, DoctorReport
    from streamgen.execution.memory import available_memory
    from streamgen.execution.threads import available_threads, cgroup_quota
    from streamgen.hub import demo_model_path

    instruction_sets, chosen_isa, reasons = _kernels()
    demo = demo_model_path()
    return DoctorReport(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        system=platform.platform(),
        processor=machine.cpu_model(),
        instruction_sets=instruction_sets,
        chosen_isa=chosen_isa,
        affinity_cpus=machine.affinity_cpus(),
        cgroup_cpus=cgroup_quota(),
        threads=available_threads(),
        memory_total=machine.memory_total(),
        memory_available=available_memory(),
        packages={name: _version(name) for name in PACKAGES},
        extras={extra: _version(package) for extra, package in EXTRAS.items()},
        demo_model=str(demo) if demo.is_file() else None,
        backends=(
            BackendReport(name="cpu", usable=not reasons, reasons=reasons),
            _reference_backend(),
            BackendReport(name="cuda", usable=False, reasons=("this version has no CUDA kernels yet",)),
        ),
    )


def _kernels() -> tuple[tuple[str, ...], str | None, tuple[str, ...]]:
    """Kernel tables this processor runs, best first; the one an engine would use; else why it cannot use any."""
    from streamgen.backends.cpu import chosen_isa

    try:
        chosen = chosen_isa()
    except KernelUnavailable as error:
        return (), None, (str(error),)
    from streamgen import _cpu

    return tuple(_cpu.isa_names()), chosen, ()


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _reference_backend() -> BackendReport:
    from importlib.util import find_spec

    from streamgen.cli.report import BackendReport

    reasons = () if find_spec("torch") else ("torch is not installed; pip install torch",)
    return BackendReport(name=FOR_TESTS, usable=not reasons, reasons=reasons)


def render(report: DoctorReport) -> str:
    """The report as lines of text."""
    lines = [
        f"python       {report.python}",
        f"system       {report.system}",
        f"processor    {report.processor}",
        f"kernels      {_kernel_line(report)}",
        f"threads      {report.threads} ({_thread_reasons(report)})",
        f"memory       {_size(report.memory_available)} available of {_size(report.memory_total)}",
        f"demo model   {report.demo_model or 'not here: streamgen pull demo'}",
    ]
    lines += [f"package      {name} {version or 'missing'}" for name, version in report.packages.items()]
    lines += [f"extra        {extra}: {_extra_line(extra, version)}" for extra, version in report.extras.items()]
    for backend in report.backends:
        note = " (for tests)" if backend.name == FOR_TESTS else ""
        lines.append(f"backend      {backend.name}{note}: {'usable' if backend.usable else 'no'}")
        lines += [f"             - {reason}" for reason in backend.reasons]
    return "\n".join(lines)


def _kernel_line(report: DoctorReport) -> str:
    return (
        f"{report.chosen_isa} (this processor runs {', '.join(report.instruction_sets)})"
        if report.chosen_isa
        else "none"
    )


def _thread_reasons(report: DoctorReport) -> str:
    cgroup = "no cgroup limit" if report.cgroup_cpus is None else f"cgroup allows {report.cgroup_cpus:g}"
    return f"affinity allows {report.affinity_cpus}, {cgroup}"


def _extra_line(extra: str, version: str | None) -> str:
    return f"{EXTRAS[extra]} {version or f'not installed (pip install streamgen[{extra}])'}"


def _size(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)
