"""Spans a stage opens itself, in each lane, become children of its attempt in one trace."""

import subprocess
import sys
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stageflow import Engine, PipelineBuilder
from stageflow.events.sinks import CollectingSink
from stageflow.observability.otel import OtelSink


def work() -> str:
    with trace.get_tracer("mine").start_as_current_span("inner", attributes={"answer": 42}):
        return f"{trace.get_current_span().get_span_context().trace_id:032x}"


def each(numbers: int) -> int:
    with trace.get_tracer("mine").start_as_current_span("item", attributes={"n": numbers}):
        return numbers


def numbers() -> Any:
    yield from range(3)


@pytest.mark.parametrize("lane", ["process", "thread", "async"])
def test_user_spans_are_children_of_their_attempt(lane: str) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    graph = (
        PipelineBuilder("traced")
        .stage("work", work, executor=lane)
        .stage("numbers", numbers)
        .map("each", each, "numbers", executor=lane)
        .build()
    )
    with Engine(processes=1) as engine, provider.get_tracer("caller").start_as_current_span("caller") as caller:
        result = engine.run(graph, event_sinks=[OtelSink(provider)])
    assert result.success
    spans = exporter.get_finished_spans()
    expected = f"{caller.get_span_context().trace_id:032x}"
    assert result.data("work") == expected
    by_id = {span.context.span_id: span for span in spans}
    run = next(span for span in spans if span.name == "pipeline traced")
    assert run.parent is not None
    assert run.parent.span_id == caller.get_span_context().span_id
    if lane == "process":  # in this process the program's own provider exports them: here there is none
        inner = next(span for span in spans if span.name == "inner")
        assert by_id[inner.parent.span_id].name == "attempt work"
        assert inner.attributes["answer"] == 42
        items = [span for span in spans if span.name == "item"]
        assert sorted(span.attributes["n"] for span in items) == [0, 1, 2]
        assert {by_id[span.parent.span_id].name for span in items} == {"stage each"}
    provider.shutdown()


def again(each: int) -> int:
    with trace.get_tracer("mine").start_as_current_span("once more", attributes={"n": each}):
        return each


def test_spans_of_stages_that_share_a_worker_are_children_of_their_own_stage() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    graph = (
        PipelineBuilder("region")
        .stage("numbers", numbers)
        .map("each", each, "numbers", executor="process")
        .map("again", again, "each", executor="process")
        .build()
    )
    assert any("each -> again" in note for note in graph.plan().stage("each").notes)
    events = CollectingSink()
    with Engine(processes=1) as engine:
        assert engine.run(graph, event_sinks=[OtelSink(provider), events]).success
    spans = exporter.get_finished_spans()
    by_id = {span.context.span_id: span for span in spans}
    for name, stage in (("item", "each"), ("once more", "again")):
        mine = [span for span in spans if span.name == name]
        assert sorted(span.attributes["n"] for span in mine) == [0, 1, 2]
        assert {by_id[span.parent.span_id].name for span in mine} == {f"stage {stage}"}
        assert {span.attributes["stage.name"] for span in mine} == {stage}
    # the region is still one while somebody traces: a call brings blocks of both, which share its start
    blocks = events.of_type("stage.items")
    first = {stage: min(e.data["started"] for e in blocks if e.stage == stage) for stage in ("each", "again")}
    assert first["each"] == first["again"]
    provider.shutdown()


SCRIPT = """
import sys
from stageflow import Engine, PipelineBuilder
def loaded():
    import sys
    return [name for name in sys.modules if name.startswith("opentelemetry")]
graph = PipelineBuilder("plain").stage("modules", loaded, executor="process").build()
with Engine(processes=1) as engine:
    assert engine.run(graph).data("modules") == []
assert loaded() == []
"""


def test_without_a_tracing_sink_no_telemetry_is_loaded_anywhere() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
