"""What crosses between an engine and an executor in another process: frames of MessagePack on a socket pair.

A frame is its length, 4 bytes little-endian, and one message. Both ends run the same code, so there is no version.
"""

from __future__ import annotations

import socket
from typing import Any, Generic, TypeVar

import msgspec

from streamgen.config import EngineOptions, LoadProgress, MemoryPlan  # noqa: TC001  # decoding needs the types
from streamgen.messages import Message, StepDone, StepPlan

T = TypeVar("T")

MAX_FRAME = 1 << 28  # bytes; a plan that begins 512 sequences of 100,000 ids has half of that
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a host may have made SIGPIPE deadly again


class Load(Message, frozen=True, kw_only=True):
    """Host -> child, first of all: what to load, with the sizes that were planned."""

    options: EngineOptions
    plan: MemoryPlan


class DropPages(Message, frozen=True, kw_only=True):
    """Host -> child: give the pages back and forget the slots; answered by Dropped."""


class Dropped(Message, frozen=True, kw_only=True):
    """Child -> host: it is done."""


class Loading(Message, frozen=True, kw_only=True):
    """Child -> host: how far it is."""

    progress: LoadProgress


class Loaded(Message, frozen=True, kw_only=True):
    """Child -> host: it takes plans from here on."""


class LoadFailed(Message, frozen=True, kw_only=True):
    """Child -> host, last of all: the error's `code` and text."""

    code: str
    message: str


class StepError(Message, frozen=True, kw_only=True):
    """Child -> host: the plan raised; the child is well."""

    message: str


class SetVocabulary(Message, frozen=True, kw_only=True):
    """Host -> child, before the first grammar: the bytes of each token, and which ids end an output."""

    tokens: tuple[bytes, ...]
    stop_ids: tuple[int, ...]
    vocab_size: int


class AddGrammar(Message, frozen=True, kw_only=True):
    """Host -> child: plans after this may name this grammar; `dump` is `Grammar.dump()`."""

    key: str
    dump: bytes


class DropGrammar(Message, frozen=True, kw_only=True):
    """Host -> child: no plan will name it."""

    key: str


ToChild = Load | StepPlan | DropPages | SetVocabulary | AddGrammar | DropGrammar
ToHost = Loading | Loaded | LoadFailed | StepDone | StepError | Dropped


class FrameTooLarge(Exception):
    """A message that does not fit a frame; nothing of it was sent."""


class ConnectionEnded(Exception):
    """The other side is gone."""


class Connection(Generic[T]):
    """One end. One thread sends and one receives, the same or another; `close` is for when neither does.

    incoming   the union of what may come
    """

    def __init__(self, sock: socket.socket, incoming: Any) -> None:
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(incoming)
        self._buffer = bytearray(4)  # grows to the longest message

    def fileno(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Blocks while the other side does not read.

        Raises:
            ConnectionEnded: nobody is there. FrameTooLarge: it is longer than MAX_FRAME.
        """
        body = self._encoder.encode(message)
        if len(body) > MAX_FRAME:
            raise FrameTooLarge(f"a message of {len(body)} bytes; at most {MAX_FRAME} can cross")
        try:
            self._socket.sendall(len(body).to_bytes(4, "little") + body, _NO_SIGNAL)
        except OSError as error:
            raise ConnectionEnded("the other side is gone") from error

    def receive(self, timeout: float | None = None) -> T:
        """The next message.

        Raises:
            ConnectionEnded: nobody is there, it sent what is no message, or `timeout` seconds passed in silence.
        """
        try:
            if self._socket.gettimeout() != timeout:
                self._socket.settimeout(timeout)
            self._fill(memoryview(self._buffer)[:4])
            size = int.from_bytes(self._buffer[:4], "little")
            if size > MAX_FRAME:
                raise ConnectionEnded(f"a frame of {size} bytes")
            if size > len(self._buffer):
                self._buffer = bytearray(size)
            body = memoryview(self._buffer)[:size]
            self._fill(body)
            return self._decoder.decode(body)
        except (OSError, msgspec.MsgspecError) as error:
            raise ConnectionEnded(str(error) or type(error).__name__) from error

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def _fill(self, target: memoryview) -> None:
        while target:
            count = self._socket.recv_into(target)
            if count == 0:
                raise ConnectionEnded("the other side is gone")
            target = target[count:]
