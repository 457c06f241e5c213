"""transformers, in a process of its own: reads a task as JSON, prints when each request's tokens came.

Files with quantized weights are read as bfloat16, which is what transformers makes of them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def open_model(path: Path) -> Any:
    """In bfloat16, with torch's own attention."""
    where = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    return AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.bfloat16, attn_implementation="sdpa", **where[1])


def generate(model: Any, requests: list[dict[str, Any]], *, announces: bool) -> list[dict[str, Any]]:
    """All requests as one batch: their prompts are equally long, and so are their outputs."""
    ids = torch.tensor([request["ids"] for request in requests])
    count = requests[0]["max_tokens"]
    clock = _BatchClock(announces=announces)
    submitted = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
    return [{"submitted": submitted, "times": clock.times, "counts": [1] * count} for _ in requests]


class _BatchClock:
    """A criterion that never stops; unlike a streamer it may be had with several sequences."""

    def __init__(self, *, announces: bool) -> None:
        self.times: list[float] = []
        self._announces = announces

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """After each step."""
        self.times.append(time.perf_counter())
        if self._announces:
            self._announces = False
            print(json.dumps({"first": True}), flush=True)
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Open, warm, run."""
    torch.set_num_threads(task["threads"])
    try:
        model = open_model(Path(task["model"]))
    except (OSError, ValueError, NotImplementedError) as error:
        return {"unable": str(error).strip().splitlines()[-1]}
    if task["warm"]:
        generate(model, [{"ids": task["requests"][0]["ids"][:32], "max_tokens": 4}] * 2, announces=False)
    announces = not task["warm"]
    return {"runs": [generate(model, task["requests"], announces=announces) for _ in range(task["repeats"])]}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.stdin.read()))), flush=True)
