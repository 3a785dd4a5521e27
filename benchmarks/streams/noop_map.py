"""Items per second of a `.map` of no-ops, beside `multiprocessing.Pool.map` with its default chunks, interleaved.

`python benchmarks/streams/noop_map.py [items] [pairs]` prints the median of the pairwise ratios (ours / theirs, higher
is better) by wall time and by CPU time of the whole process tree; the second is the one to trust on a busy machine.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable

import psutil

from stageflow import Engine, PipelineBuilder


def noop(x: int) -> int:
    """What is mapped."""
    return x


def tree_cpu() -> float:
    """CPU seconds of this process and everything below it, as far as it lives."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    cpu, wall = tree_cpu(), time.perf_counter()
    work()
    return time.perf_counter() - wall, tree_cpu() - cpu


def middle(rows: list[tuple[float, float]], column: int) -> float:
    """The median of one column."""
    return statistics.median(row[column] for row in rows)


def main(count: int = 20_000, pairs: int = 15) -> None:
    """Run the pairs; print per item and the ratios."""
    graph = PipelineBuilder("noop", inputs={"items": list}).map("m", noop, "items").build()
    items = list(range(count))
    repeat = 10  # CPU clocks tick in hundredths of a second
    with Engine(processes=2) as engine, multiprocessing.get_context("fork").Pool(2) as pool:

        def ours() -> None:
            for _ in range(repeat):
                result = engine.run(graph, {"items": items})
                if not result.success or len(result.data("m")) != count:
                    raise RuntimeError(f"the run went wrong: {result.error}")

        def theirs() -> None:
            for _ in range(repeat):
                pool.map(noop, items)

        ours(), theirs()
        walls, cpus, mine, other = [], [], [], []
        for pair in range(pairs):
            first, second = (ours, theirs) if pair % 2 else (theirs, ours)
            a, b = timed(first), timed(second)
            us, peer = (a, b) if first is ours else (b, a)
            walls.append(peer[0] / us[0])
            cpus.append(peer[1] / us[1] if us[1] else 0.0)
            mine.append(us)
            other.append(peer)
    scale = 1e6 / count / repeat
    print(f"ours   {middle(mine, 0) * scale:.2f} us an item, CPU {middle(mine, 1) * scale:.2f}")
    print(f"Pool   {middle(other, 0) * scale:.2f} us an item, CPU {middle(other, 1) * scale:.2f}")
    print(f"ratio  {statistics.median(walls):.3f} by wall time, {statistics.median(cpus):.3f} by CPU time (bar: 0.25)")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
