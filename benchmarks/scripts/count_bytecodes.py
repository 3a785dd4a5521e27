"""Count the byte codes of one completion in this process: `count_bytecodes.py SLOW SHAPE ...`; prints JSON.

Each shape is run at two sizes, and the difference is counted: what starts and ends a run is not part of it. SLOW is a
number of turns of a useless loop per turn of the scheduler, by which a test makes the path slower.
"""

import asyncio
import gc
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[2] / "executors")]

import uvloop  # noqa: E402

from benchmarks.graphs import CountingSink, chain, fan_out, floor  # noqa: E402
from benchmarks.simulated import Simulation, stream_layout  # noqa: E402
from stageflow import Engine  # noqa: E402
from stageflow.runtime.running import live_drivers  # noqa: E402

GRAPHS = {"chain": chain, "fan-out": fan_out}
SMALL, LARGE = 100, 400
ITEMS = 20_000


class Counter:
    """Counts byte codes of this thread between `start` and `stop`."""

    def __init__(self):
        self.count = 0

    def start(self):
        """From here on."""
        self.count = 0
        sys.settrace(self._call)
        sys._getframe(1).f_trace = self._opcode

    def stop(self):
        """Up to here."""
        sys.settrace(None)
        return self.count

    def _call(self, frame, event, arg):
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._opcode

    def _opcode(self, frame, event, arg):
        if event == "opcode":
            self.count += 1
        return self._opcode


class Nobody:
    """In place of the sampler, which reads every run once a second."""

    def begin(self):
        """Nothing."""

    def end(self):
        """Nothing."""


def slower(handle, turns):
    """`handle` after a useless loop."""

    def wrapped(signals, now):
        for _ in range(turns):
            pass
        return handle(signals, now)

    return wrapped


async def engine(shape, sinks, slow):
    """Byte codes of one stage in the whole engine, on this loop."""
    counts = []
    async with Engine(processes=1) as running:
        for size in (SMALL, LARGE):
            graph = GRAPHS[shape](size)
            for counted in (False, True):
                if counted:
                    quiet(slow)
                    counter.start()
                result = await running.execute(graph, event_sinks=tuple(CountingSink() for _ in range(sinks)))
                found = counter.stop()
                result.raise_for_failure()
            counts.append(found)
    return (counts[1] - counts[0]) / (LARGE - SMALL)


def quiet(slow):
    """Take off what wakes up by the clock; make the scheduler slower where that was asked for."""
    for driver in list(live_drivers):
        for watcher in driver.watchers:
            watcher.close()
        driver.watchers = ()
        driver.sampler = Nobody()
        if slow and not hasattr(driver.machine, "slowed"):
            driver.machine.slowed = True
            driver.machine.handle_all = slower(driver.machine.handle_all, slow)


async def least(shape):
    """The same of counters and one asyncio task each."""
    counts = []
    for size in (SMALL, LARGE):
        graph = GRAPHS[shape](size)
        await floor(graph.deps, graph.dependents)
        counter.start()
        await floor(graph.deps, graph.dependents)
        counts.append(counter.stop())
    return (counts[1] - counts[0]) / (LARGE - SMALL)


def blocks(slow):
    """Byte codes of one item of a stream in the scheduler alone."""
    counts = []
    layout = stream_layout()
    for items in (ITEMS, 3 * ITEMS):
        for counted in (False, True):
            one = Simulation(layout, 4, lambda stage: 1e-4, items=items)
            if slow:
                one.machine.handle = slower(one.machine.handle, slow)
            if counted:
                counter.start()
            one.run()
            found = counter.stop()
        counts.append(found)
    return (counts[1] - counts[0]) / (2 * ITEMS)


counter = Counter()


def main(slow, shapes):
    """Print what was asked for."""
    gc.disable()
    found = {}
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for name in shapes:
            kind, _, rest = name.partition(" ")
            if kind == "blocks":
                found[name] = blocks(slow)
            elif kind == "floor":
                found[name] = runner.run(least(rest))
            else:
                shape, _, sink = rest.partition(", ")
                found[name] = runner.run(engine(shape, 1 if sink else 0, slow))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
