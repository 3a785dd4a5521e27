"""The bounded queue: drops are counted, draining is prompt, and it can be started again."""

import asyncio
import threading
import time

import pytest

from stageflow.events.bounded import BackpressureMetrics, BoundedSink
from stageflow.events.event import Event
from stageflow.events.sinks import CollectingSink


def event(n: int = 0) -> Event:
    return Event("stage.started", n, n)


class Gate:
    """A sink that holds its first event until it is let go."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.entered = threading.Event()
        self.go = threading.Event()

    def emit(self, event: Event) -> None:
        self.entered.set()
        assert self.go.wait(20)
        self.seen.append(event.seq)


def test_not_running_at_creation_and_one_emit_is_counted() -> None:
    kept = CollectingSink()
    sink = BoundedSink(kept, 10)
    assert not sink.is_running
    assert sink.try_emit(event())
    assert sink.is_running
    assert sink.stop()
    assert sink.metrics.emitted == sink.metrics.delivered == 1
    assert len(kept) == 1
    assert not sink.is_running


def test_full_queue_drops_the_new_event_counts_it_and_tells() -> None:
    gate, told = Gate(), []
    sink = BoundedSink(gate, 2, on_drop=lambda e: told.append(e.seq))
    sink.emit(event(0))
    assert gate.entered.wait(20)
    assert [sink.try_emit(event(n)) for n in (1, 2, 3, 4)] == [True, True, False, False]
    assert told == [3, 4]
    assert sink.queue_size == 2
    assert sink.metrics.to_dict() == {
        "emitted": 3,
        "dropped": 2,
        "queue_full_count": 2,
        "drop_rate_percent": 40.0,
    }
    gate.go.set()
    assert sink.stop()
    assert gate.seen == [0, 1, 2]


def test_stopping_an_idle_sink_is_prompt() -> None:
    sink = BoundedSink(CollectingSink())
    sink.start()
    started = time.monotonic()
    assert sink.stop(timeout=30)
    assert time.monotonic() - started < 20
    assert sink.stop()


def test_it_can_be_started_again() -> None:
    kept = CollectingSink()
    sink = BoundedSink(kept)
    for n in range(3):
        sink.emit(event(n))
        sink.close()
    sink.start()
    assert sink.is_running
    sink.close()
    assert [e.seq for e in kept.events()] == [0, 1, 2]


def test_stop_without_draining_drops_what_waits() -> None:
    gate = Gate()
    sink = BoundedSink(gate)
    for n in range(5):
        sink.emit(event(n))
    assert gate.entered.wait(20)
    threading.Timer(0.05, gate.go.set).start()
    assert sink.stop(drain=False)
    assert gate.seen == [0]
    assert sink.metrics.dropped == 4
    assert sink.metrics.queue_full_count == 0


def test_a_stuck_sink_is_left_behind_and_a_new_thread_serves_the_next_event() -> None:
    gate = Gate()
    sink = BoundedSink(gate)
    sink.emit(event(0))
    sink.emit(event(1))
    assert gate.entered.wait(20)
    assert not sink.stop(timeout=0.05)
    assert sink.metrics.dropped == 1
    sink.emit(event(2))
    gate.go.set()
    assert sink.flush(20)
    assert sink.stop()
    assert 2 in gate.seen


def test_a_failing_downstream_does_not_end_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    class Bad:
        def emit(self, event: Event) -> None:
            seen.append(event.seq)
            raise ValueError("no")

    sink = BoundedSink(Bad())
    for n in range(3):
        sink.emit(event(n))
    assert sink.stop()
    assert seen == [0, 1, 2]
    assert (sink.metrics.errors, sink.metrics.delivered) == (3, 0)
    assert len(caplog.records) == 1


async def test_async_downstream_put_and_aclose() -> None:
    seen: list[int] = []

    class Async:
        async def emit(self, event: Event) -> None:
            await asyncio.sleep(0)
            seen.append(event.seq)

    sink = BoundedSink(Async(), 2)
    for n in range(20):
        await sink.put(event(n))
    await sink.aclose()
    assert seen == list(range(20))
    assert sink.metrics.dropped == 0


def test_metrics_without_events() -> None:
    metrics = BackpressureMetrics()
    assert metrics.drop_rate() == 0.0
    metrics.record_drop()
    assert (metrics.dropped, metrics.queue_full_count) == (1, 1)
    assert metrics.last_drop_time is not None


def test_a_queue_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        BoundedSink(CollectingSink(), 0)
