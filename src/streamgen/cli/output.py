"""What the commands write beside their results: notes and errors on stderr, and a progress bar on a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

BAR_WIDTH = 28
REDRAW_SECONDS = 0.1


def note(text: str) -> None:
    """Say something that is not the result."""
    print(text, file=sys.stderr, flush=True)


def complain(text: str) -> None:
    """Say what went wrong."""
    note(f"streamgen: {text}")


def format_bytes(count: float) -> str:
    """A size as people read it, in powers of 1024: `93.8 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


class ProgressBar:
    """One line on stderr that grows, and is wiped at the end; nothing at all where stderr is no terminal."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._shown = sys.stderr.isatty()
        self._last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def update(self, done: float, total: float | None, label: str | None = None) -> None:
        """Draw `done` of `total` bytes; an unknown total shows the bytes alone."""
        now = time.monotonic()
        finished = total is not None and done >= total
        if not self._shown or (now - self._last < REDRAW_SECONDS and not finished):
            return
        self._last = now
        sys.stderr.write(f"\r\x1b[K{label or self._label} {self._bar(done, total)}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Wipe the line."""
        if self._shown and self._last:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._last = 0.0

    def _bar(self, done: float, total: float | None) -> str:
        if not total:
            return format_bytes(done)
        share = min(max(done / total, 0.0), 1.0)
        full = round(share * BAR_WIDTH)
        return f"[{'#' * full}{' ' * (BAR_WIDTH - full)}] {share:4.0%} of {format_bytes(total)}"
