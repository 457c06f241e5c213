"""`streamgen run`: answer prompts. One prompt streams as it is generated; several run at once."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TextIO

from streamgen.cli import exit_codes
from streamgen.cli.options import (
    ENGINE_FIELDS,
    SAMPLING_FIELDS,
    add_model_arguments,
    add_sampling_arguments,
    chosen,
    model_or_demo,
    open_engine,
)
from streamgen.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from streamgen.cli.prompts import Request

SUMMARY = "answer one prompt, or many at once"
DESCRIPTION = """\
Answer the prompts of -p, or what stdin holds. One prompt streams to stdout as it is generated; several run at once and
are printed in order. With --jsonl each line of the input is a prompt: a JSON string, or an object with `prompt` or
`messages` and any fields of sampling; answers are JSON lines in the order in which they finish.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the prompts, the form of the output, sampling."""
    add_model_arguments(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="may be repeated; default: stdin")
    group.add_argument("--jsonl", nargs="?", const="-", metavar="FILE", help="one prompt per line of FILE, or of stdin")
    group.add_argument("--concurrency", type=int, default=64, metavar="N", help="requests under way (default: 64)")
    group.add_argument("--json", action="store_true", help="one JSON object per answer")
    group.add_argument("--raw", action="store_true", help="prompts as they are, without the chat template")
    group.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    add_sampling_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Stream one answer, or run a batch."""
    _check(arguments)
    if arguments.jsonl is not None:
        with _open_lines(arguments.jsonl) as lines:
            from streamgen.cli.prompts import from_json_lines

            return _run_batch(arguments, from_json_lines(lines))
    texts = arguments.prompt or [_read_stdin()]
    if len(texts) == 1 and not arguments.json:
        return _stream_one(arguments, texts[0])
    from streamgen.cli.prompts import from_texts

    return _run_batch(arguments, from_texts(texts))


def _check(arguments: argparse.Namespace) -> None:
    if arguments.raw and arguments.system is not None:
        raise ConfigError("--system: expected a chat, got --raw as well; leave one of them out", option="system")
    if arguments.jsonl is not None and arguments.prompt:
        raise ConfigError("--jsonl: expected prompts from one place, got -p as well; leave one out", option="jsonl")
    if arguments.concurrency < 1:
        raise ConfigError(f"--concurrency: expected >= 1, got {arguments.concurrency}", option="concurrency")


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise InvalidRequest("prompt: expected -p TEXT, or text on stdin; got neither", param="prompt")
    return sys.stdin.read().rstrip("\n")


def _open_lines(source: str) -> AbstractContextManager[TextIO]:
    if source == "-":
        return nullcontext(sys.stdin)
    try:
        return open(source, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--jsonl: cannot read {source}: {error.strerror}", option="jsonl") from None


def _stream_one(arguments: argparse.Namespace, text: str) -> int:
    from streamgen.cli.prompts import Request, as_prompt, use_template

    with open_engine(arguments) as engine:
        templated = use_template(engine, raw=arguments.raw, system=arguments.system)
        prompt = as_prompt(Request(index=0, text=text), system=arguments.system, templated=templated)
        with engine.stream(prompt, **chosen(arguments, SAMPLING_FIELDS)) as stream:
            for piece in stream.texts():
                print(piece, end="", flush=True)
        print()
    return exit_codes.OK


def _run_batch(arguments: argparse.Namespace, requests: Iterator[Request]) -> int:
    from streamgen.cli.batch import BatchOptions, run_batch

    options = BatchOptions(
        model=model_or_demo(arguments.model),
        engine=chosen(arguments, ENGINE_FIELDS),
        sampling=chosen(arguments, SAMPLING_FIELDS),
        system=arguments.system,
        raw=arguments.raw,
        concurrency=arguments.concurrency,
        ordered=arguments.jsonl is None,
        as_json=arguments.json or arguments.jsonl is not None,
    )
    return run_batch(options, requests)
