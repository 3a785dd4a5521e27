"""Timeouts as values, and memory samples."""

from __future__ import annotations

import asyncio
import tracemalloc

import pytest

from stageflow.core.errors import DefinitionError, StageTimeoutError
from stageflow.helpers.runtime import (
    Err,
    MemoryTracker,
    Ok,
    Timeout,
    run_cleanup_with_timeout,
    run_with_timeout,
)


async def forever() -> None:
    await asyncio.Event().wait()


async def fine() -> int:
    return 3


async def broken() -> int:
    raise ValueError("broken")


async def own_timeout() -> int:
    raise TimeoutError("mine")


async def test_the_three_outcomes() -> None:
    ok = await run_with_timeout(5, fine)
    assert isinstance(ok, Ok)
    assert (ok.is_ok, ok.is_err, ok.is_timeout) == (True, False, False)
    assert ok.into_result() == 3
    err = await run_with_timeout(5, broken)
    assert isinstance(err, Err)
    assert (err.is_ok, err.is_err, err.is_timeout) == (False, True, False)
    with pytest.raises(ValueError, match="broken"):
        err.into_result()
    late = await run_with_timeout(0, forever)
    assert isinstance(late, Timeout)
    assert (late.is_ok, late.is_err, late.is_timeout) == (False, False, True)
    with pytest.raises(StageTimeoutError):
        late.into_result()
    with pytest.raises(KeyError):
        late.into_result(KeyError("own"))


async def test_a_timeout_of_its_own_is_an_error() -> None:
    assert (await run_with_timeout(5, own_timeout)).is_err


async def test_cancelling_the_caller_cancels_the_operation() -> None:
    ended = asyncio.Event()

    async def operation() -> None:
        try:
            await forever()
        finally:
            ended.set()

    task = asyncio.create_task(run_with_timeout(60, operation))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_cleanup(caplog: pytest.LogCaptureFixture) -> None:
    assert await run_cleanup_with_timeout(5, fine) is True
    assert await run_cleanup_with_timeout(0, forever) is False
    assert await run_cleanup_with_timeout(5, broken) is False
    assert len(caplog.records) == 2


def test_tracker_samples() -> None:
    clock = iter([1.0, 2.0])
    tracker = MemoryTracker(clock=lambda: next(clock))
    with pytest.raises(DefinitionError):
        tracker.observe("early")
    with tracker:
        tracker.observe("a")
        held = bytearray(2_000_000)
        tracker.observe("b")
    assert not tracemalloc.is_tracing()
    first, second = tracker.samples
    assert (first.time, first.label, second.time, second.label) == (1.0, "a", 2.0, "b")
    assert second.current_kb - first.current_kb > len(held) / 1024 - 100
    assert tracker.peak_kb == max(first.peak_kb, second.peak_kb)
    with pytest.raises(DefinitionError):
        tracker.observe("late")


def test_trackers_overlap_and_respect_others() -> None:
    one, two = MemoryTracker().start(), MemoryTracker().start()
    one.stop()
    one.stop()
    assert two.observe("still").current_kb >= 0
    two.stop()
    assert not tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        with MemoryTracker() as three:
            three.observe("x")
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


async def test_decorated_functions() -> None:
    tracker = MemoryTracker()

    @tracker.track("load")
    def load(n: int) -> int:
        return n + 1

    @tracker.track("fetch")
    async def fetch() -> None:
        raise ValueError("no")

    assert load(1) == 2
    with pytest.raises(ValueError, match="no"):
        await fetch()
    assert [sample.label for sample in tracker.samples] == ["load:start", "load:end", "fetch:start", "fetch:end"]
    assert not tracker.active
    assert load.__name__ == "load"
