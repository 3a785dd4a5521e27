"""`TraceSink`: a run as a Chrome trace, to be opened in Perfetto (ui.perfetto.dev) or chrome://tracing.

One process per worker and one for the engine with tracks per lane; a slice per attempt or block of items; arrows along
the edges; counters for memory and queues; marks for failures, retries and lost workers. Written as it happens, in
bounded memory: an interrupted file can be opened too (the format allows the closing bracket to be absent).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from typing import IO, Any, Final

import msgspec

from stageflow.events import names
from stageflow.events.encoding import as_text, plain
from stageflow.events.event import Event
from stageflow.events.files import PieceWriter
from stageflow.events.merging import BlockMerger
from stageflow.observability.attempts import RetriedAttempts
from stageflow.observability.clock import ClockMap

#: The engine's own "process" in the trace; workers appear under their real ids.
ENGINE: Final = 1
#: Side-by-side tracks of one lane. What overlaps more than this goes to free-floating slices.
MAX_TRACKS: Final = 64
#: Slices of blocks drawn one by one; later ones are merged as for other sinks, so that a day fits into a file.
DETAILED: Final = 100_000
#: Blocks of a stage to which an arrow can still start.
_RECENT: Final = 64

_CLOSING: Final = names.STAGE_ENDED | names.RUN_ENDED
#: Of a block, what its slice shows.
_SHOWN: Final = (
    "ok", "dropped", "failed", "cancelled", "emitted", "seconds", "cpu_seconds", "bytes_in", "bytes_out", "queued_ms",
)  # fmt: skip

_encode = msgspec.json.Encoder(enc_hook=as_text).encode


class _Tracks:
    """Places intervals on as few tracks as needed, so that no two on one track overlap."""

    __slots__ = ("ends", "first")

    def __init__(self, first: int) -> None:
        self.first = first
        self.ends: list[int] = []

    def place(self, start: int, end: int) -> int | None:
        """The track of the interval, or None when all are taken."""
        for index, taken_until in enumerate(self.ends):
            if taken_until <= start:
                self.ends[index] = end
                return self.first + index
        if len(self.ends) >= MAX_TRACKS:
            return None
        self.ends.append(end)
        return self.first + len(self.ends) - 1


class _Slice(msgspec.Struct):
    """Where a block of a stage was drawn, for arrows: items [lo, hi), track, and end in microseconds."""

    lo: int
    hi: int
    pid: int
    tid: int
    end: float


class _RunTrace:
    """What one run needs while it goes on."""

    __slots__ = ("clock", "parents", "pipeline", "recent", "started_ns")

    def __init__(self, event: Event) -> None:
        self.clock = ClockMap()
        self.clock.span(event)
        self.started_ns = event.time_unix_ns
        self.pipeline = event.data.get("pipeline") or "run"
        self.parents: dict[str, list[tuple[str, bytes]]] = {}  # and the name of the arrow from there, as JSON
        for source, target in event.data.get("edges") or ():
            self.parents.setdefault(target, []).append((source, _encode(f"{source} to {target}")))
        self.recent: dict[str, deque[_Slice]] = {}


class TraceSink:
    """Writes a Chrome trace to `target` (a path, ".json.gz" compresses, or an open binary file).

    Call `close()` when the engine is done; a full disk is reported once and ends only the trace. Not thread-safe by
    itself: attach it to a `FanOut`.
    """

    #: blocks as they come, not merged: a slice each
    wants_blocks = True

    def __init__(self, target: str | os.PathLike[str] | IO[bytes]) -> None:
        self._writer = PieceWriter(target, what="the trace", append=False)
        self._first = True
        self._origin = 0
        self._runs: dict[str | None, _RunTrace] = {}
        self._lanes: dict[str, _Tracks] = {}
        self._workers: dict[int, _Tracks] = {}
        self._named: set[tuple[int, int]] = set()
        self._flow = 0
        self._attempts = RetriedAttempts()
        self._detailed = 0
        self._merger = BlockMerger()
        self._handlers = {
            names.RUN_STARTED: self._run_started,
            names.STAGE_COMPLETED: self._ended,
            names.STAGE_FAILED: self._failed,
            names.STAGE_RETRYING: self._mark,
            names.STAGE_SKIPPED: self._mark,
            names.STAGE_CANCELLED: self._mark,
            names.STAGE_PLACED: self._mark,
            names.STAGE_IDEMPOTENCY_HIT: self._mark,
            names.STAGE_PROGRESS: self._progress,
            names.WORKER_STARTED: self._worker,
            names.WORKER_LOST: self._worker,
            names.WORKER_RECYCLED: self._worker,
            names.BACKPRESSURE_ENTERED: self._pressure,
            names.BACKPRESSURE_LEFT: self._pressure,
            names.STAGE_WAITING: self._waits,
            names.STAGE_WAITED: self._waits,
            names.ENGINE_SAMPLE: self._sample,
            names.SPANS_RECORDED: self._spans,
        }

    @property
    def error(self) -> Exception | None:
        """What ended the writing, if anything did."""
        return self._writer.error

    def emit(self, event: Event) -> None:
        """Draw `event`."""
        if self._writer.error is not None:
            return
        if not self._origin:
            self._origin = event.time_unix_ns
            self._name(ENGINE, 0, "engine")
        if event.type == names.STAGE_ITEMS:
            if self._detailed < DETAILED:
                self._detailed += 1
                self._block(event)
            else:
                self._blocks(self._merger.add(event) or ())
            return
        if self._merger.holds and event.type in _CLOSING:
            self._blocks(self._merger.take())
        if event.type in names.RUN_ENDED:
            self._run_ended(event)
            return
        retried = self._attempts.add(event)
        if retried is not None:
            self._retried(retried)
        handler = self._handlers.get(event.type)
        if handler is not None:
            handler(event)
        elif event.type not in (names.STAGE_STARTED, names.STAGE_ATTEMPT, names.STAGE_LOG, names.STAGE_PRINT):
            self._mark(event)

    def close(self) -> None:
        """Write the closing bracket and close the file."""
        if self._writer.error is None:
            self._writer.write(b"[\n]\n" if self._first else b"\n]\n")
        self._writer.close()

    # ------------------------------------------------------------ writing

    def _out(self, ph: str, name: str, ts_ns: int, pid: int, tid: int, **more: Any) -> None:
        record = {"ph": ph, "name": name, "ts": (ts_ns - self._origin) / 1000.0, "pid": pid, "tid": tid, **more}
        self._line(_encode(record))

    def _line(self, line: bytes) -> None:
        self._writer.write((b"[\n" if self._first else b",\n") + line)
        self._first = False

    def _name(self, pid: int, tid: int, name: str) -> None:
        """Give a process (`tid` 0) or a track its name, once, and order tracks as they were made."""
        if (pid, tid) in self._named:
            return
        self._named.add((pid, tid))
        kind = "process" if tid == 0 else "thread"
        self._out("M", f"{kind}_name", self._origin, pid, tid, args={"name": name})
        self._out("M", f"{kind}_sort_index", self._origin, pid, tid, args={"sort_index": tid or pid})

    # ------------------------------------------------------------ tracks and slices

    def _track(self, lane: str | None, worker_pid: int, start: int, end: int) -> tuple[int, int] | None:
        if worker_pid and lane not in ("async", "thread", "inline"):
            tracks = self._workers.get(worker_pid)
            if tracks is None:
                tracks = self._workers[worker_pid] = _Tracks(1)
                self._name(worker_pid, 0, f"worker {worker_pid}")
            pid, label = worker_pid, "worker"
        else:
            label = lane or "engine"
            tracks = self._lanes.get(label)
            if tracks is None:
                # Tracks of one lane are neighbours: each lane has a hundred numbers.
                tracks = self._lanes[label] = _Tracks(100 * (len(self._lanes) + 1))
            pid = ENGINE
        tid = tracks.place(start, end)
        if tid is None:
            return None
        self._name(pid, tid, f"{label} {tid - tracks.first + 1}")
        return pid, tid

    def _slice(self, event: Event, name: str, args: dict[str, Any]) -> tuple[int, int, int, int] | None:
        """Draw the interval `event` tells of; where it went: process, track, start and end."""
        run = self._runs.get(event.run_id)
        start, end = (run.clock if run else ClockMap()).span(event)
        where = self._track(event.lane, event.data.get("worker_pid") or 0, start, end)
        category = event.stage or "run"
        if where is None:
            self._flow += 1
            ident = f"s{self._flow}"
            self._out("b", name, start, ENGINE, 1, cat=category, id=ident, args=args)
            self._out("e", name, end, ENGINE, 1, cat=category, id=ident)
            return None
        pid, tid = where
        self._out("X", name, start, pid, tid, dur=max(0.0, (end - start) / 1000.0), cat=category, args=args)
        return pid, tid, start, end

    def _arrows(self, event: Event, drawn: tuple[int, int, int, int], lo: int, hi: int) -> None:
        """Arrows from the parents' slices that made the first item of this one, and remember it for its children."""
        run = self._runs.get(event.run_id)
        if run is None or event.stage is None:
            return
        pid, tid, start, end = drawn
        begin, finish = (start - self._origin) / 1000.0, (end - self._origin) / 1000.0
        for parent, name in run.parents.get(event.stage, ()):
            for source in reversed(run.recent.get(parent, ())):
                if source.hi > lo >= source.lo or source.hi < 0:
                    self._flow += 1
                    # An arrow may not point back in time; clocks of two processes differ by microseconds.
                    leave = source.end if source.end < begin else begin
                    self._line(
                        b'{"ph":"s","name":%b,"ts":%.3f,"pid":%d,"tid":%d,"id":%d,"cat":"flow"},\n'
                        b'{"ph":"f","name":%b,"ts":%.3f,"pid":%d,"tid":%d,"id":%d,"cat":"flow","bp":"e"}'
                        % (name, leave, source.pid, source.tid, self._flow, name, begin, pid, tid, self._flow)
                    )
                    break
        recent = run.recent.get(event.stage)
        if recent is None:
            recent = run.recent[event.stage] = deque(maxlen=_RECENT)
        recent.append(_Slice(lo, hi, pid, tid, finish))

    # ------------------------------------------------------------ events

    def _run_started(self, event: Event) -> None:
        if len(self._runs) >= 1024:
            self._runs.pop(next(iter(self._runs)))
        run = self._runs[event.run_id] = _RunTrace(event)
        self._out("i", f"run {run.pipeline} started", event.time_unix_ns, ENGINE, 1, s="p", args={"run": event.run_id})
        self._name(ENGINE, 1, "runs")

    def _run_ended(self, event: Event) -> None:
        run = self._runs.pop(event.run_id, None)
        if run is None:
            return
        start = run.started_ns
        args = {"run": event.run_id, **plain(event.data)}
        ident = f"run{event.run_id}"
        self._out("b", run.pipeline, start, ENGINE, 1, cat="run", id=ident, args=args)
        self._out("e", run.pipeline, event.time_unix_ns, ENGINE, 1, cat="run", id=ident)
        self._writer.flush()

    def _blocks(self, events: Iterable[Event]) -> None:
        for event in events:
            self._block(event)

    def _block(self, event: Event) -> None:
        data = event.data
        lo, hi = data.get("lo") or 0, data.get("hi") or 0
        args: dict[str, Any] = {"run": event.run_id}
        for key in _SHOWN:
            value = data.get(key)
            if value is not None:
                args[key] = value
        name = f"{event.stage} {lo}" if hi - lo == 1 else f"{event.stage} {lo}-{hi - 1}"
        drawn = self._slice(event, name, args)
        if drawn is not None:
            self._arrows(event, drawn, lo, hi)

    def _retried(self, event: Event) -> None:
        """An attempt that was followed by another; the last one is drawn when its stage ends."""
        self._slice(event, f"{event.stage} attempt {event.attempt}", {"run": event.run_id, **_short(event)})

    def _ended(self, event: Event) -> None:
        if event.item is not None or "items_in" in event.data:
            return  # drawn block by block
        drawn = self._slice(event, event.stage or "", {"run": event.run_id, **_short(event)})
        if drawn is not None:
            self._arrows(event, drawn, 0, -1)

    def _failed(self, event: Event) -> None:
        if event.item is None and "items_in" not in event.data:
            self._slice(event, event.stage or "", {"run": event.run_id, **_short(event)})
        self._mark(event)

    def _mark(self, event: Event) -> None:
        where = event.stage or event.type
        item = f" {'.'.join(map(str, event.item))}" if event.item else ""
        name = f"{event.type}: {where}{item}" if event.stage else event.type
        self._out("i", name, event.time_unix_ns, ENGINE, 1, s="p", cat=event.type, args=_short(event))

    def _progress(self, event: Event) -> None:
        done = event.data.get("done")
        if isinstance(done, int | float):
            self._out("C", f"progress {event.stage}", event.time_unix_ns, ENGINE, 0, args={"done": done})

    def _worker(self, event: Event) -> None:
        pid = event.data.get("pid") or 0
        if not pid:
            return
        self._name(pid, 0, f"worker {pid}")
        self._out("i", event.type, event.time_unix_ns, pid, 1, s="p", cat="worker", args=_short(event))
        if event.type != names.WORKER_STARTED:
            self._workers.pop(pid, None)

    def _pressure(self, event: Event) -> None:
        reason = as_text(event.data.get("reason") or "pressure")
        ph = "b" if event.type == names.BACKPRESSURE_ENTERED else "e"
        name = f"waiting for {reason}"
        self._out(ph, name, event.time_unix_ns, ENGINE, 1, cat="backpressure", id=f"bp-{reason}-{event.stage}")

    def _waits(self, event: Event) -> None:
        reason = as_text(event.data.get("reason") or "other")
        ph = "b" if event.type == names.STAGE_WAITING else "e"
        item = ".".join(map(str, event.item or ()))
        key = f"wait-{event.run_id}-{event.stage}-{item}-{event.attempt}-{reason}"
        self._out(ph, f"{event.stage} waits for {reason}", event.time_unix_ns, ENGINE, 1, cat="wait", id=key)

    def _sample(self, event: Event) -> None:
        data = event.data
        now = event.time_unix_ns
        memory = {key: data[key] for key in ("rss_bytes", "live_bytes") if isinstance(data.get(key), int | float)}
        if memory:
            self._out("C", "memory", now, ENGINE, 0, args=memory)
        for name, key in (("queued items", "queued"), ("running", "running")):
            values = {str(k): v for k, v in (data.get(key) or {}).items() if isinstance(v, int | float)}
            if values:
                self._out("C", name, now, ENGINE, 0, args=values)
        for pid, rss in (data.get("workers") or {}).items():
            self._out("C", "rss", now, int(pid), 0, args={"bytes": rss})

    def _spans(self, event: Event) -> None:
        for span in event.data.get("spans") or ():
            ident = str(span.get("span_id"))
            name = as_text(span.get("name") or "span")
            pid = span.get("pid") or ENGINE
            start, end = span.get("start_ns") or 0, span.get("end_ns") or 0
            args = plain(span.get("attributes") or {})
            self._out("b", name, start, pid, 1, cat="span", id=ident, args=args)
            self._out("e", name, max(start, end), pid, 1, cat="span", id=ident)


def _short(event: Event) -> dict[str, Any]:
    """The event's data without long texts."""
    skipped = ("traceback", "error_info", "spans", "stderr_tail")
    shown = {key: plain(value, 2) for key, value in event.data.items() if key not in skipped}
    if event.attempt is not None:
        shown["attempt"] = event.attempt
    return shown
