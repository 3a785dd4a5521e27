"""The graphs of the scheduling benchmarks, and the least that running them can cost.

May not import: any peer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from benchmarks.work import anoop
from stageflow import PipelineBuilder, StageGraph


def chain(size: int) -> StageGraph:
    """Each stage after the one before."""
    builder = PipelineBuilder("chain")
    for number in range(size):
        builder.stage(f"s{number}", anoop, [f"s{number - 1}"] if number else [])
    return builder.build()


def fan_out(size: int) -> StageGraph:
    """All stages after one."""
    builder = PipelineBuilder("fan-out")
    builder.stage("root", anoop)
    for number in range(size - 1):
        builder.stage(f"s{number}", anoop, ["root"])
    return builder.build()


def layered(width: int, depth: int) -> StageGraph:
    """`depth` layers of `width` stages, each after its three neighbours in the layer before."""
    builder = PipelineBuilder("layered")
    for layer in range(depth):
        for place in range(width):
            builder.stage(f"s{layer}_{place}", anoop, layer_deps(layer, place, width))
    return builder.build()


def layer_deps(layer: int, place: int, width: int) -> list[str]:
    """The stages of the layer before that a stage of `layered` waits for."""
    if layer == 0:
        return []
    return [f"s{layer - 1}_{other}" for other in sorted({(place - 1) % width, place, (place + 1) % width})]


async def floor(deps: Sequence[Sequence[int]], dependents: Sequence[Sequence[int]]) -> None:
    """Run no-op stages with counters and one asyncio task each: no context, events, retry, or result."""
    counts = [len(before) for before in deps]
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    left = len(deps)

    async def run(stage: int) -> None:
        nonlocal left
        await anoop()
        left -= 1
        for dependent in dependents[stage]:
            counts[dependent] -= 1
            if counts[dependent] == 0:
                loop.create_task(run(dependent))  # noqa: RUF006 - the loop's own reference will do for a no-op
        if left == 0:
            done.set_result(None)

    for stage, count in enumerate(list(counts)):
        if count == 0:
            loop.create_task(run(stage))  # noqa: RUF006
    await done


class CountingSink:
    """Listens to every event and adds one."""

    def __init__(self, *, wants_items: bool = False) -> None:
        self.wants_items = wants_items
        self.events = 0

    def emit(self, event: Any) -> None:
        """Add one."""
        self.events += 1
