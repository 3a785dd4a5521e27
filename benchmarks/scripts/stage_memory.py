"""Build a graph of argv[2] no-op stages in shape argv[1], run it, hold the result; prints peak bytes per stage as JSON.

The peak counts from the moment at which everything is imported and one small run is over.
"""

import asyncio
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import uvloop

from benchmarks.graphs import chain, fan_out
from stageflow import Engine


async def main(shape: str, size: int) -> None:
    """One warm run, then the large one."""
    build = {"chain": chain, "fan-out": fan_out}[shape]
    async with Engine(processes=1) as engine:
        (await engine.execute(build(10))).raise_for_failure()
        before = psutil.Process().memory_info().rss
        began = time.process_time()
        graph = build(size)
        built = time.process_time() - began
        graph_bytes = psutil.Process().memory_info().rss - before
        began = time.process_time()
        result = await engine.execute(graph)
        ran = time.process_time() - began
        held = psutil.Process().memory_info().rss - before
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        assert result.success
        assert len(result.outputs) == size
        print(
            json.dumps(
                {
                    "bytes_per_stage": peak / size,
                    "graph_bytes_per_stage": graph_bytes / size,
                    "held_bytes_per_stage": held / size,
                    "build_us_per_stage": built / size * 1e6,
                    "run_us_per_stage": ran / size * 1e6,
                }
            )
        )


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], int(sys.argv[2])))
