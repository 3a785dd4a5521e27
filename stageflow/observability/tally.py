"""The numbers of a stage and of a run: as they are counted (`StageTally`), and as they are shown (`StageStats`,
`RunStats`). What is counted how is said in `stageflow.observability.stats`, which feeds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from stageflow.events.event import Event
from stageflow.observability.histogram import Histogram

#: A stage that went through more workers than this lists the first ones only.
MAX_PIDS: Final = 256
#: limits at which an attempt waits before it starts
_QUEUED_FOR: Final = ("concurrency", "rate", "token", "cpu", "memory")
#: an attempt of a stage: the index path of its item, and its number
Attempt = tuple[tuple[int, ...] | None, int | None]


class StageStats(msgspec.Struct, frozen=True, kw_only=True):
    """What one stage did. Times are seconds; `busy_seconds` is spent inside the function, summed over attempts.

    `p50_seconds`, `p95_seconds` and `max_seconds` are per attempt (percentiles within 6.25 %; items of a block count
    with its mean). `wait` maps a reason (slot, token, rate, bytes, memory, upstream, downstream, ...) to seconds;
    what an attempt says it waits for (`ctx.waiting`: approval, ...) is part of `busy_seconds` as well.
    """

    stage: str
    lane: str = ""
    kind: str = ""
    status: str = "pending"
    items_in: int = 0
    items_out: int = 0
    dropped: int = 0
    failed: int = 0
    cancelled: int = 0
    emitted: int = 0
    skipped: int = 0
    retried: int = 0
    attempts: int = 0
    wall_seconds: float = 0.0
    busy_seconds: float = 0.0
    cpu_seconds: float = 0.0
    queued_seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    wait: dict[str, float] = {}
    p50_seconds: float = 0.0
    p95_seconds: float = 0.0
    max_seconds: float = 0.0
    worker_pids: tuple[int, ...] = ()

    @property
    def rate(self) -> float:
        """Items that ended per second of wall time; 0.0 before any time has passed."""
        return self.items_in / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping of every field."""
        return msgspec.structs.asdict(self)


class RunStats(msgspec.Struct, frozen=True, kw_only=True):
    """The totals of a run over all its stages; `wall_seconds` is the run's own duration."""

    run_id: str | None = None
    pipeline: str = ""
    status: str = "running"
    stages: int = 0
    events: int = 0
    wall_seconds: float = 0.0
    busy_seconds: float = 0.0
    cpu_seconds: float = 0.0
    items_in: int = 0
    items_out: int = 0
    dropped: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    attempts: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    workers_started: int = 0
    workers_lost: int = 0
    workers_recycled: int = 0
    backpressure_seconds: dict[str, float] = {}

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping of every field."""
        return msgspec.structs.asdict(self)


class StageTally:
    """The counters of one stage while its run goes on. Read by live views; changed by `StatsFold` only."""

    __slots__ = (
        "attempt_covered",
        "attempts_ended",
        "bytes_in",
        "bytes_out",
        "cancelled",
        "cpu_seconds",
        "dropped",
        "emitted",
        "ended_ns",
        "failed",
        "held",
        "histogram",
        "items_out",
        "lane",
        "moved",
        "pids",
        "progress",
        "queued_seconds",
        "queued_told",
        "retried",
        "skipped",
        "started_ns",
        "status",
        "streaming",
        "upstream",
        "wait",
        "wall_seconds",
    )

    def __init__(self) -> None:
        self.lane: str | None = None
        self.moved: dict[str, int] | None = None  # attempts that ran in another lane than was planned
        self.status = "pending"
        self.started_ns = 0
        self.ended_ns = 0
        self.items_out = 0
        self.dropped = 0
        self.failed = 0
        self.cancelled = 0
        self.emitted = 0
        self.skipped = 0
        self.retried = 0
        self.attempts_ended = 0
        self.attempt_covered = 0
        self.wall_seconds = 0.0
        self.cpu_seconds = 0.0
        self.queued_seconds = 0.0
        self.queued_told = False  # the last attempt has said how long it was queued
        self.upstream = 0.0  # of a plain stage: seconds until it came ready
        self.bytes_in = 0
        self.bytes_out = 0
        self.streaming = False
        self.wait: dict[str, float] | None = None
        #: reason -> (since when, the attempts that wait for it)
        self.held: dict[str, tuple[int, set[Attempt]]] | None = None
        self.histogram: Histogram | None = None
        self.pids: dict[int, None] | None = None
        self.progress: tuple[float, float | None, str] | None = None

    @property
    def items_in(self) -> int:
        """Items that ended, whatever way."""
        return self.items_out + self.dropped + self.failed + self.cancelled

    def moved_to(self, lane: str) -> None:
        """An attempt runs in this lane, whatever is said of its stage."""
        self.moved = moved = self.moved or {}
        moved[lane] = moved.get(lane, 0) + 1

    def where(self, planned: str) -> str:
        """The lane in which most of its attempts ran."""
        if self.moved:
            lane, count = max(self.moved.items(), key=lambda one: one[1])
            if 2 * count > self.attempts_ended:
                return lane
        return self.lane or planned

    def measure(self, data: Mapping[str, Any], weight: int, ended_ns: int) -> None:
        """Take the times, bytes and worker of an attempt, or of a block of `weight` items."""
        get = data.get
        seconds = get("seconds")
        if seconds is not None and weight > 0:
            histogram = self.histogram
            if histogram is None:
                histogram = self.histogram = Histogram()
            histogram.add(seconds / weight if weight > 1 else seconds, weight)
            longest = get("max_seconds")
            if longest is not None and longest > histogram.maximum:
                histogram.maximum = longest
        self.cpu_seconds += get("cpu_seconds") or 0.0
        self.queued_seconds += (get("queued_ms") or 0.0) / 1000.0
        self.bytes_in += get("bytes_in") or 0
        self.bytes_out += get("bytes_out") or 0
        pid = get("worker_pid")
        if pid:
            pids = self.pids
            if pids is None:
                pids = self.pids = {}
            if pid not in pids and len(pids) < MAX_PIDS:
                pids[pid] = None
        self.ended_ns = ended_ns

    def close(self, status: str, event: Event) -> None:
        """The stage ended: its status, wall time and waits."""
        self.status = status
        self.ended_ns = event.time_unix_ns
        data = event.data
        duration = data.get("duration_ms")
        if duration is not None:
            self.wall_seconds += duration / 1000.0
        elif self.started_ns:
            self.wall_seconds += max(0, event.time_unix_ns - self.started_ns) / 1e9
        for reason, seconds in (data.get("wait") or {}).items():
            self._waited(reason, seconds)
        for reason, (since, _) in (self.held or {}).items():
            self._waited(reason, max(0, event.time_unix_ns - since) / 1e9)
        self.held = None

    def _waited(self, reason: str, seconds: float) -> None:
        if self.wait is None:
            self.wait = {}
        self.wait[reason] = self.wait.get(reason, 0.0) + seconds

    def wait_begins(self, reason: str, attempt: Attempt, now_ns: int) -> None:
        """An attempt waits for something outside."""
        if self.held is None:
            self.held = {}
        self.held.setdefault(reason, (now_ns, set()))[1].add(attempt)

    def wait_ends(self, reason: str, attempt: Attempt, now_ns: int) -> None:
        """It waits no more: the stage has waited while at least one of its attempts did."""
        since, attempts = (self.held or {}).get(reason, (now_ns, set()))
        if attempt not in attempts:
            return
        attempts.discard(attempt)
        if not attempts and self.held is not None:
            del self.held[reason]
            self._waited(reason, max(0, now_ns - since) / 1e9)

    def waits_at(self, now_ns: int) -> dict[str, float]:
        """Seconds waited by reason, those still being waited included (to `now_ns`, where it is given)."""
        found = dict(self.wait or {})
        if not self.streaming:
            # what it was queued for no reason that has a name, it waited for a slot
            slot = self.queued_seconds - sum(found.get(reason, 0.0) for reason in _QUEUED_FOR)
            if slot > 0.0:
                found["slot"] = found.get("slot", 0.0) + slot
            if self.upstream > 0.0:
                found.setdefault("upstream", self.upstream)
        if now_ns:
            for reason, (since, _) in (self.held or {}).items():
                found[reason] = found.get(reason, 0.0) + max(0, now_ns - since) / 1e9
        return found

    def wall_at(self, now_ns: int) -> float:
        """Seconds from the start to the end, or to `now_ns` (Unix) while it runs."""
        if self.wall_seconds or not self.started_ns or self.status != "running":
            return self.wall_seconds
        return max(0, now_ns - self.started_ns) / 1e9
