"""The fake engine for plain code: what `streamgen.sync.Engine` is to `streamgen.Engine`."""

from __future__ import annotations

from streamgen import sync
from streamgen.testing.fake_engine import ScriptedEngine

__all__ = ["FakeEngine"]


class FakeEngine(ScriptedEngine, sync.Engine):
    """`streamgen.testing.FakeEngine`, with `with` and plain iterators. Arguments are the same."""
