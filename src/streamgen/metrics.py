"""Counters and gauges as plain values: the application decides where they go."""

from __future__ import annotations

from msgspec import Struct

from streamgen.config import EngineState  # noqa: TC001  # msgspec resolves it when it decodes
from streamgen.latencies import Latencies


class Stats(Struct, frozen=True, kw_only=True):
    """A snapshot of an engine. Gauges are of the last scheduler turn; counters are since the engine opened.

    open_requests        submitted and not ended, wherever they are
    running, waiting     sequences that hold a slot, and that wait for one; paused: of those that run, for their readers
    pages_used           pages that running sequences hold; pages_cached: idle, kept for their prefix;
                         pages_pinned: kept for sessions
    requests             requests taken; prompt_tokens, completion_tokens: of those that ended
    cached_tokens        prompt tokens whose pages were found or shared
    forward_seconds      time in the device's call, summed over steps
    step_seconds         the same with all that happens between calls while there is work
    latencies            histograms of waiting and running, since the engine was made
    """

    state: EngineState
    open_requests: int = 0
    running: int = 0
    paused: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_pinned: int = 0
    pages_total: int = 0
    steps: int = 0
    preemptions: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    forward_seconds: float = 0.0
    step_seconds: float = 0.0
    latencies: Latencies = Latencies()
