"""OpenTelemetry against the real SDK: the shape of the trace, user spans of workers, metrics, and OTLP over
loopback."""

import gzip
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

from stageflow.context import tracing
from stageflow.context.attempt import Header
from stageflow.core.errors import DefinitionError
from stageflow.events.event import Event
from stageflow.events.fanout import FanOut
from stageflow.observability.otel import MAX_BLOCKS, OtelSink
from stageflow.observability.stats import StatsFold


def export(events: list[Event], **options: Any) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(**options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    fan = FanOut([OtelSink(provider)])
    for event in events:
        fan.emit(event)
    assert not fan.troubles()
    provider.shutdown()
    return list(exporter.get_finished_spans())


def ident(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def test_one_trace_run_over_stage_over_attempt_and_block(docs_run: list[Event]) -> None:
    spans = export(docs_run)
    by_id = {ident(span): span for span in spans}
    assert len(by_id) == len(spans)
    assert len({span.context.trace_id for span in spans if span.context}) == 1
    roots = [span for span in spans if span.parent is None]
    assert [span.name for span in roots] == ["pipeline docs"]
    for span in spans:
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time
        if span.parent is None:
            continue
        parent = by_id[span.parent.span_id]
        kind = span.name.split()[0]
        assert parent.name.split()[0] == {"stage": "pipeline", "attempt": "stage", "items": "stage"}[kind]
        assert roots[0].start_time is not None
        assert span.start_time >= roots[0].start_time


def test_span_counts_and_attributes_agree_with_the_stats(docs_run: list[Event]) -> None:
    fold = StatsFold()
    for event in docs_run:
        fold.add(event)
    stats, totals = fold.result(), fold.totals()
    spans = export(docs_run)
    stages = {
        span.attributes["stage.name"]: span.attributes
        for span in spans
        if span.name.startswith("stage ") and span.attributes
    }
    assert set(stages) == set(stats)
    for name, attributes in stages.items():
        assert attributes["stage.items.in"] == stats[name].items_in
        assert attributes["stage.items.out"] == stats[name].items_out
        assert attributes["stage.items.dropped"] == stats[name].dropped
        assert attributes["stage.items.failed"] == stats[name].failed
        assert attributes["stage.retries"] == stats[name].retried
        assert isinstance(attributes["stage.duration_ms"], float)
    blocks = [span.attributes for span in spans if span.name == "items parse" and span.attributes]
    assert sum(a["stage.items.ok"] for a in blocks) == stats["parse"].items_out  # type: ignore[misc]
    run = next(span for span in spans if span.parent is None)
    assert run.attributes is not None
    assert run.attributes["pipeline.items.in"] == totals.items_in
    assert run.attributes["pipeline.user_id"] == "user-1"
    assert run.status.status_code is StatusCode.OK


def test_failures_carry_the_exception_and_retries_are_attempts(docs_run: list[Event]) -> None:
    spans = export(docs_run)
    failed = next(s for s in spans if s.attributes and s.attributes.get("stage.item") == "7")
    assert failed.status.status_code is StatusCode.ERROR
    (event,) = failed.events
    assert event.name == "exception"
    assert event.attributes is not None
    assert event.attributes["exception.type"] == "builtins.ValueError"
    assert "bad 7" in str(event.attributes["exception.stacktrace"])
    summary = [s for s in spans if s.name == "attempt summary"]
    assert [(s.attributes or {})["stage.attempt"] for s in summary] == [1, 2]
    assert [s.status.status_code for s in summary] == [StatusCode.ERROR, StatusCode.OK]


def test_blocks_link_to_the_blocks_their_items_came_from(docs_run: list[Event]) -> None:
    spans = export(docs_run)
    by_id = {ident(span): span for span in spans}
    parse = [span for span in spans if span.name == "items parse"]
    for span in parse:
        (link,) = span.links
        source = by_id[link.context.span_id]
        assert source.name == "items fetch"
        assert (source.attributes or {})["stage.items.first"] == (span.attributes or {})["stage.items.first"]


def test_a_run_inside_a_trace_continues_it(docs_run: list[Event]) -> None:
    inside = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    first = docs_run[0]
    started = Event(first.type, first.time_unix_ns, 0, first.run_id, data={**first.data, "traceparent": inside})
    spans = export([started, *docs_run[1:]])
    run = next(span for span in spans if span.name.startswith("pipeline"))
    assert run.parent is not None
    assert f"{run.parent.span_id:016x}" == "b7ad6b7169203331"
    assert all(f"{s.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c" for s in spans if s.context)
    unsampled = Event(first.type, 1, 0, "run-1", data={**first.data, "traceparent": inside[:-1] + "0"})
    assert export([unsampled, *docs_run[1:]]) == []


def test_the_sampler_decides_for_the_whole_run(docs_run: list[Event]) -> None:
    assert export(docs_run, sampler=ALWAYS_OFF) == []


def test_blocks_beyond_the_limit_are_counted_not_traced(docs_run: list[Event]) -> None:
    blocks = [
        Event(
            "stage.items",
            docs_run[0].time_unix_ns,
            n,
            "run-1",
            "parse",
            None,
            1,
            "process",
            {"lo": n, "hi": n + 1, "ok": 1, "seconds": 0.001},
        )
        for n in range(MAX_BLOCKS + 7)
    ]
    spans = export([docs_run[0], *blocks, *docs_run[1:]])
    assert len([s for s in spans if s.name in ("items parse", "attempt parse")]) == MAX_BLOCKS
    stage = next(s for s in spans if s.name == "stage parse")
    assert (stage.attributes or {})["stage.blocks_not_traced"] >= 7


class Port:
    """What a worker's port does with notes."""

    lane = "process"

    def __init__(self) -> None:
        self.notes: list[tuple[str, Any]] = []

    def note(self, kind: str, data: Any) -> None:
        self.notes.append((kind, data))


WORKER = """
import json, sys
from stageflow.context import tracing
assert not any(m.startswith("opentelemetry") for m in sys.modules), "imported too early"
class Port:
    lane = "process"
    def note(self, kind, data): print(json.dumps([kind, data]))
with tracing.attempt_scope(Port(), None):
    pass
assert not any(m.startswith("opentelemetry") for m in sys.modules)
with tracing.attempt_scope(Port(), {"traceparent": sys.argv[1]}, (4,)):
    from opentelemetry import trace, propagate
    tracer = trace.get_tracer("mine")
    with tracer.start_as_current_span("outer", attributes={"n": 3}) as outer:
        carrier = {}
        propagate.inject(carrier)
        assert carrier["traceparent"].startswith(sys.argv[1][:35])
        with tracer.start_as_current_span("inner") as inner:
            inner.record_exception(ValueError("x"))
with tracing.attempt_scope(Port(), {"traceparent": sys.argv[1]}):
    pass
"""


def test_spans_of_a_worker_become_children_of_their_attempt(docs_run: list[Event]) -> None:
    import json

    traceparent = tracing.traceparent_of("run-1", "summary", 2)
    done = subprocess.run([sys.executable, "-c", WORKER, traceparent], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    kind, data = json.loads(line)
    assert (kind, data["type"], data["item"], data["data"]["dropped"]) == ("event", "spans.recorded", [4], 0)
    when = docs_run[-1].time_unix_ns
    event = Event("spans.recorded", when, 1, "run-1", "summary", None, 2, "process", data["data"])
    spans = export([*docs_run[:-1], event, docs_run[-1]])
    by_id = {ident(span): span for span in spans}
    inner = next(s for s in spans if s.name == "inner")
    outer = next(s for s in spans if s.name == "outer")
    assert inner.parent is not None
    assert by_id[inner.parent.span_id] is outer
    assert outer.parent is not None
    attempt = by_id[outer.parent.span_id]
    assert attempt.name == "attempt summary"
    assert (attempt.attributes or {})["stage.attempt"] == 2
    assert (outer.attributes or {})["n"] == 3
    assert outer.instrumentation_scope is not None
    assert outer.instrumentation_scope.name == "mine"
    assert inner.events[0].name == "exception"


def test_in_the_engines_own_process_only_the_context_is_set() -> None:
    port = Port()
    port.lane = "thread"
    with tracing.attempt_scope(port, {"traceparent": tracing.traceparent_of("r", "s", 1)}):  # type: ignore[arg-type]
        assert tracing.current_traceparent() == tracing.traceparent_of("r", "s", 1)
    assert port.notes == []
    assert tracing.current_traceparent() is None


class Program:
    """As much of a stage's program as a traced call needs."""

    name = "parse"

    def __call__(self, port: Any, header: Header, *args: Any) -> Any:
        return tracing.current_traceparent()

    async def run_async(self, port: Any, header: Header, *args: Any) -> Any:
        return tracing.current_traceparent()


class Parts(Program):
    def __call__(self, port: Any, header: Header, *args: Any) -> Any:
        for _ in args:
            yield tracing.current_traceparent()
        return "end"


async def test_a_traced_program_runs_inside_the_context_of_its_attempt() -> None:
    port = Port()
    port.lane = "thread"
    on = Header("run-1", 2, extras={tracing.TRACE: ""})
    plain: Any = tracing.Traced(Program(), streaming=False)  # type: ignore[arg-type]
    assert plain(port, on) == tracing.traceparent_of("run-1", "parse", 2)
    assert await plain.run_async(port, on) == tracing.traceparent_of("run-1", "parse", 2)
    assert plain(port, Header("run-1", 2)) is None
    stream: Any = tracing.Traced(Parts(), streaming=True)  # type: ignore[arg-type]
    assert list(stream(port, on, 1, 2)) == [tracing.traceparent_of("run-1", "parse")] * 2
    with pytest.raises(StopIteration) as stop:
        next(stream(port, on))
    assert stop.value.value == "end"
    outer = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    inside = plain(port, Header("run-1", 1, extras={tracing.TRACE: outer}))
    assert inside.startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert inside.endswith("-00")
    assert tracing.current_traceparent() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00-zz",
        "00-" + "0" * 32 + "-" + "1" * 16 + "-01",
        "ff-" + "1" * 32 + "-" + "1" * 16 + "-01",
        "00-" + "g" * 32 + "-" + "1" * 16 + "-01",
        None,
    ],
)
def test_what_is_no_traceparent_is_ignored(text: str | None) -> None:
    assert tracing.parse_traceparent(text) is None
    with tracing.attempt_scope(None, {"traceparent": text}):
        assert tracing.current_traceparent() is None


def test_a_collector_is_bounded() -> None:
    collector = tracing.SpanCollector()
    provider = TracerProvider()
    provider.add_span_processor(collector)  # type: ignore[arg-type]
    tracer = provider.get_tracer("t")
    with tracer.start_as_current_span("root") as root:
        for _ in range(tracing.MAX_SPANS + 5):
            tracer.start_span("x").end()
    trace_id = f"{root.get_span_context().trace_id:032x}"
    spans, dropped = collector.take(trace_id)
    assert (len(spans), dropped) == (tracing.MAX_SPANS, 6)
    assert collector.take(trace_id) == ([], 0)
    provider.shutdown()


# ---------------------------------------------------------------- metrics


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    assert data is not None
    found: dict[str, list[Any]] = {}
    for resource in data.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                found[metric.name] = [metric.unit, *metric.data.data_points]
    return found


def test_metrics_tell_the_same_numbers_as_the_stats(docs_run: list[Event]) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    fan = FanOut([OtelSink(meter_provider=provider)])
    fold = StatsFold()
    for event in docs_run:
        fan.emit(event)
        fold.add(event)
    assert not fan.troubles()
    found = points(reader)
    stats, totals = fold.result(), fold.totals()
    unit, *items = found["stageflow.items"]
    assert unit == "{item}"
    by = {(p.attributes["stage"], p.attributes["outcome"]): p.value for p in items}
    for name, s in stats.items():
        assert by.get((name, "ok"), 0) == s.items_out
        assert by.get((name, "dropped"), 0) == s.dropped
        assert by.get((name, "failed"), 0) == s.failed
    assert sum(p.value for p in found["stageflow.retries"][1:]) == totals.retried
    unit, *moved = found["stageflow.bytes"]
    assert unit == "By"
    assert sum(p.value for p in moved if p.attributes["direction"] == "out") == totals.bytes_out
    blocks = found["stageflow.block.duration"][1:] + found["stageflow.attempt.duration"][1:]
    assert sum(p.sum for p in blocks) == pytest.approx(totals.busy_seconds)
    assert found["stageflow.workers"][1].value == 2
    assert found["stageflow.backpressure"][1].value == 0
    assert found["stageflow.run.duration"][0] == "s"
    waits = {(p.attributes["stage"], p.attributes["reason"]): p.sum for p in found["stageflow.stage.wait"][1:]}
    assert waits["parse", "slot"] == pytest.approx(0.3)
    provider.shutdown()


# ---------------------------------------------------------------- configuration


def test_off_without_a_provider_and_nothing_imported() -> None:
    code = (
        "import sys\n"
        "from stageflow.observability.otel_auto import configured_sink\n"
        "import stageflow.observability.stats, stageflow.context.tracing, stageflow.observability.wide\n"
        "assert configured_sink() is None\n"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')]\n"
        "from opentelemetry.sdk.trace import TracerProvider\n"
        "assert configured_sink() is None\n"
        "from opentelemetry import trace\n"
        "trace.set_tracer_provider(TracerProvider())\n"
        "sink = configured_sink()\n"
        "assert sink is not None and sink.wants_spans\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


AUTOMATIC = """
import sys
from stageflow import Engine, PipelineBuilder

def numbers():
    yield from range(10)

def user(numbers):
    from opentelemetry import trace
    with trace.get_tracer("user").start_as_current_span("inner"):
        return numbers

graph = PipelineBuilder("g").stage("numbers", numbers).map("user", user, "numbers", executor="process").build()
plain = PipelineBuilder("p").stage("one", lambda: 1, executor="thread").build()

if __name__ == "__main__":
    with Engine(processes=1) as engine:
        engine.run(plain)
        assert not [name for name in sys.modules if name.startswith("opentelemetry")]
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from stageflow.observability.otel import OtelSink

        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        for sinks in ([], [OtelSink(provider)]):
            exporter.clear()
            with trace.get_tracer("main").start_as_current_span("outer") as outer:
                assert engine.run(graph, event_sinks=sinks).success
            spans = exporter.get_finished_spans()
            names = [span.name for span in spans]
            assert (names.count("inner"), names.count("pipeline g"), names.count("stage user")) == (10, 1, 1), names
            assert {span.context.trace_id for span in spans} == {outer.context.trace_id}
    print("exported")
"""


def test_a_provider_that_the_program_has_set_up_gets_every_run_once(tmp_path: Path) -> None:
    program = tmp_path / "automatic.py"
    program.write_text(AUTOMATIC)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (0, "exported\n"), done.stderr


def test_a_wrong_provider_is_named() -> None:
    with pytest.raises(DefinitionError, match="needs"):
        OtelSink()
    with pytest.raises(DefinitionError, match="str"):
        OtelSink("provider")


# ---------------------------------------------------------------- over the wire


class Receiver(http.server.BaseHTTPRequestHandler):
    requests: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest()
        request.ParseFromString(body)
        self.server.requests.append(request)  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def receiver() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.requests = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_otlp_receiver_gets_the_whole_trace(docs_run: list[Event], receiver: Any) -> None:
    provider = TracerProvider()
    endpoint = f"http://127.0.0.1:{receiver.server_address[1]}/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    sink = OtelSink(provider)
    for event in docs_run:
        sink.emit(event)
    sink.close()
    provider.shutdown()
    spans = [
        span
        for request in receiver.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    expected = export(docs_run)
    assert {s.span_id.hex() for s in spans} == {f"{ident(s):016x}" for s in expected}
    parse = next(s for s in spans if s.name == "stage parse")
    values = {a.key: a.value for a in parse.attributes}
    assert values["stage.items.in"].int_value == 100
    assert values["stage.duration_ms"].double_value > 0
