"""The memory of an engine in bytes, before any of it is taken.

    weights     what the backend packs
    workspace   activations of the largest step
    runtime     what libraries and the tokenizer take beside: measured on real models, about 40 MiB and 350 B a token
    cache       pages: what `kv_memory` says, else as much as the weights, at least 1 GiB, at most half of what is free

Only headers are read for it. Several engines of one process share what is free through the `MemoryLedger`.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from streamgen.backends.base import Backend, LoadOptions
from streamgen.config import EngineOptions, MemoryPlan, parse_bytes
from streamgen.errors import ConfigError, InsufficientMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from streamgen.models.config import ModelConfig
    from streamgen.models.program import Program
    from streamgen.quantization.base import Packing

PAGE_SIZE = 16
STEP_ROWS = 512  # token budget of one step
DEFAULT_RUNNING = 256
_DEFAULT_CACHE = 1 << 30
_GIB = 1 << 30
_RUNTIME_BYTES = 40 << 20
_RUNTIME_BYTES_PER_TOKEN = 350


def available_memory() -> int:
    """Bytes that this process may still take: free memory of the system, cut to what its cgroup leaves."""
    return min(_system_available(), _cgroup_available())


class Promise:
    """What one engine may still take: `planned` bytes, of which `touched()` are in memory already."""

    def __init__(self, plan: MemoryPlan) -> None:
        self.plan = plan
        self.planned = plan.total
        self.touched: Callable[[], int] = lambda: 0

    def untouched(self) -> int:
        """Bytes that the system still counts as free, but that the engine will take."""
        return max(0, self.planned - self.touched())


class MemoryLedger:
    """The promises of the open engines of this process.

    Pages are touched when they are first used, so the system calls free what an engine that is open will take. Memory
    is the process's, hence one ledger for it, `LEDGER`, which is empty when all engines are closed. Any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a plan is made under it, and asks for `left`
        self._promises: set[Promise] = set()

    def promised(self, *, beside: Promise | None = None) -> int:
        """Bytes that open engines will take yet, those of `beside` not counted."""
        with self._lock:
            return sum(promise.untouched() for promise in self._promises if promise is not beside)

    def left(self, *, beside: Promise | None = None) -> int:
        """Bytes that may be planned with."""
        return available_memory() - self.promised(beside=beside)

    def reserve(self, make_plan: Callable[[], MemoryPlan]) -> Promise:
        """Plan and promise in one, so that two engines that open at once do not plan with the same memory."""
        with self._lock:
            promise = Promise(make_plan())
            self._promises.add(promise)
            return promise

    def renew(self, promise: Promise) -> None:
        """Promise again what an engine gave back.

        Raises:
            InsufficientMemory: there is less left than it had.
        """
        plan = promise.plan
        wanted = plan.weights + plan.workspace + plan.cache
        with self._lock:
            left = self.left(beside=promise)
            if wanted > left:
                raise InsufficientMemory(
                    f"waking takes {_gib(wanted)} again; {_gib(left)} are free and not promised to other engines. "
                    "Close or put to sleep something else, or open the engine with less kv_memory"
                )
            promise.planned = wanted

    def release(self, promise: Promise) -> None:
        """The engine is closed; idempotent."""
        with self._lock:
            self._promises.discard(promise)


LEDGER = MemoryLedger()


def plan_memory(
    options: EngineOptions,
    config: ModelConfig,
    program: Program,
    backend: Backend,
    *,
    dtype: str,
    threads: int,
    packings: Mapping[str, Packing],
) -> MemoryPlan:
    """Decide the sizes of the cache, from what is free and not promised to other engines of this process.

    Raises:
        InsufficientMemory: weights, workspace and the smallest cache do not fit; the message says what would.
        ConfigError: kv_memory or max_context cannot be met.
    """
    free = LEDGER.left()
    page_bytes = backend.page_bytes(program, dtype, PAGE_SIZE, options.kv_dtype)
    weights = backend.weight_bytes(program, dtype, packings)
    wanted_context = options.max_context or config.max_context
    load = LoadOptions(
        dtype=dtype,
        max_rows=STEP_ROWS,
        num_pages=1,
        page_size=PAGE_SIZE,
        max_context=wanted_context,
        threads=threads,
        packings=packings,
        kv_dtype=options.kv_dtype,
    )
    workspace = backend.workspace_bytes(program, load)
    runtime = _RUNTIME_BYTES + _RUNTIME_BYTES_PER_TOKEN * config.vocab_size
    left = free - weights - workspace - runtime
    cache = _cache_bytes(options.kv_memory, left=left, weights=weights, free=free)
    if left < page_bytes or cache > left:
        raise InsufficientMemory(
            f"the model needs {_gib(weights)} of weights, {_gib(workspace + runtime)} beside and "
            f"{_gib(max(cache, page_bytes))} of cache; {_gib(free)} are free. "
            + _what_fits(left, page_bytes, smallest=free - left + page_bytes, longest=config.max_context)
        )
    num_pages = max(1, cache // page_bytes)
    max_context = _fit_context(options.max_context, config.max_context, num_pages, page_bytes)
    num_pages = min(num_pages, _max_running(options) * (-(-max_context // PAGE_SIZE) + 1))
    return MemoryPlan(
        weights=weights,
        cache=num_pages * page_bytes,
        workspace=workspace,
        headroom=left - num_pages * page_bytes,
        page_bytes=page_bytes,
        num_pages=num_pages,
        max_context=max_context,
        max_running=_max_running(options),
        page_size=PAGE_SIZE,
        dtype=dtype,
        backend=backend.name,
        runtime=runtime,
    )


def _what_fits(left: int, page_bytes: int, *, smallest: int, longest: int) -> str:
    pages = left // page_bytes
    if pages < 1:
        return f"{_gib(smallest)} would do"
    return (
        f"kv_memory up to {pages * page_bytes} bytes would fit, with max_context up to "
        f"{min(pages * PAGE_SIZE, longest)}"
    )


def _max_running(options: EngineOptions) -> int:
    return options.max_running or DEFAULT_RUNNING


def _cache_bytes(kv_memory: str | float | None, *, left: int, weights: int, free: int) -> int:
    """A size is taken as it is, a number below 1 is a share of what is free."""
    if kv_memory is None:
        return max(0, min(left // 2, max(_DEFAULT_CACHE, weights)))
    if isinstance(kv_memory, str):
        return parse_bytes(kv_memory)
    return int(kv_memory * free)


def _fit_context(asked: int | None, longest: int, num_pages: int, page_bytes: int) -> int:
    """The longest sequence: what was asked for if the cache holds it, else what both model and cache allow."""
    capacity = num_pages * PAGE_SIZE
    if asked is None:
        return min(longest, capacity)
    if asked > longest:
        raise ConfigError(f"max_context: the model was made for {longest} tokens, got {asked}", option="max_context")
    if asked > capacity:
        raise ConfigError(
            f"max_context: the cache holds {capacity} tokens, got {asked}; ask for at most {capacity}, or for "
            f"kv_memory of at least {-(-asked // PAGE_SIZE) * page_bytes} bytes",
            option="max_context",
        )
    return asked


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def _system_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_available() -> int:
    """What the memory limit leaves; without a limit, more than any machine has."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit != "max":
            return max(0, int(limit) - int((root / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return 1 << 62
