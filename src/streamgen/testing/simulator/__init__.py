"""How the scheduler behaves under loads that no test bench can make: in virtual time, without a model.

simulate    thousands of random requests, cancels, faults and slow readers from one seed, with every promise checked
simulate_engine   the same for a whole engine: its actors, mailboxes and readers as tasks of one virtual loop
replay      a recorded trace of requests against a cost model of a machine: waits, throughput, cache hits
CostModel   how long a step takes, measured on an engine
VirtualLoop an asyncio loop whose time jumps to the next timer, with its order shuffled by a seed
"""

from __future__ import annotations

from streamgen.testing.simulator.cost import DEMO_ON_TWO_CORES, CostModel, StepSample
from streamgen.testing.simulator.engine import EngineFaults, EngineReport, simulate_engine
from streamgen.testing.simulator.replay import Quantiles, ReplayReport, replay
from streamgen.testing.simulator.scenario import SCENARIOS, Scenario
from streamgen.testing.simulator.simulation import SimulationFailed, SimulationReport, simulate
from streamgen.testing.simulator.traces import TraceRequest, read_trace
from streamgen.testing.simulator.virtual_loop import VirtualLoop

__all__ = [
    "DEMO_ON_TWO_CORES",
    "SCENARIOS",
    "CostModel",
    "EngineFaults",
    "EngineReport",
    "Quantiles",
    "ReplayReport",
    "Scenario",
    "SimulationFailed",
    "SimulationReport",
    "StepSample",
    "TraceRequest",
    "VirtualLoop",
    "read_trace",
    "replay",
    "simulate",
    "simulate_engine",
]
