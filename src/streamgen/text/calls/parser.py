"""Reading calls out of an answer that arrives in parts: what all formats share.

A parser walks over an answer symbol by symbol. A symbol is a character, or a token that the format gives a meaning to
(`<tool_call>`, `[TOOL_CALLS]`): such a token is told apart by its id, so that a text which only looks like one stays
text. Where a call may begin, a generator (the *block*) takes over and is sent one symbol at a time; until it is certain
that there is a call, what it takes is held. A symbol that does not fit ends the block: what was held is text after all,
and the symbol is looked at anew. So nothing is lost, nothing is read twice, and where an output is cut into parts makes
no difference.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from enum import Enum
from typing import TypeAlias, TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")


class CallStart(Struct, frozen=True):
    """A call begins; calls of an answer are counted from 0."""

    index: int
    name: str


class CallArguments(Struct, frozen=True):
    """More of the JSON text of its arguments."""

    index: int
    text: str


class CallEnd(Struct, frozen=True):
    """The call is whole, or broken in a way that ends it; an output that is cut has none."""

    index: int


Piece: TypeAlias = str | CallStart | CallArguments | CallEnd


class MarkerKind(Enum):
    """What a token means in a format: it opens a block, closes one, stands inside a call's head, or only decorates."""

    BEGIN = "begin"
    END = "end"
    INNER = "inner"
    QUIET = "quiet"


class Marker(Struct, frozen=True):
    """A token with a meaning. `text` is what it adds to a text, "" for special tokens; `literal` how it is written."""

    kind: MarkerKind
    text: str
    literal: str


Symbol: TypeAlias = str | Marker
Steps: TypeAlias = Generator[None, Symbol, T]


class Misfit(Exception):
    """The symbol that a block was sent is not part of it."""


SPACE = frozenset(" \t\r\n")
_CLOSERS = {"{": "}", "[": "]"}


class CallParser:
    """One answer. Owned by whoever feeds it. Never raises, whatever it is fed.

    markers   token id -> what it means
    begin     how the beginning of a block is spelled where no token stands for it; "" where one does. Its first
              character occurs in it once, so that a failed attempt never hides another
    """

    def __init__(self, markers: Mapping[int, Marker], *, begin: str = "") -> None:
        assert begin.count(begin[:1]) == 1 or not begin, f"{begin}: its first character occurs again"
        self.markers = markers
        self._begin = begin
        self._pieces: list[Piece] = []
        self._held: list[str] = []
        self._arguments: list[str] = []  # of the open call, not handed out yet
        self._index = -1  # of the last call
        self._is_open = False
        self._is_streaming = False  # what comes is arguments: not held
        self._block: Steps[None] | None = None
        opening = self._opening()
        if opening is not None:
            self._start(opening, "")

    def feed(self, text: str) -> list[Piece]:
        """What more text brings."""
        at = 0
        while at < len(text):
            if self._block is None:
                at = self._feed_plain(text, at)
            elif self._send(text[at]):
                at += 1
        return self._take()

    def feed_token(self, token: int) -> list[Piece]:
        """What a token of `markers` brings."""
        marker = self.markers[token]
        if self._block is None or not self._send(marker):
            self._meet(marker)
        return self._take()

    def finish(self) -> list[Piece]:
        """The answer is over: what was held is text. An open call stays without an end."""
        self._block = None
        self._flush_arguments()
        self._is_open = False
        self._say_held()
        return self._take()

    # ---- what formats define ----

    def _opening(self) -> Steps[None] | None:
        """A block that may stand at the very beginning of the answer without a marker."""
        return None

    def _calls(self) -> Steps[None]:
        """What follows the beginning of a block."""
        raise NotImplementedError

    # ---- plain text ----

    def _feed_plain(self, text: str, at: int) -> int:
        begins = text.find(self._begin[0], at) if self._begin else -1
        if begins < 0:
            self._say(text[at:])
            return len(text)
        self._say(text[at:begins])
        self._start(self._spelled_block(), text[begins])
        return begins + 1

    def _meet(self, marker: Marker) -> None:
        """A marker outside of a block."""
        if marker.kind is MarkerKind.BEGIN:
            self._start(self._calls(), marker.text)
        elif marker.kind is not MarkerKind.QUIET:
            self._say(marker.text)

    def _say(self, text: str) -> None:
        if not text:
            return
        pieces = self._pieces
        if pieces and isinstance(pieces[-1], str):
            pieces[-1] += text
        else:
            pieces.append(text)

    def _say_held(self) -> None:
        self._say("".join(self._held))
        self._held.clear()

    def _take(self) -> list[Piece]:
        self._flush_arguments()
        pieces, self._pieces = self._pieces, []
        return pieces

    # ---- blocks ----

    def _start(self, block: Steps[None], held: str) -> None:
        self._held = [held] if held else []
        self._block = block
        next(block)

    def _send(self, symbol: Symbol) -> bool:
        """Whether the block took the symbol."""
        assert self._block is not None, "asked of an open block"
        if not self._is_streaming:
            self._held.append(symbol if isinstance(symbol, str) else symbol.text)
        try:
            self._block.send(symbol)
        except StopIteration:
            self._block = None
            self._held.clear()
        except Misfit:
            if not self._is_streaming:
                self._held.pop()
            self._block = None
            self._end_call()
            self._say_held()
            return False
        return True

    def _spelled_block(self) -> Steps[None]:
        yield from self._match(self._begin[1:])
        yield from self._calls()

    # ---- calls ----

    def _start_call(self, name: str) -> None:
        """From here on there is a call, and what comes next are its arguments."""
        self._index += 1
        self._pieces.append(CallStart(self._index, name))
        self._held.clear()
        self._is_open = self._is_streaming = True

    def _end_arguments(self) -> None:
        """What comes next is held again."""
        self._is_streaming = False

    def _end_call(self) -> None:
        self._is_streaming = False
        if self._is_open:
            self._flush_arguments()
            self._pieces.append(CallEnd(self._index))
            self._is_open = False

    def _flush_arguments(self) -> None:
        if self._arguments:
            self._pieces.append(CallArguments(self._index, "".join(self._arguments)))
            self._arguments.clear()

    # ---- steps: each takes the symbols of one thing ----

    def _space(self) -> Steps[Symbol]:
        """The first symbol that is no white space."""
        symbol = yield
        while symbol in SPACE:
            symbol = yield
        return symbol

    def _match(self, literal: str) -> Steps[None]:
        for char in literal:
            if (yield) != char:
                raise Misfit

    def _string(self, *, limit: int | None = None) -> Steps[str]:
        """The value of a JSON string whose quote was taken, written in at most `limit` characters."""
        raw: list[str] = []
        is_escaped = False
        while True:
            symbol = yield
            if not isinstance(symbol, str):
                raise Misfit
            if symbol == '"' and not is_escaped:
                return _unquote("".join(raw))
            is_escaped = symbol == "\\" and not is_escaped
            raw.append(symbol)
            if limit is not None and len(raw) > limit:
                raise Misfit

    def _container(self, first: str, sink: list[str]) -> Steps[None]:
        """A JSON object or list whose first character was taken; its text goes to `sink`. Brackets have to match."""
        sink.append(first)
        open_ = [_CLOSERS[first]]
        while open_:
            symbol = yield
            if symbol == '"':
                sink.append('"')
                yield from self._string_text(sink)
                continue
            if not isinstance(symbol, str):
                raise Misfit
            if symbol in _CLOSERS:
                open_.append(_CLOSERS[symbol])
            elif symbol in ("}", "]") and open_.pop() != symbol:
                raise Misfit
            sink.append(symbol)

    def _string_text(self, sink: list[str]) -> Steps[None]:
        """The text of a JSON string up to its closing quote. A marker in it that can be seen is a part of its text."""
        is_escaped = False
        while True:
            symbol = yield
            if not isinstance(symbol, str):
                if not symbol.text:
                    raise Misfit
                sink.append(symbol.text)
                continue
            sink.append(symbol)
            if symbol == '"' and not is_escaped:
                return
            is_escaped = symbol == "\\" and not is_escaped


def _unquote(raw: str) -> str:
    """What a JSON string means; its text as it is where that is no JSON."""
    try:
        return msgspec.json.decode(f'"{raw}"', type=str)
    except (msgspec.DecodeError, UnicodeEncodeError):
        return raw
