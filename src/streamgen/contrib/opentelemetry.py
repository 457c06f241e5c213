"""OpenTelemetry spans of requests, under the caller's span: `pip install streamgen[opentelemetry]`.

    from streamgen.contrib.opentelemetry import traced

    engine = traced(sg.Engine("path"))          # or of streamgen.sync.Engine
    async with engine:
        with tracer.start_as_current_span("my handler"):
            await engine.generate("...")        # a span "streamgen.generate" below "my handler"

Each request is one span, from when it is made until it ends; a stream's span has the time at which the request ended,
even if it is read later. Attributes follow the semantic conventions for generative AI; neither prompts nor answers nor
stop strings are among them. No span is made current, so nothing of it leaks into the task that reads a stream.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode

from streamgen.errors import ConfigError, StreamgenError

if TYPE_CHECKING:
    from types import TracebackType

    from opentelemetry.trace import Span, Tracer, TracerProvider

    import streamgen.sync
    from streamgen.completion import Completion, Delta, TokenLogprob
    from streamgen.engine import Engine
    from streamgen.prompt import Prompt
    from streamgen.stream import Stream

T = TypeVar("T")

SPAN_NAME = "streamgen.generate"

_REQUEST_ATTRIBUTES = {
    name: f"gen_ai.request.{name}"
    for name in ("max_tokens", "temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "seed")
}


@overload
def traced(engine: streamgen.sync.Engine, *, tracer_provider: TracerProvider | None = None) -> TracedSyncEngine: ...
@overload
def traced(engine: Engine, *, tracer_provider: TracerProvider | None = None) -> TracedEngine: ...
def traced(engine: Any, *, tracer_provider: TracerProvider | None = None) -> TracedEngine | TracedSyncEngine:
    """The same engine, whose requests are spans. Everything else of it is there under its own name.

    tracer_provider   None: the global one, looked up now

    Raises:
        ConfigError: that is no engine.
    """
    if not callable(getattr(engine, "stream", None)) or not callable(getattr(engine, "generate", None)):
        raise ConfigError(f"engine: expected an engine, got {type(engine).__name__}", option="engine")
    tracer = trace.get_tracer("streamgen", tracer_provider=tracer_provider)
    return (TracedSyncEngine if hasattr(engine, "__enter__") else TracedEngine)(engine, tracer)


class _RequestSpan:
    """The span of one request: opened when it is made, closed once."""

    def __init__(self, tracer: Tracer, model: str, prompt: Any, fields: Mapping[str, Any], **more: Any) -> None:
        self._began = time.time_ns()
        self._is_over = False
        attributes = {
            "gen_ai.operation.name": "chat" if _is_chat(prompt) else "text_completion",
            "gen_ai.provider.name": "streamgen",
            "gen_ai.request.model": model,
            **_request_attributes(fields),
            **more,
        }
        self.span: Span = tracer.start_span(
            SPAN_NAME, kind=SpanKind.INTERNAL, attributes=attributes, start_time=self._began
        )

    def finish(self, completions: Sequence[Completion[Any]]) -> None:
        """The request ended, with these results; called again, it does nothing."""
        if self._is_over:
            return
        self._is_over = True
        ended = [c.timings.finished for c in completions if c.timings.finished is not None]
        if self.span.is_recording():
            self._describe(completions)
        self.span.end(self._at(max(ended)) if ended else None)

    def fail(self, error: BaseException, completions: Sequence[Completion[Any]] = ()) -> None:
        """The request ended with an error. One that was cancelled did not fail."""
        if isinstance(error, Exception) and not self._is_over:
            code = error.code if isinstance(error, StreamgenError) else type(error).__qualname__
            # NOTE: no message and no traceback: only codes are sure to hold no text of a prompt.
            self.span.set_attribute("error.type", code)
            self.span.set_status(Status(StatusCode.ERROR, code))
        partial = getattr(error, "partial", None)
        self.finish(completions or ([partial] if partial is not None else []))

    def _describe(self, completions: Sequence[Completion[Any]]) -> None:
        if not completions:
            return
        first = [c.timings.first_token for c in completions if c.timings.first_token is not None]
        if first:
            self.span.add_event("first_token", timestamp=self._at(min(first)))
        usage = completions[0].usage
        self.span.set_attributes(
            {
                "gen_ai.response.id": completions[0].id,
                "gen_ai.response.finish_reasons": [c.finish_reason or "cancelled" for c in completions],
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
                "gen_ai.usage.output_tokens": sum(c.usage.completion_tokens for c in completions),
            }
        )

    def _at(self, seconds: float) -> int:
        return self._began + round(seconds * 1e9)


def _is_chat(prompt: Any) -> bool:
    return (
        not isinstance(prompt, str) and isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)
    )


def _request_attributes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller asked for: only fields of numbers, and who asks."""
    sampling = fields.get("sampling")
    attributes = {}
    for name, key in _REQUEST_ATTRIBUTES.items():
        value = fields.get(name, getattr(sampling, name, None))
        if isinstance(value, int | float):
            attributes[key] = value
    if isinstance(fields.get("tenant"), str):
        attributes["streamgen.tenant"] = fields["tenant"]
    return attributes


class _Traced:
    """What traced engines of both kinds share."""

    def __init__(self, engine: Any, tracer: Tracer) -> None:
        self._engine = engine
        self._tracer = tracer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _open(self, prompt: Any, fields: Mapping[str, Any], **more: Any) -> _RequestSpan:
        return _RequestSpan(self._tracer, self._engine.name, prompt, fields, **more)

    def _make(self, span: _RequestSpan, make: Callable[[], T]) -> T:
        try:
            return make()
        except BaseException as e:
            span.fail(e)
            raise

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._engine!r}>"


class TracedEngine(_Traced):
    """An async engine whose `stream`, `generate`, `sample` and `score` are spans. Make one with `traced`."""

    async def __aenter__(self) -> Self:
        """Open the engine."""
        await self._engine.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        await self._engine.__aexit__(exc_type, exc, traceback)

    async def open(self) -> Self:
        """Open the engine."""
        await self._engine.open()
        return self

    def stream(self, prompt: Prompt, /, **fields: Any) -> TracedStream:
        """`Engine.stream`, as a span."""
        span = self._open(prompt, fields, **{"gen_ai.request.stream": True})
        return TracedStream(self._make(span, lambda: self._engine.stream(prompt, **fields)), span)

    async def generate(self, prompt: Prompt, /, **fields: Any) -> Completion[Any]:
        """`Engine.generate`, as a span."""
        span = self._open(prompt, fields)
        async with TracedStream(self._make(span, lambda: self._engine.stream(prompt, **fields)), span) as stream:
            return await stream.final()

    async def sample(
        self, prompt: Prompt, /, *, n: int, best_of: int | None = None, **fields: Any
    ) -> list[Completion[None]]:
        """`Engine.sample`, as one span."""
        span = self._open(prompt, fields, **{"gen_ai.request.choice.count": n})
        try:
            completions: list[Completion[None]] = await self._engine.sample(prompt, n=n, best_of=best_of, **fields)
        except BaseException as e:
            span.fail(e)
            raise
        span.finish(completions)
        return completions

    async def score(self, prompt: Prompt, continuation: str | Sequence[int], /) -> tuple[TokenLogprob, ...]:
        """`Engine.score`, as a span."""
        span = self._open(prompt, {})
        try:
            scores: tuple[TokenLogprob, ...] = await self._engine.score(prompt, continuation)
        except BaseException as e:
            span.fail(e)
            raise
        span.finish([])
        return scores


class TracedSyncEngine(_Traced):
    """The same of `streamgen.sync.Engine`."""

    def __enter__(self) -> Self:
        """Open the engine."""
        self._engine.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        self._engine.__exit__(exc_type, exc, traceback)

    def open(self) -> Self:
        """Open the engine."""
        self._engine.open()
        return self

    def stream(self, prompt: Prompt, /, **fields: Any) -> TracedSyncStream:
        """`Engine.stream`, as a span."""
        span = self._open(prompt, fields, **{"gen_ai.request.stream": True})
        return TracedSyncStream(self._make(span, lambda: self._engine.stream(prompt, **fields)), span)

    def generate(self, prompt: Prompt, /, **fields: Any) -> Completion[Any]:
        """`Engine.generate`, as a span."""
        span = self._open(prompt, fields)
        with TracedSyncStream(self._make(span, lambda: self._engine.stream(prompt, **fields)), span) as stream:
            return stream.final()

    def sample(self, prompt: Prompt, /, *, n: int, best_of: int | None = None, **fields: Any) -> list[Completion[None]]:
        """`Engine.sample`, as one span."""
        span = self._open(prompt, fields, **{"gen_ai.request.choice.count": n})
        completions: list[Completion[None]] = self._make(
            span, lambda: self._engine.sample(prompt, n=n, best_of=best_of, **fields)
        )
        span.finish(completions)
        return completions

    def score(self, prompt: Prompt, continuation: str | Sequence[int], /) -> tuple[TokenLogprob, ...]:
        """`Engine.score`, as a span."""
        span = self._open(prompt, {})
        scores: tuple[TokenLogprob, ...] = self._make(span, lambda: self._engine.score(prompt, continuation))
        span.finish([])
        return scores


class _TracedStreamBase:
    """A stream and its span; what is not named here is the stream's own."""

    def __init__(self, stream: Any, span: _RequestSpan) -> None:
        self._stream = stream
        self._span = span

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _finish(self) -> None:
        self._span.finish([self._stream.result])

    def _fail(self, error: BaseException) -> None:
        self._span.fail(error, [self._stream.result])

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._stream!r}>"

    def __del__(self) -> None:
        if "_span" in self.__dict__:  # absent if __init__ was never reached
            self._finish()


class TracedStream(_TracedStreamBase):
    """`streamgen.Stream`, whose span ends with it."""

    _stream: Stream[Any]

    async def __aenter__(self) -> Self:
        """Submit."""
        try:
            await self._stream.__aenter__()
        except BaseException as e:
            self._fail(e)
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what still runs; the request has ended then."""
        try:
            await self._stream.__aexit__(exc_type, exc, traceback)
        finally:
            self._finish()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return _Watched(self._stream, self)

    async def __anext__(self) -> Delta:
        """The next delta."""
        delta: Delta = await _Watched(self._stream, self).__anext__()
        return delta

    def texts(self) -> AsyncIterator[str]:
        """Only the texts."""
        return _Watched(self._stream.texts(), self)

    def events(self) -> AsyncIterator[Any]:
        """Typed events."""
        return _Watched(self._stream.events(), self)

    async def final(self) -> Completion[Any]:
        """Wait for the end, and return the whole."""
        try:
            completion = await self._stream.final()
        except Exception as e:
            self._fail(e)
            raise
        self._finish()
        return completion


class _Watched(AsyncIterator[Any]):
    """An iterator of a stream, at whose end the span ends.

    A reader that is cancelled leaves the request running: the stream's scope or finalizer ends the span then.
    """

    def __init__(self, iterator: AsyncIterator[Any], stream: TracedStream) -> None:
        self._iterator = iterator
        self._stream = stream  # which must not be dropped before its iterator

    async def __anext__(self) -> Any:
        try:
            return await self._iterator.__anext__()
        except StopAsyncIteration:
            self._stream._finish()
            raise
        except Exception as e:
            self._stream._fail(e)
            raise


class TracedSyncStream(_TracedStreamBase):
    """`streamgen.sync.Stream`, whose span ends with it."""

    _stream: streamgen.sync.Stream[Any]

    def __enter__(self) -> Self:
        """Submit."""
        try:
            self._stream.__enter__()
        except BaseException as e:
            self._fail(e)
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel what still runs; the request has ended then."""
        try:
            self._stream.__exit__(exc_type, exc, traceback)
        finally:
            self._finish()

    def __iter__(self) -> Iterator[Delta]:
        return self._watch(self._stream)

    def __next__(self) -> Delta:
        """The next delta."""
        try:
            return next(self._stream)
        except StopIteration:
            self._finish()
            raise
        except Exception as e:
            self._fail(e)
            raise

    def texts(self) -> Iterator[str]:
        """Only the texts."""
        return self._watch(self._stream.texts())

    def events(self) -> Iterator[Any]:
        """Typed events."""
        return self._watch(self._stream.events())

    def final(self) -> Completion[Any]:
        """Wait for the end, and return the whole."""
        try:
            completion = self._stream.final()
        except Exception as e:
            self._fail(e)
            raise
        self._finish()
        return completion

    def _watch(self, iterator: Iterator[T]) -> Iterator[T]:
        try:
            yield from iterator
        except Exception as e:
            self._fail(e)
            raise
        self._finish()
