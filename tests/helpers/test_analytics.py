"""Exporters and the sink: what is written, what is dropped, and who is told."""

from __future__ import annotations

import io
import json
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stageflow.core.errors import DefinitionError
from stageflow.events.event import Event
from stageflow.events.sinks import EventSink
from stageflow.helpers.analytics import (
    AnalyticsEvent,
    AnalyticsSink,
    BufferedExporter,
    CompositeExporter,
    ConsoleExporter,
    JSONFileExporter,
)

NOON = datetime(2023, 10, 5, 14, 30, 15, 123456, tzinfo=UTC)


class Recorder:
    def __init__(self) -> None:
        self.events: list[AnalyticsEvent] = []
        self.calls: list[str] = []
        self.refuse = False

    def export(self, event: AnalyticsEvent) -> None:
        if self.refuse:
            raise OSError("refused")
        self.events.append(event)

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")

    @property
    def types(self) -> list[str]:
        return [event.event_type for event in self.events]


class ManualTimers:
    """Timers that fire when the test says so."""

    def __init__(self) -> None:
        self.pending: list[tuple[float, Callable[[], None]]] = []
        self.cancelled = 0

    def __call__(self, seconds: float, callback: Callable[[], None]) -> ManualTimers:
        self.pending.append((seconds, callback))
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    def fire(self) -> None:
        self.pending.pop(0)[1]()


def event(name: str = "stage.completed", **fields: object) -> AnalyticsEvent:
    return AnalyticsEvent(event_type=name, timestamp=NOON, **fields)  # type: ignore[arg-type]


def test_to_dict_has_the_three_always_and_the_rest_when_set() -> None:
    assert event().to_dict() == {
        "event_type": "stage.completed",
        "timestamp": "2023-10-05T14:30:15.123456+00:00",
        "data": {},
    }
    full = event(pipeline_run_id="r", stage_name="s", duration_ms=1.5, metadata={"k": 1}, data={"a": 1})
    assert full.to_dict().keys() == {
        "event_type", "timestamp", "data", "pipeline_run_id", "stage_name", "duration_ms", "metadata",
    }  # fmt: skip
    assert AnalyticsEvent.from_dict(full.to_dict()) == full


def test_from_dict_reads_times_and_uuids() -> None:
    run_id = uuid.uuid4()
    read = AnalyticsEvent.from_dict(
        {"event_type": "x", "timestamp": "2023-10-05T16:30:15.123456+02:00", "pipeline_run_id": run_id}
    )
    assert read.timestamp == NOON
    assert read.pipeline_run_id == str(run_id)
    with pytest.raises(DefinitionError):
        AnalyticsEvent.from_dict({"timestamp": "2023-10-05"})


def test_json_lines_appear_with_the_first_event(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    exporter = JSONFileExporter(path)
    assert not path.parent.exists()
    exporter.export(event(data={"odd": {1, 2} - {2}, ("tuple", "key"): b"x", "text": "zwölf\n"}))
    exporter.export(event("second"))
    exporter.flush()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event_type"] for line in lines] == ["stage.completed", "second"]
    assert json.loads(lines[0])["data"] == {"odd": "{1}", "('tuple', 'key')": "b'x'", "text": "zwölf\n"}
    assert exporter.count == 2
    exporter.close()
    exporter.close()
    exporter.export(event("third"))
    exporter.close()
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_append_and_truncate(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for append in (True, True, False):
        exporter = JSONFileExporter(path, append=append)
        exporter.export(event())
        exporter.close()
        exporter.export(event())
        exporter.close()
    assert len(path.read_text().splitlines()) == 2


def test_console_line() -> None:
    stream = io.StringIO()
    exporter = ConsoleExporter(colorize=False, verbose=True, stream=stream)
    exporter.export(event(stage_name="parse", duration_ms=12.34, data={"n": 1}))
    assert stream.getvalue() == '[14:30:15.123] stage.completed stage=parse 12.3 ms {"n": 1}\n'
    exporter.close()
    assert not stream.closed


@pytest.mark.parametrize(
    ("name", "code"),
    [("stage.failed", 31), ("stage.retrying", 33), ("stage.completed", 32), ("stage.started", 36), ("other", 37)],
)
def test_console_colour_follows_keywords(name: str, code: int) -> None:
    line = ConsoleExporter().render(event(name), colorize=True)
    assert f"\x1b[{code}m{name}\x1b[0m" in line


def test_console_escapes_what_drives_terminals() -> None:
    stream = io.StringIO()
    ConsoleExporter(stream=stream, verbose=True).export(event("a\x1b[2Jb", stage_name="s\nt"))
    assert stream.getvalue() == "[14:30:15.123] a\\x1b[2Jb stage=s\\nt\n"


def test_buffer_flushes_at_batch_size_on_flush_and_on_close() -> None:
    target, timers = Recorder(), ManualTimers()
    buffered = BufferedExporter(target, batch_size=2, start_timer=timers)
    buffered.export(event("1"))
    assert target.types == []
    buffered.export(event("2"))
    assert target.types == ["1", "2"]
    buffered.export(event("3"))
    buffered.flush()
    assert target.types == ["1", "2", "3"]
    buffered.export(event("4"))
    buffered.close()
    buffered.close()
    assert target.types == ["1", "2", "3", "4"]
    assert target.calls[-2:] == ["flush", "close"]
    assert target.calls.count("close") == 1
    assert timers.cancelled == 1
    buffered.export(event("late"))
    assert buffered.stats["dropped_count"] == 1


def test_the_timer_starts_with_the_first_event_and_repeats() -> None:
    target, timers = Recorder(), ManualTimers()
    buffered = BufferedExporter(target, flush_interval_seconds=7.0, start_timer=timers)
    assert timers.pending == []
    buffered.export(event("1"))
    buffered.export(event("2"))
    assert [seconds for seconds, _ in timers.pending] == [7.0]
    timers.fire()
    assert target.types == ["1", "2"]
    target.refuse = True
    buffered.export(event("3"))
    timers.fire()
    assert buffered.stats["buffer_size"] == 1
    target.refuse = False
    timers.fire()
    assert target.types == ["1", "2", "3"]
    buffered.close()
    callback = timers.pending.pop()[1]
    callback()
    assert timers.pending == []


def test_a_full_buffer_drops_its_oldest_and_says_so() -> None:
    target = Recorder()
    target.refuse = True
    calls: list[tuple[int, int]] = []

    def overflow(dropped: int, size: int) -> None:
        calls.append((dropped, size))
        raise RuntimeError("swallowed")

    buffered = BufferedExporter(
        target, batch_size=100, max_buffer_size=5, high_water=0.8, on_overflow=overflow, flush_interval_seconds=None
    )
    for n in range(7):
        buffered.export(event(str(n)))
    assert calls == [(-1, 4), (1, 5), (2, 5)]
    assert buffered.stats == {
        "buffer_size": 5,
        "max_buffer_size": 5,
        "fill_ratio": 1.0,
        "dropped_count": 2,
        "high_water_warned": True,
    }
    with pytest.raises(OSError, match="refused"):
        buffered.flush()
    target.refuse = False
    buffered.flush()
    assert target.types == ["2", "3", "4", "5", "6"]
    assert buffered.stats["high_water_warned"] is False
    for n in range(4):
        buffered.export(event(str(n)))
    assert calls[-1] == (-1, 4)
    buffered.close()


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"max_buffer_size": 0}, {"flush_interval_seconds": 0}, {"high_water": 0}]
)
def test_impossible_buffers_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(DefinitionError):
        BufferedExporter(Recorder(), **bad)  # type: ignore[arg-type]


def test_composite_reaches_everyone_whatever_one_does() -> None:
    class Broken(Recorder):
        def flush(self) -> None:
            raise OSError("flush")

        def close(self) -> None:
            raise OSError("close")

    broken, sound = Broken(), Recorder()
    broken.refuse = True
    both = CompositeExporter(broken, sound)
    both.export(event())
    both.export(event())
    assert sound.types == ["stage.completed"] * 2
    assert both.failures == [2, 0]
    with pytest.raises(ExceptionGroup, match="flush"):
        both.flush()
    with pytest.raises(ExceptionGroup, match="close"):
        both.close()
    assert sound.calls == ["flush", "close"]


def test_sink_maps_engine_events() -> None:
    target = Recorder()
    sink = AnalyticsSink(target)
    assert isinstance(sink, EventSink)
    sink.emit(
        Event(
            "stage.completed", 1_696_516_215_123_456_789, 7, run_id="run-1", stage="parse", item=(3,), attempt=2,
            lane="process", data={"duration_ms": 8},
        )
    )  # fmt: skip
    sink.emit(Event("run.started", 0, 8))
    assert sink.wants_items is True
    assert AnalyticsSink(target, items=False).wants_items is False
    assert sink.flush() is True
    first, second = target.events
    assert first.timestamp == NOON
    assert (first.pipeline_run_id, first.stage_name, first.duration_ms) == ("run-1", "parse", 8.0)
    assert first.metadata == {"seq": 7, "item": (3,), "attempt": 2, "lane": "process"}
    assert second.stage_name is None
    assert second.data == {}
    assert sink.event_count == 2
    sink.close()
    sink.close()
    assert target.calls == ["flush", "close"]
    sink.emit(Event("run.completed", 0, 9))
    assert sink.dropped_count == 1


def test_sink_filters() -> None:
    target = Recorder()
    sink = AnalyticsSink(target, include=["stage."], exclude=["started"])
    assert sink.try_emit("stage.completed", {"stage": "a", "duration_ms": 3, "pipeline_run_id": "r"}) is True
    assert sink.try_emit("stage.started") is False
    assert sink.try_emit("run.completed") is False
    sink.close()
    assert target.types == ["stage.completed"]
    assert target.events[0].stage_name == "a"
    assert target.events[0].pipeline_run_id == "r"


def test_sink_returns_at_once_and_bounds_its_queue() -> None:
    gate = threading.Event()
    entered = threading.Event()

    class Slow(Recorder):
        def export(self, event: AnalyticsEvent) -> None:
            entered.set()
            assert gate.wait(10)
            super().export(event)

    target = Slow()
    sink = AnalyticsSink(target, max_queue=2)
    assert sink.try_emit("1") is True
    assert entered.wait(10)
    assert sink.try_emit("2") is True
    assert sink.try_emit("3") is True
    assert sink.try_emit("4") is False
    assert sink.flush(timeout=0) is False
    gate.set()
    sink.close()
    assert target.types == ["1", "2", "3"]
    assert sink.dropped_count == 1


def test_sink_survives_a_failing_exporter_and_odd_events() -> None:
    target = Recorder()
    target.refuse = True
    sink = AnalyticsSink(target)
    sink.try_emit("a")
    sink.flush()
    target.refuse = False
    sink.emit(object())  # type: ignore[arg-type]
    sink.try_emit("b")
    sink.close()
    assert target.types == ["b"]
    assert sink.error_count == 2
