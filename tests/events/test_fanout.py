"""The fan-out: nothing a sink does reaches the run, and nobody listening costs nothing."""

import asyncio
import logging
import time
import timeit

import pytest

from stageflow.events.event import Event
from stageflow.events.fanout import FanOut
from stageflow.events.sinks import CollectingSink


def event(n: int = 0, type_: str = "stage.started", **data: object) -> Event:
    return Event(type_, n, n, "run-1", "parse", None, 1, "process", dict(data))


class Raising:
    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0

    def emit(self, event: Event) -> None:
        self.calls += 1
        raise self.error


class SlowAsync:
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.gate = asyncio.Event()

    async def emit(self, event: Event) -> None:
        await self.gate.wait()
        self.seen.append(event.seq)


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(3), asyncio.CancelledError()])
def test_a_raising_sink_is_reported_once_and_hurts_no_other(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Raising(error), CollectingSink()
    fan = FanOut([bad, good])
    for n in range(3):
        fan.emit(event(n))
    assert [e.seq for e in good.events()] == [0, 1, 2]
    assert bad.calls == 3
    assert len(caplog.records) == 1
    assert fan.troubles() == [{"sink": "Raising", "errors": 3, "dropped": 0}]


def test_keyboard_interrupt_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        FanOut([Raising(KeyboardInterrupt())]).emit(event())


async def test_an_async_sink_gets_events_in_order_without_holding_the_emitter() -> None:
    slow = SlowAsync()
    fan = FanOut([slow])
    for n in range(100):
        fan.emit(event(n))
    await asyncio.sleep(0)
    assert slow.seen == []
    slow.gate.set()
    assert await fan.drain()
    assert slow.seen == list(range(100))


async def test_a_slow_async_sink_loses_events_beyond_its_bound_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    slow = SlowAsync()
    fan = FanOut([slow], max_waiting=10)
    for n in range(50):
        fan.emit(event(n))
    assert fan.troubles()[0]["dropped"] == 40
    assert len(caplog.records) == 1
    slow.gate.set()
    await fan.drain()
    assert slow.seen == list(range(10))


async def test_drain_gives_up_on_a_stuck_sink() -> None:
    stuck = SlowAsync()
    fan = FanOut([stuck])
    for n in range(3):
        fan.emit(event(n))
    started = time.monotonic()
    assert not await fan.drain(timeout=0.05)
    assert time.monotonic() - started < 20  # it was to wait for a twentieth of a second, not for the sink
    assert fan.troubles()[0]["dropped"] == 3


async def test_async_errors_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    class Bad:
        async def emit(self, event: Event) -> None:
            raise asyncio.CancelledError if event.seq % 2 else ValueError("no")

    fan = FanOut([Bad()])
    for n in range(4):
        fan.emit(event(n))
    assert await fan.drain()
    assert fan.troubles()[0]["errors"] == 4
    assert len(caplog.records) == 1


async def test_a_sync_emit_may_return_an_awaitable() -> None:
    seen: list[int] = []

    async def take(e: Event) -> None:
        seen.append(e.seq)

    class Half:
        def emit(self, event: Event):  # type: ignore[no-untyped-def]
            return take(event)

    fan = FanOut([Half()])
    fan.emit(event(1))
    fan.emit(event(2))
    await fan.aclose()
    assert seen == [1, 2]
    assert not fan.listening


def test_an_async_sink_without_a_loop_loses_events_but_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Async:
        async def emit(self, event: Event) -> None: ...

    fan = FanOut([Async()])
    fan.emit(event())
    assert "no event loop" in caplog.text


def test_detaching() -> None:
    first, second = CollectingSink(), CollectingSink()
    fan = FanOut()
    assert not fan.listening
    detach = fan.add(first)
    fan.append(second)
    assert fan.listening
    assert list(fan) == [first, second]
    detach()
    fan.emit(event())
    fan.remove(second)
    assert not fan.listening
    assert (len(first), len(second)) == (0, 1)


def test_redaction_reaches_every_sink_and_a_failing_hook_shows_nothing(caplog: pytest.LogCaptureFixture) -> None:
    kept = CollectingSink()

    def redact(e: Event) -> Event | None:
        if e.seq == 1:
            raise RuntimeError("cannot")
        return None if e.seq == 2 else e

    fan = FanOut([kept], redact=redact)
    for n in range(4):
        fan.emit(event(n))
    assert [e.seq for e in kept.events()] == [0, 3]
    assert len(caplog.records) == 1


def test_items_are_expanded_only_for_the_sinks_that_want_them() -> None:
    blocks, items = CollectingSink(), CollectingSink(wants_items=True)
    fan = FanOut([blocks, items])
    fan.emit(Event("stage.failed", 1, 1, "run-1", "parse", (11,), 1, "process", {"error": "x"}))
    fan.emit(event(2, "stage.items", lo=10, hi=14, ok=3, dropped=0, failed=1, seconds=0.4, worker_pid=9))
    assert [e.type for e in blocks.events()] == ["stage.failed", "stage.items"]
    expanded = items.of_type("stage.completed")
    assert [e.item for e in expanded] == [(10,), (12,), (13,)]
    assert expanded[0].data["seconds"] == pytest.approx(0.1)
    assert expanded[0].data["worker_pid"] == 9
    fan.emit(event(3, "stage.items", lo=0, hi=2, items=[[5, 0], [5, 1]], ok=2, dropped=0, failed=0))
    assert [e.item for e in items.of_type("stage.completed")][3:] == [(5, 0), (5, 1)]


def test_failed_items_of_an_ended_stage_are_forgotten() -> None:
    fan = FanOut([CollectingSink(limit=1, wants_items=True)])
    for n in range(100):
        fan.emit(Event("stage.failed", 1, 1, "run-1", "parse", (n,), 1, "process", {}))
    fan.emit(event(2, "stage.completed", items_in=100))
    assert not fan._failed_items


def test_nobody_listening_costs_less_than_a_tenth_of_a_microsecond() -> None:
    fan = FanOut()
    best = min(
        timeit.repeat("fan.listening and fan.emit(e)", globals={"fan": fan, "e": event()}, number=10_000, repeat=20)
    )
    assert best / 10_000 < 1e-7
    logging.getLogger(__name__).debug("%.1f ns", best / 10_000 * 1e9)


async def test_aclose_closes_sinks_and_survives_one_that_cannot(caplog: pytest.LogCaptureFixture) -> None:
    closed: list[str] = []

    class A:
        def emit(self, event: Event) -> None: ...
        async def aclose(self) -> None:
            closed.append("a")

    class B:
        def emit(self, event: Event) -> None: ...
        def close(self) -> None:
            raise OSError("disk")

    class C:
        def emit(self, event: Event) -> None: ...
        def close(self) -> None:
            closed.append("c")

    await FanOut([A(), B(), C()]).aclose()
    assert closed == ["a", "c"]
    assert "disk" in caplog.text
