"""What every tokenizer container is turned into: an encoder, and what each id means.

The containers (`json_tokenizer`, `sentencepiece`, `gguf_tokenizer`) differ in how they write a vocabulary down; once
read they all answer with a `Vocabulary`, and `tokenizer.Tokenizer` knows nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import tokenizers
from msgspec import Struct

from streamgen.errors import CorruptWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

NUM_BYTES = 256


class TokenType(IntEnum):
    """The kinds of pieces; sentencepiece models and GGUF files use the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_TYPES = (TokenType.CONTROL, TokenType.UNKNOWN)  # left out of texts


class Vocabulary(Struct, frozen=True, kw_only=True):
    """A tokenizer's parts.

    core         turns text into ids; its post-processor is never run (BOS is put in front by `Tokenizer`)
    size         one more than the largest id
    piece_bytes  text of an ordinary piece -> the bytes that it stands for
    special_ids  left out of the text
    silent_ids   padding of the vocabulary: never anything but ""
    token_names  the texts behind `bos_token`, `eos_token` ..., as chat templates call them
    add_bos      whether raw text gets a BOS in front
    drops_leading_space   the encoder put a space before a text, which decoding takes away again
    """

    core: tokenizers.Tokenizer
    size: int
    piece_bytes: Callable[[str], bytes]
    special_ids: frozenset[int]
    silent_ids: frozenset[int] = frozenset()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    token_names: Mapping[str, str] = {}
    add_bos: bool = False
    drops_leading_space: bool = False


def config_token_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names: `"bos_token": "<s>"`, or an added token with its content."""
    names = {}
    for key, token in config.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if key.endswith("_token") and isinstance(text, str):
            names[key] = text
    return names


def add_tokens(core: tokenizers.Tokenizer, pieces: Iterable[tuple[str, int]]) -> None:
    """Make control and user-defined pieces known to `core` as tokens that text can name. They keep their ids.

    pieces   text and type of each; those of other types are passed over
    """
    special, plain = [], []
    for text, kind in pieces:
        if kind in SPECIAL_TYPES:
            special.append(tokenizers.AddedToken(text, normalized=False, special=True))
        elif kind == TokenType.USER_DEFINED:
            plain.append(tokenizers.AddedToken(text, normalized=False, special=False))
    core.add_special_tokens(special)
    core.add_tokens(plain)


def parse_byte_piece(text: str) -> int | None:
    """The byte that `<0xNN>` stands for, or None if the piece is anything else.

    NOTE: strict, two upper-case hex digits as sentencepiece writes them. A lenient parse would take bytes that are not
    there from a vocabulary file.
    """
    if len(text) != 6 or not text.startswith("<0x") or text[5] != ">":
        return None
    digits = text[3:5]
    return int(digits, 16) if all(digit in "0123456789ABCDEF" for digit in digits) else None


def spaced_piece_bytes(text: str) -> bytes:
    """Bytes of a piece that writes a space as U+2581, and may be one raw byte."""
    byte = parse_byte_piece(text)
    return bytes((byte,)) if byte is not None else text.replace("▁", " ").encode("utf-8", "replace")


def check_byte_pieces(texts: dict[int, str], where: str) -> None:
    """Check that the byte pieces (id -> text) are the 256 bytes, each once.

    Raises:
        CorruptWeights: a piece is no byte, or a byte is missing or there twice.
    """
    seen: set[int] = set()
    for token_id, text in texts.items():
        byte = parse_byte_piece(text)
        if byte is None:
            raise CorruptWeights(f"{where}: byte token {token_id}: expected <0xNN>, got {text[:16]!r}")
        if byte in seen:
            raise CorruptWeights(f"{where}: byte token {token_id}: {text} is there twice")
        seen.add(byte)
    if len(seen) != NUM_BYTES:
        raise CorruptWeights(f"{where}: expected byte tokens for all {NUM_BYTES} bytes, got {len(seen)}")


@contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turn what the tokenizers library raises over a broken vocabulary into CorruptWeights.

    NOTE: it raises bare `Exception`, and where its Rust code panics, a `BaseException` that would end an actor.
    """
    try:
        yield
    except Exception as error:
        raise CorruptWeights(f"{where}: the tokenizers library refused it: {error}") from None
    except BaseException as error:
        if not is_panic(error):
            raise
        raise CorruptWeights(f"{where}: the tokenizers library broke on it") from None


def is_panic(error: BaseException) -> bool:
    """Whether Rust code panicked; the class is made at run time and cannot be imported."""
    return type(error).__name__ == "PanicException"


def unique_ids(texts: list[str], where: str) -> dict[str, int]:
    """Map piece -> id.

    Raises:
        CorruptWeights: a piece is there twice, so that its id would be a matter of luck.
    """
    ids = dict(zip(texts, range(len(texts)), strict=True))
    if len(ids) != len(texts):
        token_id = next(i for i, text in enumerate(texts) if ids[text] != i)
        raise CorruptWeights(f"{where}: tokens {token_id} and {ids[texts[token_id]]} are the same piece")
    return ids
