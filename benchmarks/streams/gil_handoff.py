"""How long a process hand-off takes while a thread stage holds the interpreter.

`python -m benchmarks.streams.gil_handoff [seconds]` runs a chain of process stages (each hand-off goes through the loop
of this process twice) alone, beside a thread stage that computes in pure Python for so long, and beside it without the
mitigation. Prints p50, p99 and the largest time between the end of one stage and the start of the next, both taken in
the worker, in milliseconds. Thread switches come every 5 ms by default: a loop that wants the interpreter back waits
that long, once or twice for each hand-off.
"""

from __future__ import annotations

import statistics
import sys
import time

from stageflow import Engine, PipelineBuilder
from stageflow.pipeline.graph import StageGraph

STAGES = 200
ROUNDS = 3


def step(before: tuple[float, float]) -> tuple[float, float]:
    """One hand-off: how long it took, and when this stage ended."""
    return time.monotonic() - before[1], time.monotonic()


def hold(seconds: float) -> int:
    """Pure Python in a thread, for that long."""
    until = time.monotonic() + seconds
    count = 0
    while time.monotonic() < until:
        count += 1
    return count


def chain(*, held: bool) -> StageGraph:
    """The process stages, and the thread stage beside them."""
    builder = PipelineBuilder("handoff", inputs={"seconds": float, "begin": tuple})
    for i in range(STAGES):
        before = {"before": f"s{i - 1}"} if i else {"before": "begin"}
        builder.stage(f"s{i}", step, inputs=before, executor="process", fuse=False)
    if held:
        builder.stage("hold", hold, executor="thread", kind="work")
    return builder.build()


def measure(engine: Engine, *, held: bool, seconds: float) -> list[float]:
    """Milliseconds of every hand-off but the first, which waits for the worker."""
    graph = chain(held=held)
    found: list[float] = []
    for _ in range(ROUNDS):
        result = engine.run(graph, {"seconds": seconds, "begin": (0.0, 0.0)}).raise_for_failure()
        found += [result.data(f"s{i}")[0] * 1e3 for i in range(1, STAGES)]
    return found


def main(seconds: float = 2.0) -> None:
    """One line for each case."""
    print("| beside it | p50, ms | p99, ms | largest, ms |")
    print("|---|---|---|---|")
    for name, held, options in (
        ("nothing", False, {}),
        ("a thread that holds the interpreter", True, {}),
        ("the same, switch_interval=None", True, {"switch_interval": None}),
    ):
        with Engine(processes=1, **options) as engine:
            measure(engine, held=False, seconds=0.0)
            times = sorted(measure(engine, held=held, seconds=seconds))
        p99 = times[int(len(times) * 0.99)]
        print(f"| {name} | {statistics.median(times):.2f} | {p99:.2f} | {times[-1]:.2f} |", flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]))
