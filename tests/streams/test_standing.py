"""A flat-map's generator stands still while its readers have enough: its memory is bounded, and nothing hangs on it."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import signal
import struct
import threading
import time

import pytest

from stageflow import Engine, PipelineBuilder, RetryConfig
from stageflow.context.pieces import Done
from stageflow.runtime.running import live_drivers
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.audit import audit
from stageflow.scheduler.layout import Layout
from stageflow.scheduler.machine import Machine

MB = 1_000_000


class Counters:
    """Numbers in a file, of which each has one writer, in whatever process, and a mark for each element let go."""

    def __init__(self, path) -> None:
        self.path = str(path)
        with open(path, "wb") as file:
            file.write(bytes(MARKS + 100))
        self._open()

    def _open(self) -> None:
        with open(self.path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), MARKS + 100)

    def let_go(self, element: int) -> None:
        self.memory[MARKS + element] = 1

    def ahead(self) -> int:
        return self[MADE] - sum(self.memory[MARKS:])

    def __reduce__(self):
        return _reopened, (self.path,)

    def __getitem__(self, place: int) -> int:
        return struct.unpack_from("@q", self.memory, 8 * place)[0]

    def __setitem__(self, place: int, value: int) -> None:
        struct.pack_into("@q", self.memory, 8 * place, value)


def _reopened(path: str) -> Counters:
    found = Counters.__new__(Counters)
    found.path = path
    found._open()
    return found


MADE, AHEAD, PID, OPEN = range(4)
MARKS = 64


def numbers(n: int):
    yield from range(n)


def maker(counters: Counters, many: int, size: int = MB):
    def make(x):
        counters[PID] = os.getpid()
        for k in range(many):
            counters[MADE] += 1
            counters[AHEAD] = max(counters[AHEAD], counters.ahead())
            yield k, bytes(size)

    return make


def on_loop(make):
    async def made(x):
        for value in make(x):
            yield value
            await asyncio.sleep(0)

    return made


async def until(seen) -> None:
    """Wait for something that is bound to come; the test's own limit bounds it."""
    while not seen():
        await asyncio.sleep(0.002)


def someone_stands() -> bool:
    return any(run.standing for driver in live_drivers for run in driver.machine.runs.values())


def graph_of(make, keep, *, kind: str, **policies):
    builder = PipelineBuilder("standing").stage("source", numbers).map("make", make, "source", kind=kind, **policies)
    return builder.sink("keep", keep, "make", kind="work", ordered=True).build()


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize(("kind", "through"), [("transform", "transform"), ("work", "work"), ("async", "work")])
def test_a_generator_is_never_further_ahead_than_the_memory_limit_allows(tmp_path, kind, through, batch):
    counters = Counters(tmp_path / "counters")
    seen = []
    make = maker(counters, 90)
    if kind == "async":
        kind, make = "work", on_loop(make)

    def same(pair) -> int:  # here the megabyte ends: how far the sink is behind is no matter
        while not counters[OPEN]:
            time.sleep(0.002)
        counters.let_go(pair[0])
        return pair[0]

    graph = (
        PipelineBuilder("standing").stage("source", numbers).map("make", make, "source", kind=kind, batch=batch)
        .map("same", same, "make", kind=through).sink("keep", seen.append, "same", kind="work", ordered=True).build()
    )  # fmt: skip

    async def main(own):
        handle = await own.start(graph, {"n": 1})
        await until(lambda: someone_stands() or counters[MADE] == 90)
        counters[OPEN] = 1
        return await handle

    with Engine(processes=1, threads=4, memory_limit="40MiB") as own:  # the one slot of processes is a reader's too
        result = asyncio.run(main(own))
        assert result.success, result.error
        assert seen == list(range(90))
        assert 5 < counters[AHEAD] <= 40  # of 90
        if own._supply is not None:
            assert own._supply.standing == 0
            assert len(own._supply.workers) <= 2, "one stands in, again and again"


def test_several_that_stand_still_take_their_turns(tmp_path):
    seen = []

    def make(x):
        for k in range(30):
            yield x, k, bytes(MB)

    graph = (
        PipelineBuilder("turns").stage("source", numbers).map("make", make, "source", kind="transform")
        .map("cut", lambda item: item[:2], "make", kind="transform")
        .sink("keep", seen.append, "cut", kind="work", ordered=True).build()
    )  # fmt: skip
    with Engine(processes=2, threads=4, memory_limit="32MiB") as own:
        result = own.run(graph, {"n": 4}, timeout=60)
    assert result.success, result.error
    assert [tuple(one) for one in seen] == [(x, k) for x in range(4) for k in range(30)]


@pytest.mark.parametrize("kind", ["transform", "work", "async"])
@pytest.mark.parametrize("whole", [True, False])
def test_what_stands_still_can_be_stopped(tmp_path, kind, whole):
    gate = threading.Event()
    closed = []

    def endless(x: int):
        yield from (bytes(MB) for _ in (itertools.count() if x == 1 else ()))

    async def endless_async(x: int):
        try:
            for value in endless(x):
                yield value
        finally:
            closed.append(x)

    async def main():
        chosen = {"make": endless, "kind": kind} if kind != "async" else {"make": endless_async, "kind": "work"}
        graph = graph_of(keep=lambda item: gate.wait(20), **chosen)
        async with Engine(processes=2, threads=4, memory_limit="32MiB", grace=20.0) as own:
            handle = await own.start(graph, {"n": 3})
            await until(someone_stands)
            handle.cancel("enough", **({} if whole else {"stage": "make", "item": 1}))
            if not whole:
                await until(lambda: not someone_stands())
            gate.set()
            return await asyncio.wait_for(handle, 20)

    result = asyncio.run(main())
    assert kind != "async" or 1 in closed
    if whole:
        assert result.cancelled
    else:
        assert "item [1] of stage 'make' was cancelled" in result.error
        assert (result.stats["make"].items_out, result.stats["make"].cancelled) == (2, 1)
        assert result.stats["keep"].items_out == result.stats["make"].emitted


@pytest.mark.parametrize("again", [True, False])
def test_a_worker_that_dies_while_its_call_stands_still(tmp_path, again):
    counters = Counters(tmp_path / "counters")
    gate = threading.Event()
    seen = []

    def keep(pair) -> None:
        gate.wait(20)
        seen.append(pair[0])

    async def main():
        graph = graph_of(maker(counters, 100), keep, kind="transform", replayable=again, retry=RetryConfig())
        async with Engine(processes=1, threads=4, memory_limit="32MiB") as own:
            handle = await own.start(graph, {"n": 1}, failure_mode="best_effort")
            await until(someone_stands)
            os.kill(counters[PID], signal.SIGKILL)
            await until(lambda: not someone_stands())
            gate.set()
            return await asyncio.wait_for(handle, 30)

    result = asyncio.run(main())
    if again:
        assert result.success, result.error
        assert seen == list(range(100))
    else:
        assert result.stats["make"].failed == 1
        assert seen == list(range(len(seen)))
        assert 0 < len(seen) < 100


def test_the_time_for_which_it_stood_is_not_its_own():
    def keep(pair) -> None:
        threading.Event().wait(0.005)

    def make(x):
        for k in range(60):
            yield k, bytes(MB)

    with Engine(processes=1, threads=4, memory_limit="32MiB") as own:
        result = own.run(graph_of(make, keep, kind="work"), {"n": 1}, timeout=60)
    assert result.success, result.error
    stats = result.stats["make"]
    stood = sum(stats.wait.get(why, 0.0) for why in ("downstream", "bytes"))
    assert stood > 0.05
    assert stats.busy_seconds <= stats.wall_seconds - stood + 0.02


class Told:
    """A machine, and what it said last."""

    def __init__(self, graph) -> None:
        self.machine = Machine({"thread": 4}, policies=[lambda view: "the test" if view.what == "start" else None])
        self.layout = Layout(graph, ["thread"] * len(graph.specs))
        self.now = 100.0

    def say(self, signal, after: float = 0.0):
        self.now += after
        actions = self.machine.handle(signal, self.now)
        audit(self.machine)
        return actions


def of_type(actions, kind):
    return [action for action in actions if type(action) is kind]


def test_a_timeout_stands_still_with_its_call():
    graph = graph_of(numbers, lambda item: None, kind="work", timeout=1.0)
    flat = graph.index["make"]

    def told(asks: bool, handle: int):
        return sig.BlockPart(make.task, Done((), counts=(1,), flows=((0, handle - 2),), asks=asks), handle, 10)

    told_to = Told(graph)
    told_to.say(sig.RunSubmitted(1, "run", told_to.layout))
    actions = told_to.say(sig.ItemsArrived(1, graph.index["source"], 1, 1, 10))
    (make,) = of_type(actions, act.StartBlock)
    (timer,) = of_type(actions, act.SetTimer)
    assert make.stage == flat
    actions = told_to.say(told(True, 2), 0.5)
    assert of_type(actions, act.Stand)
    (keep,) = of_type(actions, act.StartBlock)  # what is deeper goes first, whatever the policy says
    actions = told_to.say(sig.TimerDue(timer.timer, elapsed=1.0), 0.5)  # it worked for one half of that
    (timer,) = of_type(actions, act.SetTimer)
    assert not of_type(actions, act.StopAttempt)
    actions = told_to.say(sig.BlockPart(keep.task, Done(((0, 1, -1),)), final=True), 9.0)
    assert of_type(actions, act.GoOn)
    actions = told_to.say(sig.TimerDue(timer.timer, elapsed=10.2), 0.2)
    (timer,) = of_type(actions, act.SetTimer)
    assert timer.at == pytest.approx(told_to.now + 0.3)
    actions = told_to.say(sig.TimerDue(timer.timer, elapsed=10.5), 0.3)
    (stop,) = of_type(actions, act.StopAttempt)
    assert stop.timeout == 1.0
