"""OpenTelemetry spans of requests, under the caller's span.  python examples/spans.py [MODEL]

Needs `pip install "streamgen[opentelemetry]" opentelemetry-sdk`.
"""

import sys

import anyio
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import streamgen as sg
from streamgen.contrib.opentelemetry import traced

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))


async def main() -> None:
    """One request in a handler."""
    async with traced(sg.Engine(*sys.argv[1:2]), tracer_provider=provider) as engine:
        with provider.get_tracer("app").start_as_current_span("handler"):
            async with engine.stream([sg.user("Name three rivers.")], max_tokens=24) as stream:
                async for text in stream.texts():
                    print(text, end="", flush=True)
    for span in exporter.get_finished_spans():
        print(f"\n{span.name}", f"below span {span.parent.span_id:x}" if span.parent else "")
        for name, value in (span.attributes or {}).items():
            print(f"  {name} = {value}")


anyio.run(main)
