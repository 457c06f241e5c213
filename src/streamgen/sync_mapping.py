"""`Engine.map` for plain code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

from streamgen.mapping import MapBase, Result, close_generator, not_a_source

if TYPE_CHECKING:
    from types import TracebackType

    from streamgen.engine_base import EngineBase
    from streamgen.prompt import Prompt

T = TypeVar("T")


class ResultStream(MapBase[T]):
    """An iterator of results. Make one with `Engine.map`.

    The source is read by the thread that reads the results, while it waits for one. One thread at a time may read.
    """

    def __init__(self, engine: EngineBase, source: Iterable[Prompt], **options: Any) -> None:
        if isinstance(source, str | bytes | Mapping) or not isinstance(source, Iterable):
            raise not_a_source(source, "an iterable of prompts")
        super().__init__(engine, source, **options)

    def __enter__(self) -> Self:
        """Nothing happens until it is read."""
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End what still runs; returns when the engine has freed it and a source that is a generator is closed."""
        self.close()

    def close(self) -> None:
        """End what runs, and close the source if it is a generator. Idempotent."""
        for mailbox in self._cancel_all():
            mailbox.wait_end_blocking()
        iterator, self._iterator = self._iterator, None
        close_generator(iterator)

    def __iter__(self) -> Iterator[Result[T]]:
        return self

    def __next__(self) -> Result[T]:
        """The next result. Raises as its async namesake."""
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def _next(self) -> Result[T]:
        while True:
            self._fill()
            result = self._take()
            if result is not None:
                return result
            if self._is_over():
                error = self._take_error()
                raise StopIteration if error is None else error
            limit = None if self._pending is None else self._retry_after
            self._arrivals.notifier.wait_blocking(self._is_news, limit)

    def _fill(self) -> None:
        self._retry()
        while self._has_room():
            self._pull()

    def _pull(self) -> None:
        try:
            if self._iterator is None:
                source: Any = self._source
                self._iterator = iter(source)
            prompt = next(self._iterator)
        except StopIteration:
            self._end_source(None)
        except Exception as error:  # the source's own; it is raised when its turn comes
            self._end_source(error)
        else:
            self._add(prompt)
