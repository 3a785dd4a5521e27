"""An engine that lives long, and a process that has many: after many runs they hold what they held after some."""

import gc
import threading
from collections.abc import Callable

import pytest

from stageflow import Engine, PipelineBuilder
from stageflow.runtime.sampling import anonymous_bytes
from tests.executors.leaks import descriptors, my_children, shared_memory, shm_entries

LANES = ("process", "thread", "async", "inline")


def five():
    return list(range(5))


def plus_one(x):
    return x + 1


def refuse(x):
    raise ValueError(x)


def blobs():
    return [bytes(200_000) for _ in range(3)]


def twice(x):
    return x * 2


def total(twice):
    return sum(map(len, twice))


def short(lane, function=plus_one):
    return PipelineBuilder("short").stage("five", five).map("m", function, over="five", executor=lane).build()


GRAPHS = [short(lane) for lane in LANES]
FAILING = [short(lane, refuse) for lane in LANES]
HEAVY = (
    PipelineBuilder("heavy")
    .stage("blobs", blobs, executor="process")
    .map("twice", twice, over="blobs", executor="process")
    .stage("total", total, executor="process")
    .build()
)


def runs(engine, n):
    assert list(engine.run(GRAPHS[n % 4]).data("m")) == [1, 2, 3, 4, 5]


def failures(engine, n):
    assert not engine.run(FAILING[n % 4], failure_mode="continue_on_failure").success


def payloads(engine, n):
    assert engine.run(HEAVY).data("total") == 1_200_000


def graphs(engine, n):
    lane = LANES[n % 4]
    assert engine.run(short(lane, lambda x: x + n)).data("m")[0] == n


def engines(engine, n):
    with Engine(processes=1, threads=2) as own:
        for graph in GRAPHS[:3]:
            assert own.run(graph).success


def held():
    """Each kind of thing that a process may forget to give back."""
    gc.collect()
    return {
        "descriptors": sum(descriptors().values()),
        "threads": threading.active_count(),
        "children": len(my_children()),
        "mappings": shared_memory()[0],
        "named": len(shm_entries()),
    }


def grown(step: Callable[[Engine, int], None], times: int) -> tuple[dict[str, int], int]:
    """What there is more of after `times` than after a quarter of them, and how many bytes more. A worker more, or a
    mapping, may come at any time, but not in each of three rounds."""
    more, nbytes = {"": 1}, 0
    with Engine(processes=2, threads=2) as engine:
        for n in range(times // 4):
            step(engine, n)
        for _ in range(3):
            before, bytes_before = held(), anonymous_bytes("self")
            for n in range(times // 4, times):
                step(engine, n)
            after, nbytes = held(), anonymous_bytes("self") - bytes_before
            more = {kind: after[kind] - before[kind] for kind in after if after[kind] > before[kind]}
            if not more:
                break
    return more, nbytes


STEPS = [(runs, 40), (failures, 24), (payloads, 24), (graphs, 24), (engines, 8)]


@pytest.mark.parametrize(("step", "times"), STEPS)
def test_what_is_held_does_not_grow_with_the_runs(step, times):
    more, _ = grown(step, times)
    assert more == {}


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("step", "times"), [(step, 40 * times) for step, times in STEPS])
def test_neither_does_memory_with_a_thousand(step, times):
    more, nbytes = grown(step, times)
    print(f"\n{times:,} times {step.__name__}: {nbytes / 1024:,.0f} KiB more than after a quarter of them")
    assert more == {}
    assert nbytes < 4 << 20  # some KiB for each would be more; the allocator's own wobble is below three MiB
