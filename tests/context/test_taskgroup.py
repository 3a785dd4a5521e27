"""Task groups: the first failure in time stops the rest at once, and cleanup always runs."""

import asyncio
import threading

import pytest

from stageflow.context.cancellation import CancellationToken
from stageflow.context.taskgroup import StructuredTaskGroup
from stageflow.core.errors import DefinitionError, StageCancelledError


async def forever(token: CancellationToken) -> None:
    await asyncio.Event().wait()


async def test_success_keeps_names_and_results_and_cleans_up():
    cleaned: list[str] = []

    async def value(token: CancellationToken) -> int:
        return 4

    async with StructuredTaskGroup() as group:
        task = group.spawn("four", value)
        group.cleanup.register(cleaned.append, "done", name="note")
    assert task.get_name() == "four"
    assert (dict(group.results), dict(group.failures), group.task_count) == ({"four": 4}, {}, 1)
    assert cleaned == ["done"]
    assert group.cleanup_report.completed == ("note",)
    assert not group.token.cancelled


async def test_the_first_failure_stops_earlier_spawned_tasks_at_once():
    cleaned: list[str] = []
    ended: list[str] = []

    async def long(token: CancellationToken) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(token.reason or "?")

    async def fails(token: CancellationToken) -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    group = StructuredTaskGroup()
    group.cleanup.register(cleaned.append, "done")
    group.spawn("long", long)
    group.spawn("fails", fails)
    with pytest.raises(ValueError, match="broken") as caught:
        await group.wait()
    assert caught.value.__notes__ == ["in task 'fails'"]
    assert ended == ["broken"]
    assert group.token.reason == "broken"
    assert list(group.failures) == ["fails"]
    assert cleaned == ["done"]


async def test_cancel_all_and_the_token_from_another_thread():
    group = StructuredTaskGroup()
    group.spawn("a", forever)
    group.cancel_all("stop")
    with pytest.raises(StageCancelledError) as caught:
        await group.wait()
    assert caught.value.reason == "stop"

    outer = CancellationToken()
    inner = StructuredTaskGroup(token=outer)
    inner.spawn("a", forever)
    thread = threading.Thread(target=outer.cancel, args=("from a thread",))
    thread.start()
    with pytest.raises(StageCancelledError, match="from a thread"):
        await inner.wait()
    thread.join()
    assert len(outer._callbacks) == 0


async def test_cancelling_the_waiter_stops_the_tasks_and_cleans_up():
    cleaned: list[str] = []
    group = StructuredTaskGroup()
    group.cleanup.register(cleaned.append, "done")
    inner = group.spawn("a", forever)
    waiter = asyncio.create_task(group.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert inner.cancelled()
    assert cleaned == ["done"]


async def test_the_body_failing_stops_the_tasks():
    group = StructuredTaskGroup()
    inner: list[asyncio.Task[None]] = []

    async def body() -> None:
        async with group:
            inner.append(group.spawn("a", forever))
            raise KeyError("body")

    with pytest.raises(KeyError):
        await body()
    assert inner[0].cancelled()


async def test_names_are_unique_and_late_spawns_refused():
    async with StructuredTaskGroup() as group:
        task = group.spawn("a", lambda token: asyncio.sleep(0))
        with pytest.raises(DefinitionError, match="already a task 'a'"):
            group.spawn("a", forever)
    assert task.done()
    with pytest.raises(DefinitionError, match="after the group ended"):
        group.spawn("b", forever)


async def test_a_task_spawned_while_stopping_starts_cancelled():
    group = StructuredTaskGroup()
    group.spawn("a", forever)
    group.cancel_all("stop")
    late = group.spawn("late", forever)
    with pytest.raises(StageCancelledError):
        await group.wait()
    assert late.cancelled()
