"""Where events go. A sink can be slow, raise or be broken: it never hurts a run."""

from __future__ import annotations

import contextvars
import logging
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import IO, Any, Final, Protocol, runtime_checkable

from stageflow.events import names
from stageflow.events.event import Event

_log = logging.getLogger("stageflow.events")


@runtime_checkable
class EventSink(Protocol):
    """Receives every event of the runs it is attached to.

    `emit` may be sync or async; what it raises is reported once and dropped. A sink that sets `wants_items = True` is
    given one `stage.completed` per map item besides the block that reports them together; one with `wants_blocks =
    True` is given blocks as they come, where others get several at once. A sink may have `close()`.
    """

    def emit(self, event: Event) -> Awaitable[None] | None:
        """Take one event. Called on the loop that runs the pipeline."""
        ...


class NoOpSink:
    """Drops every event."""

    def emit(self, event: Event) -> None:
        """Do nothing."""


class CollectingSink:
    """Keeps events in order, for tests and notebooks: all of them, or the newest `limit`, in memory that grows with
    what is kept. Thread-safe."""

    def __init__(self, limit: int | None = None, *, wants_items: bool = False) -> None:
        self._events: deque[Event] = deque(maxlen=limit)
        self._lock = threading.Lock()
        self.wants_items = wants_items

    def emit(self, event: Event) -> None:
        """Keep `event`."""
        with self._lock:
            self._events.append(event)

    def events(self) -> list[Event]:
        """A copy of what was kept, oldest first."""
        with self._lock:
            return list(self._events)

    def of_type(self, prefix: str) -> list[Event]:
        """The kept events whose type starts with `prefix`."""
        return [event for event in self.events() if event.type.startswith(prefix)]

    @property
    def is_empty(self) -> bool:
        """True when nothing was kept."""
        return not self._events

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._events.clear()

    def __len__(self) -> int:
        return len(self._events)


class LoggingSink:
    """Writes each event as one record of `logger` at exactly `level` (a number or a name such as "warning").

    The record has `run_id`, `stage`, `item`, `attempt`, `lane`, `event` and `event_data` as attributes.
    """

    def __init__(self, level: int | str = logging.INFO, logger: logging.Logger | str = "stageflow.run") -> None:
        self.level = level_number(level)
        self.logger = logging.getLogger(logger) if isinstance(logger, str) else logger

    def emit(self, event: Event) -> None:
        """Log `event` unless the logger's level says no."""
        if self.logger.isEnabledFor(self.level):
            extra = {
                "event": event.type,
                "run_id": event.run_id,
                "stage": event.stage,
                "item": event.item,
                "attempt": event.attempt,
                "lane": event.lane,
                "event_data": event.data,
            }
            self.logger.log(self.level, "%s", one_line(event), extra=extra)


def level_number(level: int | str) -> int:
    """The number of a logging level given by number or by name in any case.

    Raises:
        ValueError: no level has that name.
    """
    if isinstance(level, int):
        return level
    known = logging.getLevelNamesMapping()
    name = level.upper()
    if name not in known:
        raise ValueError(f"no logging level is called {level!r}; there are {', '.join(sorted(known))}")
    return known[name]


_SHOWN: Final = (
    "reason",
    "error",
    "key",
    "delay_ms",
    "duration_ms",
    "items_in",
    "items_out",
    "dropped",
    "failed",
    "pid",
)


def one_line(event: Event) -> str:
    """The event as one readable line, without values that could be long or secret."""
    from stageflow.events.encoding import as_text

    words = [event.type]
    if event.stage is not None:
        words.append(event.stage if event.item is None else f"{event.stage}[{'.'.join(map(str, event.item))}]")
    if event.attempt is not None and event.attempt > 1:
        words.append(f"attempt={event.attempt}")
    for key in _SHOWN:
        value = event.data.get(key)
        if value is not None and value != "":
            text = f"{value:.1f}" if isinstance(value, float) else as_text(value).replace("\n", " ")[:200]
            words.append(f"{key}={text}")
    return " ".join(words)


class JsonlSink:
    """Appends each event as one JSON line to a file (a path, or an open binary file, which is left open).

    Folders are made and the file is opened with the first event. Lines are written in pieces: at the latest after a
    second, at a failure and at the end of a run. A full disk or a closed pipe is reported once; what cannot be written
    from then on is only counted (`lost`). Thread-safe.
    """

    def __init__(
        self, target: str | os.PathLike[str] | IO[bytes], *, append: bool = True, wants_items: bool = False
    ) -> None:
        from stageflow.events.encoding import encode_json
        from stageflow.events.files import PieceWriter

        self._encode = encode_json
        self._writer = PieceWriter(target, what="the event log", append=append)
        self.wants_items = wants_items

    def emit(self, event: Event) -> None:
        """Buffer `event`, and write when it is time."""
        urgent = event.type in names.RUN_ENDED or event.type == names.STAGE_FAILED
        self._writer.write(self._encode(event) + b"\n", now=urgent)

    @property
    def written(self) -> int:
        """Lines that reached the file."""
        return self._writer.written

    @property
    def lost(self) -> int:
        """Lines that could not be written."""
        return self._writer.lost

    @property
    def error(self) -> Exception | None:
        """What ended the writing, if anything did."""
        return self._writer.error

    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered and close the file if this sink opened it. A later event opens it again."""
        self._writer.close()


class RedactingSink:
    """Passes events on after `redact(event)`; what it returns as None is dropped, and what it raises drops the event
    too."""

    def __init__(self, downstream: EventSink, redact: Callable[[Event], Event | None]) -> None:
        self.downstream = downstream
        self.redact = redact

    @property
    def wants_items(self) -> bool:
        """As the sink behind it."""
        return bool(getattr(self.downstream, "wants_items", False))

    @property
    def wants_blocks(self) -> bool:
        """As the sink behind it."""
        return bool(getattr(self.downstream, "wants_blocks", False))

    def emit(self, event: Event) -> Awaitable[None] | None:
        """Redact and pass on."""
        shown = self.redact(event)
        return None if shown is None else self.downstream.emit(shown)


_current: contextvars.ContextVar[EventSink | None] = contextvars.ContextVar("stageflow_event_sink", default=None)
_NO_OP: Final = NoOpSink()


def set_event_sink(sink: EventSink) -> contextvars.Token[EventSink | None]:
    """Make `sink` the current one in this context; tasks started from here inherit it."""
    return _current.set(sink)


def clear_event_sink() -> None:
    """Have no current sink in this context."""
    _current.set(None)


def get_event_sink() -> EventSink:
    """The current sink of this context, or one that drops everything."""
    sink = _current.get()
    return _NO_OP if sink is None else sink  # an empty sink may be falsy


def close_all(sinks: Iterable[Any]) -> None:
    """Call `close()` of every sink that has one; what it raises is logged."""
    for sink in sinks:
        close = getattr(sink, "close", None)
        if close is None:
            continue
        try:
            close()
        except Exception:
            _log.warning("closing %s failed", type(sink).__name__, exc_info=True)
