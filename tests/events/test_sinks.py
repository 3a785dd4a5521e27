"""Sinks: what they keep and write, and that a broken one is told of once."""

import asyncio
import io
import json
import logging
import os
import threading
from pathlib import Path

import pytest

from stageflow.events.event import Event
from stageflow.events.sinks import (
    CollectingSink,
    EventSink,
    JsonlSink,
    LoggingSink,
    NoOpSink,
    RedactingSink,
    clear_event_sink,
    get_event_sink,
    set_event_sink,
)


def event(n: int = 0, type_: str = "stage.completed", **data: object) -> Event:
    return Event(type_, 1_000 + n, n, "run-1", "parse", None, 1, "process", dict(data))


def test_collecting_keeps_order_filters_by_prefix_and_clears() -> None:
    sink = CollectingSink()
    assert sink.is_empty
    for n, type_ in enumerate(["run.started", "stage.started", "stage.completed"]):
        sink.emit(event(n, type_))
    assert [e.type for e in sink.of_type("stage.")] == ["stage.started", "stage.completed"]
    assert [e.seq for e in sink.events()] == [0, 1, 2]
    sink.clear()
    assert len(sink) == 0
    assert isinstance(sink, EventSink)


def test_collecting_with_a_limit_keeps_the_newest_in_bounded_memory() -> None:
    sink = CollectingSink(limit=10)
    for n in range(1_000):
        sink.emit(event(n))
        assert len(sink._events) <= 21
    assert [e.seq for e in sink.events()] == list(range(990, 1_000))


@pytest.mark.parametrize("level", [logging.DEBUG, "info", "WARNING", logging.ERROR])
def test_logging_sink_logs_at_exactly_its_level(level: int | str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "stageflow.run")
    LoggingSink(level).emit(event(type_="stage.failed", error="boom\nsecond line"))
    (record,) = caplog.records
    assert record.levelno == (level if isinstance(level, int) else getattr(logging, level.upper()))
    assert record.getMessage() == "stage.failed parse error=boom second line"
    assert (record.run_id, record.stage, record.attempt) == ("run-1", "parse", 1)  # type: ignore[attr-defined]


def test_logging_sink_names_an_unknown_level() -> None:
    with pytest.raises(ValueError, match="loud"):
        LoggingSink("loud")


def test_jsonl_makes_folders_appends_and_reopens(tmp_path: Path) -> None:
    path = tmp_path / "a" / "events.jsonl"
    sink = JsonlSink(path)
    assert not path.exists()
    sink.emit(event(0, x=1))
    sink.close()
    sink.emit(event(1))
    sink.close()
    JsonlSink(path).close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["seq"] for line in lines] == [0, 1]
    assert lines[0]["data"] == {"x": 1}
    truncating = JsonlSink(path, append=False)
    truncating.emit(event(5))
    truncating.close()
    assert [json.loads(line)["seq"] for line in path.read_text().splitlines()] == [5]


def test_jsonl_writes_a_failure_and_the_end_of_a_run_at_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    sink = JsonlSink(path)
    sink.emit(event(0))
    sink.emit(event(1, "stage.failed"))
    assert len(path.read_bytes().splitlines()) == 2
    sink.emit(event(2, "run.failed"))
    assert len(path.read_bytes().splitlines()) == 3
    sink.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported_once_and_then_only_counted(caplog: pytest.LogCaptureFixture) -> None:
    sink = JsonlSink("/dev/full")
    for n in range(5):
        sink.emit(event(n, "stage.failed"))
    sink.close()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "/dev/full" in caplog.text
    assert (sink.written, sink.lost) == (0, 5)


def test_a_closed_pipe_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as pipe:
        sink = JsonlSink(pipe)
        for n in range(3):
            sink.emit(event(n, "run.completed"))
        assert isinstance(sink.error, BrokenPipeError)
    assert len(caplog.records) == 1
    assert sink.lost == 3


def test_jsonl_writes_to_an_open_stream_and_leaves_it_open() -> None:
    stream = io.BytesIO()
    sink = JsonlSink(stream)
    sink.emit(event(1))
    sink.close()
    assert json.loads(stream.getvalue())["seq"] == 1


def test_redaction_comes_before_the_sink() -> None:
    kept = CollectingSink()

    def hide(e: Event) -> Event | None:
        return None if e.type == "secret" else Event(e.type, e.time_unix_ns, e.seq, data={"hidden": True})

    sink = RedactingSink(kept, hide)
    sink.emit(event(1, password="x"))
    sink.emit(event(2, "secret"))
    assert [e.data for e in kept.events()] == [{"hidden": True}]


async def test_current_sink_is_per_context_and_inherited_by_tasks() -> None:
    assert isinstance(get_event_sink(), NoOpSink)
    mine = CollectingSink()
    set_event_sink(mine)

    async def child() -> bool:
        return get_event_sink() is mine

    assert await asyncio.create_task(child())
    seen: list[EventSink] = []
    other = threading.Thread(target=lambda: seen.append(get_event_sink()))
    other.start()
    other.join()
    assert isinstance(seen[0], NoOpSink)
    clear_event_sink()
    assert isinstance(get_event_sink(), NoOpSink)
