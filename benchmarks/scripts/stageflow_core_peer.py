"""Runs in the interpreter that has stageflow-core: reads {"shape", ...} per line, answers {"seconds", "stages"}.

Seconds are CPU seconds of this process for one run of the graph, which is built once per shape.
"""

import asyncio
import json
import logging
import sys
import time

import uvloop

from stageflow.api import Pipeline, StageKind, stage, stage_metadata

logging.disable(logging.CRITICAL)


@stage_metadata(name="noop", kind=StageKind.TRANSFORM)
class Noop:
    """Does nothing."""

    async def execute(self, ctx):
        """Nothing."""
        return {}


def build(shape, size, width=0):
    """The same graphs as `benchmarks.graphs`."""
    if shape == "chain":
        deps = [[i - 1] if i else [] for i in range(size)]
    elif shape == "fan-out":
        deps = [[0] if i else [] for i in range(size)]
    else:
        deps = []
        for i in range(size):
            layer, place = divmod(i, width)
            near = sorted({(place - 1) % width, place, (place + 1) % width}) if layer else []
            deps.append([(layer - 1) * width + other for other in near])
    return Pipeline.from_stages(*[stage(f"s{i}", Noop, dependencies=[f"s{j}" for j in deps[i]]) for i in range(size)])


def main():
    """Answer until the input ends."""
    built = {}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            asked = json.loads(line)
            key = (asked["shape"], asked["size"])
            pipeline = built.get(key)
            if pipeline is None:
                pipeline = built[key] = build(asked["shape"], asked["size"], asked.get("width", 0))
            seconds = []
            for _ in range(asked.get("repeat", 1)):
                began = time.process_time()
                runner.run(pipeline.run(input_text="x", topology="bench", execution_mode="default"))
                seconds.append(time.process_time() - began)
            print(json.dumps({"seconds": sorted(seconds)[len(seconds) // 2], "stages": asked["size"]}), flush=True)


if __name__ == "__main__":
    main()
