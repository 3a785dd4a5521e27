"""Cleanup: last first, a share of time each, failures collected, and never skipped."""

import asyncio
import threading

import pytest

from stageflow.context.cancellation import CancellationToken
from stageflow.context.cleanup import CleanupGuard, CleanupRegistry, cleanup_on_cancel, run_with_cleanup
from stageflow.core.errors import StageCancelledError


@pytest.mark.parametrize("blocking", ["here", "thread"])
async def test_last_registered_runs_first_and_the_registry_is_empty_after(blocking):
    ran: list[int] = []
    registry = CleanupRegistry(blocking=blocking)
    registry.register(ran.append, 1, name="one")

    async def two() -> None:
        ran.append(2)

    registry.register(two, name="two")
    registry.register(lambda: two(), name="three")
    assert registry.pending_count == 3
    report = await registry.run_all(5)
    assert ran == [2, 2, 1]
    assert report.completed == registry.completed == ("three", "two", "one")
    assert (report.ok, registry.pending_count) == (True, 0)
    assert (await registry.run_all(5)).completed == ()


@pytest.mark.parametrize("blocking", ["here", "thread"])
@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), StopIteration(), asyncio.CancelledError()])
async def test_a_failure_is_collected_and_the_rest_runs(blocking, error):
    ran: list[str] = []
    registry = CleanupRegistry(blocking=blocking)
    registry.register(ran.append, "first", name="first")

    def bad() -> None:
        raise error

    async def bad_async() -> None:
        if isinstance(error, StopIteration):
            raise ValueError("no")  # the language turns StopIteration in a coroutine into RuntimeError
        raise error

    registry.register(bad, name="bad")
    registry.register(bad_async, name="bad_async")
    registry.register(ran.append, "last")
    report = await registry.run_all(5)
    assert ran == ["last", "first"]
    assert [failure.name for failure in report.failed] == ["bad_async", "bad"]
    assert not any(failure.timed_out for failure in report.failed)
    assert report.completed == ("<unnamed>", "first")


async def test_a_hanging_coroutine_loses_its_share_and_the_rest_runs():
    ran: list[str] = []
    registry = CleanupRegistry()
    registry.register(ran.append, "after", name="after")

    async def hangs() -> None:
        await asyncio.Event().wait()

    registry.register(hangs, name="hangs")
    report = await registry.run_all(0.1)
    assert ran == ["after"]
    assert [(f.name, f.message, f.timed_out) for f in report.failed] == [("hangs", "Timeout", True)]


async def test_a_hanging_thread_is_given_up():
    release, ran = threading.Event(), []
    registry = CleanupRegistry(blocking="thread")
    registry.register(ran.append, 1)
    registry.register(release.wait, name="stuck")
    try:
        report = await registry.run_all(0.1)
    finally:
        release.set()
    assert [f.name for f in report.failed] == ["stuck"]
    assert ran == [1]


async def test_here_means_the_calling_thread_and_late_is_reported():
    now = [0.0]
    where: list[threading.Thread] = []

    def slow() -> None:
        where.append(threading.current_thread())
        now[0] += 7.0

    registry = CleanupRegistry(blocking="here", clock=lambda: now[0])
    registry.register(slow, name="slow")
    report = await registry.run_all(5)
    assert where == [threading.current_thread()]
    assert [(f.name, f.timed_out) for f in report.failed] == [("slow", True)]


def test_sync_twin_needs_no_loop():
    ran: list[str] = []

    async def later() -> None:
        ran.append("async")

    registry = CleanupRegistry(blocking="here")
    registry.register(ran.append, "sync")
    registry.register(later)
    assert registry.run_all_sync(5).ok
    assert ran == ["async", "sync"]


async def test_what_a_callback_registers_runs_too():
    ran: list[str] = []
    registry = CleanupRegistry(blocking="here")
    registry.register(lambda: registry.register(ran.append, "second"))
    await registry.run_all(5)
    assert ran == ["second"]


async def test_endless_registration_stops_when_the_time_is_spent():
    now = [0.0]
    registry = CleanupRegistry(blocking="here", clock=lambda: now[0])

    def again() -> None:
        now[0] += 1.0
        registry.register(again, name="again")

    registry.register(again)
    report = await registry.run_all(3)
    assert len(report.completed) == 3
    assert (report.failed[-1].name, report.failed[-1].timed_out, registry.pending_count) == ("again", True, 0)


def test_unregister_by_name_removes_all_of_that_name():
    registry = CleanupRegistry()
    for name in ("a", "b", "a"):
        registry.register(lambda: None, name=name)
    assert registry.unregister_by_name("a") is True
    assert registry.pending_count == 1
    assert registry.unregister_by_name("a") is False
    registry.clear()
    assert registry.pending_count == 0


async def test_cancelling_the_caller_waits_for_the_pass():
    entered, release, ran = asyncio.Event(), asyncio.Event(), []
    registry = CleanupRegistry()
    registry.register(lambda: ran.append("sync"))

    async def first() -> None:
        entered.set()
        await release.wait()
        ran.append("async")

    registry.register(first)
    task = asyncio.create_task(registry.run_all(30))
    await entered.wait()
    task.cancel()
    asyncio.get_running_loop().call_soon(release.set)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ran == ["async", "sync"]


async def test_run_with_cleanup_cleans_up_on_every_way_out():
    ran: list[str] = []

    async def value() -> int:
        return 7

    async def raises() -> int:
        raise KeyError("x")

    async def waits() -> int:
        await asyncio.Event().wait()
        return 0

    assert await run_with_cleanup(value, lambda: ran.append("value"), 5) == 7
    with pytest.raises(KeyError):
        await run_with_cleanup(raises, lambda: ran.append("raises"), 5)
    task = asyncio.create_task(run_with_cleanup(waits, lambda: ran.append("cancelled"), 5))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ran == ["value", "raises", "cancelled"]


async def test_cleanup_on_cancel_only_then():
    ran: list[str] = []

    async def value() -> int:
        return 7

    async def stops() -> int:
        raise StageCancelledError("x")

    async def fails() -> int:
        raise ValueError

    assert await cleanup_on_cancel(value, lambda: ran.append("value")) == 7
    with pytest.raises(ValueError):
        await cleanup_on_cancel(fails, lambda: ran.append("fails"))
    assert ran == []
    with pytest.raises(StageCancelledError):
        await cleanup_on_cancel(stops, lambda: ran.append("stops"))
    token = CancellationToken()
    token.cancel("x")
    assert await cleanup_on_cancel(value, lambda: ran.append("token"), token=token) == 7
    with pytest.raises(ValueError):
        await cleanup_on_cancel(fails, lambda: ran.append("token and error"), token=token)
    assert ran == ["stops", "token", "token and error"]


def test_guard_runs_unless_disarmed():
    ran: list[str] = []
    with pytest.raises(ZeroDivisionError), CleanupGuard(lambda: ran.append("armed")):
        raise ZeroDivisionError
    with CleanupGuard(lambda: ran.append("disarmed")) as guard:
        guard.disarm()
    assert ran == ["armed"]
