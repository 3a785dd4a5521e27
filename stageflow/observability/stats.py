"""`StatsFold`: the numbers of one run, folded from its events. `RunResult.stats` and every other view use it.

It is fed on every run, so an event costs well under a microsecond or two and memory is per stage, never per item.

How the numbers are counted (each view says the same, since each reads this fold):
- an *item* is one element of a map, source, reduce or sink; a plain stage has one item;
- `items_in = items_out + dropped + failed + cancelled`: every item that ended, by how it ended. `emitted` counts the
  values that left, which differs for flat-maps and reduces;
- `attempts` counts ended attempts: one per item, plus one per retry;
- a block (`stage.items`) stands for its items: a `stage.failed` of one of them brings the error, not another count.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from stageflow.events import names
from stageflow.events.event import Event
from stageflow.observability.histogram import Histogram
from stageflow.observability.tally import MAX_PIDS
from stageflow.observability.tally import RunStats as RunStats
from stageflow.observability.tally import StageStats as StageStats
from stageflow.observability.tally import StageTally as StageTally

#: The ordinary life of a plain stage is kept as it came and folded when somebody reads (most runs are never asked for
#: numbers): 0.1 us instead of 2 us per event. At this many they are folded anyway, so memory stays bounded.
_LATE: Final = frozenset({names.STAGE_STARTED, names.STAGE_ATTEMPT, names.STAGE_COMPLETED})
#: these touch no stage's counters, so what waits may go on waiting
_APART: Final = frozenset(
    {names.RUN_STARTED, names.RUN_COMPLETED, names.RUN_FAILED, names.RUN_CANCELLED, names.WORKER_STARTED}
)
_MAX_LATE: Final = 65_536
#: rows of more stages than this (a tenth) are packed into a table: 80 bytes a stage
_MAX_CELLS: Final = 327_680
_WIDTH: Final = 10


class StatsFold:
    """Folds the events of one run (or of several: their numbers add up) into numbers. Feed and read it on one thread.

    `stages` fixes the order of the result and lists stages that never had an event; others are added as they are met.
    """

    __slots__ = (
        "_handlers",
        "_pressure_since",
        "_rows",
        "_stages",
        "_table",
        "_tallies",
        "_zero",
        "backpressure",
        "events",
        "kinds",
        "lanes",
        "late",
        "pipeline",
        "run_id",
        "stages",
        "started_ns",
        "status",
        "wall_seconds",
        "workers_lost",
        "workers_recycled",
        "workers_started",
    )

    def __init__(self, stages: Sequence[str] = (), *, specs: Sequence[Any] = (), lanes: Sequence[str] = ()) -> None:
        self._rows: list[Any] = []  # of stages that succeeded, told in short
        self._table: array[float] = array("d")  # the same, when there are many
        self._stages = (specs, lanes)  # what the numbers in rows mean
        self._zero = (0.0, 0)
        self.stages: Sequence[str] = stages
        self._tallies: dict[str, StageTally] = {}
        #: ordinary events of plain stages that wait to be folded. The engine puts each `stage.started` here by itself,
        #: and counts it in `events`; `take`, which follows, looks at how many there are
        self.late: list[Event] = []
        self.lanes: Mapping[str, str] = {}
        self.kinds: Mapping[str, str] = {}
        self.events = 0
        self.run_id: str | None = None
        self.pipeline = ""
        self.status = "pending"
        self.started_ns = 0
        self.wall_seconds = 0.0
        self.workers_started = 0
        self.workers_lost = 0
        self.workers_recycled = 0
        self.backpressure: dict[str, float] = {}
        self._pressure_since: dict[str, int] = {}
        self._handlers: dict[str, Callable[[Event], None]] = {
            names.STAGE_STARTED: self._stage_started,
            names.STAGE_ITEMS: self._items,
            names.STAGE_ATTEMPT: self._attempt,
            names.STAGE_COMPLETED: self._completed,
            names.STAGE_FAILED: self._failed,
            names.STAGE_SKIPPED: self._skipped,
            names.STAGE_CANCELLED: self._cancelled,
            names.STAGE_RETRYING: self._retrying,
            names.STAGE_PROGRESS: self._progress,
            names.STAGE_WAITING: self._waiting,
            names.STAGE_WAITED: self._waited,
            names.STAGE_PLACED: self._placed,
            names.RUN_STARTED: self._run_started,
            names.RUN_COMPLETED: self._run_ended,
            names.RUN_FAILED: self._run_ended,
            names.RUN_CANCELLED: self._run_ended,
            names.WORKER_STARTED: self._worker,
            names.WORKER_LOST: self._worker,
            names.WORKER_RECYCLED: self._worker,
            names.BACKPRESSURE_ENTERED: self._pressure,
            names.BACKPRESSURE_LEFT: self._pressure,
        }

    def add(self, event: Event) -> None:
        """Take one event. Types it does not know only count as events."""
        self.events += 1
        late = self.late
        if event.type in _LATE:
            late.append(event)
            if len(late) >= _MAX_LATE:
                self._settle()
            return
        handler = self._handlers.get(event.type)
        if handler is not None:
            if (late or self._rows) and event.type not in _APART:
                self._settle()
            handler(event)

    def _settle(self) -> None:
        """Fold what was kept for later, in the order it came."""
        late, self.late = self.late, []
        handlers = self._handlers
        for event in late:
            handlers[event.type](event)
        # a row is the last that is heard of its stage, so it may come after every event
        rows, self._rows = self._rows, []
        table, self._table = self._table, array("d")
        for told in (table, rows):
            for at in range(0, len(told), _WIDTH):
                self._row(*told[at : at + _WIDTH])

    def begins(self, monotonic: float, time_unix_ns: int) -> None:
        """The run begins at this time, by two clocks: rows are told by the first."""
        self._zero = (monotonic, time_unix_ns)

    def take(self, rows: list[Any], told: int = 1) -> None:
        """Take rows (`stageflow.scheduler.actions.ROW`) of plain stages that succeeded; each is `told` events."""
        self.events += told * (len(rows) // _WIDTH)
        own = self._rows
        own += rows
        if len(own) >= _MAX_CELLS:
            self._rows = []
            self._table.extend(own)
        if len(self.late) >= _MAX_LATE:
            self._settle()

    def _row(
        self,
        stage: float,
        attempt: float,
        now: float,
        duration: float,
        seconds: float,
        cpu_seconds: float,
        bytes_in: float,
        bytes_out: float,
        pid: float,
        started: float,
    ) -> None:
        """What `_attempt` and `_completed` do for the two events that a row stands for."""
        specs, lanes = self._stages
        number = int(stage)
        tally = self._tally(specs[number].name)
        tally.items_out += 1
        tally.emitted += 1
        tally.attempts_ended += 1
        histogram = tally.histogram
        if histogram is None:
            histogram = tally.histogram = Histogram()
        histogram.add(seconds, 1)
        tally.cpu_seconds += cpu_seconds
        tally.queued_seconds += max(0.0, duration - seconds)
        tally.bytes_in += int(bytes_in)
        tally.bytes_out += int(bytes_out)
        if pid:
            if tally.pids is None:
                tally.pids = {}
            if len(tally.pids) < MAX_PIDS:
                tally.pids[int(pid)] = None
        tally.lane = lanes[number]
        tally.status = "ok"
        tally.wall_seconds += duration
        begun, begun_ns = self._zero
        tally.upstream += now - duration - begun
        tally.ended_ns = begun_ns + int((now - begun) * 1e9)

    @property
    def tallies(self) -> Mapping[str, StageTally]:
        """The live counters of every stage that had an event."""
        if self.late or self._rows or self._table:
            self._settle()
        return self._tallies

    def _tally(self, stage: str) -> StageTally:
        """The counters of `stage` without what waits to be folded, made when first asked for."""
        found = self._tallies.get(stage)
        if found is None:
            found = self._tallies[stage] = StageTally()
        return found

    # ------------------------------------------------------------ stages

    def _stage_started(self, event: Event) -> None:
        tally = self._tally(event.stage or "")
        if event.item is not None:
            return
        if not tally.started_ns:
            tally.started_ns = event.time_unix_ns
        tally.status = "running"
        if event.lane is not None:
            tally.lane = event.lane

    def _items(self, event: Event) -> None:
        tally = self._tally(event.stage or "")
        data = event.data
        get = data.get
        ok = get("ok") or 0
        dropped = get("dropped") or 0
        failed = get("failed") or 0
        tally.streaming = True
        tally.items_out += ok
        tally.dropped += dropped
        tally.failed += failed
        tally.cancelled += get("cancelled") or 0
        emitted = get("emitted")
        tally.emitted += ok if emitted is None else emitted
        count = ok + dropped + failed
        tally.attempts_ended += count
        if count or get("seconds"):  # a merge takes time and ends no item; what was stopped does neither
            tally.measure(data, count or 1, event.time_unix_ns)
        if event.lane is not None:
            tally.lane = event.lane

    def _attempt(self, event: Event) -> None:
        tally = self._tally(event.stage or "")
        tally.measure(event.data, 1, event.time_unix_ns)
        if event.item is None and event.attempt is not None:
            tally.attempt_covered = event.attempt
            tally.queued_told = "queued_ms" in event.data
        if event.lane is not None:
            tally.lane = event.lane

    def _ended_alone(self, tally: StageTally, event: Event) -> None:
        """Measure a plain stage's last attempt, unless its `stage.attempt` has already brought the same numbers."""
        tally.attempts_ended += 1
        if tally.attempt_covered and tally.attempt_covered == (event.attempt or tally.attempt_covered):
            tally.attempt_covered = 0
            if not tally.queued_told:
                tally.queued_seconds += (event.data.get("queued_ms") or 0.0) / 1000.0
        else:
            tally.measure(event.data, 1, event.time_unix_ns)
        duration = event.data.get("duration_ms")
        if duration is not None and self._zero[1]:
            tally.upstream += max(0.0, (event.time_unix_ns - self._zero[1]) / 1e9 - duration / 1000.0)
        if event.lane is not None:
            tally.lane = event.lane

    def _completed(self, event: Event) -> None:
        if event.item is not None:
            return  # one item of a block, told one by one to the sinks that want it
        tally = self._tally(event.stage or "")
        if tally.streaming or "items_in" in event.data:
            self._close_stream(tally, event)
        else:
            tally.items_out += 1
            tally.emitted += 1
            self._ended_alone(tally, event)
        tally.close("ok", event)

    def _close_stream(self, tally: StageTally, event: Event) -> None:
        """The closing event of a stream names the totals; they count where no block told them."""
        data = event.data
        if not tally.streaming:
            tally.streaming = True
            tally.items_out = data.get("items_out") or 0
            tally.dropped = data.get("dropped") or 0
            tally.failed = data.get("failed") or 0
            tally.cancelled = data.get("cancelled") or 0
            tally.emitted = data.get("emitted", tally.items_out) or 0
            tally.attempts_ended = tally.items_in
            if tally.items_in:
                tally.measure(data, tally.items_in, event.time_unix_ns)

    def _failed(self, event: Event) -> None:
        tally = self._tally(event.stage or "")
        if event.item is not None:
            return  # counted by its block
        if tally.streaming or "items_in" in event.data:
            self._close_stream(tally, event)
        else:
            tally.failed += 1
            self._ended_alone(tally, event)
        tally.close("fail", event)

    def _skipped(self, event: Event) -> None:
        if event.item is not None:
            return
        tally = self._tally(event.stage or "")
        tally.skipped += 1
        tally.close("skip", event)

    def _cancelled(self, event: Event) -> None:
        tally = self._tally(event.stage or "")
        if event.item is not None:  # stopped by itself, and in no block's numbers
            tally.streaming = True
            tally.cancelled += 1
            return
        if tally.streaming or "items_in" in event.data:
            self._close_stream(tally, event)
        elif tally.status == "running":
            tally.cancelled += 1
            self._ended_alone(tally, event)
        tally.close("cancel", event)

    def _retrying(self, event: Event) -> None:
        tally = self._tally(event.stage or "")
        tally.retried += 1
        tally.attempts_ended += 1
        for reason in tuple(tally.held or ()):  # its worker may have died while it waited
            tally.wait_ends(reason, (event.item, event.attempt), event.time_unix_ns)

    def _waiting(self, event: Event) -> None:
        reason = str(event.data.get("reason") or "other")
        self._tally(event.stage or "").wait_begins(reason, (event.item, event.attempt), event.time_unix_ns)

    def _waited(self, event: Event) -> None:
        reason = str(event.data.get("reason") or "other")
        self._tally(event.stage or "").wait_ends(reason, (event.item, event.attempt), event.time_unix_ns)

    def _progress(self, event: Event) -> None:
        data, tally = event.data, self._tally(event.stage or "")
        note = data.get("note")
        if note is None and tally.progress is not None:
            note = tally.progress[2]  # numbers alone: the words that were last said still hold
        tally.progress = (data.get("done") or 0, data.get("total"), note or "")

    def _placed(self, event: Event) -> None:
        lane = event.data.get("lane") or event.lane
        if lane:
            self._tally(event.stage or "").moved_to(lane)

    # ------------------------------------------------------------ the run

    def _run_started(self, event: Event) -> None:
        data = event.data
        self.run_id = event.run_id
        self.pipeline = data.get("pipeline") or ""
        self.status = "running"
        self.started_ns = event.time_unix_ns
        if not self._zero[1]:
            self._zero = (0.0, event.time_unix_ns)
        self.lanes = data.get("lanes") or self.lanes
        self.kinds = data.get("kinds") or self.kinds
        if not self.stages:
            self.stages = tuple(data.get("stages") or ())

    def _run_ended(self, event: Event) -> None:
        self.status = event.data.get("status") or event.type.partition(".")[2]
        duration = event.data.get("duration_ms")
        if duration is not None:
            self.wall_seconds = duration / 1000.0
        elif self.started_ns:
            self.wall_seconds = (event.time_unix_ns - self.started_ns) / 1e9

    def _worker(self, event: Event) -> None:
        if event.type == names.WORKER_STARTED:
            self.workers_started += 1
        elif event.type == names.WORKER_LOST:
            self.workers_lost += 1
        else:
            self.workers_recycled += 1

    def _pressure(self, event: Event) -> None:
        reason = event.data.get("reason") or "pressure"
        if event.type == names.BACKPRESSURE_ENTERED:
            self._pressure_since.setdefault(reason, event.time_unix_ns)
            return
        since = self._pressure_since.pop(reason, None)
        if since is not None:
            spent = max(0, event.time_unix_ns - since) / 1e9
            self.backpressure[reason] = self.backpressure.get(reason, 0.0) + spent

    # ------------------------------------------------------------ results

    def names(self) -> list[str]:
        """Every stage, in the graph's order; those met only in events come last."""
        listed = list(self.stages) or [spec.name for spec in self._stages[0]]
        if self.tallies:
            known = set(listed)
            listed.extend(name for name in self.tallies if name not in known)
        return listed

    def stats_of(self, stage: str, now_ns: int = 0) -> StageStats:
        """The numbers of one stage; `now_ns` (Unix) gives a running stage its wall time so far."""
        tally = self.tallies.get(stage)
        if not self.kinds and self._stages[0]:  # nobody listened, so no event has said it
            specs, lanes = self._stages
            self.kinds = {spec.name: str(spec.kind) for spec in specs}
            self.lanes = {spec.name: str(on) for spec, on in zip(specs, lanes, strict=False)}
        lane = self.lanes.get(stage, "")
        kind = self.kinds.get(stage, "")
        if tally is None:
            return StageStats(stage=stage, lane=lane, kind=kind)
        histogram = tally.histogram
        return StageStats(
            stage=stage,
            lane=tally.where(lane),
            kind=kind,
            status=tally.status,
            items_in=tally.items_in,
            items_out=tally.items_out,
            dropped=tally.dropped,
            failed=tally.failed,
            cancelled=tally.cancelled,
            emitted=tally.emitted,
            skipped=tally.skipped,
            retried=tally.retried,
            attempts=tally.attempts_ended,
            wall_seconds=tally.wall_at(now_ns),
            busy_seconds=histogram.total if histogram else 0.0,
            cpu_seconds=tally.cpu_seconds,
            queued_seconds=tally.queued_seconds,
            bytes_in=tally.bytes_in,
            bytes_out=tally.bytes_out,
            wait=tally.waits_at(now_ns),
            p50_seconds=histogram.quantile(0.5) if histogram else 0.0,
            p95_seconds=histogram.quantile(0.95) if histogram else 0.0,
            max_seconds=histogram.maximum if histogram else 0.0,
            worker_pids=tuple(tally.pids) if tally.pids else (),
        )

    def result(self) -> dict[str, StageStats]:
        """The numbers of every stage, in the graph's order."""
        return {name: self.stats_of(name) for name in self.names()}

    def view(self) -> Mapping[str, StageStats]:
        """The same as `result`, each entry computed when it is read: a million stages make nobody wait."""
        return StatsView(self)

    def totals(self) -> RunStats:
        """The sums over all stages, and the run's own numbers."""
        tallies = self.tallies.values()
        return RunStats(
            run_id=self.run_id,
            pipeline=self.pipeline,
            status=self.status,
            stages=len(self.stages) or len(self.tallies),
            events=self.events,
            wall_seconds=self.wall_seconds,
            busy_seconds=sum(t.histogram.total for t in tallies if t.histogram),
            cpu_seconds=sum(t.cpu_seconds for t in tallies),
            items_in=sum(t.items_in for t in tallies),
            items_out=sum(t.items_out for t in tallies),
            dropped=sum(t.dropped for t in tallies),
            failed=sum(t.failed for t in tallies),
            cancelled=sum(t.cancelled for t in tallies),
            retried=sum(t.retried for t in tallies),
            attempts=sum(t.attempts_ended for t in tallies),
            bytes_in=sum(t.bytes_in for t in tallies),
            bytes_out=sum(t.bytes_out for t in tallies),
            workers_started=self.workers_started,
            workers_lost=self.workers_lost,
            workers_recycled=self.workers_recycled,
            backpressure_seconds=dict(self.backpressure),
        )


class StatsView(Mapping[str, StageStats]):
    """Read-only mapping stage name -> `StageStats`, computed on reading."""

    __slots__ = ("_fold", "_names")

    def __init__(self, fold: StatsFold) -> None:
        self._fold = fold
        self._names: dict[str, None] | None = None

    def _keys(self) -> dict[str, None]:
        if self._names is None:
            self._names = dict.fromkeys(self._fold.names())
        return self._names

    def __getitem__(self, stage: str) -> StageStats:
        if stage not in self._keys():
            raise KeyError(stage)
        return self._fold.stats_of(stage)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys())

    def __len__(self) -> int:
        return len(self._keys())

    def __repr__(self) -> str:
        return f"StatsView({list(self._keys())!r})"
