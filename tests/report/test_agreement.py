"""Every view agrees with `RunResult.stats` on a run in which everything happens: drops, failures, retries of items and
stages, a killed worker, a flat-map, a reduce; in the thread and the process lane."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stageflow import DROP, Engine, PipelineBuilder, RetryConfig, StageGraph
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
from stageflow.report.progress import ProgressFold

ITEMS = 120


def numbers() -> Any:
    yield from range(ITEMS + 9)


def lift(numbers: int) -> Any:
    if numbers == ITEMS:
        raise OverflowError("one too many")
    return DROP if numbers > ITEMS else numbers + 1


def tidy(lift: int) -> int:
    return lift - 1


def spread(tidy: int) -> Any:
    for place in range(tidy % 3):
        yield tidy * 10 + place


def _first_time(folder: str, name: str) -> bool:
    """True once, across processes."""
    try:
        os.close(os.open(Path(folder, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def sift(spread: int, folder: str, kills: bool) -> Any:
    if kills and spread == 500 and _first_time(folder, "killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if spread % 70 == 0 and _first_time(folder, f"item-{spread}"):
        raise ConnectionError(f"{spread} not yet")
    if spread % 110 == 0:
        raise ValueError(f"{spread} never")
    return DROP if spread % 50 == 0 else spread


def add(total: int, sift: int) -> int:
    return total + sift


def flaky(total: int, folder: str) -> int:
    if _first_time(folder, "once") or _first_time(folder, "twice"):
        raise ConnectionError("not yet")
    return total


def bad(flaky: int) -> int:
    raise RuntimeError("bad")


def graph(lane: Any) -> StageGraph:
    retry = RetryConfig(max_attempts=3, base_delay_ms=1, retry_on=(ConnectionError,))
    return (
        PipelineBuilder("agreement")
        .stage("numbers", numbers)
        .map("lift", lift, "numbers", executor=lane)  # one region with the next in the process lane
        .map("tidy", tidy, "lift", executor=lane)
        .map("spread", spread, "tidy", executor=lane)
        .map("sift", sift, "spread", executor=lane, retry=retry)
        .reduce("total", add, "sift", initial=0, combine=lambda a, b: a + b, executor="thread")
        .stage("flaky", flaky, executor=lane, retry=retry)
        .stage("bad", bad, executor=lane)
        .stage("after", lambda bad: bad, ["bad"], executor="thread")
        .build()
    )


class Seen:
    """A run with every view, and what they showed."""

    def __init__(self, lane: str, folder: Path) -> None:
        self.folder = folder
        self.events, wide = CollectingSink(), CollectingSink()
        self.fold, self.prometheus, self.report, self.progress = (
            StatsFold(),
            PrometheusSink(),
            ReportFold(),
            ProgressFold(),
        )
        jsonl, trace = JsonlSink(folder / "events.jsonl"), TraceSink(folder / "trace.json")
        exporter, tracer = InMemorySpanExporter(), TracerProvider()
        tracer.add_span_processor(SimpleSpanProcessor(exporter))
        reader = InMemoryMetricReader()
        meter = MeterProvider([reader])
        fold, progress = self.fold, self.progress

        class Folds:
            def emit(self, event: Event) -> None:
                fold.add(event)
                progress.add(event)

        sinks = [
            self.events, jsonl, trace, WideEvents(wide), self.prometheus, self.report, Folds(),
            FailedItemSink(folder / "failed"), OtelSink(tracer, meter),
        ]  # fmt: skip
        with Engine(processes=2) as engine:
            given = {"folder": str(folder), "kills": lane == "process"}
            self.result = engine.run(graph(lane), given, event_sinks=sinks, failure_mode="best_effort")
        jsonl.close()
        trace.close()
        self.wide = wide.events()
        self.spans = exporter.get_finished_spans()
        self.metrics = reader.get_metrics_data()
        tracer.shutdown()
        meter.shutdown()


@pytest.fixture(scope="module", params=["thread", "process"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return Seen(request.param, tmp_path_factory.mktemp("agreement"))


_COUNTS = ("items_in", "items_out", "dropped", "failed", "cancelled", "emitted", "skipped", "retried", "attempts")


def counts(stats: Any) -> tuple[int, ...]:
    return tuple(getattr(stats, name) for name in _COUNTS)


def test_two_maps_of_the_process_lane_are_one_region() -> None:
    made = graph("process")
    assert any("lift" in note and "tidy" in note for row in made.plan().stages for note in row.notes)


def test_the_run_was_what_it_should_be(seen: Seen) -> None:
    stats = seen.result.stats
    elements = [n * 10 + place for n in range(ITEMS) for place in range(n % 3)]
    failed = [one for one in elements if one % 110 == 0]
    dropped = [one for one in elements if one % 50 == 0 and one % 110]
    flawed = [one for one in elements if one % 70 == 0]
    assert (stats["lift"].items_in, stats["lift"].dropped, stats["lift"].failed) == (ITEMS + 9, 8, 1)
    assert stats["lift"].items_out == stats["tidy"].items_in == stats["tidy"].items_out == ITEMS
    assert stats["spread"].emitted == stats["sift"].items_in == len(elements)
    assert (stats["sift"].failed, stats["sift"].dropped) == (len(failed), len(dropped))
    assert stats["sift"].retried >= len(flawed)
    assert seen.result.data("flaky") == sum(set(elements) - set(failed) - set(dropped))
    assert (stats["flaky"].retried, stats["flaky"].attempts) == (2, 3)
    assert (stats["bad"].failed, stats["bad"].status) == (1, "fail")
    killed = (seen.folder / "killed").exists()
    assert seen.fold.workers_lost == int(killed)
    for one in stats.values():
        assert one.items_in == one.items_out + one.dropped + one.failed + one.cancelled


def test_streams_in_memory_and_in_a_file_give_the_same_numbers(seen: Seen) -> None:
    read = StatsFold()
    for line in (seen.folder / "events.jsonl").read_bytes().splitlines():
        read.add(decode_json(line))
    for name, stats in seen.result.stats.items():
        for view in (seen.fold, read, seen.report.stats, seen.progress.fold):
            told = view.stats_of(name)
            assert counts(told) == counts(stats), name
            assert told.busy_seconds == pytest.approx(stats.busy_seconds)
            assert told.bytes_out == stats.bytes_out
    assert list(seen.fold.result()) == list(seen.result.stats)


def test_wide_events_agree(seen: Seen) -> None:
    (run,) = [event.data for event in seen.wide if event.type == "pipeline.wide"]
    stats = seen.result.stats.values()
    for name in ("items_in", "items_out", "dropped", "failed", "retried", "attempts"):
        assert run[name] == sum(getattr(one, name) for one in stats), name
    assert run["status"] == seen.result.status
    details = {row["stage"]: row for row in run["stage_details"]}
    for one in stats:
        assert details[one.stage]["failed"] == one.failed


def test_prometheus_agrees(seen: Seen) -> None:
    text = seen.prometheus.render()
    for stats in seen.result.stats.values():
        pattern = rf'^stageflow_items_total\{{[^}}]*stage="{stats.stage}"[^}}]*outcome="(\w+)"\}} (\d+)'
        told = {outcome: int(value) for outcome, value in re.findall(pattern, text, re.M)}
        for outcome, count in (("ok", stats.items_out), ("dropped", stats.dropped), ("failed", stats.failed)):
            assert told.get(outcome, 0) == count, (stats.stage, told)


def test_metrics_agree(seen: Seen) -> None:
    points: dict[tuple[str, str, str], float] = {}
    for resource in seen.metrics.resource_metrics:  # type: ignore[union-attr]
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    at = point.attributes or {}
                    key = (metric.name, str(at.get("stage")), str(at.get("outcome")))
                    points[key] = points.get(key, 0) + getattr(point, "value", 0)
    for stats in seen.result.stats.values():
        for outcome, count in (("ok", stats.items_out), ("dropped", stats.dropped), ("failed", stats.failed)):
            assert points.get(("stageflow.items", stats.stage, outcome), 0) == count, stats.stage
        retried = sum(value for (name, stage, _), value in points.items() if "retr" in name and stage == stats.stage)
        assert retried == stats.retried, stats.stage


def test_spans_agree(seen: Seen) -> None:
    ours = {
        str((span.attributes or {}).get("stage.name")): span for span in seen.spans if span.name.startswith("stage ")
    }
    (run,) = [span for span in seen.spans if span.name.startswith("pipeline ")]
    stats = seen.result.stats
    assert (run.attributes or {})["pipeline.items.failed"] == sum(one.failed for one in stats.values())
    assert (run.attributes or {})["pipeline.retries"] == sum(one.retried for one in stats.values())
    assert set(ours) == set(stats)
    for name, span in ours.items():
        assert (span.attributes or {})["stage.items.in"] == stats[name].items_in
        assert (span.attributes or {})["stage.items.failed"] == stats[name].failed


def test_saved_failures_and_the_trace_agree(seen: Seen) -> None:
    saved = find_failed(seen.folder / "failed")
    assert len(saved) == sum(one.failed for one in seen.result.stats.values())
    slices = json.loads((seen.folder / "trace.json").read_text())
    for name in ("lift", "tidy", "spread", "sift"):
        stats = seen.result.stats[name]
        blocks = [one["args"] for one in slices if one["ph"] in "Xb" and one.get("cat") == name]
        assert sum(args.get("ok", 0) for args in blocks) == stats.items_out
        assert sum(args.get("failed", 0) for args in blocks) == stats.failed
