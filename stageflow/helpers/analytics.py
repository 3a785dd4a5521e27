"""Carries events out of the engine: JSON lines, console, buffering, several targets, and the sink that feeds them.

Exporters are plain synchronous objects, safe from several threads, and bound to no event loop: the sink owns one thread
that calls them, so a slow disk never holds up a run. Knows the engine's events by their attributes only.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TextIO

from stageflow.core.errors import DefinitionError
from stageflow.helpers.timestamps import UnixPrecision, format_iso8601, from_unix, now_utc, parse_timestamp

__all__ = [
    "AnalyticsEvent",
    "AnalyticsSink",
    "BufferedExporter",
    "CompositeExporter",
    "ConsoleExporter",
    "Exporter",
    "JSONFileExporter",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyticsEvent:
    """One event as exporters see it. `timestamp` is aware and in UTC, `duration_ms` in milliseconds."""

    event_type: str
    timestamp: datetime = field(default_factory=now_utc)
    data: Mapping[str, Any] = field(default_factory=dict)
    pipeline_run_id: str | None = None
    stage_name: str | None = None
    duration_ms: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Type, time and data always; the rest where it is set."""
        written: dict[str, Any] = {
            "event_type": self.event_type,
            "timestamp": format_iso8601(self.timestamp),
            "data": dict(self.data),
        }
        if self.pipeline_run_id is not None:
            written["pipeline_run_id"] = self.pipeline_run_id
        if self.stage_name is not None:
            written["stage_name"] = self.stage_name
        if self.duration_ms is not None:
            written["duration_ms"] = self.duration_ms
        if self.metadata:
            written["metadata"] = dict(self.metadata)
        return written

    def to_json(self) -> str:
        """One line of JSON; what JSON cannot say is written as its `str`."""
        return json.dumps(_json_keys(self.to_dict()), default=str, ensure_ascii=False)

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> AnalyticsEvent:
        """Read what `to_dict` wrote; the time may be any text `parse_timestamp` reads, the run id a UUID object.

        Raises:
            DefinitionError: no `event_type`, or an unreadable time.
        """
        if not isinstance(written.get("event_type"), str):
            raise DefinitionError("an analytics event needs the text field 'event_type'", fields=sorted(written))
        when = written.get("timestamp")
        if not isinstance(when, datetime):
            when = now_utc() if when is None else parse_timestamp(str(when))
        run_id = written.get("pipeline_run_id")
        return cls(
            event_type=written["event_type"],
            timestamp=when,
            data=dict(written.get("data") or {}),
            pipeline_run_id=str(run_id) if isinstance(run_id, str | uuid.UUID) else None,
            stage_name=written.get("stage_name"),
            duration_ms=written.get("duration_ms"),
            metadata=dict(written.get("metadata") or {}),
        )


def _json_keys(value: Any) -> Any:
    """Give every mapping text keys: JSON has no others, and `default=` is not asked about keys."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _json_keys(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_keys(inner) for inner in value]
    return value


class Exporter(Protocol):
    """Takes events somewhere. Called from one or several threads; may raise, and whoever calls decides what then."""

    def export(self, event: AnalyticsEvent) -> None:
        """Take one event."""

    def flush(self) -> None:
        """Return when everything taken so far has left this process's buffers."""

    def close(self) -> None:
        """Flush and free; further calls to `close` do nothing."""


class JSONFileExporter:
    """Writes one JSON object per line. The file and its folders appear with the first event; UTF-8.

    `append=False` empties the file at the first event after construction, not again when it is reopened after `close`.
    """

    def __init__(self, path: str | Path, append: bool = True) -> None:
        self.path = Path(path)
        self.count = 0
        self._mode: Literal["a", "w"] = "a" if append else "w"
        self._handle: TextIO | None = None
        self._lock = threading.Lock()

    def export(self, event: AnalyticsEvent) -> None:
        """Append one line; OSError where the disk refuses."""
        line = event.to_json() + "\n"
        with self._lock:
            if self._handle is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._handle = self.path.open(self._mode, encoding="utf-8", errors="backslashreplace")
                self._mode = "a"
            self._handle.write(line)
            self.count += 1

    def flush(self) -> None:
        """Hand the written lines to the operating system."""
        with self._lock:
            if self._handle is not None:
                self._handle.flush()

    def close(self) -> None:
        """Close the file and forget it; a later event opens it again."""
        with self._lock:
            handle, self._handle = self._handle, None
            if handle is not None:
                handle.close()


COLOURS: Final = (  # first keyword found in the event type wins
    (("fail", "error", "denied", "lost"), "\x1b[31m"),
    (("retry", "skip", "cancel", "drop", "throttle", "overflow", "underrun", "timeout"), "\x1b[33m"),
    (("complete", "success", "recovered", "approved"), "\x1b[32m"),
    (("start", "invoked", "requested"), "\x1b[36m"),
)
PLAIN_COLOUR: Final = "\x1b[37m"
RESET: Final = "\x1b[0m"


class ConsoleExporter:
    """Prints `[HH:MM:SS.mmm] type stage=... 12.3 ms`, in UTC; `verbose` adds the data as JSON.

    `colorize=None` colours where the stream is a terminal. Control characters in names and data are escaped, so that an
    event cannot drive the terminal.
    """

    def __init__(self, colorize: bool | None = None, verbose: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._colorize = colorize
        self.verbose = verbose
        self._lock = threading.Lock()

    def render(self, event: AnalyticsEvent, *, colorize: bool) -> str:
        """The line for one event, without its end."""
        moment = event.timestamp.astimezone(UTC)
        parts = [f"[{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}]", _printable(event.event_type)]
        if event.stage_name is not None:
            parts.append(f"stage={_printable(event.stage_name)}")
        if event.duration_ms is not None:
            parts.append(f"{event.duration_ms:.1f} ms")
        if self.verbose and event.data:
            parts.append(_printable(json.dumps(_json_keys(event.data), default=str, ensure_ascii=False)))
        if colorize:
            kind = event.event_type.lower()
            colour = next((code for words, code in COLOURS if any(word in kind for word in words)), PLAIN_COLOUR)
            parts[1] = f"{colour}{parts[1]}{RESET}"
        return " ".join(parts)

    def export(self, event: AnalyticsEvent) -> None:
        """Print one line."""
        stream = self._stream if self._stream is not None else sys.stderr
        colorize = stream.isatty() if self._colorize is None else self._colorize
        line = self.render(event, colorize=colorize) + "\n"
        with self._lock:
            stream.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        (self._stream if self._stream is not None else sys.stderr).flush()

    def close(self) -> None:
        """Flush; the stream belongs to whoever gave it."""
        self.flush()


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class Timer(Protocol):
    """A started timer."""

    def cancel(self) -> None:
        """Make sure the callback is not called any more, as far as it has not begun."""


def thread_timer(seconds: float, callback: Callable[[], None]) -> Timer:
    """Call `callback` once, `seconds` from now, in a daemon thread."""
    timer = threading.Timer(seconds, callback)
    timer.daemon = True
    timer.start()
    return timer


class BufferedExporter:
    """Collects events and passes them on together: at `batch_size`, every `flush_interval_seconds`, on flush and close.

    A full buffer drops its *oldest* event and calls `on_overflow(dropped_in_total, buffer_size)`. When the buffer first
    reaches `high_water` (a fraction of `max_buffer_size`), `on_overflow(-1, size)` is called once, and again only after
    the size fell below half of that mark. What the callback raises is swallowed. An event the target refused stays in
    the buffer, in order, for the next flush.
    """

    def __init__(
        self,
        exporter: Exporter,
        batch_size: int = 100,
        flush_interval_seconds: float | None = 10.0,
        max_buffer_size: int = 10_000,
        *,
        high_water: float = 0.8,
        on_overflow: Callable[[int, int], None] | None = None,
        start_timer: Callable[[float, Callable[[], None]], Timer] = thread_timer,
    ) -> None:
        if batch_size < 1 or max_buffer_size < 1:
            raise DefinitionError("batch_size and max_buffer_size must be 1 or more", batch_size=batch_size)
        if flush_interval_seconds is not None and flush_interval_seconds <= 0:
            raise DefinitionError("flush_interval_seconds must be above 0, or None for no timer")
        if not 0 < high_water <= 1:
            raise DefinitionError("high_water is a fraction of max_buffer_size, above 0 and up to 1")
        self._exporter = exporter
        self._batch_size = batch_size
        self._interval = flush_interval_seconds
        self._max = max_buffer_size
        self._high_mark = high_water * max_buffer_size
        self._on_overflow = on_overflow
        self._start_timer = start_timer
        self._buffer: deque[AnalyticsEvent] = deque()
        self._dropped = 0
        self._warned = False
        self._closed = False
        self._timer: Timer | None = None
        self._lock = threading.Lock()
        self._flushing = threading.RLock()  # one flush at a time, or batches would overtake each other

    @property
    def stats(self) -> dict[str, Any]:
        """`buffer_size`, `max_buffer_size`, `fill_ratio`, `dropped_count`, `high_water_warned` at this moment."""
        with self._lock:
            return {
                "buffer_size": len(self._buffer),
                "max_buffer_size": self._max,
                "fill_ratio": len(self._buffer) / self._max,
                "dropped_count": self._dropped,
                "high_water_warned": self._warned,
            }

    def export(self, event: AnalyticsEvent) -> None:
        """Keep one event; flushes when a batch is full, and then raises what the target raised. Dropped after close."""
        calls: list[tuple[int, int]] = []
        with self._lock:
            if self._closed:
                self._dropped += 1
                return
            if len(self._buffer) >= self._max:
                self._buffer.popleft()
                self._dropped += 1
                calls.append((self._dropped, self._max))
            self._buffer.append(event)
            size = len(self._buffer)
            if size >= self._high_mark and not self._warned:
                self._warned = True
                calls.append((-1, size))
            if self._timer is None and self._interval is not None:
                self._timer = self._start_timer(self._interval, self._tick)
            full = size >= self._batch_size
        for dropped, at_size in calls:
            self._tell(dropped, at_size)
        if full:
            self._drain()

    def flush(self) -> None:
        """Pass on everything kept, then flush the target; raises what the target raises."""
        self._drain()
        self._exporter.flush()

    def close(self) -> None:
        """Stop the timer, flush what remains, then close the target, also when the flush failed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        try:
            self.flush()
        finally:
            self._exporter.close()

    def _drain(self) -> None:
        with self._flushing:
            while True:
                with self._lock:
                    if not self._buffer:
                        return
                    event = self._buffer.popleft()
                try:
                    self._exporter.export(event)
                except BaseException:
                    with self._lock:
                        if len(self._buffer) < self._max:
                            self._buffer.appendleft(event)
                        else:
                            self._dropped += 1
                    raise
                with self._lock:
                    if len(self._buffer) < self._high_mark / 2:
                        self._warned = False

    def _tick(self) -> None:
        try:
            self.flush()
        except Exception:
            logger.exception("a timed flush failed; %d events wait for the next one", len(self._buffer))
        with self._lock:
            if not self._closed and self._interval is not None:
                self._timer = self._start_timer(self._interval, self._tick)

    def _tell(self, dropped: int, size: int) -> None:
        if self._on_overflow is None:
            return
        try:
            self._on_overflow(dropped, size)
        except Exception:
            logger.exception("on_overflow failed")


class CompositeExporter:
    """Gives every event to every target. One that fails loses its event alone; the others get theirs.

    `failures` counts refused events per target. `flush` and `close` reach every target before they raise.
    """

    def __init__(self, *exporters: Exporter) -> None:
        self.exporters = exporters
        self.failures = [0] * len(exporters)

    def export(self, event: AnalyticsEvent) -> None:
        """Hand out one event; a target's error is counted, and logged the first time."""
        for index, exporter in enumerate(self.exporters):
            try:
                exporter.export(event)
            except Exception:
                self.failures[index] += 1
                if self.failures[index] == 1:
                    logger.exception("exporter %s failed", type(exporter).__name__)

    def flush(self) -> None:
        """Flush all; an ExceptionGroup of what failed."""
        self._each("flush", [exporter.flush for exporter in self.exporters])

    def close(self) -> None:
        """Close all; an ExceptionGroup of what failed."""
        self._each("close", [exporter.close for exporter in self.exporters])

    @staticmethod
    def _each(what: str, calls: Iterable[Callable[[], None]]) -> None:
        errors: list[Exception] = []
        for call in calls:
            try:
                call()
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup(f"{what} failed for {len(errors)} exporter(s)", errors)


class EngineEvent(Protocol):
    """What the sink reads of an engine event."""

    @property
    def type(self) -> str:
        """Its dotted name."""


class AnalyticsSink:
    """An event sink for the engine that exports in a thread of its own: `emit` returns at once and never raises.

    `exclude` patterns (substrings of the event type) drop an event; where `include` is given, one of it must match. The
    queue holds `max_queue` events; when it is full the newest is dropped and counted. `items=False` asks the engine for
    no event per map item. Counters: `event_count` exported, `dropped_count`, `error_count` refused by the exporter.
    """

    def __init__(
        self,
        exporter: Exporter,
        *,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        items: bool = True,
        max_queue: int = 100_000,
    ) -> None:
        self.wants_items = items
        self._exporter = exporter
        self._include = tuple(include)
        self._exclude = tuple(exclude)
        self._max_queue = max_queue
        self._queue: deque[AnalyticsEvent] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self.event_count = 0
        self.dropped_count = 0
        self.error_count = 0

    def wants(self, event_type: str) -> bool:
        """Whether the patterns let this type through."""
        if any(pattern in event_type for pattern in self._exclude):
            return False
        return not self._include or any(pattern in event_type for pattern in self._include)

    def emit(self, event: EngineEvent) -> None:
        """Queue one engine event; where the queue is full or the sink closed it is counted as dropped."""
        try:
            if self.wants(event.type):
                self._put(_from_engine(event))
        except Exception:
            self.error_count += 1
            logger.exception("an event could not be taken")

    def try_emit(self, event_type: str, data: Mapping[str, Any] | None = None) -> bool:
        """Queue an event given by name and data; False where it was filtered or dropped."""
        if not self.wants(event_type):
            return False
        fields = dict(data or {})
        return self._put(_with_fields(event_type, now_utc(), fields, {}))

    def flush(self, timeout: float | None = 10.0) -> bool:
        """Wait until everything queued was exported, then flush the exporter; False after `timeout` seconds."""
        with self._changed:
            drained = self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)
        self._exporter.flush()
        return drained

    def close(self, timeout: float | None = 10.0) -> None:
        """Take no more, export what is queued, close the exporter. `timeout` bounds the wait in seconds."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout)
        self._exporter.close()

    def _put(self, event: AnalyticsEvent) -> bool:
        with self._changed:
            if self._closed or len(self._queue) >= self._max_queue:
                self.dropped_count += 1
                return False
            self._queue.append(event)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="stageflow-analytics", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return True

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                event = self._queue.popleft()
                self._busy = True
            try:
                self._exporter.export(event)
                self.event_count += 1
            except Exception:
                self.error_count += 1
                if self.error_count == 1:
                    logger.exception("exporter %s failed; further failures are only counted", type(self._exporter))


ENGINE_FIELDS: Final = ("seq", "item", "attempt", "lane")


def _from_engine(event: EngineEvent) -> AnalyticsEvent:
    """Map the engine's event: stage and run id to their fields, the rest of its head to metadata."""
    nanos = getattr(event, "time_unix_ns", None)
    if nanos is None:
        moment = datetime.fromtimestamp(time.time(), UTC)
    else:
        moment = from_unix(str(nanos), UnixPrecision.NANOSECONDS)
    data = getattr(event, "data", None)
    fields = dict(data) if isinstance(data, Mapping) else ({} if data is None else {"value": data})
    for source in ("stage", "run_id"):
        value = getattr(event, source, None)
        if value is not None:
            fields.setdefault(source, value)
    head = {name: value for name in ENGINE_FIELDS if (value := getattr(event, name, None)) is not None}
    return _with_fields(event.type, moment, fields, head)


def _with_fields(event_type: str, moment: datetime, data: dict[str, Any], head: dict[str, Any]) -> AnalyticsEvent:
    run_id = data.get("pipeline_run_id", data.get("run_id"))
    stage = data.get("stage")
    duration = data.get("duration_ms")
    return AnalyticsEvent(
        event_type=event_type,
        timestamp=moment,
        data=data,
        pipeline_run_id=None if run_id is None else str(run_id),
        stage_name=None if stage is None else str(stage),
        duration_ms=float(duration) if isinstance(duration, int | float) else None,
        metadata=head,
    )
