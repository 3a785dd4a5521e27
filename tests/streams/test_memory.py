"""The byte budget: peak memory of the whole process tree, items larger than the budget, and spill behind a barrier."""

from __future__ import annotations

import os
import threading

import psutil
import pytest

from stageflow import Engine, PipelineBuilder
from stageflow.runtime.running import live_drivers

MIB = 1 << 20


def blobs(n: int, size: int):
    for i in range(n):
        yield i.to_bytes(8, "little") * (size // 8)


def flip(x: bytes) -> bytes:
    return x[::-1]


def flop(x: bytes) -> bytes:
    return x[::-1]


def slowly(x: bytes) -> bytes:
    for _ in range(20):
        x = x[::-1]
    return x


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


class Peak:
    """The largest sum of PSS while it is open, above what it was at the start."""

    def __enter__(self):
        self.base = pss()
        self.most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.02):
            self.most = max(self.most, pss() - self.base)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def heavy(last):
    async def store(turned: bytes) -> None:
        count.append(len(turned))

    count: list[int] = []
    graph = (
        PipelineBuilder("heavy")
        .stage("blobs", blobs)
        .map("flipped", flip, "blobs")
        .map("turned", last, "flipped")
        .sink("store", store, "turned")
        .build()
    )
    return graph, count


needs_pss = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="PSS needs Linux")


def live_bytes() -> int:
    return sum(driver.machine.live_bytes + driver.machine.promised for driver in live_drivers)


@needs_pss
@pytest.mark.parametrize(("n", "limit", "last"), [(1000, 128, flop), (100, 32, slowly)])
def test_the_tree_stays_under_the_limit(n, limit, last):
    graph, count = heavy(last)
    with Engine(processes=2, memory_limit=f"{limit}MiB") as engine:
        assert engine.run(graph, {"n": 8, "size": MIB}).success  # workers and warm memory are there
        with Peak() as peak:
            result = engine.run(graph, {"n": n, "size": MIB})
    assert result.success, result.error
    assert len(count) == n + 8
    assert peak.most < limit * MIB


@needs_pss
@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("last", [flop, slowly])
def test_the_tree_stays_under_the_limit_for_hours(last):
    n = 100_000 if last is flop else 10_000
    graph, count = heavy(last)
    with Engine(processes=2, memory_limit="512MiB") as engine:
        assert engine.run(graph, {"n": 8, "size": MIB}).success
        with Peak() as peak:
            result = engine.run(graph, {"n": n, "size": MIB})
    assert result.success, result.error
    assert len(count) == n + 8
    assert peak.most < 512 * MIB


def test_an_item_larger_than_the_budget_passes_alone():
    graph, count = heavy(flop)
    with Engine(processes=2, memory_limit="1MiB") as engine:
        result = engine.run(graph, {"n": 6, "size": 4 * MIB})
    assert result.success, result.error
    assert count == [4 * MIB] * 6


def sizes(flipped):
    return len(flipped), sum(map(len, flipped)), flipped[3][:1], flipped[-1][:1]


@pytest.mark.parametrize("lane", ["thread", "process"])
def test_what_waits_behind_a_barrier_goes_to_disk(lane):
    graph = (
        PipelineBuilder("spill")
        .stage("blobs", blobs)
        .map("flipped", flip, "blobs", executor=lane)
        .stage("sizes", sizes, inputs={"flipped": "flipped"})
        .build()
    )
    most = 0
    with Engine(processes=1, memory_limit="8MiB") as engine:
        stop = threading.Event()

        def watch():
            nonlocal most
            while not stop.wait(0.002):
                most = max(most, live_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        result = engine.run(graph, {"n": 96, "size": MIB // 2})
        stop.set()
        watcher.join()
    assert result.success, result.error
    assert result.data("sizes")[:2] == (96, 48 * MIB)
    assert most < 16 * MIB


def test_kept_results_are_spilled_and_read_back_in_order():
    graph = PipelineBuilder("kept").stage("blobs", blobs).map("flipped", flip, "blobs").build()
    with Engine(processes=2, memory_limit="4MiB") as engine:
        result = engine.run(graph, {"n": 64, "size": MIB // 4})
        kept = result.data("flipped")
        assert [item[-8:] for item in kept] == [i.to_bytes(8, "little")[::-1] for i in range(64)]
    assert kept[40][-8:] == (40).to_bytes(8, "little")[::-1]


def test_without_spill_a_collector_that_outgrows_the_limit_fails():
    graph = (
        PipelineBuilder("nospill")
        .stage("blobs", blobs)
        .map("flipped", flip, "blobs")
        .stage("sizes", sizes, inputs={"flipped": "flipped"}, spill=False)
        .build()
    )
    with Engine(processes=1, memory_limit="4MiB") as engine:
        result = engine.run(graph, {"n": 64, "size": MIB // 2})
    assert not result.success
    assert "spill=False" in result.error
    assert result.error_info.type.endswith("CollectTooLargeError")


def test_everything_is_given_back_after_a_run():
    graph, _ = heavy(flop)
    with Engine(processes=2, memory_limit="16MiB") as engine:
        for _ in range(2):
            assert engine.run(graph, {"n": 40, "size": MIB // 2}).success
        machines = [driver.machine for driver in live_drivers if driver.engine is engine]
        assert [(m.live_bytes, m.promised, m.spilling) for m in machines] == [(0, 0, 0)]
