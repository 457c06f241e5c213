"""What the compiler's process and its host say to each other: frames of msgpack, with a length in front."""

from __future__ import annotations

import socket
import time
from typing import Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from streamgen.errors import SchemaError, SchemaTooComplex
from streamgen.grammar.bounds import CompileLimits  # noqa: TC001  # decoding needs the types
from streamgen.grammar.source import GrammarSource  # noqa: TC001

T = TypeVar("T")

MAX_FRAME = 1 << 28
_NO_SIGNAL = getattr(socket, "MSG_NOSIGNAL", 0)  # a host may have made SIGPIPE deadly again


class Compile(Struct, frozen=True, tag=True):
    """Host -> child: what to compile, and within what."""

    source: GrammarSource
    limits: CompileLimits


class Ready(Struct, frozen=True, tag=True):
    """Child -> host, first of all: it takes work from here on."""


class Compiled(Struct, frozen=True, tag=True):
    """Child -> host: the grammar, for `compiler.load_grammar`."""

    dump: bytes


class Refused(Struct, frozen=True, tag=True):
    """Child -> host: the error that compiling raised; it is a SchemaTooComplex if it names a bound."""

    message: str
    bound: str | None = None
    pointer: str | None = None
    keyword: str | None = None

    @classmethod
    def of(cls, error: SchemaError | SchemaTooComplex) -> Refused:
        """From an error."""
        if isinstance(error, SchemaTooComplex):
            return cls(error.message, bound=error.bound or "unknown")
        return cls(error.message, pointer=error.pointer, keyword=error.keyword)

    def error(self) -> SchemaError | SchemaTooComplex:
        """The error again."""
        if self.bound is not None:
            return SchemaTooComplex(self.message, bound=self.bound)
        return SchemaError(self.message, pointer=self.pointer, keyword=self.keyword)


FromChild: TypeAlias = Ready | Compiled | Refused


class OtherSideGone(Exception):
    """Nobody is there, or what it sends is no message."""


class Frames(Generic[T]):
    """One end of the connection.

    incoming   what may come
    """

    def __init__(self, sock: socket.socket, incoming: object) -> None:
        self._socket = sock
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(incoming)

    def send(self, message: Struct) -> None:
        """Write one.

        Raises:
            OtherSideGone: nobody reads.
        """
        body = msgspec.msgpack.encode(message)
        try:
            self._socket.settimeout(None)
            self._socket.sendall(len(body).to_bytes(4, "little") + body, _NO_SIGNAL)
        except OSError as error:
            raise OtherSideGone("the other side is gone") from error

    def receive(self, seconds: float | None = None) -> T:
        """Read one, within so many seconds.

        Raises:
            TimeoutError: it did not come in time. OtherSideGone: it will not come.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        size = int.from_bytes(self._read(4, deadline), "little")
        if size > MAX_FRAME:
            raise OtherSideGone(f"a frame of {size} bytes")
        try:
            return self._decoder.decode(self._read(size, deadline))
        except msgspec.MsgspecError as error:
            raise OtherSideGone(f"no message: {error}") from error

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def _read(self, size: int, deadline: float | None) -> bytearray:
        data = bytearray(size)
        rest = memoryview(data)
        try:
            while rest:
                self._socket.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
                count = self._socket.recv_into(rest)
                if count == 0:
                    raise OtherSideGone("the other side is gone")
                rest = rest[count:]
        except TimeoutError:
            raise
        except OSError as error:
            raise OtherSideGone(str(error)) from error
        return data
