"""`BoundedSink`: a queue of limited length and a thread between a run and a sink that may be slow."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from stageflow.events.event import Event
from stageflow.events.sinks import EventSink, LoggingSink

_log = logging.getLogger("stageflow.events")


class BackpressureMetrics:
    """What a bounded sink took and lost. Times are Unix seconds, None before the first."""

    __slots__ = ("delivered", "dropped", "emitted", "errors", "last_drop_time", "last_emit_time", "queue_full_count")

    def __init__(self) -> None:
        self.emitted = 0  #: taken into the queue
        self.delivered = 0  #: taken by the downstream sink without an error
        self.errors = 0
        self.dropped = 0
        self.queue_full_count = 0
        self.last_emit_time: float | None = None
        self.last_drop_time: float | None = None

    def record_emit(self) -> None:
        """Count an event that was taken."""
        self.emitted += 1
        self.last_emit_time = time.time()

    def record_drop(self, *, full: bool = True) -> None:
        """Count an event that was lost, because the queue was full or because nobody waits for it any more."""
        self.dropped += 1
        self.queue_full_count += full
        self.last_drop_time = time.time()

    def drop_rate(self) -> float:
        """Percent of the events offered that were lost; 0.0 when there were none."""
        offered = self.emitted + self.dropped
        return 100.0 * self.dropped / offered if offered else 0.0

    def to_dict(self) -> dict[str, Any]:
        """emitted, dropped, queue_full_count, and drop_rate_percent with two decimals."""
        return {
            "emitted": self.emitted,
            "dropped": self.dropped,
            "queue_full_count": self.queue_full_count,
            "drop_rate_percent": round(self.drop_rate(), 2),
        }


class BoundedSink:
    """Queues events for `downstream`, which is called from a thread of its own (async sinks on a loop of that thread).

    `emit` never waits: when `max_queue_size` events wait, the new one is dropped, counted, and `on_drop(event)` is
    called. The thread starts with the first event; `stop` (or `close`, `aclose`) drains promptly, and a later event
    starts it anew.
    """

    def __init__(
        self,
        downstream: EventSink | None = None,
        max_queue_size: int = 10_000,
        *,
        on_drop: Callable[[Event], None] | None = None,
    ) -> None:
        if max_queue_size < 1:
            raise ValueError(f"max_queue_size must be at least 1, not {max_queue_size}")
        self.downstream: EventSink = downstream if downstream is not None else LoggingSink()
        self.max_queue_size = max_queue_size
        self.metrics = BackpressureMetrics()
        self._on_drop = on_drop
        self._queue: deque[Event] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._busy = False

    @property
    def wants_items(self) -> bool:
        """As the sink behind it."""
        return bool(getattr(self.downstream, "wants_items", False))

    @property
    def wants_blocks(self) -> bool:
        """As the sink behind it."""
        return bool(getattr(self.downstream, "wants_blocks", False))

    @property
    def queue_size(self) -> int:
        """Events that wait."""
        return len(self._queue)

    @property
    def is_running(self) -> bool:
        """True while the thread that serves the queue lives and was not told to stop."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        """Start the thread; nothing happens if it runs."""
        with self._changed:
            self._start()

    def _start(self) -> None:
        if self.is_running:
            return
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="stageflow-events", daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        """Queue `event`, or drop it when the queue is full."""
        self.try_emit(event)

    def try_emit(self, event: Event) -> bool:
        """Queue `event`; False when it was dropped."""
        with self._changed:
            if len(self._queue) < self.max_queue_size:
                self._append(event)
                return True
            self.metrics.record_drop()
            first = self.metrics.dropped == 1
        self._tell_drop(event, first)
        return False

    async def put(self, event: Event, poll: float = 0.005) -> None:
        """Queue `event`, waiting for room as long as it takes."""
        while True:
            with self._changed:
                if len(self._queue) < self.max_queue_size:
                    self._append(event)
                    return
            await asyncio.sleep(poll)

    def _append(self, event: Event) -> None:
        self._queue.append(event)
        self.metrics.record_emit()
        if not self.is_running:
            self._start()
        if not self._busy:
            self._changed.notify_all()

    def _tell_drop(self, event: Event, first: bool) -> None:
        if first:
            _log.warning(
                "event queue is full (%d): %s dropped, further drops are counted", self.max_queue_size, event.type
            )
        if self._on_drop is not None:
            try:
                self._on_drop(event)
            except Exception:
                if first:
                    _log.warning("on_drop failed", exc_info=True)

    # ------------------------------------------------------------ the thread

    def _serve(self) -> None:
        loop: asyncio.AbstractEventLoop | None = None
        me = threading.current_thread()
        try:
            while True:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
                    while not self._queue and not self._stopping and self._thread is me:
                        self._changed.wait()
                    if self._thread is not me or not self._queue:
                        return  # replaced after a stop that could not wait, or drained
                    event = self._queue.popleft()
                    self._busy = True
                try:
                    result = self.downstream.emit(event)
                    if result is not None and inspect.isawaitable(result):
                        loop = loop or asyncio.new_event_loop()
                        loop.run_until_complete(_await(result))
                except Exception:
                    self.metrics.errors += 1
                    if self.metrics.errors == 1:
                        name = type(self.downstream).__name__
                        _log.warning("event sink %s failed; further errors are only counted", name, exc_info=True)
                else:
                    self.metrics.delivered += 1
        finally:
            if loop is not None:
                loop.close()

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything queued was delivered; False if that takes longer than `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)

    def stop(self, drain: bool = True, timeout: float = 5.0) -> bool:
        """Stop the thread, after the queue is delivered if `drain`; True if that took less than `timeout` seconds.

        Returns as soon as the queue is empty. What is left after `timeout` is dropped and counted. Idempotent.
        """
        with self._changed:
            thread = self._thread
            self._stopping = True
            if not drain:
                self._drop_queued()
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        with self._changed:
            clean = thread is None or not thread.is_alive()
            if not clean and self._thread is thread:
                self._drop_queued()
                self._thread = None  # it ends by itself when the sink lets it go
                _log.warning("the event sink was still busy after %.3g s; its queue is dropped", timeout)
        return clean

    def _drop_queued(self) -> None:
        while self._queue:
            self._queue.popleft()
            self.metrics.record_drop(full=False)

    def close(self) -> None:
        """Drain, stop, and close the sink behind the queue."""
        self.stop()
        close = getattr(self.downstream, "close", None)
        if close is not None:
            close()

    async def aclose(self, timeout: float = 5.0) -> None:
        """As `close`, without blocking the loop."""
        await asyncio.get_running_loop().run_in_executor(None, self.stop, True, timeout)
        close = getattr(self.downstream, "close", None)
        if close is not None:
            close()


async def _await(result: Any) -> None:
    await result
