"""Byte-level BPE: how bytes are written as characters, and how each family cuts text before merging.

A byte-level vocabulary writes every byte as one printable character (GPT-2's table), so that merges work on text.
Before merging, text is cut into words by regular expressions. GGUF files do not hold them but name a *pre-tokenizer*;
the expressions below are those that llama.cpp (src/llama-vocab.cpp) means by the names. Each expression of a sequence
cuts the pieces that the ones before it left.
"""

from __future__ import annotations

from msgspec import Struct

from streamgen.errors import UnsupportedModel


class PreTokenizer(Struct, frozen=True):
    """How a family cuts text, and two of its habits.

    patterns       applied one after the other
    ignore_merges  a word that is itself in the vocabulary is one token, whatever the merges say
    add_bos        whether raw text gets a BOS where the file does not say
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_PLAIN = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_QWEN2 = PreTokenizer((rf"{_WORDS}|\p{{N}}|{_REST}",))
_LLAMA3 = PreTokenizer((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    "gpt-2": _PLAIN,
    "phi-2": _PLAIN,
    "olmo": _PLAIN,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of that name.

    Raises:
        UnsupportedModel: it is not known; cutting text in another way would quietly make the model worse.
    """
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise UnsupportedModel(f"tokenizer.ggml.pre: pre-tokenizer {name!r} is not supported; known are {known}")
    return found


def _make_byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable latin-1 characters stand for themselves, the other 68 bytes for U+0100 onwards."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _make_byte_of_char()


def byte_level_piece_bytes(text: str) -> bytes:
    """Bytes of a byte-level piece; a piece with other characters stands for its own text."""
    try:
        return bytes([BYTE_OF_CHAR[char] for char in text])
    except KeyError:
        return text.encode("utf-8", "replace")
