from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from streamgen.checkpoints.base import TokenizerSource
from streamgen.errors import CorruptWeights, LoadError, UnsupportedModel
from streamgen.text.sentencepiece import parse_model
from streamgen.text.tokenizer import load_tokenizer
from tests.text import vocabularies as v

if TYPE_CHECKING:
    from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its SWIG wrapper warns on import
    sentencepiece = pytest.importorskip("sentencepiece")

MODELS = ("llama2", "mistral-v3", "stories260K")
PARTS = (
    "the", " ", "  ", "   ", "//", "==", '""', "aa", "é", "e\u0301", "👩‍👩‍👧", "▁", "<s>", "[INST]", "<0x0A>", "\ufffd",
    "\u00a0", "\x00", "½", "ﬁ", "\n", "\t", "你好", "12", "----", "Once upon",
)  # fmt: skip


def reference(folder: str) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(v.DATA / v.FOLDERS[folder] / "tokenizer.model"))


def random_text(rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        return rng.choice(PARTS) * rng.randint(1, 40)
    if kind == 1:
        return "".join(rng.choices(PARTS, k=rng.randint(0, 12)))
    ranges = ((0x20, 0x2FF), (0x370, 0x4FF), (0x3000, 0x9FFF), (0x1F300, 0x1FAFF))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 12)))


@pytest.mark.parametrize("folder", MODELS)
def test_gives_the_ids_of_the_sentencepiece_library(folder: str) -> None:
    tokenizer, processor, rng = v.load(f"{folder}/model"), reference(folder), random.Random(5)
    assert tokenizer.vocab_size == processor.vocab_size()
    for _ in range(1500):
        text = random_text(rng)
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == processor.encode(text), text


@pytest.mark.parametrize("folder", MODELS)
def test_gives_the_texts_of_the_sentencepiece_library(folder: str) -> None:
    tokenizer, processor, rng = v.load(f"{folder}/model"), reference(folder), random.Random(6)
    plain = [i for i in range(tokenizer.vocab_size) if not (processor.is_byte(i) or processor.is_unknown(i))]
    for _ in range(500):
        ids = rng.choices(plain, k=rng.randint(0, 8))
        if folder == "stories260K" and processor.decode(ids) != tokenizer.decode(ids, at_start=True):
            # This model drops all spaces at the beginning, where one was put there.
            assert processor.decode(ids) == tokenizer.decode(ids, at_start=True).lstrip(" ")
            continue
        assert tokenizer.decode(ids, at_start=True) == processor.decode(ids)


def test_spaces_between_special_tokens() -> None:
    """Old tokenizers put a space before every part of a text; `legacy: false` says before the first only."""
    path = v.DATA / v.FOLDERS["mistral-v3"] / "tokenizer.model"
    old = load_tokenizer(TokenizerSource(sentencepiece_path=path))
    new = load_tokenizer(TokenizerSource(sentencepiece_path=path, config={"legacy": False}))
    word = old.encode("hello", add_bos=False)
    assert new.encode("hello", add_bos=False) == word
    assert old.encode("[INST]hello", add_bos=False) == [3, *word]
    assert new.encode("[INST] hello", add_bos=False) == [3, *word]
    assert new.encode("[INST]hello", add_bos=False) != [3, *word]


@pytest.mark.parametrize("normalizer", ["identity", "nmt_nfkc"])
def test_a_unigram_model(tmp_path: Path, normalizer: str) -> None:
    text = (v.DATA / "text" / "tinyshakespeare.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:100_000])
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "small"),
        vocab_size=700,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name=normalizer,
        minloglevel=2,
        num_threads=1,
    )
    path = tmp_path / "small.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(TokenizerSource(sentencepiece_path=path))
    rng = random.Random(2)
    lines = text[100_000:110_000].splitlines()
    for line in [*lines, "ﬁne  ½ ＡＢ", *(random_text(rng) for _ in range(100))]:
        assert tokenizer.encode(line, add_bos=False, parse_special=False) == processor.encode(line), line


# ---- broken files ---------------------------------------------------------------------------------------------------


def field(number: int, value: int | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def piece(text: str, kind: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + field(3, kind))


GOOD = piece("<unk>", 2) + piece("<s>", 3) + piece("</s>", 3) + piece("▁") + piece("a") + piece("▁a")
BPE = field(2, field(3, 2))


def parse(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    return load_tokenizer(TokenizerSource(sentencepiece_path=path))


def test_a_small_file_works(tmp_path: Path) -> None:
    assert parse(tmp_path, GOOD + BPE).encode("a") == [1, 5]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", CorruptWeights, "no pieces"),
        (GOOD[:-1] + BPE, CorruptWeights, "type: expected 1 to 6"),
        (GOOD + b"\xff", CorruptWeights, "protobuf"),
        (GOOD + b"\x0f", CorruptWeights, "wire type"),
        (GOOD + varint(1 << 3 | 2) + varint(2**62), CorruptWeights, "past byte"),
        (GOOD + BPE + piece("a"), CorruptWeights, "same piece"),
        (GOOD + BPE + piece("b", 9), CorruptWeights, "type"),
        (GOOD + BPE + piece(""), CorruptWeights, "empty"),
        (GOOD + BPE + field(1, field(1, b"\xff\xfe")), CorruptWeights, "UTF-8"),
        (GOOD + BPE + field(1, field(1, b"b") + b"\x15\x00\x00\xc0\x7f"), CorruptWeights, "NaN"),
        (GOOD + BPE + field(1, 7), CorruptWeights, "expected bytes"),
        (GOOD + BPE + piece("<0xA>", 6), CorruptWeights, "<0xNN>"),
        (GOOD + BPE + piece("<0x0A>", 6), CorruptWeights, "256 bytes"),
        (GOOD + field(2, field(3, 2) + field(40, 99)), CorruptWeights, "unk_id"),
        (GOOD + field(2, field(3, 4)), UnsupportedModel, "char"),
        (GOOD + field(2, field(3, 2) + field(24, 1)), UnsupportedModel, "U\\+2581"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, data: bytes, error: type[LoadError], words: str) -> None:
    with pytest.raises(error, match=words):
        parse(tmp_path, data)


def test_random_damage_never_gives_another_error(tmp_path: Path) -> None:
    good, rng = (v.DATA / v.FOLDERS["stories260K"] / "tokenizer.model").read_bytes(), random.Random(3)
    path = tmp_path / "tokenizer.model"
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        try:
            parse_model(path)
            load_tokenizer(TokenizerSource(sentencepiece_path=path)).encode("Once upon a time")
        except LoadError:
            refused += 1
    assert refused > 50
