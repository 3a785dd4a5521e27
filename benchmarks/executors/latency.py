"""L1: a no-op's round trip; P5: a 1 KB array in and out. Beside the standard pool in the same run."""

from __future__ import annotations

import asyncio
import operator
import time
from concurrent.futures import ProcessPoolExecutor as Standard
from typing import Any

import numpy
import uvloop

from benchmarks.executors.pairs import interleave, show
from stageflow_executors.processes.pool import ProcessExecutor

CALLS = 500


def measure() -> dict[str, Any]:
    """Seconds per sequential call."""
    small = numpy.arange(128.0)
    found: dict[str, Any] = {}
    with Standard(2) as peer, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        lane = ProcessExecutor(2)
        runner.run(lane.open())

        async def ours(function: Any, value: Any) -> float:
            start = time.perf_counter()
            for _ in range(CALLS):
                await lane.submit(function, value)
            return (time.perf_counter() - start) / CALLS

        def theirs(function: Any, value: Any) -> float:
            start = time.perf_counter()
            for _ in range(CALLS):
                peer.submit(function, value).result()
            return (time.perf_counter() - start) / CALLS

        for name, function, value in (("L1", operator.abs, 1), ("P5", operator.neg, small)):
            runner.run(ours(function, value))
            theirs(function, value)
            found[name] = interleave(
                lambda f=function, v=value: runner.run(ours(f, v)), lambda f=function, v=value: theirs(f, v), 9
            )
        runner.run(lane.aclose())
    return found


if __name__ == "__main__":
    result = measure()
    show("L1 no-op round trip", "<= 0.25", result["L1"])
    show("P5 1 KB array round trip", "<= 0.333", result["P5"])
