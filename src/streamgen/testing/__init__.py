"""For the tests of applications: engines without weights, and checks that nothing is left behind.

FakeEngine     answers from a script, with faults, delays and a virtual clock; needs neither torch nor numpy
sync           the same FakeEngine for plain code
tiny_engine    the real engine on a few hundred kilobytes of generated weights
plugin         fixtures and checks for pytest, loaded by itself where streamgen is installed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamgen.testing.clock import VirtualClock
    from streamgen.testing.fake_engine import FakeEngine
    from streamgen.testing.script import FakeRequest, Reply
    from streamgen.testing.tiny import tiny_engine

__all__ = ["FakeEngine", "FakeRequest", "Reply", "VirtualClock", "tiny_engine"]

_HOMES = {
    "FakeEngine": "fake_engine",
    "FakeRequest": "script",
    "Reply": "script",
    "VirtualClock": "clock",
    "tiny_engine": "tiny",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'streamgen.testing' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"streamgen.testing.{_HOMES[name]}"), name)
