"""Prints where the time and bytes of a no-op async stage go: `python -m benchmarks.scheduler.s1_breakdown`.

Ours and the floor run in turn; the ratio is the median of the pairs, in CPU seconds of this process. The records are
timed alone, in this interpreter, so that their sum can be held against the whole.
"""

from __future__ import annotations

import asyncio
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvloop

from benchmarks.graphs import CountingSink, chain, fan_out, floor, layered
from stageflow import Engine
from stageflow.core.executor import Call, Outcome, OutcomeKind, Shipped
from stageflow.events.event import Event
from stageflow.events.fanout import FanOut
from stageflow.runtime.running import Running
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Lane, Task
from stageflow_executors.local import LocalPort

ROOT: Final = Path(__file__).resolve().parents[2]
ROUNDS: Final = 9


async def shapes() -> None:
    """The whole: each shape against its floor, without and with a sink."""
    print("| shape | floor, us | no sink, us | ratio | one counting sink, us | ratio |")
    print("|---|---|---|---|---|---|")
    async with Engine(processes=1) as engine:
        for name, graph, repeat in (
            ("chain 1,000", chain(1000), 5),
            ("fan-out 1,000", fan_out(1000), 5),
            ("layered 100x100", layered(100, 100), 1),
        ):
            size = len(graph) * repeat
            rows: list[tuple[float, float, float]] = []
            for _ in range(ROUNDS + 1):
                row = []
                for sinks in (None, (), (CountingSink(),)):
                    gc.collect()
                    began = time.process_time()
                    for _ in range(repeat):
                        if sinks is None:
                            await floor(graph.deps, graph.dependents)
                        else:
                            (await engine.execute(graph, event_sinks=sinks)).raise_for_failure()
                    row.append((time.process_time() - began) / size * 1e6)
                rows.append((row[0], row[1], row[2]))
            del rows[0]  # the first builds the stages' code
            least, none, one = (statistics.median(column) for column in zip(*rows, strict=True))
            ratios = [statistics.median(row[side] / row[0] for row in rows) for side in (1, 2)]
            print(f"| {name} | {least:.2f} | {none:.2f} | {ratios[0]:.2f} | {one:.2f} | {ratios[1]:.2f} |")


def records() -> None:
    """The parts: what is made once per stage, alone."""
    shipped = Shipped(len)
    call = Call(1, shipped)
    signal = sig.AttemptEnded(1)
    sinks = FanOut([CountingSink()], shared=False)
    event = Event("stage.started", 1, 1, "r", "s", None, 1, "async", {})
    lane = Lane("async", 1)
    entry: Any = (0, 0, 1, 1, None, 1, None, 0.0)

    def queue() -> None:
        lane.push(entry)
        lane.pop()

    data = (0.2, 0.1, 0.0)
    parts: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("scheduler: queue entry in and out", queue),
        ("scheduler: `Task`", lambda: Task(1, None, 1, "async", 1, 0.0)),  # type: ignore[arg-type]
        ("action `StartAttempt`", lambda: act.StartAttempt(1, 1, 1, "async")),
        ("action `Completed` (one per turn)", lambda: act.Completed(1, [])),
        ("driver: `Running`", lambda: Running(None, None, None, 0.0)),  # type: ignore[arg-type]
        ("driver: `Call`", lambda: Call(1, shipped)),
        ("lane: `LocalPort`", lambda: LocalPort("async", call, print, None)),
        ("lane: `Outcome`", lambda: Outcome(1, OutcomeKind.OK, None, None, True, None, None, False, 1, 0.0, 0.0, 0.0)),
        ("signal `AttemptEnded`", lambda: sig.AttemptEnded(1, "ok", 0, 0, 0.0, 0.0, 0, 1, 0.0)),
        ("clock, two readings", lambda: (time.monotonic(), time.monotonic())),
        ("with a sink: an `Event`", lambda: Event("stage.started", 1, 1, "r", "s", None, 1, "async", {})),
        (
            "with a sink: the mapping of its numbers",
            lambda: {
                "status": "ok",
                "duration_ms": data[0] * 1e3,
                "seconds": data[1],
                "cpu_seconds": data[2],
                "bytes_in": 0,
                "bytes_out": 0,
                "worker_pid": 1,
                "queued_ms": (data[0] - data[1]) * 1e3,
                "started": data[0],
            },
        ),
        ("with a sink: `FanOut.emit` (three times)", lambda: sinks.emit(event)),
    )
    empty = min(timeit.repeat(lambda: None, number=50_000, repeat=5)) / 50_000
    print("\n| made once per stage | us |\n|---|---|")
    for name, make in parts:
        print(f"| {name} | {max(0.0, min(timeit.repeat(make, number=50_000, repeat=5)) / 50_000 - empty) * 1e6:.2f} |")
    assert signal.status == "ok"


def memory(size: int) -> None:
    """The bytes: graph, run and result of a large graph, in an interpreter of its own."""
    print(f"\n| {size:,} stages | built, bytes per stage | result held | peak | run, us per stage |")
    print("|---|---|---|---|---|")
    for shape in ("chain", "fan-out"):
        command = [sys.executable, str(ROOT / "benchmarks" / "scripts" / "stage_memory.py"), shape, str(size)]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
        print(
            f"| {shape} | {told['graph_bytes_per_stage']:.0f} | {told['held_bytes_per_stage']:.0f} "
            f"| {told['bytes_per_stage']:.0f} | {told['run_us_per_stage']:.1f} |"
        )


def main() -> None:
    """Print all three tables."""
    print(f"Python {platform.python_version()}, uvloop {uvloop.__version__}, {platform.machine()}\n")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(shapes())
    records()
    memory(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)


if __name__ == "__main__":
    main()
