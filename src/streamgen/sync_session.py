"""Sessions for plain code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, Unpack

from streamgen.session import Said, SessionBase, Turn
from streamgen.sync import Stream

if TYPE_CHECKING:
    from types import TracebackType

    from streamgen.completion import Completion, Delta
    from streamgen.request import RequestFields


class SessionStream(Stream[Any]):
    """The stream of one turn: as its async namesake, for `with` and plain iteration."""

    def __init__(self, owner: object, turn: Turn) -> None:
        super().__init__(owner, turn.submission)
        self._turn = turn

    def __enter__(self) -> Self:
        """Submit, and wait until the prompt is tokenized. Raises as `Stream` does."""
        try:
            return super().__enter__()
        except BaseException:
            self._turn.end(is_whole=False)
            raise

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what still runs; returns when the engine has freed it. The session is free for another turn."""
        try:
            super().__exit__(exc_type, exc, traceback)
        finally:
            self._turn.end(is_whole=False)

    def __next__(self) -> Delta:
        """Everything that came since the last delta. Raises as `Stream` does."""
        try:
            return super().__next__()
        except StopIteration:
            self._turn.end(is_whole=True)
            raise
        except Exception:
            self._turn.end(is_whole=False)
            raise

    def final(self) -> Completion[Any]:
        """Wait for the end and return the whole. Raises as `Stream` does."""
        try:
            completion = super().final()
        except Exception:
            self._turn.end(is_whole=False)
            raise
        self._turn.end(is_whole=True)
        return completion

    def cancel(self) -> None:
        """End the turn soon, and keep nothing of it. Thread-safe, idempotent, never blocks."""
        self._turn.drop()
        super().cancel()

    def __del__(self) -> None:
        turn: Turn | None = getattr(self, "_turn", None)
        super().__del__()
        if turn is not None:
            turn.end(is_whole=False)


class Session(SessionBase):
    """A conversation, as its async namesake. Make one with `sync.Engine.session`; threads may share it."""

    def ask(self, said: Said, /, *, output: object = None, **fields: Unpack[RequestFields]) -> Completion[Any]:
        """One turn: the whole answer, which is then part of the history. Raises as its async namesake."""
        with self.stream(said, output=output, **fields) as stream:
            return stream.final()

    def stream(self, said: Said, /, *, output: object = None, **fields: Unpack[RequestFields]) -> SessionStream:
        """One turn, as it comes. It begins here: the session is busy until the stream is read, left or dropped."""
        return SessionStream(
            self._engine, self._begin(said, fields if output is None else {"output": output, **fields})
        )

    def __enter__(self) -> Self:
        """Nothing happens until the first turn."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Cancel a turn that runs, and let pinned pages go. Idempotent. The history stays readable."""
        turn = self._close()
        if turn is not None:
            turn.submission.mailboxes[0].wait_end_blocking()
            turn.end(is_whole=False)
        self._release()

    aclose = close  # the same name as the async session's, for code that handles both
