"""What the views cost: a job on worker processes, with views on and off in turn.

    python -m benchmarks.observability.views_cost [--job demo|small] [--rounds N] [--sides off everything]

The job is the demo (every module of the standard library through four stages), or `small`: items of 0.7 ms. Sides take
turns within a round, in alternating order, on one warm engine; ratios are formed within a round, so that what the
machine does to one side it does to the other. "everything" is a live progress view on a terminal, the report (written
at the end), the live page (which nobody looks at), a Perfetto trace, JSON lines, wide events, Prometheus, saved
failures, and OpenTelemetry spans and metrics. Printed per side: the median ratio of wall time to that of "off" and of
the CPU time of parent and workers together, each with the interval that holds it in 95 of 100 cases, and the CPU
milliseconds that parent and workers spent more. CPU time says more than wall time where other programs use the machine.

"off" itself is not free of events: they are folded into `RunResult.stats`. The last line says what that takes.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

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


class _Terminal(io.StringIO):
    """A terminal that nobody looks at."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


class _Report:
    """A report that is written when the run is over, as the command line does."""

    def __init__(self, path: Path) -> None:
        from stageflow.report.fold import ReportFold

        self._fold = ReportFold()
        self._path = path
        self.emit = self._fold.emit

    def close(self) -> None:
        from stageflow.report.html import write_report

        write_report(self._path, self._fold)


def files_and_pages(folder: Path, open_views: ExitStack) -> list[Any]:
    """Every view but OpenTelemetry."""
    from stageflow.events.sinks import CollectingSink, JsonlSink
    from stageflow.observability.prometheus import PrometheusSink
    from stageflow.observability.trace import TraceSink
    from stageflow.observability.wide import WideEvents
    from stageflow.report.failed import FailedItemSink
    from stageflow.report.live import LivePage
    from stageflow.report.progress import ProgressSink

    return [
        open_views.enter_context(closing(JsonlSink(folder / "events.jsonl"))),
        open_views.enter_context(closing(TraceSink(folder / "trace.json"))),
        open_views.enter_context(closing(LivePage())),
        open_views.enter_context(closing(ProgressSink(_Terminal(), "live"))),
        WideEvents(CollectingSink()),
        PrometheusSink(),
        open_views.enter_context(closing(_Report(folder / "report.html"))),
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


class Cost(NamedTuple):
    """Seconds of one run."""

    wall: float
    parent: float
    workers: float

    @property
    def cpu(self) -> float:
        """Of all processes."""
        return self.parent + self.workers


def _cpu_of_children() -> float:
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def measure(
    engine: Engine,
    graph: StageGraph,
    inputs: dict[str, Any],
    views: list[Callable[[Path, ExitStack], list[Any]]],
    more: Any = None,
) -> Cost:
    """What one run takes, its files written and its views closed."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_views:
        sinks = [sink for view in views for sink in view(Path(folder), open_views)]
        if more is not None:
            sinks.append(more)
        workers = _cpu_of_children()
        wall, cpu = time.perf_counter(), time.process_time()
        result = engine.run(graph, inputs, event_sinks=sinks)
        open_views.close()
        cost = Cost(time.perf_counter() - wall, time.process_time() - cpu, _cpu_of_children() - workers)
        if not result.success:
            raise SystemExit(f"the job failed: {result.error}")
    return cost


@contextmanager
def chosen(name: str, items: int) -> Iterator[tuple[StageGraph, dict[str, Any]]]:
    """The graph of the job and its inputs."""
    if name == "small":
        yield job(items), {}
        return
    import httpx  # noqa: F401 - as the demo does: what it takes to import it is no part of the run

    from stageflow.demo import service
    from stageflow.demo.pipeline import graph

    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", service.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().decode().strip()
            yield graph, {"root": sysconfig.get_paths()["stdlib"], "output": folder, "service": address}
        finally:
            process.stdin.close()
            process.stdout.close()
            process.wait(20)


class _Each:
    """Keeps every event as it comes, blocks unmerged."""

    wants_blocks = True

    def __init__(self) -> None:
        self.events: list[Any] = []

    def emit(self, event: Any) -> None:
        self.events.append(event)


def folding_seconds(events: list[Any]) -> float:
    """CPU seconds to do with these events what is done when nobody listens; the best of five."""
    from stageflow.events.fanout import FanOut
    from stageflow.observability.stats import StatsFold

    found = []
    for _ in range(5):
        fold, fan = StatsFold(), FanOut()
        began = time.thread_time()
        for event in events:
            fold.add(event)
            if fan.listening:
                fan.emit(event)
        found.append(time.thread_time() - began)
    return min(found)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=("demo", "small"), default="demo")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--items", type=int, default=3000, help="of the small job")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    seen: dict[str, list[Cost]] = {name: [] for name in dict.fromkeys(["off", *options.sides])}
    each = _Each()
    with chosen(options.job, options.items) as (graph, inputs), Engine(processes=options.processes) as engine:
        measure(engine, graph, inputs, [], each)  # imports, workers, code
        for round_ in range(options.rounds):
            order = list(seen) if round_ % 2 == 0 else list(reversed(seen))
            for name in order:
                seen[name].append(measure(engine, graph, inputs, SIDES[name]))
                last = seen[name][-1]
                print(f"  round {round_ + 1} {name:<16}{last.wall:8.2f} s wall{last.cpu:8.2f} s CPU", flush=True)
    table(seen, f"{options.job} on {options.processes} workers, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    spent = folding_seconds(each.events)
    share = spent / statistics.median(cost.cpu for cost in seen["off"])
    print(f"off: {len(each.events):,} events folded into the stats in {spent * 1000:.1f} ms, {share:.2%} of the CPU")
    return 0


def table(seen: dict[str, list[Cost]], title: str) -> None:
    """Print what each side took beside "off"."""
    base = seen["off"]
    print(title)
    print(f"{'side':<18}{'wall':>9}{'ratio':>8}{'95 %':>14}{'CPU ratio':>11}{'95 %':>14}{'parent':>10}{'workers':>10}")
    for name, costs in seen.items():
        pairs = list(zip(costs, base, strict=True))
        wall = interval([mine.wall / off.wall for mine, off in pairs])
        cpu = interval([mine.cpu / off.cpu for mine, off in pairs])
        parent = statistics.median(mine.parent - off.parent for mine, off in pairs) * 1000
        workers = statistics.median(mine.workers - off.workers for mine, off in pairs) * 1000
        print(
            f"{name:<18}{statistics.median(cost.wall for cost in costs):>7.2f} s{wall.median:>8.3f}"
            f"{f'{wall.low:.3f}-{wall.high:.3f}':>14}{cpu.median:>11.3f}{f'{cpu.low:.3f}-{cpu.high:.3f}':>14}"
            f"{parent:>+7.0f} ms{workers:>+7.0f} ms"
        )


if __name__ == "__main__":
    raise SystemExit(main())
