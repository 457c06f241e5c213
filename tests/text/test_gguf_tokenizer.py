from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from streamgen.checkpoints.base import TokenizerSource
from streamgen.checkpoints.gguf import GgufCheckpoint
from streamgen.errors import CorruptWeights, StreamgenError, UnsupportedModel
from streamgen.text.byte_level import BYTE_OF_CHAR, PRE_TOKENIZERS, byte_level_piece_bytes
from streamgen.text.chat import ChatTemplates, normalize_messages
from streamgen.text.tokenizer import Tokenizer, load_tokenizer
from tests.real_models import QWEN_0_5B, QWEN_1_5B, PartedModel, real_model_path
from tests.text import vocabularies as v

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

regex = pytest.importorskip("regex", reason="an independent engine for Unicode regular expressions")


@pytest.fixture(scope="module")
def demo(demo_model_path: Path) -> tuple[Tokenizer, ChatTemplates]:
    return open_text(demo_model_path)


def open_text(path: Path) -> tuple[Tokenizer, ChatTemplates]:
    checkpoint = GgufCheckpoint(path)
    source = checkpoint.tokenizer_source
    tokenizer = load_tokenizer(source)
    templates = ChatTemplates(source.chat_templates, special_tokens=tokenizer.special_tokens)
    checkpoint.close()
    return tokenizer, templates


def test_demo_model_golden(demo: tuple[Tokenizer, ChatTemplates]) -> None:
    check_golden(*demo, "real_models/smollm2-135m-instruct")


@pytest.mark.parametrize("model", [QWEN_0_5B, QWEN_1_5B], ids=lambda model: model.name)
def test_qwen_golden(model: PartedModel) -> None:
    tokenizer, templates = open_text(real_model_path(model))
    # One vocabulary; but the larger file's template writes braces of its tool prompt twice.
    check_golden(tokenizer, templates if model is QWEN_0_5B else None, "real_models/qwen2.5-coder-0.5b-instruct")


def check_golden(tokenizer: Tokenizer, templates: ChatTemplates | None, folder: str) -> None:
    golden = v.golden(folder)
    assert set(tokenizer.eos_ids) == set(golden["stop_ids"])
    for case in golden["cases"]:
        if case["kind"] == "raw":
            assert tokenizer.encode(case["prompt"]) == case["prompt_ids"]
        else:
            rendered = case["rendered"]
            if templates is not None:
                assert templates.render(normalize_messages(case["messages"]), tools=case.get("tools")) == rendered
            assert tokenizer.encode(rendered, add_bos=False) == case["prompt_ids"]
        assert tokenizer.decode(case["output_ids"], at_start=False) == case["text"]
    for case in golden["scored_texts"]:
        assert tokenizer.encode(case["text"]) == case["ids"]


def test_demo_model_splits_every_digit(demo: tuple[Tokenizer, ChatTemplates]) -> None:
    tokenizer, _ = demo
    for digits in ("123", "2024", "½½", "ⅧⅧ", "१२"):
        assert tokenizer.encode(digits) == [i for digit in digits for i in tokenizer.encode(digit)]


def test_the_byte_table_is_a_bijection() -> None:
    assert sorted(BYTE_OF_CHAR.values()) == list(range(256))
    assert byte_level_piece_bytes("Ġé") == b" \xe9"
    assert byte_level_piece_bytes("▁x") == "▁x".encode()  # no byte-level piece: its own text


SAMPLES = (
    "Hello  world\n\n  I'm 1234 it's we'LL\t\ttabs ½Ⅷ१२ 你好，世界 $5+3=8 <a|b>~`^ éa\u0301 \u00a0\u2003x\r\n \r\n...",
    " 'S 'd'tt don't  ''s\u0085a \ud7b0\u1160 🙂‍↕️👩‍👩‍👧 _x_ #!? end   ",
)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_pre_tokenizers_cut_as_their_expressions_say(name: str) -> None:
    patterns = PRE_TOKENIZERS[name].patterns
    cutter = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
    )
    rng = random.Random(7)
    alphabet = "".join(SAMPLES)
    texts = [*SAMPLES, *("".join(rng.choices(alphabet, k=30)) for _ in range(200))]
    for text in texts:
        words = [word for word, _ in cutter.pre_tokenize_str(text)]
        assert words == _cut([text], patterns), text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("smollm", "a12 ½½ it's", ["a", "1", "2", " ", "½", "½", " it", "'s"]),
        ("gpt-2", "a12 ½½ it's", ["a", "12", " ½½", " it", "'s"]),
        ("gpt-2", "it'S  x!\n", ["it", "'", "S", " ", " x", "!", "\n"]),
        ("qwen2", "it'S  12(x)\n\n", ["it", "'S", " ", " ", "1", "2", "(x", ")\n\n"]),
        ("llama-bpe", "v12345 :a", ["v", "123", "45", " :", "a"]),
        ("default", "a+b 12345", ["a", "+", "b", " ", "123", "45"]),
    ],
)
def test_pre_tokenizers_cut_as_the_families_do(name: str, text: str, words: list[str]) -> None:
    assert _cut([text], PRE_TOKENIZERS[name].patterns) == words


def _cut(pieces: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Cut with another regular-expression engine: matches, and what is between them."""
    for pattern in patterns:
        pieces = [part for piece in pieces for part in _cut_once(piece, pattern)]
    return list(pieces)


def _cut_once(piece: str, pattern: str) -> list[str]:
    parts, end = [], 0
    for match in regex.finditer(pattern, piece, flags=regex.VERSION0):
        parts += [piece[end : match.start()], match.group()]
        end = match.end()
    return [part for part in [*parts, piece[end:]] if part]


# ---- small vocabularies ---------------------------------------------------------------------------------------------


def small_gpt2(**changes: Any) -> dict[str, Any]:
    tokens = [*BYTE_OF_CHAR, "ab", "abc", "<tool>", "<|im_end|>", "[PAD0]", "Ġab"]
    metadata: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [*[1] * 258, 4, 3, 5, 1],
        "merges": ["a b", "ab c", "Ġ ab"],
        "eos_token_id": 259,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def small_llama(**changes: Any) -> dict[str, Any]:
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    metadata: dict[str, Any] = {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", *raw, "▁", "a", "b", "ab", "▁ab"],
        "scores": [0.0] * 259 + [-4.0, -5.0, -6.0, -1.0, -2.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * 5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def load(metadata: dict[str, Any], **fields: Any) -> Tokenizer:
    return load_tokenizer(TokenizerSource(gguf=metadata, **fields))


def test_token_types() -> None:
    tokenizer = load(small_gpt2())
    assert tokenizer.encode("abc ab<tool><|im_end|>") == [257, 261, 258, 259]
    assert tokenizer.encode("ab<|im_end|>", parse_special=False)[0] == 256
    assert 258 in tokenizer.encode("<tool>", parse_special=False)  # user-defined tokens are words of the text
    assert tokenizer.special_ids == {259}
    assert tokenizer.decode([256, 258, 259, 260], at_start=True) == "ab<tool>"
    assert tokenizer.token_bytes(260) == b""  # padding of the vocabulary
    assert tokenizer.eos_ids == (259,)
    assert tokenizer.bos_id is None and not tokenizer.add_bos


def test_end_ids_come_from_the_metadata_the_source_and_known_texts() -> None:
    assert load(small_gpt2(eos_token_id=None)).eos_ids == (259,)
    assert load(small_gpt2(eos_token_id=0)).eos_ids == (0, 259)
    assert load(small_gpt2(), eos_ids=(7,)).eos_ids == (7, 259)


def test_add_bos_as_the_file_or_the_family_says() -> None:
    assert load(small_gpt2(bos_token_id=5, add_bos_token=True)).encode("ab") == [5, 256]
    assert load(small_gpt2(bos_token_id=5)).encode("ab") == [256]
    assert load(small_gpt2(bos_token_id=5, pre="llama-bpe")).encode("ab") == [5, 256]


def test_llama_bpe_takes_whole_words_from_the_vocabulary() -> None:
    merges = ["a b"]  # "abc" is in the vocabulary, but no merge leads there
    assert load(small_gpt2(pre="llama-bpe", merges=merges)).encode("abc") == [257]
    assert load(small_gpt2(pre="qwen2", merges=merges)).encode("abc")[0] == 256


def test_a_merge_that_is_there_twice_keeps_its_first_rank() -> None:
    tokens = [*BYTE_OF_CHAR, "ab", "bc"]
    metadata = small_gpt2(
        tokens=tokens, token_type=[1] * 258, merges=["a b", "b c", "a b"], eos_token_id=None, pre="gpt-2"
    )
    assert load(metadata).encode("abc")[0] == 256


def test_a_missing_pre_tokenizer_is_the_default_one() -> None:
    assert load(small_gpt2(pre=None)).encode("ab") == load(small_gpt2(pre="default")).encode("ab") == [256]


def test_sentencepiece_spaces() -> None:
    assert load(small_llama()).encode("ab", add_bos=False) == [263]
    assert load(small_llama()).encode("ab") == [1, 263]
    assert load(small_llama(add_space_prefix=False)).encode("ab", add_bos=False) == [262]
    assert load(small_llama()).decode([263, 263], at_start=True) == "ab ab"
    assert load(small_llama()).decode([263, 263], at_start=False) == " ab ab"
    assert load(small_llama(add_space_prefix=False)).decode([263], at_start=True) == " ab"


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        ({"model": None}, UnsupportedModel, "tokenizer.ggml.model"),
        ({"model": "bert"}, UnsupportedModel, "tokenizer.ggml.model"),
        ({"model": 3}, CorruptWeights, "tokenizer.ggml.model"),
        ({"pre": "no-such-family"}, UnsupportedModel, "no-such-family.*smollm"),
        ({"tokens": None}, CorruptWeights, "tokenizer.ggml.tokens"),
        ({"tokens": []}, CorruptWeights, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, CorruptWeights, "tokenizer.ggml.tokens"),
        ({"tokens": ["a", 5], "token_type": [1, 1]}, CorruptWeights, "tokenizer.ggml.tokens"),
        ({"tokens": "abc"}, CorruptWeights, "tokenizer.ggml.tokens"),
        ({"token_type": [1]}, CorruptWeights, "tokenizer.ggml.token_type"),
        ({"merges": None}, CorruptWeights, "tokenizer.ggml.merges"),
        ({"merges": ["ab"]}, CorruptWeights, "tokenizer.ggml.merges"),
        ({"merges": ["a b c"]}, CorruptWeights, "tokenizer.ggml.merges"),
        ({"merges": ["a zz"]}, CorruptWeights, "tokenizer.ggml.merges"),
        ({"eos_token_id": 10**6}, CorruptWeights, "tokenizer.ggml.eos_token_id"),
        ({"eos_token_id": "x"}, CorruptWeights, "tokenizer.ggml.eos_token_id"),
        ({"bos_token_id": -2}, CorruptWeights, "tokenizer.ggml.bos_token_id"),
        ({"add_bos_token": 1}, CorruptWeights, "tokenizer.ggml.add_bos_token"),
    ],
)
def test_broken_byte_level_metadata(change: dict[str, Any], error: type[StreamgenError], field: str) -> None:
    with pytest.raises(error, match=field):
        load(small_gpt2(**change))


def _with(key: str, edit: Callable[[list[Any]], Any]) -> dict[str, Any]:
    values = list(small_llama()[f"tokenizer.ggml.{key}"])
    edit(values)
    return small_llama(**{key: values})


@pytest.mark.parametrize(
    ("metadata", "field"),
    [
        (small_llama(scores=None), "scores"),
        (small_llama(scores=[1.0]), "scores"),
        (_with("scores", lambda s: s.__setitem__(0, float("nan"))), "scores"),
        (_with("tokens", lambda t: t.__setitem__(5, "<0xZZ>")), "<0xZZ>"),
        (_with("tokens", lambda t: t.__setitem__(5, "<0x0g>")), "<0x0g>"),
        (_with("tokens", lambda t: t.__setitem__(13, "<0x0a>")), "<0x0a>"),
        (_with("tokens", lambda t: t.__setitem__(5, "<0x+2>")), "<0x\\+2>"),
        (_with("token_type", lambda t: t.__setitem__(5, 1)), "256 bytes, got 255"),
        (_with("token_type", lambda t: t.__setitem__(-1, 6)), "<0xNN>"),
    ],
)
def test_broken_sentencepiece_metadata(metadata: dict[str, Any], field: str) -> None:
    with pytest.raises(CorruptWeights, match=field):
        load(metadata)
