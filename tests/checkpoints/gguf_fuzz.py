"""A fuzzer of the GGUF reader: damages small models at random, and opens what comes out.

A file ends in a `LoadError`, or it opens, is loaded with its tokenizer, and everything that it says of itself is there.
Anything else is a bug: another exception, a crash, memory out of proportion.

`python -m tests.checkpoints.gguf_fuzz --minutes 10` goes on for as long as it is told; a file that broke something
stays where the message says.
"""

from __future__ import annotations

import argparse
import faulthandler
import resource
import struct
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from streamgen.checkpoints.gguf import GgufCheckpoint
from streamgen.checkpoints.gguf_header import GgufStrings, parse_header
from streamgen.config import EngineOptions
from streamgen.errors import LoadError
from streamgen.execution.model import open_model
from streamgen.quantization.base import BLOCKS, TensorType
from tests.checkpoints.tiny_gguf import header, pair, tensor, text

if TYPE_CHECKING:
    from collections.abc import Callable

    Mutation = Callable[["Random", "Model"], bytes]

ALIGNMENT = 32
VOCAB, HEADS, KV_HEADS = 300, 2, 1
INTERESTING = (0, 1, 2, 7, 31, 32, 33, 255, 256, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 1)
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
MEMORY = 6 << 30  # bytes of address space while fuzzing: a file of some kilobytes may not ask for more


class Pair(Struct, frozen=True):
    """One entry of the metadata, its value as bytes."""

    key: str
    type: int
    value: bytes


class Tensor(Struct, frozen=True):
    """One tensor: dims in GGUF's order, its data's place counted from where data starts."""

    name: str
    dims: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None  # where it lies, if not where there is room


class Model(Struct, frozen=True):
    """A file in pieces."""

    pairs: tuple[Pair, ...]
    tensors: tuple[Tensor, ...]

    def assembled(self) -> bytes:
        """The file, data behind the header at multiples of ALIGNMENT."""
        entries, blob = [], bytearray()
        for t in self.tensors:
            offset = len(blob) if t.offset is None else t.offset
            entries.append(tensor(t.name, tuple(d % 2**64 for d in t.dims), t.type, offset))
            blob += t.data + bytes(-len(t.data) % ALIGNMENT)
        head = header([pair(p.key, p.type, p.value) for p in self.pairs], entries, data=0)
        return head + bytes(-len(head) % ALIGNMENT) + bytes(blob)


class Random:
    """Seeded choices."""

    def __init__(self, *seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def below(self, n: int) -> int:
        """0 .. n - 1."""
        return int(self._rng.integers(0, n))

    def of(self, choices: Any) -> Any:
        """One of a sequence."""
        return choices[self.below(len(choices))]

    def number(self) -> int:
        """One that programs stumble over, or a small one."""
        return int(self.of(INTERESTING)) if self.below(2) else self.below(300)

    def bytes(self, n: int) -> bytes:
        """Any bytes."""
        return self._rng.bytes(n)


# ---- models ----------------------------------------------------------------------------------------------------------


def strings(values: list[str]) -> bytes:
    """An array of strings as a value."""
    return struct.pack("<IQ", STRING, len(values)) + b"".join(map(text, values))


def numbers(type: int, layout: str, values: list[Any]) -> bytes:
    """An array of numbers as a value."""
    return struct.pack(f"<IQ{len(values)}{layout}", type, len(values), *values)


def byte_level() -> tuple[Pair, ...]:
    """A vocabulary of the 256 bytes, two pairs of them, and control tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens += ["ab", "cd"]
    controls = [f"ctrl{i}" for i in range(VOCAB - len(tokens))]
    return (
        Pair("tokenizer.ggml.model", STRING, text("gpt2")),
        Pair("tokenizer.ggml.pre", STRING, text("default")),
        Pair("tokenizer.ggml.tokens", ARRAY, strings(tokens + controls)),
        Pair("tokenizer.ggml.token_type", ARRAY, numbers(5, "i", [1] * len(tokens) + [3] * len(controls))),
        Pair("tokenizer.ggml.merges", ARRAY, strings(["a b", "c d"])),
    )


def sentencepiece() -> tuple[Pair, ...]:
    """A vocabulary of three control tokens, the 256 bytes, and letters with scores."""
    letters = [chr(ord("a") + i) for i in range(VOCAB - 259)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * len(letters)
    return (
        Pair("tokenizer.ggml.model", STRING, text("llama")),
        Pair("tokenizer.ggml.tokens", ARRAY, strings(tokens)),
        Pair("tokenizer.ggml.token_type", ARRAY, numbers(5, "i", types)),
        Pair("tokenizer.ggml.scores", ARRAY, numbers(6, "f", [-float(i) for i in range(VOCAB)])),
        Pair("tokenizer.ggml.bos_token_id", U32, struct.pack("<I", 1)),
        Pair("tokenizer.ggml.add_space_prefix", BOOL, b"\1"),
    )


def metadata(architecture: str, hidden: int, ffn: int) -> tuple[Pair, ...]:
    """What a model of one layer says of itself."""

    def u32(key: str, value: int) -> Pair:
        return Pair(key, U32, struct.pack("<I", value))

    def f32(key: str, value: float) -> Pair:
        return Pair(key, F32, struct.pack("<f", value))

    return (
        Pair("general.architecture", STRING, text(architecture)),
        u32("general.alignment", ALIGNMENT),
        u32(f"{architecture}.context_length", 64),
        u32(f"{architecture}.embedding_length", hidden),
        u32(f"{architecture}.block_count", 1),
        u32(f"{architecture}.feed_forward_length", ffn),
        u32(f"{architecture}.attention.head_count", HEADS),
        u32(f"{architecture}.attention.head_count_kv", KV_HEADS),
        f32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5),
        f32(f"{architecture}.rope.freq_base", 10000.0),
        *(sentencepiece() if architecture == "llama" else byte_level()),
        u32("tokenizer.ggml.eos_token_id", VOCAB - 1),
        Pair("tokenizer.ggml.add_bos_token", BOOL, b"\0"),
        Pair("tokenizer.chat_template", STRING, text("{{ messages[0].content }}")),
    )


def stored(random: Random, type: TensorType, rows: int, columns: int) -> bytes:
    """Rows of any bytes, those of floats finite."""
    block = BLOCKS[type]
    raw = random.bytes(rows * columns // block.values * block.num_bytes)
    return (np.frombuffer(raw, np.uint8) & 0xBF).tobytes() if type.is_integer else bytes(len(raw))


def model(architecture: str, type: TensorType, seed: int) -> Model:
    """A whole model of one layer whose matrices are of one type."""
    random, hidden, ffn = Random(seed), BLOCKS[type].values, 2 * BLOCKS[type].values
    hidden = max(hidden, 32)
    ffn = max(ffn, 64)
    kv = hidden // HEADS * KV_HEADS
    matrices = {
        "token_embd": (VOCAB, hidden),
        "blk.0.attn_q": (hidden, hidden),
        "blk.0.attn_k": (kv, hidden),
        "blk.0.attn_v": (kv, hidden),
        "blk.0.attn_output": (hidden, hidden),
        "blk.0.ffn_gate": (ffn, hidden),
        "blk.0.ffn_up": (ffn, hidden),
        "blk.0.ffn_down": (hidden, ffn),
    }
    tensors = [Tensor(f"{n}.weight", (c, r), type, stored(random, type, r, c)) for n, (r, c) in matrices.items()]
    norms = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")
    ones = np.ones(hidden, np.float32).tobytes()
    tensors += [Tensor(f"{name}.weight", (hidden,), TensorType.F32, ones) for name in norms]
    if architecture == "qwen2":
        for name, rows in (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
            tensors.append(Tensor(f"blk.0.{name}.bias", (rows,), TensorType.F32, bytes(rows * 4)))
    return Model(metadata(architecture, hidden, ffn), tuple(tensors))


def models() -> list[Model]:
    """Of two families, in every element type."""
    return [model(("llama", "qwen2")[i % 2], type, i) for i, type in enumerate(BLOCKS)]


# ---- mutations -------------------------------------------------------------------------------------------------------


def _place(random: Random, raw: bytes | bytearray, size: int) -> int:
    """A byte, mostly of the header."""
    end = len(raw) if random.below(8) == 0 else min(len(raw), 3000 + random.below(12000))
    return random.below(max(1, end - size))


def flip_bits(random: Random, m: Model) -> bytes:
    """Some bits, anywhere."""
    raw = bytearray(m.assembled())
    for _ in range(1 + random.below(4)):
        raw[_place(random, raw, 1)] ^= 1 << random.below(8)
    return bytes(raw)


def write_number(random: Random, m: Model) -> bytes:
    """A number of 4 or 8 bytes over what is there."""
    raw = bytearray(m.assembled())
    for _ in range(1 + random.below(2)):
        size = int(random.of((4, 8)))
        at = _place(random, raw, size)
        raw[at : at + size] = (random.number() % 256**size).to_bytes(size, "little")
    return bytes(raw)


def cut_and_paste(random: Random, m: Model) -> bytes:
    """A piece is taken out, doubled, or put in from elsewhere."""
    raw = m.assembled()
    at, size, other = _place(random, raw, 1), 1 + random.below(64), random.below(len(raw))
    piece = raw[other : other + size]
    return bytes(
        random.of((raw[:at] + raw[at + size :], raw[:at] + piece + raw[at:], raw[:at] + piece + raw[at + size :]))
    )


def truncate(random: Random, m: Model) -> bytes:
    """The end is missing."""
    raw = m.assembled()
    return raw[: random.below(len(raw))]


def any_value(random: Random) -> tuple[int, bytes]:
    """A value of any type, mostly well formed."""
    type = random.below(13)
    n = random.number()
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    if type in sizes:
        return type, (n % 256 ** sizes[type]).to_bytes(sizes[type], "little")
    if type == STRING:
        return type, text(random.of((b"", b"llama", b"gpt2", b"\xff", random.bytes(9), b"{{", b"{% for x in y %}")))
    kinds = (
        strings([]),
        strings(["a"] * random.below(20)),
        strings([chr(random.below(55000)) for _ in range(VOCAB)]),
        numbers(6, "f", [random.of((0.0, float("nan"), 1e38)) for _ in range(random.below(400))]),
        numbers(5, "i", [random.number() % 2**31 - 2 for _ in range(random.of((3, VOCAB)))]),
        struct.pack("<IQ", random.below(14), n) + random.bytes(16),
    )
    return ARRAY, bytes(random.of(kinds))


def change_metadata(random: Random, m: Model) -> bytes:
    """A key goes, is doubled, renamed, or gets another value."""
    pairs = list(m.pairs)
    for _ in range(1 + random.below(3)):
        at = random.below(len(pairs))
        kind = random.below(5)
        if kind == 0:
            del pairs[at]
        elif kind == 1:
            pairs.insert(random.below(len(pairs)), pairs[at])
        elif kind == 2:
            pairs[at] = replace(pairs[at], key=pairs[random.below(len(pairs))].key + random.of(("", "x", ".length")))
        elif kind == 3 and len(pairs[at].value) <= 4:  # the same type, another number
            size = len(pairs[at].value)
            pairs[at] = replace(pairs[at], value=(random.number() % 256**size).to_bytes(size, "little"))
        else:
            type, value = any_value(random)
            pairs[at] = replace(pairs[at], type=type, value=value)
        if not pairs:
            break
    return replace(m, pairs=tuple(pairs)).assembled()


def change_tensor(random: Random, m: Model) -> bytes:
    """A tensor goes, is doubled, renamed, moved, or is of another shape or type."""
    tensors = list(m.tensors)
    for _ in range(1 + random.below(2)):
        at = random.below(len(tensors))
        t = tensors[at]
        kind = random.below(7)
        if kind == 0:
            del tensors[at]
        elif kind == 1:
            tensors.insert(at, t)
        elif kind == 2:
            tensors[at] = replace(t, name=tensors[random.below(len(tensors))].name)
        elif kind == 3:
            tensors[at] = replace(t, offset=random.number() // ALIGNMENT * ALIGNMENT)
        elif kind == 4:
            dims = list(t.dims)
            dims[random.below(len(dims))] = random.number()
            tensors[at] = replace(t, dims=tuple(dims))
        elif kind == 5:
            tensors[at] = replace(t, dims=random.of((t.dims[::-1], (*t.dims, 1), (1, *t.dims), t.dims[:1])))
        else:
            tensors[at] = replace(t, type=random.of((*BLOCKS, random.below(60))))
    return replace(m, tensors=tuple(tensors)).assembled()


def change_data(random: Random, m: Model) -> bytes:
    """The file is well formed; its weights are any bytes: NaN, infinities, scales of any size."""
    at = random.below(len(m.tensors))
    tensors = list(m.tensors)
    tensors[at] = replace(tensors[at], data=random.bytes(len(tensors[at].data)))
    return replace(m, tensors=tuple(tensors)).assembled()


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits, write_number, cut_and_paste, truncate, change_metadata, change_metadata, change_tensor, change_data,
)  # fmt: skip


# ---- opening ---------------------------------------------------------------------------------------------------------


def open_file(path: Path) -> LoadError | None:
    """Read everything of the file, and load it; the error that it ended in, if any. Raises what is no LoadError."""
    try:
        read_all(path)
        open_model(EngineOptions(model=str(path), threads=1, kv_memory="1MB"), None, lambda: False).close()
    except LoadError as error:
        assert str(error), "an error without a message"
        return error
    return None


def read_all(path: Path) -> None:
    """Every string and every byte that the header tells of. Raises LoadError."""
    raw = path.read_bytes()
    end = 0
    for entry in parse_header(raw, str(path)).tensors:
        assert entry.offset >= end and all(entry.shape), f"{entry.name} overlaps, or is empty"
        end = entry.offset + entry.num_bytes
    assert end <= len(raw), "a tensor passes the end of the file"
    checkpoint = GgufCheckpoint(path)
    try:
        for value in checkpoint.metadata.values():
            if isinstance(value, GgufStrings):
                assert len(list(value)) == len(value)
        for name, info in checkpoint.tensors.items():
            data = checkpoint.read(name).data
            assert data.nbytes == info.num_bytes and int(data.max(initial=0)) < 256
        assert checkpoint.tokenizer_source.gguf is not None
        assert checkpoint.config is not None
    finally:
        checkpoint.close()


class Fuzzer:
    """Mutants one after the other, the same for the same seed. The one under way is at `path`."""

    def __init__(self, path: Path, *, seed: int) -> None:
        self.path = path
        self.endings: Counter[str] = Counter()
        self._seed = seed
        self._models = models()

    def step(self) -> None:
        """One mutant. Raises what no file should raise."""
        random = Random(self._seed, self.endings.total())
        m = random.of(self._models)
        mutation = random.of(MUTATIONS)
        self.path.write_bytes(mutation(random, m))
        try:
            found = open_file(self.path)
        except Exception as error:
            error.add_note(f"mutant {self.endings.total()} of seed {self._seed}, by {mutation.__name__}: {self.path}")
            raise
        self.endings["loaded" if found is None else type(found).__name__] += 1


def main(arguments: list[str] | None = None) -> None:
    """Fuzz until the time is over; what breaks ends it with the file's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args(arguments)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    path = Path(tempfile.mkdtemp(prefix="gguf-fuzz-")) / "mutant.gguf"
    fuzzer = Fuzzer(path, seed=options.seed)
    end = time.monotonic() + options.minutes * 60
    while time.monotonic() < end:
        fuzzer.step()
    endings = ", ".join(f"{count} {name}" for name, count in fuzzer.endings.most_common())
    print(f"seed {options.seed}: {fuzzer.endings.total()} files, nothing broke: {endings}")


if __name__ == "__main__":
    main()
