"""What the views cost: one job of many items of about a millisecond on worker processes, with views on and off in turn.

    python -m benchmarks.observability.views_cost [--rounds N] [--items N] [--spin MICROSECONDS]

Sides take turns within a round, in alternating order, on one warm engine; ratios are formed within a round, so that
what the machine does to one side it does to the other. Printed per side: the median ratio of wall time to that of
"off" with the interval that holds it in 95 of 100 cases, and the parent's CPU milliseconds, which other programs on
the machine disturb less.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from benchmarks.stats import interval
from stageflow import Engine, PipelineBuilder, StageGraph

SPIN_US = 700


def spin(numbers: int) -> int:
    """Some honest work."""
    until = time.perf_counter_ns() + SPIN_US * 1000
    value = numbers
    while time.perf_counter_ns() < until:
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return value


def shorten(spin: int) -> int:
    """Next to nothing."""
    return spin & 0xFF


def job(items: int) -> StageGraph:
    """Items through a source, two maps and a whole-stream stage."""

    def numbers() -> Iterator[int]:
        yield from range(items)

    return (
        PipelineBuilder("watched")
        .stage("numbers", numbers)
        .map("spin", spin, "numbers", executor="process")
        .map("shorten", shorten, "spin", executor="process")
        .stage("total", lambda shorten: sum(shorten), ["shorten"], executor="thread")
        .build()
    )


def files_and_pages(folder: Path, open_views: ExitStack) -> list[Any]:
    """Every view but OpenTelemetry."""
    from stageflow.events.sinks import CollectingSink, JsonlSink
    from stageflow.observability.prometheus import PrometheusSink
    from stageflow.observability.trace import TraceSink
    from stageflow.observability.wide import WideEvents
    from stageflow.report.failed import FailedItemSink
    from stageflow.report.fold import ReportFold
    from stageflow.report.live import LivePage
    from stageflow.report.progress import ProgressSink

    return [
        open_views.enter_context(closing(JsonlSink(folder / "events.jsonl"))),
        open_views.enter_context(closing(TraceSink(folder / "trace.json"))),
        open_views.enter_context(closing(LivePage())),
        open_views.enter_context(closing(ProgressSink(io.StringIO()))),
        WideEvents(CollectingSink()),
        PrometheusSink(),
        ReportFold(),
        FailedItemSink(folder / "failed"),
    ]


def exporting(folder: Path, open_views: ExitStack) -> list[Any]:
    """OpenTelemetry spans and metrics, exported in batches."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from stageflow.observability.otel import OtelSink

    tracer = TracerProvider()
    tracer.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    meter = MeterProvider([InMemoryMetricReader()])
    open_views.callback(tracer.shutdown)
    open_views.callback(meter.shutdown)
    return [OtelSink(tracer, meter)]


SIDES: dict[str, list[Callable[[Path, ExitStack], list[Any]]]] = {
    "off": [],
    "files and pages": [files_and_pages],
    "OpenTelemetry": [exporting],
    "everything": [files_and_pages, exporting],
}


def measure(
    engine: Engine, graph: StageGraph, views: list[Callable[[Path, ExitStack], list[Any]]]
) -> tuple[float, float]:
    """Wall seconds of one run, and CPU seconds of this process for it."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_views:
        sinks = [sink for view in views for sink in view(Path(folder), open_views)]
        wall, cpu = time.perf_counter(), time.process_time()
        result = engine.run(graph, event_sinks=sinks)
        cost = time.perf_counter() - wall, time.process_time() - cpu
        if not result.success:
            raise SystemExit(f"the job failed: {result.error}")
    return cost


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--items", type=int, default=3000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    graph = job(options.items)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ["off", *options.sides]}
    with Engine(processes=options.processes) as engine:
        for name in seen:
            measure(engine, graph, SIDES[name])  # imports, workers, code
        for round_ in range(options.rounds):
            order = list(seen) if round_ % 2 == 0 else list(reversed(seen))
            for name in order:
                seen[name].append(measure(engine, graph, SIDES[name]))
    base = seen["off"]
    print(f"{options.items} items of {SPIN_US} us on {options.processes} workers, {options.rounds} rounds")
    print(f"{'side':<18}{'wall':>10}{'ratio':>8}{'95 %':>16}{'parent CPU':>14}{'more CPU':>11}")
    for name, costs in seen.items():
        found = interval([mine[0] / off[0] for mine, off in zip(costs, base, strict=True)])
        wall = statistics.median(cost[0] for cost in costs)
        cpu = statistics.median(cost[1] for cost in costs)
        more = statistics.median(mine[1] - off[1] for mine, off in zip(costs, base, strict=True))
        print(
            f"{name:<18}{wall * 1000:>7.0f} ms{found.median:>8.3f}{f'{found.low:.3f}-{found.high:.3f}':>16}"
            f"{cpu * 1000:>11.0f} ms{more * 1000:>8.0f} ms"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
