"""Streams far larger than memory: the peak of the whole process tree, how far a source runs ahead, and what the
scheduler itself holds after millions of elements."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time

import psutil
import pytest

from stageflow import DROP, Engine, PipelineBuilder
from stageflow.pipeline.policies import SOURCE_AHEAD
from stageflow.runtime.sampling import anonymous_bytes

MIB = 1 << 20
SIZE = 1_000_000
#: values that fit into half of the limit, and what eight threads and two workers hold while they run
RUNNING = 8 + 2 * 2


def flip(x: bytes) -> bytes:
    return x[::-1]


def flop(x: bytes) -> bytes:
    return x[::-1]


def pss() -> int:
    """Proportional set size of this process and everything below it."""
    me = psutil.Process()
    total = 0
    for pid in (me.pid, *(child.pid for child in me.children(recursive=True))):
        try:
            with open(f"/proc/{pid}/smaps_rollup") as lines:
                total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        except (OSError, StopIteration):
            continue
    return total


class Heavy:
    """Numbers -> read (threads) -> two stages that are fused in a worker -> an asynchronous sink, and what it saw."""

    def __init__(self, sink_seconds: float = 0.0, *, heavy_source: bool = False) -> None:
        self.heavy_source = heavy_source  # the source itself gives what weighs
        self.given = self.stored = self.ahead = self.wrong = 0
        self.base = self.peak = 0
        self.size = 8
        self._stop = threading.Event()
        self.graph = (
            PipelineBuilder("heavy")
            .stage("numbers", self.numbers)
            .map("read", self.read, "numbers", executor="thread")
            .map("flipped", flip, "read")
            .map("turned", flop, "flipped")
            .sink("store", self.slow_store if sink_seconds else self.store, "turned", concurrency=1, ordered=True)
            .build()
        )
        self.sink_seconds = sink_seconds

    def numbers(self, n: int):
        for i in range(n):
            self.given += 1
            self.ahead = max(self.ahead, self.given - self.stored)
            yield self.blob(i) if self.heavy_source else i

    def read(self, i: int | bytes) -> bytes:
        return i if isinstance(i, bytes) else self.blob(i)

    def blob(self, i: int) -> bytes:
        return i.to_bytes(8, "little") * (self.size // 8)

    async def store(self, turned: bytes) -> None:
        # the sink is ordered, so each element tells whether one was lost or changed
        self.wrong += len(turned) != self.size or int.from_bytes(turned[:8], "little") != self.stored
        self.stored += 1

    async def slow_store(self, turned: bytes) -> None:
        await asyncio.sleep(self.sink_seconds)
        await self.store(turned)

    def _watch(self, every: float) -> None:
        while not self._stop.wait(every):
            self.peak = max(self.peak, pss() - self.base)

    def run(self, n: int, limit: int, every: float = 0.02) -> float:
        with Engine(processes=2, threads=8, memory_limit=limit) as engine:
            assert engine.code(self.graph).layout.regions == {2: (2, 3)}  # fused
            assert engine.run(self.graph, {"n": 64}).success  # the workers are there: their base
            self.given = self.stored = self.ahead = 0
            self.size = SIZE
            gc.collect()
            self.base = pss()
            watcher = threading.Thread(target=self._watch, args=(every,))
            watcher.start()
            started = time.monotonic()
            try:
                result = engine.run(self.graph, {"n": n})
            finally:
                took = time.monotonic() - started
                self._stop.set()
                watcher.join()
        assert result.success, result.error
        assert (self.stored, self.wrong) == (n, 0)
        return took


needs_pss = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="PSS needs Linux")


def report(heavy: Heavy, n: int, limit: int, took: float) -> None:
    print(
        f"\n{n:,} x 1 MB, sink {heavy.sink_seconds * 1e3:g} ms: {took:.0f} s, {took / n * 1e3:.1f} ms an element; "
        f"peak PSS of the tree {heavy.peak / MIB:.0f} MiB above its base of {heavy.base / MIB:.0f} MiB "
        f"(limit {limit / MIB:.0f}); source at most {heavy.ahead} elements ahead"
    )


@needs_pss
@pytest.mark.parametrize(
    ("n", "limit", "heavy_source", "sink_seconds"),
    [(700, 512 * MIB, False, 0.0), (200, 96 * MIB, True, 0.0), (100, 96 * MIB, True, 0.01)],
)
def test_more_megabytes_than_the_limit_pass_under_it(n, limit, heavy_source, sink_seconds):
    heavy = Heavy(sink_seconds, heavy_source=heavy_source)
    took = heavy.run(n, limit)
    report(heavy, n, limit, took)
    assert heavy.peak < limit
    if heavy_source:
        assert heavy.ahead <= limit // 2 // SIZE + RUNNING


@needs_pss
@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("n", "sink_seconds"), [(100_000, 0.0), (10_000, 0.05)])
def test_a_hundred_gigabytes_pass_under_the_limit(n, sink_seconds):
    """The slow sink takes ten times what an element took before it. It gets a tenth of the elements: the pipeline is
    full after some 500, so 10,000 fill it twenty times over."""
    limit = 512 * MIB
    heavy = Heavy(sink_seconds)
    took = heavy.run(n, limit, 0.1)
    report(heavy, n, limit, took)
    assert heavy.peak < limit
    assert heavy.ahead <= SOURCE_AHEAD + limit // SIZE


def thin(x: int):
    """Gaps in the indices are what a scheduler could gather unnoticed."""
    return DROP if x % 3 == 0 else -x


class Tiny:
    """Elements that weigh nothing, through two workers: what this process holds at each of `marks`."""

    def __init__(self, marks: tuple[int, ...]) -> None:
        self.marks = marks
        self.held: dict[int, int] = {}
        self.graph = (
            PipelineBuilder("tiny")
            .stage("numbers", self.numbers)
            .map("thin", thin, "numbers", executor="process", keep=False)
            .build()
        )

    def numbers(self, n: int):
        for i in range(n):
            if i in self.marks:
                gc.collect()
                self.held[i] = anonymous_bytes("self")
            yield i

    def run(self, n: int) -> float:
        with Engine(processes=2) as engine:
            started = time.monotonic()
            result = engine.run(self.graph, {"n": n})
            took = time.monotonic() - started
        assert result.success, result.error
        assert (result.stats["thin"].items_in, result.stats["thin"].dropped) == (n, -(-n // 3))
        return took


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="anonymous memory needs Linux")
@pytest.mark.parametrize(
    ("n", "marks"),
    [
        (160_000, (40_000, 150_000)),
        pytest.param(5_000_000, (1_000_000, 4_999_000), marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_the_scheduler_holds_as_much_after_millions_of_elements_as_after_some(n, marks):
    tiny = Tiny(marks)
    took = tiny.run(n)
    first, last = (tiny.held[mark] for mark in marks)
    print(f"\n{n:,} elements: {took:.0f} s; {first / MIB:.1f} MiB at {marks[0]:,}, {last / MIB:.1f} at {marks[1]:,}")
    # a byte for every element would be 4 MiB of 5,000,000; the allocator's own wobble is below two
    assert last - first < 3 * MIB
