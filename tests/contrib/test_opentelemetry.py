"""Spans, collected with the SDK's own exporter in memory."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import anyio
import pytest

pytest.importorskip("opentelemetry.sdk")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.trace import StatusCode

import streamgen as sg
from streamgen import sync
from streamgen.contrib.opentelemetry import TracedEngine, _RequestSpan, traced
from streamgen.testing import FakeEngine
from streamgen.text_engine import TextEngine
from tests.fakes import FakeOpener

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.anyio

CANARY = "xyzzy canary"


class Spans:
    """A provider, and what was exported."""

    def __init__(self) -> None:
        self.provider = TracerProvider()
        self.exporter = InMemorySpanExporter()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("tests")

    def all(self, name: str = "streamgen.generate") -> list[ReadableSpan]:
        """Every ended span of this name, in order."""
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def one(self) -> ReadableSpan:
        """The one request's span."""
        (span,) = self.all()
        return span


@pytest.fixture
def spans() -> Spans:
    return Spans()


def traced_engine(spans: Spans, opener: FakeOpener | None = None) -> TracedEngine:
    return traced(sg.Engine(name="tiny", _opener=opener or FakeOpener()), tracer_provider=spans.provider)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_request_is_a_span_under_the_callers(spans: Spans) -> None:
    async with traced_engine(spans) as engine:
        with spans.tracer.start_as_current_span("handler") as handler:
            completion = await engine.generate("hello", max_tokens=5, temperature=0.5, seed=3, tenant="gold")
            assert trace.get_current_span() is handler
    span = spans.one()
    assert span.parent is not None and span.parent.span_id == handler.get_span_context().span_id
    assert span.context.trace_id == handler.get_span_context().trace_id
    assert attributes(span) == {
        gen_ai.GEN_AI_OPERATION_NAME: "text_completion",
        gen_ai.GEN_AI_PROVIDER_NAME: "streamgen",
        gen_ai.GEN_AI_REQUEST_MODEL: "tiny",
        gen_ai.GEN_AI_REQUEST_MAX_TOKENS: 5,
        gen_ai.GEN_AI_REQUEST_TEMPERATURE: 0.5,
        gen_ai.GEN_AI_REQUEST_SEED: 3,
        gen_ai.GEN_AI_RESPONSE_ID: completion.id,
        gen_ai.GEN_AI_RESPONSE_FINISH_REASONS: ("length",),
        gen_ai.GEN_AI_USAGE_INPUT_TOKENS: 6,
        gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: 0,
        gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: 5,
        "streamgen.tenant": "gold",
    }
    assert span.status.status_code is StatusCode.UNSET
    (event,) = span.events
    assert event.name == "first_token"
    assert span.start_time is not None and span.end_time is not None
    assert span.start_time < event.timestamp <= span.end_time


async def test_fields_of_a_sampling_count_and_keywords_win(spans: Spans) -> None:
    async with traced_engine(spans) as engine:
        await engine.generate([sg.user("hi")], sampling=sg.Sampling(max_tokens=9, top_k=7), max_tokens=2)
    got = attributes(spans.one())
    assert (got["gen_ai.request.max_tokens"], got["gen_ai.request.top_k"]) == (2, 7)
    assert got["gen_ai.operation.name"] == "chat"


@pytest.mark.parametrize("how", ["deltas", "texts", "events", "final", "scope"])
async def test_a_stream_is_a_span_that_ends_with_it(spans: Spans, how: str, caplog: pytest.LogCaptureFixture) -> None:
    async with traced_engine(spans) as engine:
        async with engine.stream("hello", max_tokens=5) as stream:
            assert spans.all() == []
            match how:
                case "deltas":
                    text = "".join([delta.text async for delta in stream])
                case "texts":
                    text = "".join([text async for text in stream.texts()])
                case "events":
                    text = "".join([event.text async for event in stream.events() if isinstance(event, sg.Text)])
                case "final":
                    text = (await stream.final()).text
                case _:
                    text = (await anext(stream)).text
                    stream.cancel()
            assert len(spans.all()) == (how != "scope")
            assert text and stream.result.text.startswith(text)
    span = spans.one()
    assert attributes(span)[gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS] >= 1
    assert attributes(span)["gen_ai.request.stream"] is True
    assert [r for r in caplog.records if r.name.startswith("opentelemetry")] == []  # it warns of a second end


async def test_the_span_ends_when_the_request_did_not_when_it_was_read(spans: Spans) -> None:
    async with traced_engine(spans) as engine:
        async with engine.stream("hello", max_tokens=5) as stream:
            await stream._stream._mailbox.wait_end()
            ended = time.time_ns()
            assert spans.all() == []
            [delta async for delta in stream]
    span = spans.one()
    assert span.end_time is not None and span.end_time <= ended


async def test_a_stream_left_early_is_cancelled_not_failed(spans: Spans) -> None:
    async with traced_engine(spans) as engine:
        async with engine.stream("hello", max_tokens=400) as stream:
            async for _ in stream:
                break
        with anyio.CancelScope() as scope:
            async with engine.stream("hello", max_tokens=400) as stream:
                async for _ in stream:
                    scope.cancel()
    assert [attributes(s)["gen_ai.response.finish_reasons"] for s in spans.all()] == [("cancelled",)] * 2
    assert {s.status.status_code for s in spans.all()} == {StatusCode.UNSET}


async def test_a_dropped_stream_leaves_no_open_span(spans: Spans) -> None:
    async with traced_engine(spans) as engine:
        stream = engine.stream("hello", max_tokens=400)
        await anext(stream)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del stream
            gc.collect()
        engine.stream("never submitted")
        gc.collect()
    assert len(spans.all()) == 2


async def test_errors_have_their_code_and_no_text(spans: Spans) -> None:
    async with traced_engine(spans) as engine:
        with pytest.raises(sg.InvalidRequest):
            engine.stream("hello", temperature=-1)
        with pytest.raises(sg.PromptTooLong):
            await engine.generate(CANARY * 200)
        with pytest.raises(sg.TemplateError):
            await engine.generate([sg.system("refuse"), sg.user(CANARY)])
    assert [attributes(s)["error.type"] for s in spans.all()] == [
        "invalid_request",
        "prompt_too_long",
        "template_error",
    ]
    assert {s.status.status_code for s in spans.all()} == {StatusCode.ERROR}
    assert all(span.status.description == attributes(span)["error.type"] for span in spans.all())
    assert all("canary" not in span.to_json() for span in spans.all())


async def test_a_failure_in_the_middle_keeps_what_there_was(spans: Spans) -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    opener.runner.release(3)
    async with traced_engine(spans, opener) as engine:
        with pytest.raises(sg.DeadlineExceeded):
            async with engine.stream("hello", max_tokens=400, timeout=0.3) as stream:
                [delta async for delta in stream]
        opener.runner.open_gate()
    got = attributes(spans.one())
    assert got["error.type"] == "deadline_exceeded"
    assert got["gen_ai.response.finish_reasons"] == ("deadline",)
    assert got["gen_ai.usage.output_tokens"] >= 1


async def test_samples_are_one_span(spans: Spans) -> None:
    async with traced_engine(spans) as engine:
        completions = await engine.sample("hello", n=3, max_tokens=4)
        assert len(completions) == 3
        await engine.score("hello", " world")
        with pytest.raises(sg.InvalidRequest):
            await engine.sample("hello", n=0)
    sampled, _scored, failed = spans.all()
    assert attributes(sampled)["gen_ai.request.choice.count"] == 3
    assert attributes(sampled)["gen_ai.usage.output_tokens"] == 12
    assert attributes(sampled)["gen_ai.response.finish_reasons"] == ("length",) * 3
    assert attributes(failed)["error.type"] == "invalid_request"


async def test_a_sample_that_is_cancelled_did_not_fail(spans: Spans) -> None:
    opener = FakeOpener()
    opener.runner.is_gated = True
    async with traced_engine(spans, opener) as engine:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: engine.sample("hello", n=2, max_tokens=400))
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        opener.runner.open_gate()
    assert spans.one().status.status_code is StatusCode.UNSET
    assert "error.type" not in attributes(spans.one())


def test_a_span_of_several_sequences_lasts_as_long_as_the_longest(spans: Spans) -> None:
    def completion(first: float, last: float) -> sg.Completion[None]:
        return sg.Completion(id="r", finish_reason="stop", timings=sg.Timings(first_token=first, finished=last))

    request = _RequestSpan(spans.tracer, "tiny", "hello", {})
    request.finish([completion(2.0, 3.0), completion(1.0, 5.0), completion(1.5, 4.0)])
    span = spans.one()
    assert span.start_time is not None and span.end_time == span.start_time + 5_000_000_000
    assert span.events[0].timestamp == span.start_time + 1_000_000_000


async def test_concurrent_requests_are_siblings_of_their_own_callers(spans: Spans) -> None:
    parents: dict[int, int] = {}

    async def handler(engine: TracedEngine, number: int) -> None:
        with spans.tracer.start_as_current_span("handler") as span:
            async with engine.stream("hello", max_tokens=3 + number) as stream:
                async for _ in stream:
                    assert trace.get_current_span() is span
            parents[span.get_span_context().span_id] = 3 + number

    async with traced_engine(spans) as engine, anyio.create_task_group() as group:
        for number in range(5):
            group.start_soon(handler, engine, number)
    for span in spans.all():
        assert span.parent is not None
        assert attributes(span)["gen_ai.usage.output_tokens"] == parents.pop(span.parent.span_id)
    assert parents == {}


async def test_nothing_of_a_request_is_told(spans: Spans) -> None:
    async with traced_engine(spans) as engine:
        await engine.generate([sg.user(CANARY)], max_tokens=4, stop=["canary"], logit_bias={65: 1.0})
    assert "canary" not in spans.one().to_json()
    assert spans.one().to_json().count("generate") == 1


async def test_an_engine_for_tests_is_traced_the_same(spans: Spans) -> None:
    async with traced(FakeEngine("a script"), tracer_provider=spans.provider) as engine:
        assert isinstance(engine, TextEngine)
        assert (await engine.generate("hello")).text == "a script"
        async with engine.stream("hello") as stream:
            assert "".join([text async for text in stream.texts()]) == "a script"
    assert len(spans.all()) == 2


async def test_the_rest_of_the_engine_is_there(spans: Spans) -> None:
    async with traced_engine(spans) as engine:
        assert (engine.name, engine.state) == ("tiny", "ready")
        assert engine.stats().open_requests == 0
        assert await engine.tokenize("a") == [256, 97]
        with pytest.raises(AttributeError):
            _ = engine.no_such_thing


def test_the_sync_engine_is_traced_too(spans: Spans) -> None:
    def texts(stream: Any) -> str:
        return "".join(stream.texts())

    def deltas(stream: Any) -> str:
        return "".join(delta.text for delta in stream)

    def one_by_one(stream: Any) -> str:
        return "".join(iter(lambda: next(stream, sg.Delta()).text, ""))

    def final(stream: Any) -> str:
        return str(stream.final().text)

    readers: list[Callable[[Any], str]] = [texts, deltas, one_by_one, final]
    with traced(sync.Engine(name="tiny", _opener=FakeOpener()), tracer_provider=spans.provider) as engine:
        with spans.tracer.start_as_current_span("handler") as handler:
            for number, read in enumerate(readers, start=1):
                with engine.stream("hello", max_tokens=5) as stream:
                    assert len(read(stream)) == 5
                    assert len(spans.all()) == number
            engine.generate("hello", max_tokens=5)
            engine.sample("hello", n=2, max_tokens=5)
            engine.score("a", "b")
            with pytest.raises(sg.InvalidRequest):
                engine.generate("hello", top_p=7)
            with engine.stream("hello", max_tokens=400) as stream:
                next(stream)
    assert len(spans.all()) == 9
    assert {s.parent.span_id for s in spans.all() if s.parent} == {handler.get_span_context().span_id}
    assert [attributes(s).get("error.type") for s in spans.all()] == [None] * 7 + ["invalid_request", None]


def test_spans_that_nobody_records_cost_no_attributes() -> None:
    with traced(sync.Engine(_opener=FakeOpener())) as engine:  # the global provider, which does nothing
        assert engine.generate("hello", max_tokens=5).usage.completion_tokens == 5
        thread = threading.Thread(target=engine.generate, args=("hello",), kwargs={"max_tokens": 2})
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(sg.ConfigError, match="expected an engine, got str"):
        traced("engine")  # type: ignore[call-overload]  # that is the test
