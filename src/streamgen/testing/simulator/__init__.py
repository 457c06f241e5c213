"""How the scheduler behaves under loads that no test bench can make: in virtual time, without a model.

simulate    thousands of random requests, cancels, faults and slow readers from one seed, with every promise checked
replay      a recorded trace of requests against a cost model of a machine: waits, throughput, cache hits
CostModel   how long a step takes, measured on an engine
"""

from __future__ import annotations
