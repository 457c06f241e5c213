"""Prometheus metrics of an engine, in a registry of your own.  python examples/metrics.py [MODEL]

Needs `pip install "streamgen[prometheus]"`.
"""

import sys

from prometheus_client import CollectorRegistry, generate_latest

from streamgen import sync
from streamgen.contrib import prometheus

registry = CollectorRegistry()
with sync.Engine(*sys.argv[1:2]) as engine:
    prometheus.register({"demo": engine}, registry=registry)
    for colour in ("red", "green", "blue"):
        engine.generate(f"Some things that are {colour}:", max_tokens=16)
    # What a server would answer at /metrics; prometheus_client.make_asgi_app(registry) is such a server.
    for line in generate_latest(registry).decode().splitlines():
        if not line.startswith("#") and "_bucket" not in line:
            print(line)
