"""Every scenario there is, by name. May not import: any peer at import time."""

from __future__ import annotations

from benchmarks import metg
from benchmarks.harness import Scenario
from benchmarks.measures import executors, jobs, payloads, scheduling, startup

_ALL = (
    *executors.SCENARIOS,
    *payloads.SCENARIOS,
    *scheduling.SCENARIOS,
    *startup.SCENARIOS,
    *jobs.SCENARIOS,
    *metg.SCENARIOS,
)
SCENARIOS: dict[str, Scenario] = {scenario.name: scenario for scenario in _ALL}
