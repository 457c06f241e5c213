"""Which backend runs a program, and why the others do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamgen.backends.cpu import CpuBackend
from streamgen.errors import KernelUnavailable

if TYPE_CHECKING:
    from streamgen.backends.base import Backend
    from streamgen.models.program import Program


def candidates() -> list[Backend]:
    """Backends that an engine may use, best first. The torch reference is for tests: it is asked for by name."""
    return [CpuBackend()]


def backend_reasons(program: Program, dtype: str) -> dict[str, list[str]]:
    """For each backend, why it cannot run the program; an empty list where it can."""
    return {backend.name: backend.unsupported_reasons(program, dtype) for backend in candidates()}


def select_backend(program: Program, dtype: str) -> Backend:
    """The best backend that runs the program.

    Raises:
        KernelUnavailable: none does; each is listed with its reasons.
    """
    for backend in candidates():
        if not backend.unsupported_reasons(program, dtype):
            return backend
    lines = [f"{name}: {'; '.join(reasons)}" for name, reasons in backend_reasons(program, dtype).items()]
    raise KernelUnavailable("no backend can run this model here. " + " | ".join(lines))
