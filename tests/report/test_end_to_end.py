"""One real run with every view attached: each view tells the same story as `RunResult.stats`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stageflow import DROP, Engine, PipelineBuilder, RetryConfig
from stageflow.events.catalogue import CATALOGUE, typed
from stageflow.events.encoding import decode_json
from stageflow.events.event import Event
from stageflow.events.sinks import CollectingSink, JsonlSink
from stageflow.observability.otel import OtelSink
from stageflow.observability.prometheus import PrometheusSink
from stageflow.observability.stats import StatsFold
from stageflow.observability.trace import TraceSink
from stageflow.observability.wide import WideEvents
from stageflow.report.failed import FailedItemSink, find_failed
from stageflow.report.fold import ReportFold
from stageflow.report.html import write_report
from stageflow.report.live import LivePage
from stageflow.report.progress import ProgressFold


def numbers() -> Any:
    yield from range(60)


async def double(numbers: int) -> int:
    return numbers * 2


def sift(double: int) -> Any:
    if double == 14:
        raise ValueError("fourteen <b>")
    return DROP if double % 20 == 0 else double


def total(sift: Any) -> int:
    return sum(sift)


_calls = {"flaky": 0}


def flaky(total: int) -> int:
    _calls["flaky"] += 1
    if _calls["flaky"] < 3:
        raise ConnectionError("not yet")
    return total


class Views:
    """Every view there is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events = CollectingSink()
        self.jsonl = JsonlSink(folder / "events.jsonl")
        self.wide = CollectingSink()
        self.trace = TraceSink(folder / "trace.json")
        self.prometheus = PrometheusSink()
        self.report = ReportFold()
        self.failed = FailedItemSink(folder / "failed")
        self.progress = ProgressFold()
        self.live = LivePage()
        self.exporter = InMemorySpanExporter()
        self.tracer = TracerProvider()
        self.tracer.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meter = MeterProvider([self.reader])
        self.otel = OtelSink(self.tracer, self.meter)

    def sinks(self) -> list[Any]:
        class Progress:
            def emit(this, event: Event) -> None:
                self.progress.add(event)

        return [
            self.events,
            self.jsonl,
            WideEvents(self.wide),
            self.trace,
            self.prometheus,
            self.report,
            self.failed,
            Progress(),
            self.live,
            self.otel,
        ]

    def close(self) -> None:
        self.jsonl.close()
        self.trace.close()
        self.live.close()
        self.tracer.shutdown()
        self.meter.shutdown()


@pytest.fixture(scope="module", params=["thread", "process"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    _calls["flaky"] = 0
    views = Views(tmp_path_factory.mktemp("views"))
    graph = (
        PipelineBuilder("story")
        .stage("numbers", numbers)
        .map("double", double, "numbers")
        .map("sift", sift, "double", executor=request.param)
        .stage("total", total)
        .stage("flaky", flaky, executor="thread", retry=RetryConfig(max_attempts=3, base_delay_ms=1))
        .build()
    )
    with Engine(processes=1) as engine:
        result = engine.run(graph, event_sinks=views.sinks(), failure_mode="best_effort")
    metrics = views.reader.get_metrics_data()
    views.close()
    return views, result, metrics


def test_the_run_is_what_it_should_be(seen: Any) -> None:
    _, result, _ = seen
    assert result.status == "failed"
    s = result.stats["sift"]
    assert (s.items_in, s.items_out, s.dropped, s.failed) == (60, 53, 6, 1)
    assert result.stats["flaky"].retried == 2
    assert result.stats["flaky"].attempts == 3
    for stats in result.stats.values():
        assert stats.items_in == stats.items_out + stats.dropped + stats.failed + stats.cancelled


def test_every_event_is_in_the_catalogue_and_grows_in_seq(seen: Any) -> None:
    views, _, _ = seen
    events = views.events.events()
    assert {e.type for e in events} <= set(CATALOGUE)
    assert all(typed(e) is not None for e in events)
    assert [e.seq for e in events] == sorted({e.seq for e in events})
    assert events[0].type == "run.started"
    assert events[-1].type == "run.failed"


def test_the_stream_alone_gives_the_stats_of_the_result(seen: Any) -> None:
    views, result, _ = seen
    fold = StatsFold()
    for line in (views.folder / "events.jsonl").read_bytes().splitlines():
        fold.add(decode_json(line))
    for name, s in fold.result().items():
        told = result.stats[name]
        for field in ("items_in", "items_out", "dropped", "failed", "retried", "attempts", "bytes_out", "emitted"):
            assert getattr(s, field) == getattr(told, field), (name, field)
        assert s.busy_seconds == pytest.approx(told.busy_seconds)


def test_closing_totals_are_those_of_the_blocks(seen: Any) -> None:
    views, result, _ = seen
    for e in views.events.of_type("stage.completed"):
        if "items_in" in e.data:
            s = result.stats[e.stage]
            assert (e.data["items_in"], e.data["items_out"], e.data["dropped"], e.data["failed"]) == (
                s.items_in,
                s.items_out,
                s.dropped,
                s.failed,
            )


def test_wide_events_report_progress_and_failed_files_agree(seen: Any) -> None:
    views, result, _ = seen
    rows = views.wide.events()
    run = rows[-1].data
    assert run["status"] == "failed"
    assert run["items_in"] == sum(s.items_in for s in result.stats.values())
    assert run["retried"] == 2
    closed = {r.stage: r.data for r in rows if r.type == "stage.wide" and r.item is None and r.data["final"]}
    for name in ("numbers", "double", "sift"):
        assert closed[name]["items_out"] == result.stats[name].items_out
    assert len([r for r in rows if r.stage == "flaky"]) == 3
    for name, s in views.report.stage_stats().items():
        assert (s.items_in, s.failed) == (result.stats[name].items_in, result.stats[name].failed)
    assert [(f.stage, f.item) for f in views.report.failures] == [("sift", (7,))]
    assert {row.stage: row.done for row in views.progress.rows()} == {n: s.items_in for n, s in result.stats.items()}
    assert [p.name for p in find_failed(views.folder / "failed")] == ["7.sfail"]


def test_spans_and_metrics_agree(seen: Any) -> None:
    views, result, metrics = seen
    spans = views.exporter.get_finished_spans()
    stages = {s.attributes["stage.name"]: s.attributes for s in spans if s.name.startswith("stage ")}
    for name, stats in result.stats.items():
        assert stages[name]["stage.items.in"] == stats.items_in
        assert stages[name]["stage.items.failed"] == stats.failed
    assert len([s for s in spans if s.name == "attempt flaky"]) == 3
    assert len([s for s in spans if s.parent is None]) == 1
    points = {
        (p.attributes["stage"], p.attributes["outcome"]): p.value
        for resource in metrics.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == "stageflow.items"
        for p in metric.data.data_points
    }
    for name, stats in result.stats.items():
        assert points.get((name, "ok"), 0) == stats.items_out
        assert points.get((name, "dropped"), 0) == stats.dropped
        assert points.get((name, "failed"), 0) == stats.failed
    text = views.prometheus.render()
    for name, stats in result.stats.items():
        found = re.search(
            rf'stageflow_items_total{{pipeline="story",stage="{name}",lane="[a-z]*",outcome="ok"}} (\d+)', text
        )
        assert found is not None
        assert int(found[1]) == stats.items_out


def test_trace_and_page_are_complete(seen: Any) -> None:
    views, result, _ = seen
    records = json.loads((views.folder / "trace.json").read_text())
    blocks = [r for r in records if r["ph"] in "Xb" and r.get("cat") == "sift"]
    assert sum(r["args"].get("ok", 0) for r in blocks) == result.stats["sift"].items_out
    page = write_report(views.folder / "run.html", views.report).read_text()
    assert "fourteen &lt;b&gt;" in page
    assert "fourteen <b>" not in page
    assert page.count('<g class="node ') == 5


def test_sinks_that_fail_hurt_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Bad:
        def emit(self, event: Event) -> None:
            raise RuntimeError("bad sink")

    class BadAsync:
        async def emit(self, event: Event) -> None:
            raise RuntimeError("bad async sink")

    graph = PipelineBuilder("p").stage("a", lambda: 1, executor="async").build()
    sinks = [Bad(), BadAsync(), JsonlSink("/dev/full"), TraceSink("/dev/full")]
    with Engine(processes=1) as engine:
        result = engine.run(graph, event_sinks=sinks)
    assert result.success
    assert len([r for r in caplog.records if r.name == "stageflow.events" and "failed" in r.message]) == 2
