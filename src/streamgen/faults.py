"""How a step can fail, told by who runs it to the thread that drives it; `StepFailed.kind` is what the scheduler hears.

A runner raises these, or anything else: that is a step that raised on a device that is well.
"""

from __future__ import annotations


class StepRaised(Exception):
    """The step raised in another process; the text is that of the error there, with the name of its class."""


class ExecutorLost(Exception):
    """The process that held slots and pages is gone with them; the next step runs in another. `kind` "lost"."""


class DeviceDead(Exception):
    """There is nothing any more that could run a step; the text says why. `kind` "dead"."""
