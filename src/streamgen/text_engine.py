"""TextEngine: what an application needs of an engine, so that a test can put another in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, Unpack, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable, Sequence
    from types import TracebackType

    from streamgen.completion import Completion
    from streamgen.config import EngineState
    from streamgen.mapping import ResultStream
    from streamgen.metrics import Stats
    from streamgen.prompt import Prompt
    from streamgen.request import RequestFields
    from streamgen.session import Session
    from streamgen.stream import Stream


@runtime_checkable
class TextEngine(Protocol):
    """An engine as applications see it: `streamgen.Engine`, `streamgen.testing.FakeEngine`, or a wrapper of either."""

    @property
    def state(self) -> EngineState:
        """Where the engine is in its life."""
        ...

    @property
    def name(self) -> str:
        """What to call it."""
        ...

    async def __aenter__(self) -> Self:
        """Open."""
        ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Drain and close."""
        ...

    async def drain(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # it cuts; it does not raise
        """Take no more requests and wait for those that were taken."""
        ...

    async def aclose(self) -> None:
        """Close, whatever runs."""
        ...

    def stats(self) -> Stats:
        """A snapshot."""
        ...

    def stream(self, prompt: Prompt, /, *, output: None = None, **fields: Unpack[RequestFields]) -> Stream[None]:
        """A request, as it comes."""
        ...

    async def generate(
        self, prompt: Prompt, /, *, output: None = None, **fields: Unpack[RequestFields]
    ) -> Completion[None]:
        """The whole answer."""
        ...

    async def sample(
        self, prompt: Prompt, /, *, n: int, best_of: int | None = None, **fields: Unpack[RequestFields]
    ) -> list[Completion[None]]:
        """Several answers."""
        ...

    def map(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        /,
        *,
        concurrency: int | None = None,
        ordered: bool = False,
        **fields: Unpack[RequestFields],
    ) -> ResultStream[None]:
        """Many prompts."""
        ...

    def session(
        self, *, system: str | None = None, tools: Sequence[object] = (), pin: bool = False, **defaults: Any
    ) -> Session:
        """A conversation."""
        ...

    async def tokenize(self, text: str, /) -> list[int]:
        """The ids of a text."""
        ...
