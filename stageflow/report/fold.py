"""`ReportFold`: everything a report shows of one run, folded from its events in bounded memory.

Times are binned on a grid of at most 240 cells whose width doubles when the run outgrows it; failures and slow items
are kept up to a limit and counted beyond it.
"""

from __future__ import annotations

import heapq
import os
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from stageflow.events import names
from stageflow.events.encoding import as_text
from stageflow.events.event import Event
from stageflow.observability.attempts import RetriedAttempts
from stageflow.observability.clock import ClockMap
from stageflow.observability.stats import RunStats, StageStats, StatsFold

CELLS: Final = 240
#: Stages and workers that get a row of their own in the timeline, in order of appearance.
MAX_ROWS: Final = 200
MAX_FAILURES: Final = 200
MAX_SLOWEST: Final = 25
MAX_NOTES: Final = 200
_TEXT: Final = 16 * 1024


class Failure(msgspec.Struct, frozen=True):
    """One final failure as a report shows it."""

    stage: str
    item: tuple[int, ...] | None
    attempt: int | None
    lane: str
    error: str
    error_type: str
    traceback: str
    worker_pid: int
    time_unix_ns: int
    saved: str | None = None  #: the file `stageflow replay` takes


class Slow(msgspec.Struct, frozen=True, order=True):
    """One slow attempt, or the slowest item of a block of items `[lo, hi)`."""

    seconds: float
    seq: int
    stage: str
    lo: int
    hi: int
    attempt: int | None
    worker_pid: int


class Note(msgspec.Struct, frozen=True):
    """Something that happened once: a worker lost, backpressure, a stage placed elsewhere."""

    at: float  #: seconds since the run began
    text: str


class Sample(msgspec.Struct):
    """Memory at a moment, seconds since the run began; bytes, the largest of the cell."""

    at: float
    rss: int
    live: int
    queued: int


class Grid:
    """Sparse rows of numbers over time. All rows share one cell width (seconds), which doubles as time goes on."""

    def __init__(self, width: float = 0.01) -> None:
        self.width = width
        self.rows: dict[str, dict[int, float]] = {}
        self.end = 0.0

    def add(self, row: str, start: float, end: float, amount: float) -> None:
        """Spread `amount` evenly over the seconds from `start` to `end`. Rows beyond the limit are not kept."""
        start = max(0.0, start)
        end = max(start, end)
        while end >= self.width * CELLS:
            self._double()
        self.end = max(self.end, end)
        cells = self.rows.get(row)
        if cells is None:
            if len(self.rows) >= MAX_ROWS:
                return
            cells = self.rows[row] = {}
        first, last = int(start / self.width), int(end / self.width)
        if first == last:
            cells[first] = cells.get(first, 0.0) + amount
            return
        per_second = amount / (end - start)
        for cell in range(first, last + 1):
            inside = min(end, (cell + 1) * self.width) - max(start, cell * self.width)
            cells[cell] = cells.get(cell, 0.0) + per_second * inside

    def _double(self) -> None:
        self.width *= 2
        for name, cells in self.rows.items():
            merged: dict[int, float] = {}
            for cell, amount in cells.items():
                merged[cell // 2] = merged.get(cell // 2, 0.0) + amount
            self.rows[name] = merged


class ReportFold:
    """A sink that keeps what a report of one run shows. With several runs on one engine it follows the first it meets.

    `saved(event)` names the file a failed item was saved to, if it was.
    """

    def __init__(self, saved: Any = None) -> None:
        self.stats = StatsFold()
        self.run: Mapping[str, Any] = {}
        self.run_id: str | None = None
        self.edges: list[tuple[str, str]] = []
        self.shapes: Mapping[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.busy = Grid()
        self.done = Grid()
        self.workers = Grid()
        self.samples: list[Sample] = []
        self.failures: list[Failure] = []
        self.failed_items = 0
        self.slowest: list[Slow] = []
        self.notes: list[Note] = []
        self.error: str | None = None
        self.reason: str | None = None
        self.waiting: Mapping[str, str] = {}
        self.queued: Mapping[str, int] = {}
        self.running: Mapping[str, int] = {}
        self.started_ns = 0
        self.now_ns = 0
        self.environment = environment()
        self._saved = saved
        self._clock = ClockMap()
        self._attempts = RetriedAttempts()
        self._sample_gap = 0.0
        self._failing: set[str] = set()  # stages of which an item failed

    # ------------------------------------------------------------ folding

    def emit(self, event: Event) -> None:
        """Take one event."""
        if event.run_id is not None:
            if self.run_id is None:
                self.run_id = event.run_id
            elif event.run_id != self.run_id:
                return
        self.now_ns = max(self.now_ns, event.time_unix_ns)
        self.stats.add(event)
        type_ = event.type
        retried = self._attempts.add(event)
        if retried is not None:
            self._interval(retried, 0)
        if type_ == names.STAGE_ITEMS:
            self._block(event)
        elif type_ == names.STAGE_COMPLETED:
            self._completed(event)
        elif type_ == names.STAGE_FAILED:
            self._failed(event)
        elif type_ == names.ENGINE_SAMPLE:
            self._sample(event)
        elif type_ == names.RUN_STARTED:
            self._run_started(event)
        elif type_ in names.RUN_ENDED:
            self.error = event.data.get("error")
            self.reason = event.data.get("reason")
        elif type_ in (names.STAGE_SKIPPED, names.STAGE_CANCELLED):
            if event.stage is not None and event.item is None:
                self.reasons[event.stage] = as_text(event.data.get("reason") or "")
        elif type_ in _NOTED:
            self._note(event)

    def emit_all(self, events: Iterable[Event]) -> ReportFold:
        """Take many events; self."""
        for event in events:
            self.emit(event)
        return self

    def _run_started(self, event: Event) -> None:
        self.run = event.data
        self.started_ns = event.time_unix_ns
        self.edges = [(edge[0], edge[1]) for edge in event.data.get("edges") or ()]
        self.shapes = event.data.get("shapes") or {}
        self._clock.span(event)

    def _since(self, time_ns: int) -> float:
        return (time_ns - self.started_ns) / 1e9 if self.started_ns else 0.0

    def _interval(self, event: Event, ended: int) -> None:
        """Bin the busy time of an attempt or block, and the `ended` items, by stage and by worker."""
        start_ns, end_ns = self._clock.span(event)
        start, end = self._since(start_ns), self._since(end_ns)
        stage = event.stage or ""
        seconds = event.data.get("seconds")
        busy = seconds if seconds is not None else end - start
        self.busy.add(stage, start, end, busy)
        if ended:
            self.done.add(stage, start, end, float(ended))
        pid = event.data.get("worker_pid")
        if pid and event.lane == "process":
            self.workers.add(f"worker {pid}", start, end, min(busy, end - start) if end > start else busy)

    def _block(self, event: Event) -> None:
        data = event.data
        count = (data.get("ok") or 0) + (data.get("dropped") or 0) + (data.get("failed") or 0)
        self._interval(event, count)
        lo, hi = data.get("longest") or (data.get("lo") or 0, data.get("hi") or 0)
        longest = data.get("max_seconds")
        if longest is None:
            longest = (data.get("seconds") or 0.0) / max(1, count)
        self._slow(event, longest, lo, hi)

    def _slow(self, event: Event, seconds: float, lo: int, hi: int) -> None:
        if len(self.slowest) >= MAX_SLOWEST and seconds <= self.slowest[0].seconds:
            return
        pid = event.data.get("worker_pid") or 0
        entry = Slow(seconds, event.seq, event.stage or "", lo, hi, event.attempt, pid)
        if len(self.slowest) >= MAX_SLOWEST:
            heapq.heapreplace(self.slowest, entry)
        else:
            heapq.heappush(self.slowest, entry)

    def _completed(self, event: Event) -> None:
        if event.item is None and "items_in" not in event.data:
            self._interval(event, 1)
            self._slow(event, event.data.get("seconds") or 0.0, -1, -1)

    def _failed(self, event: Event) -> None:
        data = event.data
        stage = event.stage or ""
        if event.item is not None:
            self._failing.add(stage)
        elif "items_in" not in data:
            self._interval(event, 1)
        elif stage in self._failing:
            return  # the stage failed because of items that are listed already
        self.failed_items += 1
        if len(self.failures) >= MAX_FAILURES:
            return
        info = data.get("error_info") or {}
        saved = self._saved(event) if self._saved is not None else data.get("saved")
        self.failures.append(
            Failure(
                event.stage or "",
                event.item,
                event.attempt,
                event.lane or self.stats.lanes.get(event.stage or "", ""),
                as_text(data.get("error") or info.get("message") or "")[:_TEXT],
                as_text(data.get("error_type") or info.get("type") or ""),
                as_text(data.get("traceback") or info.get("traceback") or "")[-_TEXT:],
                data.get("worker_pid") or info.get("worker_pid") or 0,
                event.time_unix_ns,
                str(saved) if saved else None,
            )
        )

    def _sample(self, event: Event) -> None:
        data = event.data
        self.queued = data.get("queued") or {}
        self.running = data.get("running") or {}
        self.waiting = data.get("waiting") or {}
        at = self._since(event.time_unix_ns)
        rss, live = data.get("rss_bytes") or 0, data.get("live_bytes") or 0
        queued = sum(self.queued.values())
        samples = self.samples
        if samples and at - samples[-1].at < self._sample_gap:
            last = samples[-1]
            last.rss, last.live, last.queued = max(last.rss, rss), max(last.live, live), max(last.queued, queued)
            return
        samples.append(Sample(at, rss, live, queued))
        if len(samples) > 2 * CELLS:
            # Keep the larger of each pair, so that peaks stay.
            pairs = zip(samples[::2], samples[1::2], strict=False)
            self.samples = [
                Sample(a.at, max(a.rss, b.rss), max(a.live, b.live), max(a.queued, b.queued)) for a, b in pairs
            ]
            self._sample_gap = max(at / CELLS, self._sample_gap)

    def _note(self, event: Event) -> None:
        if len(self.notes) >= MAX_NOTES:
            return
        data = event.data
        details = [f"{key} {as_text(data[key])}" for key in _NOTE_KEYS if data.get(key) not in (None, "", 0)]
        where = f" {event.stage}" if event.stage else ""
        text = f"{event.type.replace('.', ' ')}{where}"
        self.notes.append(Note(self._since(event.time_unix_ns), f"{text}: {', '.join(details)}" if details else text))

    # ------------------------------------------------------------ reading

    @property
    def pipeline(self) -> str:
        """The pipeline's name."""
        return self.stats.pipeline or "run"

    @property
    def status(self) -> str:
        """running, completed, failed or cancelled."""
        return self.stats.status

    def stage_stats(self) -> dict[str, StageStats]:
        """The numbers of every stage, in the graph's order; running stages as of the last event."""
        return {name: self.stats.stats_of(name, self.now_ns) for name in self.stats.names()}

    def totals(self) -> RunStats:
        """The run's totals; its wall time so far while it runs."""
        totals = self.stats.totals()
        if totals.wall_seconds or not self.started_ns:
            return totals
        return msgspec.structs.replace(totals, wall_seconds=(self.now_ns - self.started_ns) / 1e9)

    def slowest_first(self) -> list[Slow]:
        """The slowest attempts, slowest first."""
        return sorted(self.slowest, reverse=True)


_NOTED: Final = frozenset(
    {
        names.WORKER_LOST,
        names.WORKER_RECYCLED,
        names.BACKPRESSURE_ENTERED,
        names.BACKPRESSURE_LEFT,
        names.STAGE_PLACED,
        names.GUARD_RETRY_EXHAUSTED,
        names.GUARD_RETRY_RECOVERED,
    }
)
_NOTE_KEYS: Final = ("pid", "reason", "signal", "exit_code", "oom_killed", "lane", "guard", "attempts")


def environment() -> dict[str, str]:
    """Where this process runs: versions and sizes, no names of users, hosts, paths or arguments."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    from importlib.metadata import PackageNotFoundError, version

    try:
        stageflow = version("stageflow")
    except PackageNotFoundError:
        stageflow = "unknown"
    return {
        "stageflow": stageflow,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "usable cores": str(cores),
        "free threading": "yes" if not getattr(sys, "_is_gil_enabled", lambda: True)() else "no",
        "time zone": time.strftime("%z"),
    }
