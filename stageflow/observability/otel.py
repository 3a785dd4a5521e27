"""OpenTelemetry: spans for run, stage, attempt and block from events, user spans of workers, and metrics.

`OtelSink` needs an SDK `TracerProvider` and/or any `MeterProvider`; `configured()` makes one where the program has
set up a provider, and returns None, having imported nothing, where it has not. Ids come from the run id
(`context.tracing`), so what a worker records is a child of its attempt whoever exports it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from opentelemetry import metrics as metrics_api
from opentelemetry import trace as api
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event as SpanEvent
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from stageflow.context.tracing import parse_traceparent, span_id_of, trace_id_of
from stageflow.core.errors import DefinitionError
from stageflow.events import names
from stageflow.events.event import Event
from stageflow.observability.attempts import RetriedAttempts
from stageflow.observability.attributes import AttributeValue, PipelineSpanAttributes, StageSpanAttributes
from stageflow.observability.clock import ClockMap
from stageflow.observability.otel_metrics import Instruments
from stageflow.observability.stats import StatsFold

_SCOPE: Final = InstrumentationScope("stageflow")
#: Blocks and failed items that get a span of their own, per stage of a run; the rest is counted on the stage's span.
MAX_BLOCKS: Final = 250
_MAX_RUNS: Final = 4096
_TEXT: Final = 8192


class _Run:
    """What is open of one run."""

    __slots__ = (
        "clock",
        "data",
        "fold",
        "next_block",
        "parent",
        "parents",
        "recent",
        "sampled",
        "stages",
        "started",
        "trace_id",
        "untold",
    )

    def __init__(self, event: Event) -> None:
        self.data = event.data
        self.started = event.time_unix_ns
        self.clock = ClockMap()
        self.clock.span(event)
        self.fold = StatsFold(event.data.get("stages") or ())
        outer = parse_traceparent(event.data.get("traceparent"))
        self.trace_id = int(outer[0] if outer else trace_id_of(event.run_id or ""), 16)
        self.sampled = outer is None or bool(outer[2] & 1)
        self.parent = _context(self.trace_id, int(outer[1], 16), remote=True) if outer else None
        self.stages: dict[str, int] = {}
        self.parents: dict[str, list[str]] = {}
        for edge in event.data.get("edges") or ():
            self.parents.setdefault(edge[1], []).append(edge[0])
        self.recent: dict[str, deque[tuple[int, int, int]]] = {}
        self.next_block: dict[str, int] = {}
        self.untold: dict[str, int] = {}


def _context(trace_id: int, span_id: int, *, remote: bool = False) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=remote, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class OtelSink:
    """Turns events into spans (given a `tracer_provider`) and metrics (given a `meter_provider`).

    Inputs and values of a run are never exported. Spans are handed to the
    provider's processors with the times of the events, so a batch processor's thread does the exporting.
    """

    #: the engine sends trace contexts to attempts, and their spans back, while such a sink is attached
    wants_spans = True
    #: tells the engine that a run with such a sink is exported already
    exports = True

    def __init__(
        self,
        tracer_provider: Any = None,
        meter_provider: Any = None,
        *,
        blocks: bool = True,
    ) -> None:
        if tracer_provider is None and meter_provider is None:
            raise DefinitionError(
                "OtelSink needs a tracer_provider, a meter_provider or both",
                hint="use observability.otel.configured() for the ones the program has set up",
            )
        if tracer_provider is not None and not isinstance(tracer_provider, TracerProvider):
            raise DefinitionError(
                f"the tracer provider is a {type(tracer_provider).__name__}; spans are exported through the SDK",
                hint="opentelemetry.trace.set_tracer_provider(opentelemetry.sdk.trace.TracerProvider())",
            )
        self._provider: TracerProvider | None = tracer_provider
        self._resource: Resource | None = tracer_provider.resource if tracer_provider is not None else None
        self._instruments = Instruments(meter_provider) if meter_provider is not None else None
        self._blocks = blocks
        self._runs: dict[str | None, _Run] = {}
        self._attempts = RetriedAttempts()
        self._left: set[str | None] = set()
        self.wants_spans = tracer_provider is not None

    def leave(self, run_id: str | None) -> None:
        """Another sink exports this run: take none of its events."""
        self._left.add(run_id)

    # ------------------------------------------------------------ events

    def emit(self, event: Event) -> None:
        """Fold `event`; export what it completes."""
        if self._left and event.run_id in self._left:
            if event.type in names.RUN_ENDED:
                self._left.discard(event.run_id)
            return
        if self._instruments is not None:
            self._instruments.add(event)
        if self._provider is None:
            return
        type_ = event.type
        if type_ == names.RUN_STARTED:
            self._run_started(event)
            return
        run = self._runs.get(event.run_id)
        if run is None or not run.sampled:
            if type_ in names.RUN_ENDED:
                self._runs.pop(event.run_id, None)
            return
        run.fold.add(event)
        retried = self._attempts.add(event)
        if retried is not None:
            self._attempt(run, retried, "retry")
        if type_ == names.STAGE_STARTED:
            if event.stage is not None and event.item is None:
                run.stages.setdefault(event.stage, event.time_unix_ns)
        elif type_ == names.STAGE_ITEMS:
            self._block(run, event)
        elif type_ in names.STAGE_ENDED:
            self._stage_ended(run, event)
        elif type_ == names.SPANS_RECORDED:
            for span in event.data.get("spans") or ():
                self._user_span(run, event, span)
        elif type_ in names.RUN_ENDED:
            del self._runs[event.run_id]
            self._run_ended(run, event)

    def _run_started(self, event: Event) -> None:
        if len(self._runs) >= _MAX_RUNS:
            self._runs.pop(next(iter(self._runs)))
        run = self._runs[event.run_id] = _Run(event)
        run.fold.add(event)
        if self._provider is not None and run.parent is None:
            decided = self._provider.sampler.should_sample(None, run.trace_id, "pipeline", SpanKind.INTERNAL, {}, ())
            run.sampled = decided.decision is Decision.RECORD_AND_SAMPLE

    def _run_ended(self, run: _Run, event: Event) -> None:
        totals = run.fold.totals()
        attributes = PipelineSpanAttributes.of(event.run_id, run.data).to_otel_attributes()
        attributes.update(
            {
                "pipeline.status": totals.status,
                "pipeline.duration_ms": totals.wall_seconds * 1000.0,
                "pipeline.stages": totals.stages,
                "pipeline.items.in": totals.items_in,
                "pipeline.items.out": totals.items_out,
                "pipeline.items.dropped": totals.dropped,
                "pipeline.items.failed": totals.failed,
                "pipeline.attempts": totals.attempts,
                "pipeline.retries": totals.retried,
            }
        )
        bad = totals.status != "completed"
        text = event.data.get("error") or event.data.get("reason") or totals.status
        self._export(
            run,
            f"pipeline {totals.pipeline or 'run'}",
            span_id_of(event.run_id or ""),
            run.parent,
            run.started,
            event.time_unix_ns,
            attributes,
            Status(StatusCode.ERROR, str(text)) if bad else Status(StatusCode.OK),
        )

    def _stage_ended(self, run: _Run, event: Event) -> None:
        stage = event.stage or ""
        data = event.data
        if event.item is not None:
            if event.type == names.STAGE_FAILED and self._has_room(run, stage):
                self._attempt(run, event, "fail")
            return
        status = _STATUS[event.type]
        streaming = "items_in" in data or stage in run.next_block
        if not streaming and stage in run.stages:
            self._attempt(run, event, status)
        stats = run.fold.stats_of(stage)
        attributes = StageSpanAttributes(
            stage_name=stage,
            stage_kind=stats.kind or None,
            status=status,
            lane=stats.lane or None,
            duration_ms=stats.wall_seconds * 1000.0,
            error=_cut(data.get("error")),
            data_keys=tuple(sorted(data.get("data_keys") or ())) or None,
        ).to_otel_attributes()
        attributes.update(
            {
                "stage.items.in": stats.items_in,
                "stage.items.out": stats.items_out,
                "stage.items.dropped": stats.dropped,
                "stage.items.failed": stats.failed,
                "stage.attempts": stats.attempts,
                "stage.retries": stats.retried,
                "stage.busy_seconds": stats.busy_seconds,
                "stage.bytes.in": stats.bytes_in,
                "stage.bytes.out": stats.bytes_out,
            }
        )
        for reason, seconds in stats.wait.items():
            attributes[f"stage.wait.{reason}"] = seconds
        if data.get("reason"):
            attributes["stage.reason"] = str(data["reason"])
        if run.untold.get(stage):
            attributes["stage.blocks_not_traced"] = run.untold[stage]
        start = run.stages.pop(stage, None)
        if start is None:
            start = run.clock.span(event)[0]
        failed = status == "fail"
        self._export(
            run,
            f"stage {stage}",
            span_id_of(event.run_id or "", stage),
            _context(run.trace_id, int(span_id_of(event.run_id or ""), 16)),
            start,
            event.time_unix_ns,
            attributes,
            Status(StatusCode.ERROR, _cut(data.get("error"))) if failed else Status(StatusCode.OK),
            events=[_exception(event)] if failed else [],
        )

    def _attempt(self, run: _Run, event: Event, status: str) -> None:
        stage = event.stage or ""
        start, end = run.clock.span(event)
        attributes: dict[str, AttributeValue] = {"stage.name": stage, "stage.status": status}
        if event.attempt is not None:
            attributes["stage.attempt"] = event.attempt
        if event.item is not None:
            attributes["stage.item"] = ".".join(map(str, event.item))
        self._measured(attributes, event)
        bad = status in ("fail", "retry")
        self._export(
            run,
            f"attempt {stage}",
            span_id_of(event.run_id or "", stage, event.item, event.attempt),
            _context(run.trace_id, int(span_id_of(event.run_id or "", stage), 16)),
            max(start, run.started),
            end,
            attributes,
            Status(StatusCode.ERROR, _cut(event.data.get("error"))) if bad else Status(StatusCode.OK),
            events=[_exception(event)] if bad else [],
        )

    def _block(self, run: _Run, event: Event) -> None:
        stage = event.stage or ""
        number = run.next_block.get(stage, 0)
        if not self._blocks or not self._has_room(run, stage):
            run.next_block.setdefault(stage, number)
            return
        data = event.data
        lo, hi = data.get("lo") or 0, data.get("hi") or 0
        span_id = span_id_of(event.run_id or "", stage, "block", number, lo)
        links = []
        for parent in run.parents.get(stage, ()):
            for source_lo, source_hi, source_id in reversed(run.recent.get(parent, ())):
                if source_lo <= lo < source_hi:
                    links.append(Link(_context(run.trace_id, source_id), {"stage.name": parent}))
                    break
        attributes: dict[str, AttributeValue] = {
            "stage.name": stage,
            "stage.items.first": lo,
            "stage.items.last": hi - 1,
        }
        for key in ("ok", "dropped", "failed"):
            attributes[f"stage.items.{key}"] = data.get(key) or 0
        self._measured(attributes, event)
        start, end = run.clock.span(event)
        failed = bool(data.get("failed"))
        self._export(
            run,
            f"items {stage}",
            span_id,
            _context(run.trace_id, int(span_id_of(event.run_id or "", stage), 16)),
            max(start, run.started),
            end,
            attributes,
            Status(StatusCode.ERROR, f"{data.get('failed')} failed") if failed else Status(StatusCode.OK),
            links=links,
        )
        run.recent.setdefault(stage, deque(maxlen=64)).append((lo, hi, int(span_id, 16)))

    def _has_room(self, run: _Run, stage: str) -> bool:
        number = run.next_block.get(stage, 0)
        if number >= MAX_BLOCKS:
            run.untold[stage] = run.untold.get(stage, 0) + 1
            return False
        run.next_block[stage] = number + 1
        return True

    @staticmethod
    def _measured(attributes: dict[str, AttributeValue], event: Event) -> None:
        data = event.data
        if event.lane:
            attributes["stage.lane"] = event.lane
        for key, name in _MEASURES.items():
            value = data.get(key)
            if value:
                attributes[name] = value

    def _user_span(self, run: _Run, event: Event, data: dict[str, Any]) -> None:
        """A span that a stage opened in a worker, exported under the ids it has there."""
        parent_id = data.get("parent_id")
        context = _context(run.trace_id, int(data["span_id"], 16))
        parent = _context(run.trace_id, int(parent_id, 16)) if parent_id else None
        attributes = dict(data.get("attributes") or {})
        attributes.setdefault("stage.name", event.stage or "")
        attributes.setdefault("process.pid", data.get("pid") or 0)
        links = [
            Link(_context(int(link["trace_id"], 16), int(link["span_id"], 16)), link.get("attributes"))
            for link in data.get("links") or ()
        ]
        events = [SpanEvent(e["name"], e.get("attributes"), e.get("time_ns")) for e in data.get("events") or ()]
        code = StatusCode(data.get("status") or 0)
        self._hand_over(
            ReadableSpan(
                data.get("name") or "span",
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                events=events,
                links=links,
                kind=SpanKind(data.get("kind") or 0),
                status=Status(code, data.get("status_text") if code is StatusCode.ERROR else None),
                start_time=data.get("start_ns"),
                end_time=data.get("end_ns"),
                instrumentation_scope=InstrumentationScope(data.get("scope") or "user"),
            )
        )

    # ------------------------------------------------------------ exporting

    def _export(
        self,
        run: _Run,
        name: str,
        span_id: str,
        parent: SpanContext | None,
        start: int,
        end: int,
        attributes: dict[str, AttributeValue],
        status: Status,
        *,
        events: Sequence[SpanEvent] = (),
        links: Sequence[Link] = (),
    ) -> None:
        self._hand_over(
            ReadableSpan(
                name,
                context=_context(run.trace_id, int(span_id, 16)),
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                events=events,
                links=links,
                kind=SpanKind.INTERNAL,
                status=status,
                start_time=start,
                end_time=max(start, end),
                instrumentation_scope=_SCOPE,
            )
        )

    def _hand_over(self, span: ReadableSpan) -> None:
        assert self._provider is not None
        # The SDK has no public way to export a span with given ids and times; its processors are the stable part.
        self._provider._active_span_processor.on_end(span)

    def flush(self, timeout: float = 5.0) -> bool:
        """Have the provider export what it buffered; False if that took longer than `timeout` seconds."""
        return self._provider is None or self._provider.force_flush(int(timeout * 1000))

    def close(self) -> None:
        """Flush. The providers belong to the program and stay open."""
        if self._instruments is not None:
            self._instruments.flush()
        self.flush()


_STATUS: Final = {
    names.STAGE_COMPLETED: "ok",
    names.STAGE_FAILED: "fail",
    names.STAGE_SKIPPED: "skip",
    names.STAGE_CANCELLED: "cancel",
}
_MEASURES: Final = {
    "seconds": "stage.busy_seconds",
    "cpu_seconds": "stage.cpu_seconds",
    "queued_ms": "stage.queued_ms",
    "bytes_in": "stage.bytes.in",
    "bytes_out": "stage.bytes.out",
    "worker_pid": "process.pid",
}


def _cut(text: Any) -> str | None:
    return None if text is None else str(text)[:_TEXT]


def _exception(event: Event) -> SpanEvent:
    """The exception event of the semantic conventions."""
    data = event.data
    info = data.get("error_info") or {}
    attributes = {
        "exception.type": str(data.get("error_type") or info.get("type") or "Exception"),
        "exception.message": _cut(data.get("error") or info.get("message") or "") or "",
        "exception.stacktrace": _cut(data.get("traceback") or info.get("traceback") or "") or "",
    }
    return SpanEvent("exception", attributes, event.time_unix_ns)


def configured(**options: Any) -> OtelSink | None:
    """A sink for the providers the program has set up globally; None where there are none."""
    tracer = api.get_tracer_provider() if "opentelemetry.sdk.trace" in sys.modules else None
    meter = metrics_api.get_meter_provider() if "opentelemetry.sdk.metrics" in sys.modules else None
    real_tracer = tracer if isinstance(tracer, TracerProvider) else None
    real_meter = meter if meter is not None and type(meter).__module__.startswith("opentelemetry.sdk") else None
    if real_tracer is None and real_meter is None:
        return None
    return OtelSink(real_tracer, real_meter, **options)
