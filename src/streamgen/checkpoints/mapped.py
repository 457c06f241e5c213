"""A checkpoint file in memory: mapped read-only, handed out as views, given back to the system page by page."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streamgen.errors import CorruptWeights, LoadError, ModelNotFound


class MappedFile:
    """A read-only memory map of a whole file.

    Raises:
        ModelNotFound: the file cannot be opened.
        CorruptWeights: the file is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                if self.size == 0:
                    raise CorruptWeights(f"{path}: the file is empty; download it again")
                self._map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelNotFound(f"{path}: cannot be opened ({error.strerror or error})") from error

    @property
    def buffer(self) -> mmap.mmap:
        """The map itself. Raises LoadError after `close`."""
        if self._map is None:
            raise LoadError(f"{self.path}: the checkpoint is closed; open it again to read from it")
        return self._map

    def view(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """Bytes [offset, offset + num_bytes) without a copy; read-only."""
        return np.frombuffer(self.buffer, np.uint8, num_bytes, offset)

    def release(self, offset: int, num_bytes: int) -> None:
        """Drop the resident pages that lie wholly inside the range; reading it again brings them back."""
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, end - first)

    def close(self) -> None:
        """Unmap; idempotent. Where a view is still alive, the map goes with the last one instead."""
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):
                mapped.close()
