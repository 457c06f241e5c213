"""`streamgen inspect`: what a model file or folder holds, from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from streamgen.cli import exit_codes
from streamgen.cli.options import ENGINE_FIELDS, add_model_arguments, chosen, model_or_demo
from streamgen.cli.output import format_bytes
from streamgen.errors import LoadError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from streamgen.checkpoints.base import Checkpoint, TensorInfo, TokenizerSource
    from streamgen.config import MemoryPlan
    from streamgen.engine import Engine
    from streamgen.models.config import ModelConfig

SUMMARY = "what a model holds, without loading it"
DESCRIPTION = "Show architecture, sizes, tensors, tokenizer and the memory an engine would take. Reads headers only."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how it would be opened, which decides the memory plan."""
    add_model_arguments(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def run(arguments: argparse.Namespace) -> int:
    """Print what the headers say."""
    from streamgen.checkpoints.open import open_checkpoint
    from streamgen.engine import Engine
    from streamgen.hub import resolve_model

    path = Path(resolve_model(str(model_or_demo(arguments.model))))
    checkpoint = open_checkpoint(path)
    try:
        lines = [f"path          {path}", f"name          {checkpoint.model_name}"]
        lines += _config_lines(checkpoint.config)
        lines += _tensor_lines(checkpoint)
        lines += _tokenizer_lines(checkpoint.tokenizer_source)
        tensors = [_tensor_line(info) for info in checkpoint.tensors.values()] if arguments.tensors else []
    finally:
        checkpoint.close()
    lines += _plan_lines(Engine(path, **chosen(arguments, ENGINE_FIELDS)))
    print("\n".join([*lines, *tensors]))
    return exit_codes.OK


def _config_lines(config: ModelConfig) -> list[str]:
    heads = f"{config.num_heads} heads, {config.num_kv_heads} of keys and values, of {config.head_dim}"
    window = "" if config.sliding_window is None else f", window {config.sliding_window}"
    return [
        f"architecture  {config.architecture} (family {config.family})",
        f"sizes         {config.num_layers} layers of {config.hidden_size}, feed-forward {config.intermediate_size}",
        f"attention     {heads}{window}",
        f"rope          {config.rope.kind}, theta {config.rope.theta:g}, {config.rope.rotary_dim} dimensions",
        f"context       {config.max_context} tokens",
        f"vocabulary    {config.vocab_size}, head {'tied to the embedding' if config.tied_head else 'of its own'}",
    ]


def _tensor_lines(checkpoint: Checkpoint) -> Iterator[str]:
    infos = checkpoint.tensors.values()
    values = sum(math.prod(info.shape) for info in infos)
    stored = sum(info.num_bytes for info in infos)
    yield f"tensors       {len(infos)}, {values / 1e6:.1f} M values in {format_bytes(stored)}"
    yield from (f"              {line}" for line in _mix(infos))


def _mix(infos: Iterable[TensorInfo]) -> list[str]:
    """How the tensors are stored, most bytes first."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for info in infos:
        counts[info.type.name] += 1
        sizes[info.type.name] += info.num_bytes
    return [f"{name:5} {counts[name]:5} tensors {format_bytes(size):>10}" for name, size in sizes.most_common()]


def _tensor_line(info: TensorInfo) -> str:
    shape = " x ".join(str(size) for size in info.shape)
    return f"{info.name:60} {info.type.name:5} {shape:>16} {format_bytes(info.num_bytes):>10}"


def _tokenizer_lines(source: TokenizerSource) -> list[str]:
    from streamgen.text.tokenizer import load_tokenizer

    if source.gguf is not None:
        kind = f"in the GGUF file ({source.gguf.get('tokenizer.ggml.model', 'of unknown kind')})"
    else:
        found = source.json_path or source.sentencepiece_path
        kind = found.name if found is not None else "none"
    templates = ", ".join(source.chat_templates) or "none"
    try:
        tokenizer = load_tokenizer(source)
    except LoadError as error:
        return [f"tokenizer     {kind}; cannot be used: {error}", f"chat template {templates}"]
    ends = ", ".join(map(str, sorted(tokenizer.eos_ids))) or "none"
    return [
        f"tokenizer     {kind}; {tokenizer.vocab_size} tokens, BOS {tokenizer.bos_id}, end of text {ends}",
        f"chat template {templates}",
    ]


def _plan_lines(engine: Engine) -> list[str]:
    try:
        plan = engine.plan()
    except LoadError as error:  # the file can be inspected, though it cannot be run here
        return [f"memory        cannot be opened here: {error}"]
    return [
        f"memory        {format_bytes(plan.total)} on backend {plan.backend}, dtype {plan.dtype}",
        f"              weights   {format_bytes(plan.weights):>10}",
        f"              cache     {format_bytes(plan.cache):>10}  {_pages(plan)}",
        f"              workspace {format_bytes(plan.workspace):>10}",
        f"              runtime   {format_bytes(plan.runtime):>10}  an estimate",
        f"              left      {format_bytes(plan.headroom):>10}",
    ]


def _pages(plan: MemoryPlan) -> str:
    tokens = plan.num_pages * plan.page_size
    return f"{plan.num_pages} pages of {plan.page_size} tokens: {tokens} tokens, a sequence at most {plan.max_context}"
