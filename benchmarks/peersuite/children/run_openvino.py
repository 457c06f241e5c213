"""openvino-genai, in a process of its own and in its own environment: reads a task as JSON, prints when tokens came."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import openvino  # type: ignore[import-not-found, import-untyped, unused-ignore]
import openvino_genai as genai  # type: ignore[import-not-found, import-untyped, unused-ignore]


class Batch:
    """Steps the pipeline until every request is through; tokens are timed after the step that gave them."""

    def __init__(self, pipeline: Any, *, announces: bool) -> None:
        self._pipeline = pipeline
        self._announces = announces
        self._next_id = 0

    def run(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All of them, each from when it arrives."""
        waiting = sorted(enumerate(requests), key=lambda pair: pair[1]["arrival"])
        timelines: list[dict[str, Any]] = [{} for _ in requests]
        handles: dict[int, Any] = {}
        began = time.perf_counter()
        while waiting or self._pipeline.has_non_finished_requests():
            while waiting and time.perf_counter() >= began + waiting[0][1]["arrival"]:
                index, request = waiting.pop(0)
                handles[index] = self._add(request)
                due = began + request["arrival"]  # not later: while a step runs, a request waits for its end
                timelines[index] = {"submitted": due, "times": [], "counts": []}
            if not self._pipeline.has_non_finished_requests():
                time.sleep(max(0.0, began + waiting[0][1]["arrival"] - time.perf_counter()))
                continue
            self._pipeline.step()
            self._collect(handles, timelines)
        return timelines

    def _add(self, request: dict[str, Any]) -> Any:
        config = genai.GenerationConfig(max_new_tokens=request["max_tokens"], ignore_eos=True, do_sample=False)
        self._next_id += 1
        return self._pipeline.add_request(self._next_id, openvino.Tensor(np.array([request["ids"]], np.int64)), config)

    def _collect(self, handles: dict[int, Any], timelines: list[dict[str, Any]]) -> None:
        now = time.perf_counter()
        for index, handle in handles.items():
            if handle.can_read():
                count = sum(len(output.generated_ids) for output in handle.read().values())
                timelines[index]["times"].append(now)
                timelines[index]["counts"].append(count)
                if self._announces:
                    self._announces = False
                    print(json.dumps({"first": True}), flush=True)


def open_pipeline(task: dict[str, Any]) -> Any:
    """The pipeline with paged attention; no prefix caching, a step of 512 rows, as ours."""
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs = 512, max(len(task["requests"]), 2)
    scheduler.cache_size, scheduler.enable_prefix_caching = 2, False
    properties = {"INFERENCE_NUM_THREADS": task["threads"]}
    if task["model"].endswith(".gguf"):
        return genai.ContinuousBatchingPipeline(task["model"], scheduler, "CPU", properties)
    tokenizer = genai.Tokenizer(task["tokenizer"])
    return genai.ContinuousBatchingPipeline(task["model"], tokenizer, scheduler, "CPU", **properties)


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Open, warm, run."""
    try:
        pipeline = open_pipeline(task)
    except RuntimeError as error:
        return {"unable": str(error).strip().splitlines()[-1]}
    if task["warm"]:
        warm = {"ids": task["requests"][0]["ids"][:32], "max_tokens": 4, "arrival": 0.0}
        Batch(pipeline, announces=False).run([warm, warm])
        first = dict(task["requests"][0], max_tokens=2, arrival=0.0)  # the first step of a size takes much longer
        Batch(pipeline, announces=False).run([first])
    batch = Batch(pipeline, announces=not task["warm"])
    return {"runs": [batch.run(task["requests"]) for _ in range(task["repeats"])]}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.stdin.read()))), flush=True)
