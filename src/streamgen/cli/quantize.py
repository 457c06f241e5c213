"""`streamgen quantize`: a smaller copy of a model, rounded once, that this engine and others open as it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from streamgen.cli import exit_codes
from streamgen.cli.output import ProgressBar, format_bytes, note

if TYPE_CHECKING:
    import argparse

    from streamgen.checkpoints.base import Checkpoint
    from streamgen.checkpoints.safetensors import SafetensorsCheckpoint
    from streamgen.config import Quantization
    from streamgen.quantization.base import Packing

SUMMARY = "write a smaller copy of a model in 4 or 8 bits"
DESCRIPTION = """\
Round the matrices of a folder of safetensors to integers and write a folder that can be opened in its place, by this
engine and by what reads the layout of compressed-tensors. Nothing is calibrated: values are rounded to nearest, in 4
bits with the scale of least squared error for each group.

The embedding stays as it is, and of int4 the head as well. `Engine(OUT, quantization=...)` with the same value as --to
holds both in 8 bits in memory."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, and how."""
    parser.add_argument("model", metavar="MODEL", help="a folder of safetensors, or a single file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; must not be there yet")
    parser.add_argument("--to", choices=("int8", "int4"), required=True, help="bits of a value")
    parser.add_argument(
        "--group", metavar="N", help="values that share a scale: a multiple of 32, or `channel` (default: 32)"
    )
    parser.add_argument(
        "--symmetric", action="store_true", help="of int4: no zero points, a little smaller and coarser"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the copy; its path goes to stdout."""
    from streamgen.checkpoints.open import open_checkpoint
    from streamgen.checkpoints.quantize import write_quantized
    from streamgen.config import parse_quantization
    from streamgen.hub import resolve_model

    asked = parse_quantization(_spelled(arguments))
    checkpoint = open_checkpoint(Path(resolve_model(arguments.model)))
    try:
        source = _safetensors(checkpoint)
        with ProgressBar("rounding") as bar:
            write_quantized(source, arguments.out, asked, _packings(checkpoint, asked), bar.update)
    finally:
        checkpoint.close()
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    note(f"{arguments.out}: {asked}, {format_bytes(size)}")
    print(arguments.out)
    return exit_codes.OK


def _spelled(arguments: argparse.Namespace) -> str:
    parts = [arguments.to, arguments.group, "symmetric" if arguments.symmetric else None]
    return "-".join(part for part in parts if part is not None)


def _safetensors(checkpoint: Checkpoint) -> SafetensorsCheckpoint:
    """The checkpoint, if it is one to round. Raises UnsupportedModel, ConfigError."""
    from streamgen.checkpoints.safetensors import SafetensorsCheckpoint
    from streamgen.errors import ConfigError, UnsupportedModel

    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise UnsupportedModel(
            f"{checkpoint.path}: a GGUF file holds no config.json and tokenizer files to copy; quantize the folder of "
            "safetensors that it was made from"
        )
    for info in checkpoint.tensors.values():
        if info.type.is_integer:
            raise ConfigError(f"{checkpoint.path}: quantized already ({info.name!r} is {info.type.name})")
    return checkpoint


def _packings(checkpoint: Checkpoint, asked: Quantization) -> dict[str, Packing]:
    """How each matrix is rounded: all but the embedding, and of 4 bits the head. Raises ConfigError."""
    from streamgen.execution.model import choose_packings, edge_weights
    from streamgen.models.program import Embed
    from streamgen.models.registry import build_program, read_freq_factors
    from streamgen.quantization.packing import asked_packing

    config = checkpoint.config
    program = build_program(config, max_context=config.max_context, freq_factors=read_freq_factors(checkpoint))
    packings = choose_packings(program, checkpoint, "bfloat16", asked)
    embeddings = {op.weight.name for op in program.ops if isinstance(op, Embed)}
    for weight in program.linear_weights():
        if weight.name in embeddings or (asked.bits == 4 and weight.name in edge_weights(program)):
            packings.pop(weight.name, None)
        elif weight.name in packings:  # the layout knows one kind of groups, so a head has the others'
            packings[weight.name] = asked_packing(asked, f"{weight.name}.weight", weight.columns, is_edge=False)
    return packings
