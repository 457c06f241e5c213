"""The models that are measured: for each the file every engine reads.

A name says what all engines read. `demo`, `qwen-0.5b`, `qwen-1.5b`, `*-q8_0` and `*-q4_0`: one file for all. `*-bf16`:
the same numbers in each engine's own container. `*-int8`, `*-int4`: each engine quantizes the same numbers its own way.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from streamgen.checkpoints.open import open_checkpoint
from streamgen.hub import cache_folder, demo_model_path

from .generate import GGUF_FILE, SHAPE_1B, SHAPE_135M, Shape, generate

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = {shape.name: shape for shape in (SHAPE_135M, SHAPE_1B)}
FILES = {
    "demo": lambda: demo_model_path(),
    "qwen-0.5b": lambda: cache_folder() / "test-models" / "qwen2.5-coder-0.5b-instruct.gguf",
    "qwen-1.5b": lambda: cache_folder() / "test-models" / "qwen2.5-coder-1.5b-instruct.gguf",
}
FORMATS = ("bf16", "q8_0", "q4_0", "int8", "int4")
NAMES = (*FILES, *(f"{shape}-{form}" for shape in SHAPES for form in FORMATS))
GROUP_SIZE = 64  # of int4 in openvino: 576 columns are no multiple of 128


class MissingModel(Exception):
    """A file is not there and cannot be made here."""


class Model(Struct, frozen=True, kw_only=True):
    """One model.

    ours, options   what our engine opens, and with which options
    gguf            what llama.cpp reads
    openvino        a GGUF file, or a folder of openvino's own format; None where it cannot be made
    tokenizer       a GGUF file with the tokenizer, for the folder
    vocab           how many ids there are
    file_weights    bytes of weights that a decode step reads where they are kept as the file has them
    layer_weights   weights of the layers' linears: what prefill multiplies with; head_weights likewise
    """

    name: str
    ours: Path
    gguf: Path
    openvino: Path | None
    tokenizer: Path
    options: dict[str, Any] = {}
    vocab: int
    file_weights: int
    layer_weights: int
    head_weights: int


class Tools(Struct, frozen=True, kw_only=True):
    """Programs that make files of other formats, where they are installed."""

    quantize: Path | None
    openvino_python: Path | None


def find_model(name: str, tools: Tools) -> Model:
    """The model of that name; its files are made first where they are not there.

    Raises:
        MissingModel: they cannot be made, and why.
    """
    if name in FILES:
        path = FILES[name]()
        if not path.is_file():
            how = "`streamgen pull demo`" if name == "demo" else "`python -m tests.real_models`"
            raise MissingModel(f"{name}: {path} is not there; {how} fetches it")
        return _describe(name, ours=path, gguf=path, openvino=path)
    if name not in NAMES:
        raise MissingModel(f"model: expected one of {', '.join(NAMES)}, got {name!r}")
    shape_name, _, form = name.partition("-")
    folder = _generated(SHAPES[shape_name])
    if form in ("q8_0", "q4_0"):
        path = _quantized(folder, form, tools)
        return _describe(name, ours=path, gguf=path, openvino=path)
    if form == "bf16":
        openvino = _quantized(folder, "f16", tools) if tools.openvino_python else None
        return _describe(name, ours=folder, gguf=folder / GGUF_FILE, openvino=openvino)
    gguf = _quantized(folder, {"int8": "q8_0", "int4": "q4_0"}[form], tools)
    openvino = _compressed(folder, form, tools) if tools.openvino_python else None
    return _describe(name, ours=folder, gguf=gguf, openvino=openvino, options={"quantization": form})


def _generated(shape: Shape) -> Path:
    folder = cache_folder() / "bench-models" / shape.name
    if not folder.is_dir():
        if not demo_model_path().is_file():
            raise MissingModel(f"{shape.name}: the demo model's tokenizer is wanted; `streamgen pull demo` fetches it")
        print(f"generating {folder} ...", flush=True)
        generate(shape, folder)
    return folder


def _quantized(folder: Path, form: str, tools: Tools) -> Path:
    """The GGUF file in another type, by llama.cpp's own program."""
    target = folder / f"model-{form}.gguf"

    def make(part: Path) -> None:
        if tools.quantize is None:
            raise MissingModel(f"{target}: llama-quantize makes it, which is not installed")
        _run([str(tools.quantize), str(folder / GGUF_FILE), str(part), form])

    return _made(target, make)


def _compressed(folder: Path, form: str, tools: Tools) -> Path:
    """A folder of openvino's format, by openvino's own programs."""
    source = _quantized(folder, "f16", tools)

    def make(part: Path) -> None:
        script = Path(__file__).parent / "children" / "compress_openvino.py"
        _run([str(tools.openvino_python), str(script), str(source), str(part), form, str(GROUP_SIZE)])

    return _made(folder / f"openvino-{form}", make)


def _made(target: Path, make: Callable[[Path], None]) -> Path:
    if not target.exists():
        print(f"making {target} ...", flush=True)
        part = target.with_name(f"part-{target.name}")
        make(part)
        part.rename(target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise MissingModel(f"{' '.join(command[:2])} ... ended with {done.returncode}: {said[-400:]}")


def _describe(
    name: str, *, ours: Path, gguf: Path, openvino: Path | None, options: dict[str, Any] | None = None
) -> Model:
    checkpoint = open_checkpoint(ours if options is None else gguf)
    try:
        config = checkpoint.config
        matrices = {name: info for name, info in checkpoint.tensors.items() if len(info.shape) == 2}
    finally:
        checkpoint.close()
    is_tied = "lm_head.weight" not in matrices
    embedding = "model.embed_tokens.weight"
    read = [info.num_bytes for name, info in matrices.items() if is_tied or name != embedding]
    layers = [info.shape[0] * info.shape[1] for name, info in matrices.items() if name.startswith("model.layers.")]
    return Model(
        name=name,
        ours=ours,
        gguf=gguf,
        openvino=openvino,
        tokenizer=gguf,
        options=options or {},
        vocab=config.vocab_size,
        file_weights=sum(read),
        layer_weights=sum(layers),
        head_weights=config.vocab_size * config.hidden_size,
    )
