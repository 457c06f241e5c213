"""Arguments that several commands share: which model, how it is opened, how tokens are chosen."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from streamgen.cli.output import ProgressBar, format_bytes, note

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from streamgen import sync
    from streamgen.config import LoadProgress

SAMPLING_FIELDS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "ignore_eos",
    "seed",
    "logprobs",
)
ENGINE_FIELDS = ("dtype", "quantization", "kv_dtype", "threads", "kv_memory", "max_context")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options of `Engine`."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a GGUF file, a folder of safetensors, or `demo` (default: demo)"
    )
    group = parser.add_argument_group("engine")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="of weights, operands and cache")
    group.add_argument(
        "--quantization", metavar="KIND", help="round a float checkpoint when it is loaded: int8, int4, int4-64 ..."
    )
    group.add_argument("--kv-dtype", choices=("auto", "int8"), help="of the cache")
    group.add_argument("--threads", type=int, metavar="N", help="default: what affinity and the cgroup allow")
    group.add_argument("--kv-memory", type=_kv_memory, metavar="SIZE", help="cache: 2GiB, or 0.3 of what is free")
    group.add_argument("--max-context", type=int, metavar="N", help="longest prompt and answer together, in tokens")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `Sampling`; what is not given is left to the checkpoint."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens to generate")
    group.add_argument("--min-tokens", type=int, metavar="N", help="no end of text before this many")
    group.add_argument("--temperature", type=float, metavar="X", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="X", help="the likeliest tokens that sum to this probability")
    group.add_argument("--top-k", type=int, metavar="N", help="the N likeliest tokens; 0: all")
    group.add_argument("--min-p", type=float, metavar="X", help="tokens at least this share of the likeliest one")
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="> 1 avoids tokens already there")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="subtracted from tokens of the answer")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="the same, once per occurrence")
    group.add_argument("--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="do not end at the end-of-text token")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    group.add_argument("--logprobs", type=int, metavar="K", help="with --json: of each token and K rivals")


def _kv_memory(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def chosen(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """The options that were given, as keyword arguments."""
    return {name: value for name in names if (value := getattr(arguments, name, None)) is not None}


def model_or_demo(model: str | None) -> str | Path:
    """The model that was asked for; else the demo model, pulled on first use."""
    if model not in (None, "demo"):
        return str(model)
    from streamgen.hub import demo_model_path

    path = demo_model_path()
    if not path.is_file():
        note("The demo model is not here yet: pulling it, once.")
        path = pull_demo_with_progress()
    return path


def pull_demo_with_progress() -> Path:
    """Bring the demo model into the user's cache; a bar shows how far it is."""
    from streamgen.hub import pull_demo

    with ProgressBar("pulling") as bar:
        path = pull_demo(on_progress=lambda progress: bar.update(progress.done, progress.total))
    note(f"The demo model is at {path} ({format_bytes(path.stat().st_size)}).")
    return path


def loading_bar(bar: ProgressBar) -> Callable[[LoadProgress], None]:
    """A callback for `Engine(on_progress=...)` that draws on `bar`."""

    def draw(progress: LoadProgress) -> None:
        bar.update(progress.done, progress.total, f"loading {progress.stage}")

    return draw


@contextmanager
def open_engine(arguments: argparse.Namespace) -> Iterator[sync.Engine]:
    """The engine that the arguments describe, open; a bar shows how far loading is."""
    from streamgen import sync

    model = model_or_demo(arguments.model)
    with (
        ProgressBar("loading") as bar,
        sync.Engine(model, on_progress=loading_bar(bar), **chosen(arguments, ENGINE_FIELDS)) as engine,
    ):
        bar.clear()
        yield engine
