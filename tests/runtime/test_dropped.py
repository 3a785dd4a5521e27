"""Engines and executors that nobody holds any more and nobody has closed: what they had is given back."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stageflow import Engine, PipelineBuilder, StageGraph, StageKind
from stageflow_executors.futures import ProcessPoolExecutor
from stageflow_executors.processes.pool import ProcessExecutor


def by_value() -> tuple[Callable[[int], int], Callable[[int], Any]]:
    """Functions that are sent as they are: workers need not import this module for them."""

    def doubled(number: int) -> int:
        return 2 * number

    def filled(number: int) -> Any:
        import numpy as np

        return np.full(1 << 18, float(number))

    return doubled, filled


doubled, filled = by_value()


def graph_of(kind: StageKind, function: Callable[[int], Any] = doubled) -> StageGraph:
    return PipelineBuilder("dropped").stage("only", function, kind=kind).build()


def children() -> set[str]:
    with open(f"/proc/self/task/{threading.get_native_id()}/children") as listed:
        return set(listed.read().split())


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("stageflow")}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Processes, threads and warnings of a test end with what it dropped."""
    gc.collect()
    before = children(), threads()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
        gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("stageflow") and thread.name not in before[1]:
            thread.join(5.0)
    assert (children(), threads()) == before
    assert [str(one.message) for one in told if one.category is ResourceWarning] == []


def test_an_engine_that_ran_is_gone_with_its_last_name() -> None:
    others = children()
    engine = Engine(processes=1)
    result = engine.run(graph_of(StageKind.TRANSFORM, filled), {"number": 3})
    processes = children() - others
    alive = weakref.ref(engine)
    del engine
    assert alive() is None
    assert processes
    assert not processes & children()
    assert result.data("only").sum() == 3.0 * (1 << 18)  # what it made stays


def test_an_engine_in_a_circle_goes_with_it() -> None:
    engine = Engine(processes=1)
    engine.own = engine  # type: ignore[attr-defined]
    assert engine.run(graph_of(StageKind.TRANSFORM), {"number": 1}).data("only") == 2
    alive = weakref.ref(engine)
    del engine
    gc.collect()
    assert alive() is None


def test_an_engine_dropped_on_a_running_loop_is_gone() -> None:
    async def main() -> None:
        others = children()
        engine = Engine(processes=1)
        assert (await engine.execute(graph_of(StageKind.TRANSFORM), {"number": 1})).data("only") == 2
        processes = children() - others
        del engine
        assert processes
        assert not processes & children()

    asyncio.run(main())


def test_threads_that_wait_for_work_do_not_keep_an_engine() -> None:
    engine = Engine(processes=1)
    assert engine.run(graph_of(StageKind.WORK), {"number": 1}).data("only") == 2
    assert any(name.startswith("stageflow-thread") for name in threads())
    alive = weakref.ref(engine)
    del engine
    assert alive() is None


def test_a_run_under_way_keeps_its_engine() -> None:
    async def main() -> None:
        handle = await Engine(processes=1).start(graph_of(StageKind.TRANSFORM), {"number": 4})
        gc.collect()
        assert (await handle).data("only") == 8

    asyncio.run(main())


def test_a_pool_of_futures_ends_when_it_is_dropped() -> None:
    pool = ProcessPoolExecutor(1)
    assert pool.submit(doubled, 4).result() == 8
    alive = weakref.ref(pool)
    del pool
    gc.collect()
    assert alive() is None


async def test_a_lane_that_was_never_opened_has_nothing_to_give_back() -> None:
    lane = ProcessExecutor(1)
    alive = weakref.ref(lane)
    del lane
    assert alive() is None
