"""P4: 10,000 typed records in and out, beside the standard's pool in the same run."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ProcessPoolExecutor as Standard
from typing import Any

import msgspec
import uvloop

from benchmarks.executors.pairs import interleave, show
from stageflow_executors.processes.pool import ProcessExecutor


class Record(msgspec.Struct):
    """A closed type: it goes through typed msgspec."""

    name: str
    size: int
    weight: float


def identity(value: Any) -> Any:
    """The records as they came."""
    return value


def measure() -> dict[str, Any]:
    """Seconds per round trip."""
    records = [Record(f"name {n}", n, n / 3) for n in range(10_000)]
    with Standard(1) as peer, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        lane = ProcessExecutor(1)
        runner.run(lane.open())

        async def ours() -> float:
            start = time.perf_counter()
            await lane.submit(identity, records)
            return time.perf_counter() - start

        def theirs() -> float:
            start = time.perf_counter()
            peer.submit(identity, records).result()
            return time.perf_counter() - start

        for _ in range(3):
            runner.run(ours())
            theirs()
        found = {"P4": interleave(lambda: runner.run(ours()), theirs, 15)}
        runner.run(lane.aclose())
    return found


if __name__ == "__main__":
    show("P4 10,000 records", "<= 0.5", measure()["P4"])
