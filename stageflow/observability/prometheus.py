"""The numbers of all runs of an engine in Prometheus' text format, and a small server for them.

Base units (seconds, bytes), `_total` for counters; a stage's labels are pipeline, stage and lane. The number of
series is bounded: stages beyond the limit share the label "other".
"""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Final

from stageflow.events import names
from stageflow.events.event import Event
from stageflow.observability.histogram import Histogram
from stageflow.observability.stats import StageTally, StatsFold

#: Stages with labels of their own, over all pipelines.
MAX_STAGES: Final = 1000
_MAX_RUNS: Final = 4096
BOUNDS: Final = (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 300.0)
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class _Stage:
    """What has been counted of one stage over all runs that ended."""

    __slots__ = (
        "bytes_in",
        "bytes_out",
        "cancelled",
        "cpu",
        "dropped",
        "failed",
        "histogram",
        "ok",
        "queued",
        "retried",
        "wait",
    )

    def __init__(self) -> None:
        self.ok = self.dropped = self.failed = self.cancelled = self.retried = 0
        self.bytes_in = self.bytes_out = 0
        self.cpu = self.queued = 0.0
        self.wait: dict[str, float] = {}
        self.histogram = Histogram()

    def add(self, tally: StageTally) -> None:
        """Add the counters of one run."""
        self.ok += tally.items_out
        self.dropped += tally.dropped
        self.failed += tally.failed
        self.cancelled += tally.cancelled
        self.retried += tally.retried
        self.bytes_in += tally.bytes_in
        self.bytes_out += tally.bytes_out
        self.cpu += tally.cpu_seconds
        self.queued += tally.queued_seconds
        for reason, seconds in (tally.wait or {}).items():
            self.wait[reason] = self.wait.get(reason, 0.0) + seconds
        if tally.histogram is not None:
            self.histogram.merge(tally.histogram)

    def copy(self) -> _Stage:
        """An independent copy, for a scrape in the middle of a run."""
        other = _Stage()
        for name in _Stage.__slots__:
            setattr(other, name, getattr(self, name))
        other.wait = dict(self.wait)
        other.histogram = Histogram()
        other.histogram.merge(self.histogram)
        return other


_Key = tuple[str, str, str]


class PrometheusSink:
    """Folds the events of every run; `render()` gives the text. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str | None, StatsFold] = {}
        self._stages: dict[_Key, _Stage] = {}
        self._runs: dict[tuple[str, str], tuple[int, float]] = {}
        self._started: dict[str, int] = {}
        self._workers = 0
        self._worker_events: dict[str, int] = {"started": 0, "lost": 0, "recycled": 0}
        self._pressure: dict[str, int] = {}
        self._sample: Mapping[str, Any] = {}
        self._events = 0

    def emit(self, event: Event) -> None:
        """Take one event."""
        with self._lock:
            self._events += 1
            type_ = event.type
            if type_.startswith("worker."):
                self._worker(type_)
            elif type_ in (names.BACKPRESSURE_ENTERED, names.BACKPRESSURE_LEFT):
                self._pressure[str(event.data.get("reason") or "")] = int(type_ == names.BACKPRESSURE_ENTERED)
            elif type_ == names.ENGINE_SAMPLE:
                self._sample = event.data
            elif type_ == names.RUN_STARTED:
                self._run_started(event)
            else:
                fold = self._open.get(event.run_id)
                if fold is None:
                    return
                fold.add(event)
                if type_ in names.RUN_ENDED:
                    self._run_ended(event.run_id, fold)

    def _worker(self, type_: str) -> None:
        kind = type_.partition(".")[2]
        if kind in self._worker_events:
            self._worker_events[kind] += 1
            self._workers += 1 if kind == "started" else -1

    def _run_started(self, event: Event) -> None:
        if len(self._open) >= _MAX_RUNS:
            oldest = next(iter(self._open))
            self._run_ended(oldest, self._open[oldest])
        fold = self._open[event.run_id] = StatsFold(event.data.get("stages") or ())
        fold.add(event)
        self._started[fold.pipeline] = self._started.get(fold.pipeline, 0) + 1

    def _run_ended(self, run_id: str | None, fold: StatsFold) -> None:
        del self._open[run_id]
        key = (fold.pipeline, fold.status)
        count, seconds = self._runs.get(key, (0, 0.0))
        self._runs[key] = (count + 1, seconds + fold.wall_seconds)
        self._merge(self._stages, fold)

    def _merge(self, into: dict[_Key, _Stage], fold: StatsFold) -> None:
        for name, tally in fold.tallies.items():
            key = (fold.pipeline, name, tally.where(fold.lanes.get(name, "")))
            stage = into.get(key)
            if stage is None:
                if len(into) >= MAX_STAGES:
                    key = ("other", "other", "")
                stage = into.setdefault(key, _Stage())
            stage.add(tally)

    # ------------------------------------------------------------ text

    def render(self) -> str:
        """The current numbers as exposition text."""
        with self._lock:
            stages = {key: stage.copy() for key, stage in self._stages.items()} if self._open else self._stages
            for fold in self._open.values():
                self._merge(stages, fold)
            out: list[str] = []
            self._render_runs(out)
            self._render_stages(out, stages)
            self._render_engine(out)
            return "\n".join(out) + "\n"

    def _render_runs(self, out: list[str]) -> None:
        _family(
            out,
            "stageflow_runs_started_total",
            "counter",
            "Runs that were started.",
            (({"pipeline": name}, n) for name, n in sorted(self._started.items())),
        )
        _family(
            out,
            "stageflow_runs_total",
            "counter",
            "Runs that ended, by status.",
            (({"pipeline": p, "status": s}, n) for (p, s), (n, _) in sorted(self._runs.items())),
        )
        _family(
            out,
            "stageflow_run_seconds_total",
            "counter",
            "Wall time of the runs that ended.",
            (({"pipeline": p, "status": s}, t) for (p, s), (_, t) in sorted(self._runs.items())),
        )
        _family(out, "stageflow_runs_in_progress", "gauge", "Runs that go on.", [({}, len(self._open))])

    def _render_stages(self, out: list[str], stages: Mapping[_Key, _Stage]) -> None:
        rows = [({"pipeline": p, "stage": s, "lane": lane}, stage) for (p, s, lane), stage in sorted(stages.items())]
        outcomes = (("ok", "ok"), ("dropped", "dropped"), ("failed", "failed"), ("cancelled", "cancelled"))
        _family(
            out,
            "stageflow_items_total",
            "counter",
            "Items that ended, by outcome.",
            (
                ({**labels, "outcome": word}, getattr(stage, field))
                for labels, stage in rows
                for field, word in outcomes
            ),
        )
        _family(
            out,
            "stageflow_retries_total",
            "counter",
            "Attempts that were followed by another.",
            ((labels, stage.retried) for labels, stage in rows),
        )
        _family(
            out,
            "stageflow_cpu_seconds_total",
            "counter",
            "CPU time inside stages.",
            ((labels, stage.cpu) for labels, stage in rows),
        )
        _family(
            out,
            "stageflow_queue_wait_seconds_total",
            "counter",
            "Time between ready and started.",
            ((labels, stage.queued) for labels, stage in rows),
        )
        _family(
            out,
            "stageflow_bytes_total",
            "counter",
            "Payload bytes read and written by stages.",
            (
                ({**labels, "direction": word}, value)
                for labels, stage in rows
                for word, value in (("in", stage.bytes_in), ("out", stage.bytes_out))
            ),
        )
        _family(
            out,
            "stageflow_stage_wait_seconds_total",
            "counter",
            "Time a stage could not run, by reason.",
            (
                ({**labels, "reason": reason}, seconds)
                for labels, stage in rows
                for reason, seconds in sorted(stage.wait.items())
            ),
        )
        name = "stageflow_attempt_duration_seconds"
        out.append(f"# HELP {name} Time inside the function, per attempt (items of a block by its mean).")
        out.append(f"# TYPE {name} histogram")
        for labels, stage in rows:
            histogram = stage.histogram
            for bound, count in zip(BOUNDS, histogram.cumulative(BOUNDS), strict=True):
                out.append(f"{name}_bucket{_labels({**labels, 'le': _number(bound)})} {count}")
            out.append(f"{name}_bucket{_labels({**labels, 'le': '+Inf'})} {histogram.count}")
            out.append(f"{name}_sum{_labels(labels)} {_number(histogram.total)}")
            out.append(f"{name}_count{_labels(labels)} {histogram.count}")

    def _render_engine(self, out: list[str]) -> None:
        _family(out, "stageflow_workers", "gauge", "Worker processes alive.", [({}, max(0, self._workers))])
        _family(
            out,
            "stageflow_worker_events_total",
            "counter",
            "Worker processes started, lost and recycled.",
            (({"event": kind}, n) for kind, n in sorted(self._worker_events.items())),
        )
        _family(
            out,
            "stageflow_backpressure",
            "gauge",
            "1 while held back, by reason.",
            (({"reason": reason}, on) for reason, on in sorted(self._pressure.items())),
        )
        _family(out, "stageflow_events_total", "counter", "Events seen.", [({}, self._events)])
        sample = self._sample
        for key, name, text in (
            ("rss_bytes", "stageflow_resident_memory_bytes", "Resident memory of the engine and its workers."),
            ("live_bytes", "stageflow_live_bytes", "Live payload bytes."),
            ("memory_limit", "stageflow_memory_limit_bytes", "The budget of live payload bytes."),
        ):
            if sample.get(key) is not None:
                _family(out, name, "gauge", text, [({}, sample[key])])
        if sample.get("loop_lag_ms") is not None:
            lag: list[tuple[dict[str, str], float]] = [({}, sample["loop_lag_ms"] / 1000.0)]
            _family(out, "stageflow_loop_lag_seconds", "gauge", "How late the event loop ran.", lag)
        queued = sorted((sample.get("queued") or {}).items())[:MAX_STAGES]
        _family(
            out,
            "stageflow_queued_items",
            "gauge",
            "Items that wait before a stage.",
            (({"stage": stage}, n) for stage, n in queued),
        )


def _family(
    out: list[str], name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]
) -> None:
    lines = [f"{name}{_labels(labels)} {_number(value)}" for labels, value in samples]
    if lines:
        out.append(f"# HELP {name} {text}")
        out.append(f"# TYPE {name} {kind}")
        out.extend(lines)


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    clean = str(value).encode("utf-8", "replace").decode("utf-8")
    return clean.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))


class MetricsServer:
    """Serves `GET /metrics` from a thread. Loopback unless told otherwise; `port` 0 takes a free one.

    A slow or broken client holds up its own thread only. Use as a context manager, or call `close()`.
    """

    def __init__(self, sink: PrometheusSink, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self.sink = sink

        class Handler(http.server.BaseHTTPRequestHandler):
            timeout = 10.0
            server_version = "stageflow"
            sys_version = ""

            def do_GET(self) -> None:
                self._answer(body=True)

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def _answer(self, *, body: bool) -> None:
                known = self.path.partition("?")[0] in ("/metrics", "/metrics/")
                content = sink.render().encode() if known else b"see /metrics\n"
                self.send_response(200 if known else 404)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing: a scrape every few seconds is no news."""

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that went away is no news either."""

        self._server = Server((host, port), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="stageflow-metrics", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host, port = self._server.server_address[:2]
        name = host.decode() if isinstance(host, bytes) else str(host)
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/metrics"

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
