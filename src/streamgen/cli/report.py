"""What `doctor` finds, as plain data: printed as text, or as JSON."""

from __future__ import annotations

from msgspec import Struct


class BackendReport(Struct, frozen=True, kw_only=True):
    """Whether a backend can run here, and every reason why not."""

    name: str
    usable: bool
    reasons: tuple[str, ...] = ()


class DoctorReport(Struct, frozen=True, kw_only=True):
    """The machine and the installation. Sizes in bytes; None: not known, not there, or no limit.

    instruction_sets       kernel tables this processor runs, best first
    chosen_isa             the one an engine uses; STREAMGEN_CPU_ISA lowers it
    threads                how many an engine uses unless told otherwise
    """

    python: str
    system: str
    processor: str
    instruction_sets: tuple[str, ...]
    chosen_isa: str | None
    affinity_cpus: int
    cgroup_cpus: float | None
    threads: int
    memory_total: int | None
    memory_available: int
    packages: dict[str, str | None]
    extras: dict[str, str | None]
    demo_model: str | None
    backends: tuple[BackendReport, ...]
