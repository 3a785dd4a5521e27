"""Trace context in attempts: which span an attempt belongs to, and how spans opened in a worker reach the parent.

The ids of a run's own spans are computed from its run id, so the engine can tell a worker its parent span before that
span is exported, and no id has to come back. In a worker the spans a stage opens are collected and sent to the parent
as data before the attempt's result: a worker that is killed or recycled afterwards loses none. OpenTelemetry is
imported only by an attempt that was given a trace context.

May not import: the pipeline, the scheduler, the runtime, any room above them, any executor.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from stageflow.context.attempt import TRACE
from stageflow.events.names import SPANS_RECORDED

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from stageflow.context.attempt import Header, Program
    from stageflow.core.worker import WorkerPort

#: The key of `Header.extras` that holds the W3C trace context of an attempt.
TRACEPARENT: Final = "traceparent"
#: Spans one attempt may send; the others are counted.
MAX_SPANS: Final = 1000


# ---------------------------------------------------------------- ids


def trace_id_of(run_id: str) -> str:
    """The trace id (32 hex digits) of a run that was not started inside another trace."""
    import hashlib

    return hashlib.blake2b(run_id.encode("utf-8", "replace"), digest_size=16, person=b"stageflow-trace").hexdigest()


def span_id_of(run_id: str, *parts: object) -> str:
    """The span id (16 hex digits) of a part of a run: nothing = the run itself; else stage, item and attempt."""
    text = "\x1f".join([run_id, *(repr(part) for part in parts)])
    import hashlib

    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, person=b"stageflow-span").hexdigest()


@lru_cache(maxsize=256)  # blocks of one stage have the same
def parse_traceparent(text: str | None) -> tuple[str, str, int] | None:
    """Trace id, span id and flags of a W3C traceparent; None for anything that is not one."""
    if not text:
        return None
    pieces = text.strip().lower().split("-")
    if len(pieces) < 4 or [len(p) for p in pieces[:4]] != [2, 32, 16, 2] or pieces[0] == "ff":
        return None
    try:
        numbers = [int(p, 16) for p in pieces[:4]]
    except ValueError:
        return None
    if not numbers[1] or not numbers[2]:
        return None
    return pieces[1], pieces[2], numbers[3]


def traceparent_of(
    run_id: str,
    stage: str | None = None,
    attempt: int | None = None,
    *,
    inherited: str | None = None,
) -> str:
    """The W3C trace context inside a run, a stream stage (no `attempt`) or an attempt of a plain stage.

    `inherited` is the context the run was started in: its trace and its sampling decision are kept.
    """
    outer = parse_traceparent(inherited)
    trace_id, flags = (outer[0], outer[2]) if outer else (trace_id_of(run_id), 1)
    if stage is None:
        span_id = span_id_of(run_id)
    elif attempt is None:
        span_id = span_id_of(run_id, stage)
    else:
        span_id = span_id_of(run_id, stage, None, attempt)
    return f"00-{trace_id}-{span_id}-{flags:02x}"


def current_traceparent() -> str | None:
    """The trace context of the caller, if OpenTelemetry is in use here and a span is current."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


# ---------------------------------------------------------------- in the attempt


def attempt_scope(
    port: WorkerPort | None,
    extras: Mapping[str, Any] | None,
    item: tuple[int, ...] | None = None,
    *,
    stage: str = "",
) -> AbstractContextManager[None]:
    """Make the trace context in `extras` the current one; afterwards send what was recorded here to the parent.

    Costs a dictionary look-up when there is none. In lanes of the engine's own process the user's provider exports
    spans itself, so only the context is set. Never fails an attempt.
    """
    text = extras.get(TRACEPARENT) if extras else None
    parsed = parse_traceparent(text)
    return _NO_SCOPE if parsed is None else _Scope(port, text or "", parsed, item, stage)


_NO_SCOPE: Final[AbstractContextManager[None]] = nullcontext()


class _Scope:
    """The trace context of one attempt. A class, since blocks of tiny items enter one for every few of them."""

    __slots__ = ("_collector", "_item", "_parsed", "_port", "_stage", "_text", "_token")

    def __init__(
        self, port: WorkerPort | None, text: str, parsed: tuple[str, str, int], item: tuple[int, ...] | None, stage: str
    ) -> None:
        self._stage = stage
        self._port = port
        self._text = text
        self._parsed = parsed
        self._item = item
        self._collector: SpanCollector | None = None
        self._token: Any = None

    def __enter__(self) -> None:
        port = self._port
        try:
            alone = port is not None and port.lane == "process"
            self._collector = _collector() if alone else None
            self._token = _attach(self._text, self._parsed)
        except Exception:
            self._port = None  # a broken tracing set-up is no reason to fail a stage

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            _detach(self._token)
        collector, port = self._collector, self._port
        if collector is None or port is None or collector.is_empty:
            return
        spans, dropped = collector.take(self._parsed[0])
        if spans or dropped:
            if self._stage:
                for span in spans:  # a call may be of several stages
                    span["attributes"].setdefault("stage.name", self._stage)
            told: dict[str, Any] = {"type": SPANS_RECORDED, "data": {"spans": spans, "dropped": dropped}}
            if self._item is not None:
                told["item"] = list(self._item)
            port.note("event", told)


class Traced:
    """A stage's program inside the trace context of its attempt. Shipped instead of the program while somebody traces.

    `streaming` programs (map, sink, reduce) run blocks of items: what they record belongs to the stage's span.
    """

    __slots__ = ("_gives_parts", "_known", "program", "streaming")

    def __init__(self, program: Program, *, streaming: bool) -> None:
        self._gives_parts = inspect.isgeneratorfunction(type(program).__call__)
        self._known: tuple[Any, dict[str, str]] | None = None  # the context of the last run
        self.program = program
        self.streaming = streaming

    def __reduce__(self) -> tuple[Any, ...]:
        return _traced, (self.program, self.streaming)

    def _extras(self, header: Header) -> dict[str, str] | None:
        inherited = (header.extras or {}).get(TRACE)
        if inherited is None:
            return None
        attempt = None if self.streaming else header.attempt
        key = (header.run_id, attempt, inherited)
        known = self._known
        if known is None or known[0] != key:  # a worker runs blocks of one run after another
            text = traceparent_of(header.run_id, self.program.name, attempt, inherited=inherited)
            known = self._known = (key, {TRACEPARENT: text})
        return known[1]

    def scope(self, port: WorkerPort, header: Header) -> AbstractContextManager[None]:
        """The trace context of an attempt, or of the stage for a block; spans recorded in it bear the stage's name."""
        return attempt_scope(port, self._extras(header), header.item, stage=self.program.name)

    def __call__(self, port: WorkerPort, header: Header, *args: Any) -> Any:
        """As the program's own call."""
        if self._gives_parts:
            return self._parts(port, header, *args)
        with self.scope(port, header):
            return self.program(port, header, *args)

    def _parts(self, port: WorkerPort, header: Header, *args: Any) -> Generator[Any, None, Any]:
        with self.scope(port, header):
            return (yield from self.program(port, header, *args))

    async def run_async(self, port: WorkerPort, header: Header, *args: Any) -> Any:
        """As the program's own."""
        with self.scope(port, header):
            return await self.program.run_async(port, header, *args)


def _traced(program: Program, streaming: bool) -> Traced:
    return Traced(program, streaming=streaming)


def _attach(text: str, parsed: tuple[str, str, int]) -> Any:
    global _parent
    from opentelemetry import context, trace

    known = _parent
    if known is not None and known[0] == text:
        return context.attach(trace.set_span_in_context(known[1]))
    parent = trace.SpanContext(
        trace_id=int(parsed[0], 16), span_id=int(parsed[1], 16), is_remote=True, trace_flags=trace.TraceFlags(parsed[2])
    )
    span = trace.NonRecordingSpan(parent)
    _parent = (text, span)  # replaced as a whole: threads may come at once
    return context.attach(trace.set_span_in_context(span))


_parent: tuple[str, Any] | None = None  # the last that was attached: blocks of one stage have the same


def _detach(token: Any) -> None:
    from opentelemetry import context

    context.detach(token)


class SpanCollector:
    """A span processor that keeps finished spans as plain data, by trace, until an attempt takes them."""

    def __init__(self) -> None:
        self._spans: dict[str, list[dict[str, Any]]] = {}
        self._dropped: dict[str, int] = {}
        self._lock = threading.Lock()

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """Nothing: a span is taken when it ends."""

    def on_end(self, span: ReadableSpan) -> None:
        """Keep the span."""
        context = span.context
        if context is None:
            return
        trace_id = f"{context.trace_id:032x}"
        with self._lock:
            kept = self._spans.setdefault(trace_id, [])
            if len(kept) < MAX_SPANS:
                kept.append(span_data(span))
            else:
                self._dropped[trace_id] = self._dropped.get(trace_id, 0) + 1

    def _on_ending(self, span: Any) -> None:
        """Nothing: called by newer SDKs before a span ends."""

    def shutdown(self) -> None:
        """Nothing is held open."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is buffered that an attempt would not take."""
        return True

    @property
    def is_empty(self) -> bool:
        """True while nothing waits to be taken."""
        return not self._spans

    def take(self, trace_id: str) -> tuple[list[dict[str, Any]], int]:
        """The spans of a trace that ended since the last call, and how many were dropped."""
        with self._lock:
            return self._spans.pop(trace_id, []), self._dropped.pop(trace_id, 0)


_installed: tuple[int, SpanCollector | None] | None = None
_install_lock = threading.Lock()


def _collector() -> SpanCollector | None:
    """This worker's collector, on a provider of our own; None where the user configured a provider in the worker."""
    global _installed
    known = _installed
    if known is not None and known[0] == os.getpid():
        return known[1]
    with _install_lock:
        # A forked child starts anew: the parent's collector is not its own.
        if _installed is None or _installed[0] != os.getpid():
            _installed = (os.getpid(), _install())
        return _installed[1]


def _install() -> SpanCollector | None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    collector = SpanCollector()
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        # Set up by a stage's module, or inherited by fork: it exports by itself, and a second copy would be one too
        # many.
        return None
    ours = TracerProvider()
    ours.add_span_processor(collector)  # type: ignore[arg-type]
    trace.set_tracer_provider(ours)
    return collector


def span_data(span: ReadableSpan) -> dict[str, Any]:
    """A finished span as msgpack-able data: ids in hex, times in Unix nanoseconds, attributes as plain values."""
    context = span.context
    assert context is not None
    return {
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_id": f"{span.parent.span_id:016x}" if span.parent is not None else None,
        "flags": int(context.trace_flags),
        "name": span.name,
        "kind": span.kind.value,
        "start_ns": span.start_time or 0,
        "end_ns": span.end_time or 0,
        "attributes": _plain(span.attributes),
        "status": span.status.status_code.value,
        "status_text": span.status.description,
        "events": [{"name": e.name, "time_ns": e.timestamp, "attributes": _plain(e.attributes)} for e in span.events],
        "links": [
            {
                "trace_id": f"{link.context.trace_id:032x}",
                "span_id": f"{link.context.span_id:016x}",
                "attributes": _plain(link.attributes),
            }
            for link in span.links
        ],
        "scope": span.instrumentation_scope.name if span.instrumentation_scope is not None else "",
        "pid": os.getpid(),
    }


def _plain(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        str(key): list(value) if isinstance(value, tuple | list) else value for key, value in (attributes or {}).items()
    }
