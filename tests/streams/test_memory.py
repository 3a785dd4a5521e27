"""The byte budget: items larger than the budget, and spill behind a barrier."""

from __future__ import annotations

import asyncio
import threading

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


def heavy():
    async def store(turned: bytes) -> None:
        count.append(len(turned))

    count: list[int] = []
    graph = (
        PipelineBuilder("heavy")
        .stage("blobs", blobs)
        .map("flipped", flip, "blobs")
        .map("turned", flop, "flipped")
        .sink("store", store, "turned")
        .build()
    )
    return graph, count


def live_bytes() -> int:
    return sum(driver.machine.live_bytes + driver.machine.promised for driver in live_drivers)


def test_an_item_larger_than_the_budget_passes_alone():
    graph, count = heavy()
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
    graph, _ = heavy()
    with Engine(processes=2, memory_limit="16MiB") as engine:
        for _ in range(2):
            assert engine.run(graph, {"n": 40, "size": MIB // 2}).success
        machines = [driver.machine for driver in live_drivers if driver.engine is engine]
        assert [(m.live_bytes, m.promised, m.spilling) for m in machines] == [(0, 0, 0)]


@pytest.mark.parametrize("attempt", range(2))
def test_over_budget_the_deepest_stage_drains_in_whatever_lane(attempt: int) -> None:
    """Nothing is forced to start in the first lane while a reader behind it waits in another one."""
    made: list[int] = []
    ahead: list[int] = []
    rests = threading.Event()

    class Watcher:
        def emit(self, event) -> None:
            if event.type == "engine.sample" and made and not event.data["running"].get("make"):
                rests.set()

    async def make(n: int) -> bytes:
        await asyncio.sleep(0.001)
        made.append(n)
        return bytes(200_000)

    def take(data: bytes) -> None:
        if not ahead:  # keep the only reader until making has come to rest
            rests.wait(20)
            ahead.append(len(made))

    graph = (
        PipelineBuilder("drain", inputs={"numbers": list})
        .map("make", make, "numbers")
        .sink("take", take, "make", concurrency=1, executor="thread")
        .build()
    )
    graph.run(
        {"numbers": list(range(300))}, memory_limit="4MB", processes=1, event_sinks=[Watcher()]
    ).raise_for_failure()
    assert len(made) == 300
    assert ahead[0] <= 36, "20 fit; until the first is seen each is taken for a thirty-second of the budget"
