"""P1: 100 MB in and out; P2: the same to 8 calls; P3: a chain of three; beside the standard's pool, and copies of
100 MB.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ProcessPoolExecutor as Standard
from typing import Any

import numpy
import uvloop

from benchmarks.executors.pairs import interleave, show
from stageflow.core.executor import Call, Outcome, Shipped
from stageflow_executors.processes.pool import ProcessExecutor

COUNT = 12_500_000


def copy_of(array: Any) -> Any:
    """A new array of the same size."""
    return array + 1.0


def total(array: Any) -> float:
    """Touches every page."""
    return float(array[::512].sum())


def in_place(port: Any, array: Any) -> Any:
    """Writes its result into memory that is already shared."""
    out = numpy.frombuffer(port.buffer(array.nbytes), numpy.float64)
    numpy.add(array, 1.0, out=out)
    return out


IN_PLACE = Shipped(in_place)


def measure() -> dict[str, Any]:
    """Seconds per operation."""
    array = numpy.arange(float(COUNT))
    found: dict[str, Any] = {}
    with Standard(2) as peer, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        lane = ProcessExecutor(2)
        runner.run(lane.open())
        numbers = iter(range(1, 10**9))

        async def call(shipped: Shipped, *args: Any) -> Any:
            ended = asyncio.get_running_loop().create_future()

            def deliver(outcome: Outcome) -> None:
                if outcome.final:
                    ended.set_result(outcome.value)

            lane.start(Call(next(numbers), shipped, args), deliver)
            return await ended

        async def round_trip() -> float:
            start = time.perf_counter()
            result = await lane.submit(copy_of, array)
            total(result)
            return time.perf_counter() - start

        async def fan_out() -> float:
            start = time.perf_counter()
            shared = lane.encode(array)
            plain = lane._shipped(total)
            await asyncio.gather(*[call(plain, None, shared) for _ in range(8)])
            return time.perf_counter() - start

        async def chain() -> float:
            start = time.perf_counter()
            value = array
            for _ in range(3):
                value = await call(IN_PLACE, value)
            total(value.load())
            return time.perf_counter() - start

        def peer_round_trip() -> float:
            start = time.perf_counter()
            total(peer.submit(copy_of, array).result())
            return time.perf_counter() - start

        def peer_fan_out() -> float:
            start = time.perf_counter()
            for future in [peer.submit(total, array) for _ in range(8)]:
                future.result()
            return time.perf_counter() - start

        def peer_chain() -> float:
            start = time.perf_counter()
            value = array
            for _ in range(3):
                value = peer.submit(copy_of, value).result()
            total(value)
            return time.perf_counter() - start

        target = numpy.empty_like(array)

        def warm_copy() -> float:
            start = time.perf_counter()
            numpy.copyto(target, array)
            return time.perf_counter() - start

        def encoding() -> float:
            start = time.perf_counter()
            shared = lane.encode(array)
            took = time.perf_counter() - start
            shared.release()
            return took

        for one in (round_trip, fan_out, chain):
            for _ in range(3):
                runner.run(one())
        warm_copy()
        found["P1"] = interleave(lambda: runner.run(round_trip()), peer_round_trip)
        found["P2"] = interleave(lambda: runner.run(fan_out()), peer_fan_out)
        found["P2 copies"] = interleave(lambda: runner.run(fan_out()), warm_copy)
        found["encoding"] = interleave(encoding, warm_copy, 9)
        found["P3"] = interleave(lambda: runner.run(chain()), peer_chain)
        runner.run(lane.aclose())
    return found


if __name__ == "__main__":
    result = measure()
    show("P1 100 MB in and out", "<= 0.083", result["P1"])
    show("P2 100 MB to 8 calls", "", result["P2"])
    show("P2 in copies of 100 MB", "<= 1.3", result["P2 copies"])
    show("its encoding alone, in copies", "", result["encoding"])
    show("P3 chain of 3, in place", "", result["P3"])
