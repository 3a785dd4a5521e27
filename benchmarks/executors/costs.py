"""Where the time of a round trip goes: CPU microseconds of the parent and of the worker, and of the clock, beside a
bare bounce of a frame over the same kind of socket with the same loop. CPU time is steadier than the clock on a busy
machine, but holds the microseconds of looking before sleeping.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import operator
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import psutil
import uvloop

from benchmarks.executors.bare import Bounce, echoing
from benchmarks.measures.executors import process_chain
from stageflow import Engine
from stageflow_executors.futures import ProcessPoolExecutor
from stageflow_executors.processes.pool import ProcessExecutor

TRIPS = 500
ROUNDS = 9


def cpu(_: Any) -> float:
    """CPU seconds of the process it runs in."""
    return time.process_time()


def same(value: Any) -> Any:
    """The value."""
    return value


async def bounce(*, asleep: bool) -> tuple[float, float, float]:
    """Parent's CPU, other side's CPU, and wall, in seconds per trip, of frames that carry nothing."""
    with echoing(asleep=asleep) as sock:
        ours = Bounce(sock, asyncio.get_running_loop(), asleep=asleep)
        ours.listen()
        found = []
        for _ in range(ROUNDS):
            below = psutil.Process().children()
            there, here, clock = on_cores(below), time.process_time(), time.perf_counter()
            await ours.trips(TRIPS, 40)
            clock, here = time.perf_counter() - clock, time.process_time() - here
            found.append((here / TRIPS, (on_cores(below) - there) / TRIPS, clock / TRIPS))
        asyncio.get_running_loop().remove_reader(sock.fileno())
    return least(found)


async def lane_trips(lane: ProcessExecutor, function: Any, value: Any) -> tuple[float, float, float]:
    """The same of calls through the lane."""
    found = []
    for _ in range(ROUNDS):
        there, here, clock = await lane.submit(cpu, None), time.process_time(), time.perf_counter()
        for _ in range(TRIPS):
            await lane.submit(function, value)
        clock, here = time.perf_counter() - clock, time.process_time() - here
        found.append((here / TRIPS, (await lane.submit(cpu, None) - there) / TRIPS, clock / TRIPS))
    return least(found)


async def stages() -> tuple[float, float, float]:
    """The same of the stages of a chain, through the whole engine."""
    graph = process_chain(TRIPS)
    found = []
    async with Engine(processes=1) as engine:
        (await engine.execute(graph, {"value": 1})).raise_for_failure()
        for _ in range(ROUNDS):
            below = psutil.Process().children(recursive=True)
            there, here, clock = on_cores(below), time.process_time(), time.perf_counter()
            (await engine.execute(graph, {"value": 1})).raise_for_failure()
            clock, here = time.perf_counter() - clock, time.process_time() - here
            found.append((here / TRIPS, (on_cores(below) - there) / TRIPS, clock / TRIPS))
    return least(found)


def on_cores(processes: list[psutil.Process]) -> float:
    """Seconds that these have had a core, to the nanosecond (CPU times by process tick in hundredths)."""
    return sum(int(Path(f"/proc/{one.pid}/schedstat").read_text().split()[0]) for one in processes) / 1e9


def least(rounds: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The least of each column: what is above it is other people's work."""
    parent, worker, wall = zip(*rounds, strict=True)
    return min(parent), min(worker), min(wall)


def to_a_thread_and_back() -> tuple[float, float, float]:
    """What a drop-in call costs beside its worker where it goes through the loop's thread: that is woken, and resolves
    the future that this thread waits for."""
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    found = []
    for _ in range(ROUNDS):
        here, clock = time.process_time(), time.perf_counter()
        for _ in range(TRIPS):
            future: concurrent.futures.Future[None] = concurrent.futures.Future()
            loop.call_soon_threadsafe(future.set_result, None)
            future.result()
        found.append(((time.process_time() - here) / TRIPS, 0.0, (time.perf_counter() - clock) / TRIPS))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    return least(found)


def pool_trips(pool: concurrent.futures.Executor, function: Any, value: Any) -> tuple[float, float, float]:
    """The same of calls through a pool of `concurrent.futures`."""
    pool.submit(function, value).result()
    found = []
    for _ in range(ROUNDS):
        there, here, clock = pool.submit(cpu, None).result(), time.process_time(), time.perf_counter()
        for _ in range(TRIPS):
            pool.submit(function, value).result()
        clock, here = time.perf_counter() - clock, time.process_time() - here
        found.append((here / TRIPS, (pool.submit(cpu, None).result() - there) / TRIPS, clock / TRIPS))
    return least(found)


async def main() -> None:
    """Print the table."""
    rows = [
        ("bare bounce, both asleep meanwhile", await bounce(asleep=True)),
        ("bare bounce, both look first", await bounce(asleep=False)),
        ("to a thread and back, no worker", to_a_thread_and_back()),
    ]
    async with ProcessExecutor(1) as lane:
        for name, function, value in (
            ("no-op on an int (L1)", operator.abs, 1),
            ("1 KB of bytes, inline", same, b"x" * 1000),
            ("1 KB array (P5)", operator.neg, numpy.arange(128.0)),
            ("[1, 2], by pickle", same, [1, 2]),
        ):
            rows.append((name, await lane_trips(lane, function, value)))
    rows.append(("a stage of a chain, whole engine (L2)", await stages()))
    for name, kind in (("ours", ProcessPoolExecutor), ("the standard's", concurrent.futures.ProcessPoolExecutor)):
        with kind(1) as pool:
            rows.append((f"drop-in, an int, {name}", pool_trips(pool, operator.abs, 1)))
            rows.append((f"drop-in, 1 KB array, {name}", pool_trips(pool, operator.neg, numpy.arange(128.0))))
    for name, (parent, worker, wall) in rows:
        print(f"| {name} | {parent * 1e6:.1f} | {worker * 1e6:.1f} | {wall * 1e6:.1f} |")


if __name__ == "__main__":
    uvloop.run(main())
