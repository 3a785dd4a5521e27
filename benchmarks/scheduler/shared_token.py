"""Prints what a stage costs while many wait for one token: `python -m benchmarks.scheduler.shared_token [sizes...]`.

CPU microseconds of this process for each no-op stage of a run in which all share one token, beside the same stages
without it. The first must not grow with their number.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time

from stageflow import Engine, PipelineBuilder, Resources
from stageflow.pipeline.graph import StageGraph

ROUNDS = 3


async def nothing() -> None:
    """What every stage does."""


def build(size: int, *, shared: bool) -> StageGraph:
    """`size` stages that depend on nothing."""
    builder = PipelineBuilder("shared")
    for i in range(size):
        if shared:
            builder.stage(f"s{i}", nothing, resources=Resources(tokens={"one": 1}))
        else:
            builder.stage(f"s{i}", nothing)
    return builder.build()


async def measure(engine: Engine, graph: StageGraph) -> float:
    """CPU microseconds for each stage, the median of some runs."""
    took = []
    for _ in range(ROUNDS):
        gc.collect()
        began = time.process_time()
        (await engine.execute(graph)).raise_for_failure()
        took.append((time.process_time() - began) / len(graph) * 1e6)
    return statistics.median(took)


async def main(sizes: list[int]) -> None:
    """One line for each size."""
    print("| stages | one token for all, us | no token, us |")
    print("|---|---|---|")
    async with Engine(processes=1, tokens={"one": 1}) as engine:
        for size in sizes:
            with_token = await measure(engine, build(size, shared=True))
            without = await measure(engine, build(size, shared=False))
            print(f"| {size:,} | {with_token:.1f} | {without:.1f} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main([int(size) for size in sys.argv[1:]] or [100, 1000, 10_000]))
