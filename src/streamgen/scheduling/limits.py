"""What the scheduler may use: fixed when the engine opens."""

from __future__ import annotations

from msgspec import Struct

from streamgen.errors import ConfigError


class Limits(Struct, frozen=True, kw_only=True):
    """Sizes that the scheduler plans within.

    num_pages, page_size   the KV cache
    max_running            slots of the executor: most sequences that run at once
    step_tokens            most rows of one step
    max_context            most tokens of one sequence, prompt and output
    max_queued             most sequences that wait beyond those for which a slot is free
    prefix_cache           whether full pages are kept for later requests of the same scope

    Raises:
        ConfigError: a size below what any request needs.
    """

    num_pages: int
    page_size: int = 16
    max_running: int = 256
    step_tokens: int
    max_context: int
    max_queued: int = 256
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "max_running", "step_tokens", "max_context"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("max_queued", self.max_queued, 0)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.page_size)


def _check_at_least(option: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{option}: expected >= {low}, got {value}", option=option)
