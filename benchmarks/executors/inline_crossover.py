"""From which size on is a value better laid in shared memory than sent in the frame? CPU time of parent and worker of a
round trip, the two ways in turns; the crossover is the least size from which shared memory stays cheaper.

    python -m benchmarks.executors.inline_crossover [ROUNDS]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any, Final

import numpy
import uvloop

from stageflow_executors.processes.pool import ProcessExecutor
from stageflow_executors.processes.supply import WorkerSupply

SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 63)  #: KiB; a frame holds no more
TRIPS: Final = 60


def cpu(_: Any) -> float:
    """CPU seconds of the process it runs in."""
    return time.process_time()


def same(value: Any) -> Any:
    """The value."""
    return value


async def trips(lane: ProcessExecutor, value: Any) -> float:
    """CPU microseconds of both sides for one round trip."""
    there, here = await lane.submit(cpu, None), time.process_time()
    for _ in range(TRIPS):
        await lane.submit(same, value)
    here = time.process_time() - here
    return (here + await lane.submit(cpu, None) - there) / TRIPS * 1e6


async def compare(inline: ProcessExecutor, shared: ProcessExecutor, value: Any, rounds: int) -> tuple[float, float]:
    """Medians of the two ways, measured in turns."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            found[which].append(await trips((inline, shared)[which], value))
    return statistics.median(found[0]), statistics.median(found[1])


def crossover(rows: list[tuple[int, float, float]]) -> int | None:
    """The least size (KiB) from which shared memory is cheaper at every size measured; None if at none."""
    best = None
    for size, inline, shared in reversed(rows):
        if shared >= inline:
            break
        best = size
    return best


async def main(rounds: int = 9) -> None:
    """Print a table for bytes and one for arrays."""
    supplies = WorkerSupply(1, inline_threshold=1 << 16), WorkerSupply(1, inline_threshold=1)
    async with ProcessExecutor(supply=supplies[0]) as inline, ProcessExecutor(supply=supplies[1]) as shared:
        for lane in (inline, shared):
            await lane.submit(same, numpy.zeros(1))
        for name, make in (("bytes", bytes), ("array", lambda n: numpy.zeros(n // 8))):
            rows = []
            for size in SIZES:
                rows.append((size, *await compare(inline, shared, make(size << 10), rounds)))
                print(f"{name} {size:3} KiB  inline {rows[-1][1]:7.1f} us  shared {rows[-1][2]:7.1f} us", flush=True)
            found = crossover(rows)
            print(f"{name}: " + (f"shared memory is cheaper from {found} KiB on" if found else "inline is cheaper"))
    for supply in supplies:
        supply.close()


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:])))
