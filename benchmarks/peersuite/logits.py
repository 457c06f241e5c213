"""Logits of windows of text, float32 [windows, length, vocab], from several engines, and how far they are apart."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from streamgen.backends.base import SAMPLE_ROW, StepInputs, empty_outputs
from streamgen.config import EngineOptions
from streamgen.execution.memory import PAGE_SIZE, STEP_ROWS
from streamgen.execution.model import load_runner, plan_model
from streamgen.hub import cache_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamgen.backends.base import LoadedModel

Ids = NDArray[np.int32]
Logits = NDArray[np.float32]
SOURCE = Path(__file__).parent / "llama_logits.cpp"


class Distance(Struct, frozen=True, kw_only=True):
    """An engine's next-token distributions against the exact ones.

    mean_kl, p99_kl   Kullback-Leibler divergence from the exact distribution, in nats, over all positions
    agreement         the share of positions with the same likeliest token
    perplexity        of the text's own tokens; exact_perplexity likewise by the exact distributions
    """

    mean_kl: float
    p99_kl: float
    agreement: float
    perplexity: float
    exact_perplexity: float


def torch_logits(model: Path, windows: Ids, dtype: str, threads: int) -> Logits:
    """By transformers; a GGUF file's weights are dequantized to `dtype`, which everything is computed in."""
    import torch
    import transformers

    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    folder, names = (model.parent, {"gguf_file": model.name}) if model.is_file() else (model, {})
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **names)
    network.eval()
    with torch.inference_mode():
        rows = [network(torch.from_numpy(window[None].astype(np.int64))).logits[0].float() for window in windows]
    return np.stack([row.numpy() for row in rows])


def our_logits(model: Path, windows: Ids, options: dict[str, Any], *, rows: int) -> Logits:
    """By our engine's backend, `rows` tokens of a window in each step: 1 is what decoding runs.

    options   of `Engine`
    """
    length = windows.shape[1]
    fields = {"kv_memory": "256MiB", "max_context": length + PAGE_SIZE, "max_running": 2, **options}
    chosen = EngineOptions(model=str(model), **fields)
    runner = load_runner(chosen, plan_model(chosen), None, lambda: False)
    try:
        loaded = runner._model
        assert loaded is not None, "it was just loaded"
        return np.stack([_window_logits(loaded, window, min(rows, STEP_ROWS)) for window in windows])
    finally:
        runner.close()


def _window_logits(model: LoadedModel, window: Ids, rows: int) -> Logits:
    """One sequence, in slot 0 and the pages from 0 on."""
    length = len(window)
    tokens = np.zeros((1, length + 1), np.int32)
    tokens[0, :length] = window
    num_pages = -(-(length + 1) // PAGE_SIZE)
    pages = np.arange(num_pages, dtype=np.int32)[None]
    logits = np.empty((length, model.vocab_size), np.float32)
    for start in range(0, length, rows):
        count = min(rows, length - start)
        outputs = empty_outputs(count, 0, num_logits=count, vocab=model.vocab_size)
        outputs.logits = logits[start : start + count]
        model.step(_step_inputs(tokens, pages, start, count), outputs)
    return logits


def _step_inputs(tokens: Ids, pages: Ids, start: int, count: int) -> StepInputs:
    """Rows [start, start + count) of slot 0, all of which have their logits written out."""
    samples = np.zeros(count, SAMPLE_ROW)
    samples["row"] = samples["logits"] = np.arange(count)
    samples["position"] = np.arange(start, start + count)
    samples["target"] = samples["num_top"] = samples["mask"] = -1
    samples["num_prompt"] = tokens.shape[1] - 1
    samples["top_p"] = samples["typical_p"] = samples["repetition_penalty"] = 1.0
    return StepInputs(
        tokens=tokens,
        page_tables=pages,
        slots=np.zeros(1, np.int32),
        starts=np.array([start], np.int32),
        counts=np.array([count], np.int32),
        samples=samples,
        bias_ids=np.zeros(0, np.int32),
        bias_values=np.zeros(0, np.float32),
        ban_ids=np.zeros(0, np.int32),
        masks=np.zeros((0, 0), np.uint32),
    )


def llama_cpp_logits(model: Path, windows: Ids, folder: Path, *, rows: int, threads: int, vocab: int) -> Logits:
    """By a small program against the libraries in `folder` (llama.cpp's build/bin), which is compiled first."""
    program = _compiled(folder)
    with tempfile.TemporaryDirectory() as temporary:
        ids, out = Path(temporary) / "ids", Path(temporary) / "logits"
        windows.astype(np.int32).tofile(ids)
        command = [str(program), str(model), str(ids), str(len(windows)), str(rows), str(threads), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{SOURCE.stem} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
        return np.fromfile(out, np.float32).reshape(*windows.shape, vocab)


def _compiled(folder: Path) -> Path:
    target = cache_folder() / "bench-models" / SOURCE.stem
    newest = max(SOURCE.stat().st_mtime, (folder / "llama-bench").stat().st_mtime)
    if target.is_file() and target.stat().st_mtime > newest:
        return target
    source = folder.parents[1]
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
    command = [compiler, "-std=c++17", "-O2", f"-I{source}/include", f"-I{source}/ggml/include", str(SOURCE)]
    command += [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lllama", "-lggml", "-lggml-base", "-o", str(target)]
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, check=True)
    return target


def distance(exact: Logits, other: Logits, windows: Ids) -> Distance:
    """Compare where a next token is known: all positions of every window but its last."""
    divergences, agreements, exact_losses, losses = [], [], [], []
    for p, q, following in _rows(exact, other, windows):
        divergences.append((np.exp(p) * (p - q)).sum(-1))
        agreements.append(p.argmax(-1) == q.argmax(-1))
        at = np.arange(len(following))
        exact_losses.append(-p[at, following])
        losses.append(-q[at, following])
    divergence = np.concatenate(divergences)
    return Distance(
        mean_kl=float(divergence.mean()),
        p99_kl=float(np.quantile(divergence, 0.99)),
        agreement=float(np.concatenate(agreements).mean()),
        perplexity=float(np.exp(np.concatenate(losses).mean())),
        exact_perplexity=float(np.exp(np.concatenate(exact_losses).mean())),
    )


def _rows(
    exact: Logits, other: Logits, windows: Ids, *, at_once: int = 64
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], Ids]]:
    """Log-probabilities of both, and the tokens that follow, in float64, some rows at a time."""
    for p, q, ids in zip(exact, other, windows, strict=True):
        for start in range(0, len(ids) - 1, at_once):
            rows = slice(start, min(start + at_once, len(ids) - 1))
            yield _log_softmax(p[rows]), _log_softmax(q[rows]), ids[rows.start + 1 : rows.stop + 1]


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
