from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamgen.text.decoder import TextDecoder
from tests.text import vocabularies as v

TEXTS = (
    "👩‍👩‍👧‍👦 family, flag 🇩🇪, skin 👍🏽",
    "日本語と中文，한국어 ไทย العربية עברית",
    "e\u0301 a\u0308\u0304 n\u0303 combining",
    "literal \ufffd\ufffd replacement",
    "   leading,  inner and trailing   ",
    "\x00\x01\x7f\u0080\u00ff\u0100\uffff\U0010ffff",
    "byte fallback: \U00013000\U0001f9ff ½ Ⅷ\r\n\t",
    "▁ the space sign itself",
)


def pieces_of(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` cut into parts of these sizes, the rest one by one."""
    parts, start = [], 0
    for size in sizes:
        parts.append(ids[start : start + size])
        start += size
    return [*parts, *([i] for i in ids[start:])]


def check_against_whole(name: str, ids: list[int], sizes: list[int], at_start: bool, skip_special: bool) -> None:
    tokenizer = v.load(name)
    decoder = TextDecoder(tokenizer, at_start=at_start, skip_special=skip_special)
    text, seen = "", []
    for part in pieces_of(ids, sizes):
        text += decoder.feed(part)
        seen += part
        data = b"".join(tokenizer.byte_table(skip_special=skip_special)[i] for i in seen)
        if at_start and tokenizer.drops_leading_space:
            data = data.removeprefix(b" ")
        assert text == without_unfinished(data), "holds back more or less than one unfinished character"
    text += decoder.finish()
    assert text == tokenizer.decode(ids, at_start=at_start, skip_special=skip_special)
    text.encode("utf-8")  # never half a surrogate pair


def without_unfinished(data: bytes) -> str:
    """All of `data` but a beginning of a character at its end: by definition, bytes that some bytes could complete."""
    for size in (3, 2, 1):
        tail = data[-size:]
        if len(tail) == size and could_begin_a_character(tail):
            return data[:-size].decode("utf-8", "replace")
    return data.decode("utf-8", "replace")


def could_begin_a_character(tail: bytes) -> bool:
    """Whether `tail` is a proper beginning of one character, found by trying to complete it."""
    for missing in (1, 2, 3):
        for second in (b"", b"\x80", b"\xbf", b"\x90"):
            rest = second + b"\x80" * (missing - len(second))
            if len(rest) != missing:
                continue
            try:
                if len((tail + rest).decode("utf-8")) == 1:
                    return True
            except UnicodeDecodeError:
                continue
    return False


@pytest.mark.parametrize("name", v.ALL)
@settings(max_examples=80, deadline=None)
@given(
    data=st.data(), at_start=st.booleans(), skip_special=st.booleans(), sizes=st.lists(st.integers(0, 4), max_size=6)
)
def test_random_ids(name: str, data: st.DataObject, at_start: bool, skip_special: bool, sizes: list[int]) -> None:
    tokenizer = v.load(name)
    any_id = st.integers(0, tokenizer.vocab_size + 3)
    # Single bytes make the interesting cases; they have small ids in every one of these vocabularies.
    small_id = st.integers(0, min(300, tokenizer.vocab_size - 1))
    ids = data.draw(st.lists(any_id | small_id, max_size=20))
    check_against_whole(name, ids, sizes, at_start, skip_special)


@pytest.mark.parametrize("name", v.ALL)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), sizes=st.lists(st.integers(0, 4), max_size=6))
@example(text=TEXTS[0], sizes=[])
@example(text=TEXTS[1], sizes=[])
@example(text=TEXTS[2], sizes=[3, 0, 2])
@example(text=TEXTS[3], sizes=[])
@example(text=TEXTS[4], sizes=[])
@example(text=TEXTS[5], sizes=[])
@example(text=TEXTS[6], sizes=[])
@example(text=TEXTS[7], sizes=[])
def test_texts_come_back(name: str, text: str, sizes: list[int]) -> None:
    tokenizer = v.load(name)
    ids = tokenizer.encode(text, add_bos=False, parse_special=False)
    check_against_whole(name, ids, sizes, at_start=True, skip_special=True)
    if keeps_text(name, text):
        assert tokenizer.decode(ids, at_start=True) == text


def keeps_text(name: str, text: str) -> bool:
    """Whether this tokenizer promises to write the text exactly."""
    import unicodedata

    if name == "qwen2/json":
        return unicodedata.normalize("NFC", text) == text
    if name == "qwen2/gguf":
        return True
    if name == "stories260K/model":
        return not (text.startswith(" ") or text.endswith(" ") or "  " in text or "▁" in text)
    return "▁" not in text  # sentencepiece writes a space as U+2581 and cannot tell them apart


@pytest.mark.parametrize("name", ["llama2/model", "stories260K/json"])
def test_only_the_very_first_space_is_dropped(name: str) -> None:
    tokenizer = v.load(name)
    ids = tokenizer.encode("the the", add_bos=False)
    first = TextDecoder(tokenizer, at_start=True)
    assert first.feed([1]) == ""  # BOS is no text
    assert first.feed(ids) + first.finish() == "the the"
    later = TextDecoder(tokenizer, at_start=False)
    assert later.feed(ids) + later.finish() == " the the"
    again = TextDecoder(tokenizer, at_start=True)
    assert again.feed(ids) + again.feed([1, *ids]) == "the the the the"


def test_special_tokens_can_be_kept() -> None:
    tokenizer = v.load("qwen2/json")
    ids = tokenizer.encode("<|im_start|>hi<|im_end|>")
    assert TextDecoder(tokenizer, at_start=True).feed(ids) == "hi"
    assert TextDecoder(tokenizer, at_start=True, skip_special=False).feed(ids) == "<|im_start|>hi<|im_end|>"


def test_an_unfinished_character_is_held_back_until_it_is_clear() -> None:
    tokenizer = v.load("llama2/model")
    raw = {byte: byte + 3 for byte in range(256)}
    decoder = TextDecoder(tokenizer, at_start=False)
    assert [decoder.feed([raw[byte]]) for byte in "€".encode()] == ["", "", "€"]
    assert decoder.feed([raw[0xE2]]) == ""
    assert decoder.feed([raw[0x41]]) == "\ufffdA"
    assert decoder.feed([raw[0xFF]]) == "\ufffd"
    assert decoder.feed([raw[0xF0], raw[0x9F]]) == ""
    assert decoder.finish() == "\ufffd"
