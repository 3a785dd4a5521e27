"""A million events, and nothing that watches them grows: each fold and sink on its own, measured."""

import gc
import io
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

from stageflow.events.bounded import BoundedSink
from stageflow.events.event import Event
from stageflow.events.fanout import FanOut
from stageflow.events.sinks import CollectingSink, JsonlSink, LoggingSink
from stageflow.observability.otel import OtelSink
from stageflow.observability.prometheus import PrometheusSink
from stageflow.observability.stats import StatsFold
from stageflow.observability.trace import TraceSink
from stageflow.observability.wide import WideEvents
from stageflow.report.failed import FailedItemSink
from stageflow.report.fold import ReportFold
from stageflow.report.live import LivePage
from stageflow.report.progress import ProgressFold, ProgressSink

#: bytes that a view may hold more after the second half of the events than after the first
ALLOWED = 512 << 10
BEGIN = 1_700_000_000_000_000_000


def stream(count: int) -> Iterator[Event]:
    """One run of `count` events: blocks, retries, failures, spans, prints, progress, samples, workers that die."""
    stages = ["numbers", "spin", "store"]
    lanes = dict.fromkeys(stages, "process")
    edges = [["numbers", "spin"], ["spin", "store"]]
    started = {"pipeline": "long", "stages": stages, "lanes": lanes, "edges": edges, "workers": 2, "monotonic": 5.0}
    yield Event("run.started", BEGIN, 1, "run", data=started)
    for stage in stages:
        yield Event("stage.started", BEGIN, 2, "run", stage, None, 1, "process")
    for n in range(5, count - 4):
        at, pid = BEGIN + n * 1_000_000, 1000 + (n // 5000) % 7
        stage = stages[n % 3]
        data: dict[str, Any]
        kind, item, data = "stage.items", None, {
            "lo": n, "hi": n + 4, "ok": 3, "dropped": 0, "failed": 0, "seconds": 0.001 * (n % 7), "cpu_seconds": 0.001,
            "bytes_in": 10, "bytes_out": 10, "worker_pid": pid, "queued_ms": 1.0, "started": 5.0 + n / 1000,
        }  # fmt: skip
        if n % 50 == 1:
            kind, item = "stage.retrying", (n,)
            data = {"delay_ms": 1.0, "error": f"again {n}", "why": "failure"}
        elif n % 50 == 2:
            info = {"type": "ValueError", "message": f"bad {n}", "traceback": "x" * 500}
            kind, item, data = (
                "stage.failed",
                (n,),
                {"error": f"bad {n}", "error_type": "ValueError", "error_info": info},
            )
        elif n % 50 == 3:
            kind, data = "stage.progress", {"done": n, "total": count, "note": f"at {n}"}
        elif n % 50 == 4:
            kind, data = "stage.print", {"stream": "stdout", "text": f"line {n}\n", "worker_pid": pid}
        elif n % 50 == 5:
            kind, data = (
                "engine.sample",
                {"rss_bytes": n, "live_bytes": n, "queued": {"spin": n % 9}, "workers": {pid: n}},
            )
        elif n % 5000 == 6:
            kind, data = "worker.lost", {"pid": pid, "reason": "gone"}
        elif n % 5000 == 7:
            kind, data = "worker.started", {"pid": pid}
        yield Event(kind, at, n, "run", stage if kind.startswith("stage") else None, item, 1, "process", data)
    at = BEGIN + count * 1_000_000
    for place, stage in enumerate(stages):
        done = {"duration_ms": 1.0, "items_in": count, "items_out": count, "dropped": 0, "failed": 0}
        yield Event("stage.completed", at, count + place, "run", stage, None, None, "process", done)
    yield Event("run.completed", at, count + 9, "run", data={"status": "completed", "duration_ms": 5.0})


class _Add:
    """A fold as a sink."""

    def __init__(self, fold: Any) -> None:
        self.emit = fold.add


class _Forgetting(io.TextIOBase):
    """A stream that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)


class _Nowhere:
    def emit(self, event: Event) -> None:
        """Forget it."""


def _tracer() -> TracerProvider:
    return TracerProvider()


VIEWS: dict[str, Callable[[Path], Any]] = {
    "stats": lambda folder: _Add(StatsFold()),
    "progress fold": lambda folder: _Add(ProgressFold()),
    "progress": lambda folder: ProgressSink(_Forgetting()),
    "report": lambda folder: ReportFold(),
    "live page": lambda folder: LivePage(),
    "prometheus": lambda folder: PrometheusSink(),
    "trace": lambda folder: TraceSink("/dev/null"),
    "jsonl": lambda folder: JsonlSink("/dev/null"),
    "wide": lambda folder: WideEvents(_Nowhere()),
    "saved failures": lambda folder: FailedItemSink(folder, limit=50),
    "collecting, with a limit": lambda folder: CollectingSink(limit=1000),
    "logging": lambda folder: LoggingSink(),
    "bounded": lambda folder: BoundedSink(_Nowhere()),
    "telemetry": lambda folder: OtelSink(_tracer(), MeterProvider([InMemoryMetricReader()])),
}


def grown(make: Callable[[Path], Any], folder: Path, count: int) -> int:
    """Bytes held more at the end of the stream than in its middle."""
    sink = make(folder)
    fan = FanOut([sink])
    events = stream(count)
    tracemalloc.start(1)
    try:
        for _ in range(count // 2):
            fan.emit(next(events))
        gc.collect()
        middle = tracemalloc.get_traced_memory()[0]
        for event in events:
            if event.type == "stage.completed":
                break
            fan.emit(event)
        if isinstance(sink, BoundedSink):
            sink.close()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - middle
    finally:
        tracemalloc.stop()
        with suppress(AttributeError):
            sink.close()


@pytest.mark.parametrize("view", VIEWS)
def test_a_long_run_grows_no_view(view: str, tmp_path: Path) -> None:
    assert grown(VIEWS[view], tmp_path, 5_000) < ALLOWED


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("view", VIEWS)
def test_a_million_events_grow_no_view(view: str, tmp_path: Path) -> None:
    sink = VIEWS[view](tmp_path)
    fan = FanOut([sink])
    held: list[tuple[int, int]] = []
    for number, event in enumerate(stream(1_000_000)):
        if number in (250_000, 999_990):
            gc.collect()
            held.append((sys.getallocatedblocks(), resident()))
        fan.emit(event)
    fan.close()
    # counted without tracing each allocation, which would take an hour: small objects, and what the system sees of all
    assert held[1][0] - held[0][0] < 5_000
    assert held[1][1] - held[0][1] < 8 << 20


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_folds_that_are_always_there_take_200_000_events(tmp_path: Path) -> None:
    fan = FanOut([VIEWS[name](tmp_path) for name in ("stats", "prometheus")])
    found = []
    for number, event in enumerate(stream(200_000)):
        fan.emit(event)
        if number in (100_000, 199_990):
            gc.collect()
            found.append(resident())
    fan.close()
    assert found[1] - found[0] < 8 << 20
