"""Prints what a process stage of a Task Bench grid costs each side: `python -m benchmarks.executors.grid_costs`.

Stages that do next to nothing, in the grids of M1; microseconds of CPU per stage, of the parent and of the workers
together. On as many cores as there are workers METG(50 %) cannot be less than their sum: at that task length half of
all CPU time is theirs. Below stands the same for a bare bounce of one frame, per task, with nothing decided in between
(`python -m benchmarks.executors.costs` takes it apart).

The second table is the time of all cores at a length near the crossing, by who has it: the task (what its loop takes in
this process, with warm caches), the parent, the workers beyond the task, and nobody.

Linux only: it reads /proc/PID/schedstat.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from benchmarks.measures.common import engine_on_loop
from benchmarks.metg import PATTERNS, engine_graph, grid
from benchmarks.peers import WORKERS
from benchmarks.work import loops_per_second
from stageflow.runtime.running import live_drivers

RUNS: Final = 20
ROUNDS: Final = 5
BOUNCES: Final = 2000
TASK_US: Final = 100.0  #: of the second table


def cpu_us(pid: int) -> float:
    """CPU microseconds that the first thread of a process has had."""
    with open(f"/proc/{pid}/schedstat") as stat:
        return int(stat.read().split()[0]) / 1000.0


def measured(once: Callable[[], None], workers: Sequence[int], count: int) -> tuple[float, float, float]:
    """(wall, parent's CPU, workers' CPU) in microseconds for each of the `count` tasks of one call; medians."""
    rows = []
    for _ in range(ROUNDS):
        before = [cpu_us(pid) for pid in (os.getpid(), *workers)]
        began = time.perf_counter()
        for _ in range(RUNS):
            once()
        wall = (time.perf_counter() - began) * 1e6
        parent, *others = (cpu_us(pid) - least for pid, least in zip((os.getpid(), *workers), before, strict=True))
        rows.append([value / (RUNS * count) for value in (wall, parent, sum(others))])
    wall, parent, others_ = (statistics.median(column) for column in zip(*rows, strict=True))
    return wall, parent, others_


def grids(loops: int, tell: Callable[[str, float, float, float], None]) -> None:
    """Each pattern through the engine, with tasks of so many loops."""
    with engine_on_loop(processes=WORKERS) as (runner, engine):
        for pattern in PATTERNS:
            cells = grid(pattern)
            graph: Any = engine_graph(cells)

            def once(graph: Any = graph) -> None:
                runner.run(engine.execute(graph, {"loops": loops})).raise_for_failure()

            for _ in range(5):
                once()
            lanes = [driver.executors["process"] for driver in live_drivers if "process" in driver.executors]
            pids = [worker.pid for lane in lanes for worker in lane.supply.workers.values()]  # type: ignore[attr-defined]
            tell(pattern, *measured(once, pids, len(graph)))


def bounce() -> None:
    """One frame there and back, blocking, without a codec."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        here.close()
        while frame := there.recv(4096):
            there.send(frame)
        os._exit(0)
    there.close()

    def once() -> None:
        for _ in range(BOUNCES // RUNS):
            here.send(b"x" * 64)
            here.recv(4096)

    once()
    show("bare bounce (limit)", *measured(once, [pid], BOUNCES // RUNS))
    here.close()
    os.waitpid(pid, 0)


def show(name: str, wall: float, parent: float, workers: float) -> None:
    """One row."""
    print(f"| {name} | {wall:.1f} | {parent:.1f} | {workers:.1f} | {parent + workers:.1f} |", flush=True)


def main() -> None:
    """Print the tables."""
    print("| us per stage | wall | parent CPU | workers' CPU | sum |")
    print("|---|---|---|---|---|")
    bounce()
    grids(1, show)
    print(f"\n| us of {WORKERS} cores per stage | in all | task | parent | workers beyond it | nobody, or others |")
    print("|---|---|---|---|---|---|")

    def shares(name: str, wall: float, parent: float, workers: float) -> None:
        cells = (WORKERS * wall, TASK_US, parent, workers - TASK_US, WORKERS * wall - parent - workers)
        print(f"| {name} | {' | '.join(f'{cell:.1f}' for cell in cells)} |", flush=True)

    grids(int(loops_per_second() * TASK_US * 1e-6), shares)


if __name__ == "__main__":
    main()
