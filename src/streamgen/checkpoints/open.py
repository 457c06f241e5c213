"""Opens a model path with the container that fits, and hands a program its tensors, checked against its shapes."""

from __future__ import annotations

from pathlib import Path

from streamgen.checkpoints.base import Checkpoint, RawTensor
from streamgen.checkpoints.gguf import GgufCheckpoint
from streamgen.checkpoints.gguf_header import MAGIC
from streamgen.checkpoints.safetensors import SafetensorsCheckpoint
from streamgen.errors import CorruptWeights, ModelNotFound, UnsupportedModel

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, a safetensors file, or a folder with either; reads headers only.

    Raises:
        ModelNotFound: there is nothing at `path`, or no weights in it.
        UnsupportedModel: the weights are in a container that is not opened (pickle files can run code).
        CorruptWeights: a header contradicts itself.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ModelNotFound(f"{path}: expected a model file or folder, found nothing")
    if _starts_with_magic(path):
        return GgufCheckpoint(path)
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf":
        raise CorruptWeights(f"{path}: expected a GGUF file, which starts with {MAGIC!r}; download it again")
    raise _unsupported_files(path, [path])


def _open_folder(folder: Path) -> Checkpoint:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    ggufs = [path for path in files if path.suffix == ".gguf"]
    if any(path.suffix == ".safetensors" for path in files):
        return SafetensorsCheckpoint(folder)
    if len(ggufs) == 1:
        return open_checkpoint(ggufs[0])
    if ggufs:
        raise ModelNotFound(f"{folder}: expected one .gguf file, found {_names(ggufs)}; name the file to open")
    raise _unsupported_files(folder, files)


def _unsupported_files(path: Path, files: list[Path]) -> ModelNotFound | UnsupportedModel:
    pickles = [file for file in files if file.suffix in PICKLE_SUFFIXES]
    if pickles:
        return UnsupportedModel(
            f"{path}: {_names(pickles)} may be a pickle file, which can run code when it is read; "
            "only safetensors and GGUF are opened: convert the model, or take its safetensors version"
        )
    found = _names(files) if path.is_dir() else "another kind of file"
    return ModelNotFound(f"{path}: expected .safetensors files or a .gguf file, found {found or 'an empty folder'}")


def _names(files: list[Path]) -> str:
    shown = ", ".join(file.name for file in files[:5])
    return f"{shown} and {len(files) - 5} more" if len(files) > 5 else shown


def _starts_with_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ModelNotFound(f"{path}: cannot be opened ({error.strerror or error})") from error


class CheckpointWeights:
    """A checkpoint's tensors, checked against a program's shapes; implements `backends.base.Weights`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def matrix(self, name: str, rows: int, columns: int) -> RawTensor:
        """`name`.weight [rows, columns]. Raises CorruptWeights where it is missing or of another shape."""
        return self._read(f"{name}.weight", (rows, columns))

    def vector(self, name: str, size: int) -> RawTensor:
        """The norm weight or bias `name` [size]. Raises CorruptWeights where it is missing or of another shape."""
        return self._read(name, (size,))

    def done(self, raw: RawTensor) -> None:
        """Drop the tensor's mapped bytes from memory; they can still be read."""
        self._checkpoint.release(raw.info.name)

    def _read(self, name: str, shape: tuple[int, ...]) -> RawTensor:
        raw = self._checkpoint.read(name)
        if raw.info.shape != shape:
            raise CorruptWeights(
                f"{self._checkpoint.path}: tensor {name!r}: expected shape {list(shape)} (from the configuration), "
                f"got {list(raw.info.shape)}"
            )
        return raw
