"""What the scheduler has done and where it stands, as plain numbers."""

from __future__ import annotations

from msgspec import Struct


class Counters(Struct, kw_only=True):
    """What was done since the scheduler was made."""

    steps: int = 0
    preemptions: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class SchedulerStats(Struct, frozen=True, kw_only=True):
    """Where the scheduler stands, and what it has done since it was made.

    running, waiting      sequences with and without a slot; paused: those whose readers are behind, with or without
    pages_used            held by running sequences; pages_cached: idle, with content that may be found again;
                          pages_pinned: kept for sessions, where nothing runs on them
    predicted_peak_pages  the most pages that the running sequences are expected to hold at one time
    steps                 planned so far
    computed_tokens       rows whose results arrived, those run again after a preemption included
    cached_tokens         rows that were not run because their pages were found or shared
    output_tokens         tokens given to requests; drafted_tokens, accepted_tokens: guesses, and those that were right
    """

    running: int
    waiting: int
    paused: int
    pages_used: int
    pages_cached: int
    pages_pinned: int
    pages_total: int
    predicted_peak_pages: int
    steps: int
    preemptions: int
    computed_tokens: int
    cached_tokens: int
    output_tokens: int
    drafted_tokens: int
    accepted_tokens: int
