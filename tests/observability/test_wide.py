"""Wide events: one row per attempt and per run, with true status and ids."""

import json
from pathlib import Path

import pytest

from stageflow.events.event import Event
from stageflow.events.fanout import FanOut
from stageflow.events.sinks import CollectingSink, JsonlSink
from stageflow.observability.attributes import (
    LoggingTracingEmitter,
    NoOpTracingEmitter,
    PipelineSpanAttributes,
    SpanTimer,
    StageSpanAttributes,
)
from stageflow.observability.stats import StatsFold
from stageflow.observability.wide import WideEvents, iso_time


def rows(events: list[Event], **options: bool) -> list[Event]:
    kept = CollectingSink()
    fan = FanOut([WideEvents(kept, **options)])
    for event in events:
        fan.emit(event)
    assert not fan.troubles()
    return kept.events()


def test_one_row_per_attempt_and_closed_stream_and_run(docs_run: list[Event]) -> None:
    made = rows(docs_run)
    stages = [(r.stage, r.item, r.attempt, r.data["status"]) for r in made if r.type == "stage.wide"]
    assert stages.count(("summary", None, 1, "retry")) == 1
    assert stages.count(("summary", None, 2, "ok")) == 1
    assert stages.count(("fetch", (3,), 1, "retry")) == 1
    assert stages.count(("parse", (7,), 1, "fail")) == 1
    assert len([s for s in stages if s[0] == "parse"]) == 3
    assert [r.type for r in made].count("pipeline.wide") == 1
    assert made[-1].type == "pipeline.wide"


def test_rows_have_ids_times_and_counts(docs_run: list[Event]) -> None:
    made = rows(docs_run)
    parse = next(r for r in made if r.stage == "parse" and r.item is None).data
    assert parse["items_in"] == parse["items_out"] + parse["dropped"] + parse["failed"] == 100
    assert (parse["lane"], parse["kind"], parse["wait"]["slot"]) == ("process", "transform", 0.3)
    assert parse["started_at"] < parse["ended_at"]
    assert parse["started_at"].startswith("2023-11-14T22:13:20.")
    for name, value in {
        "request_id": "req-9",
        "session_id": "sess-1",
        "user_id": "user-1",
        "org_id": "org-1",
        "service": "docs-service",
        "pipeline_run_id": "run-1",
    }.items():
        assert all(r.data[name] == value for r in made)
    summary = next(r for r in made if r.stage == "summary" and r.attempt == 2).data
    assert summary["data_keys"] == ["a", "b"]
    run = made[-1].data
    assert (run["status"], run["pipeline_name"]) == ("completed", "docs")
    assert run["stage_counts"] == {"ok": 5, "skip": 1}
    assert len(run["stage_details"]) == 6


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_the_run_row_tells_the_true_status(status: str, docs_run: list[Event]) -> None:
    ended = docs_run[-1]
    events = [*docs_run[:-1], Event(f"run.{status}", ended.time_unix_ns, ended.seq, "run-1", data={"reason": "why"})]
    assert rows(events)[-1].data["status"] == status
    assert rows(events)[-1].data["reason"] == "why"


def test_numbers_are_those_of_the_stats(docs_run: list[Event]) -> None:
    fold = StatsFold()
    for event in docs_run:
        fold.add(event)
    totals = fold.totals().to_dict()
    run = rows(docs_run)[-1].data
    for name in ("items_in", "items_out", "dropped", "failed", "attempts", "retried", "bytes_in", "bytes_out"):
        assert run[name] == totals[name]


def test_every_item_has_a_row_when_asked(docs_run: list[Event]) -> None:
    made = rows(docs_run, items=True)
    parse = [r for r in made if r.stage == "parse" and r.item is not None]
    assert len([r for r in parse if r.data["status"] == "ok"]) == 98
    assert len([r for r in parse if r.data["status"] == "fail"]) == 2


def test_rows_go_to_a_file_and_runs_are_forgotten(tmp_path: Path, docs_run: list[Event]) -> None:
    path = tmp_path / "wide.jsonl"
    sink = WideEvents(JsonlSink(path), details=False, extra={"host": "h"})
    for event in docs_run:
        sink.emit(event)
    sink.emit(Event("stage.completed", 1, 1, "unknown run", "a"))
    sink.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[-1]["data"]["extra"] == {"host": "h"}
    assert lines[-1]["data"]["stage_details"] == []
    assert not sink._runs


def test_iso_time_is_exact_to_the_microsecond() -> None:
    assert iso_time(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123456+00:00"


def test_span_attributes_keep_numbers_and_leave_out_what_is_unset() -> None:
    pipeline = PipelineSpanAttributes.of("r", {"pipeline": "docs", "user_id": "u", "service": "s", "stages": []})
    assert pipeline.to_otel_attributes() == {
        "pipeline.name": "docs",
        "pipeline.run_id": "r",
        "pipeline.user_id": "u",
        "service.name": "s",
    }
    stage = StageSpanAttributes(stage_name="parse", stage_kind="transform", duration_ms=1.5, data_keys=("a", "b"))
    assert stage.to_otel_attributes() == {
        "stage.name": "parse",
        "stage.kind": "transform",
        "stage.duration_ms": 1.5,
        "stage.data_keys": ("a", "b"),
    }


def test_span_timer_stops_once() -> None:
    now = iter([1.0, 1.5, 2.0, 9.0])
    timer = SpanTimer("load", clock=lambda: next(now))
    assert timer.elapsed_ms == 500.0
    assert timer.finish() == 1000.0
    assert timer.finish() == timer.elapsed_ms == 1000.0
    assert SpanTimer.start("x").name == "x"


def test_tracing_emitters(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "stageflow.trace")
    for emitter in (NoOpTracingEmitter(), LoggingTracingEmitter()):
        emitter.span_start("a", {"x": 1})
        emitter.span_end("a", 1.25, {})
        emitter.span_error("a", "boom", {})
    assert [r.levelname for r in caplog.records] == ["DEBUG", "INFO", "ERROR"]
