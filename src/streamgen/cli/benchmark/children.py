"""The measurements of `bench` that need a process of their own. Each prints JSON on one line.

python -m streamgen.cli.benchmark.children matmul THREADS         GFLOP/s of torch's bf16 matrix product, size 4096
python -m streamgen.cli.benchmark.children memory MODEL OPTIONS   resident bytes of an engine whose pages were all used
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

MATMUL_SIZE = 4096
MATMUL_SECONDS = 3.0
FILL_PAGES = 96
PROCESS_STATUS = Path("/proc/self/status")


def main(argv: list[str]) -> None:
    """Run one measurement and print it."""
    name, *rest = argv
    result = matmul(int(rest[0])) if name == "matmul" else memory(rest[0], json.loads(rest[1]))
    print(json.dumps(result))


def matmul(threads: int) -> dict[str, Any]:
    """Best rate of a bf16 product of two MATMUL_SIZE squares; a process of its own keeps torch out of the engine's."""
    import torch

    torch.set_num_threads(threads)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE).bfloat16() for _ in range(2))
    torch.mm(a, b)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < MATMUL_SECONDS:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return {"gflops": 2 * MATMUL_SIZE**3 / best / 1e9, "torch": torch.__version__}


def memory(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Resident bytes of this process after an engine with FILL_PAGES pages has written all of them."""
    import anyio

    return anyio.run(_memory, model, options)


async def _memory(model: str, options: dict[str, Any]) -> dict[str, Any]:

    import streamgen as sg
    from streamgen.cli.benchmark.engine import EngineBench
    from streamgen.cli.benchmark.model_size import read_model_size
    from streamgen.config import EngineOptions

    page_bytes = sg.Engine(model, **options).plan().page_bytes
    async with sg.Engine(model, **{**options, "kv_memory": str(FILL_PAGES * page_bytes)}) as engine:
        bench = EngineBench(engine, read_model_size(EngineOptions(model=model, **options)).vocab)
        plan = bench.plan
        prompt_tokens = min(128, plan.max_context // 2)
        num_seqs = 1 + plan.num_pages * plan.page_size // prompt_tokens
        await bench.decode(num_seqs, prompt_tokens=prompt_tokens, tokens=2)
        sizes = _resident()
    return {**sizes, "planned": plan.total, "runtime": plan.runtime}


def _resident() -> dict[str, int]:
    """Bytes now, at the peak, and of them those that are pages of mapped files (the system may drop these)."""
    names = {"VmRSS": "now", "VmHWM": "peak", "RssFile": "mapped"}
    lines = (line.split() for line in PROCESS_STATUS.read_text().splitlines())
    return {names[fields[0][:-1]]: int(fields[1]) * 1024 for fields in lines if fields and fields[0][:-1] in names}


if __name__ == "__main__":
    main(sys.argv[1:])
