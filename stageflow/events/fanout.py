"""`FanOut`: one event to many sinks, each kept from hurting the run or another sink."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec

from stageflow.events import names
from stageflow.events.event import Event
from stageflow.events.merging import BlockMerger
from stageflow.events.sinks import EventSink, close_all

_log = logging.getLogger("stageflow.events")
_ITEMS: Final = names.STAGE_ITEMS

#: Events that wait for one async sink. Beyond it new ones are dropped and counted: memory stays bounded.
MAX_WAITING: Final = 10_000
#: Seconds after which held blocks are passed on when nothing else happens.
_HELD_AT_MOST: Final = 0.2


class _Entry:
    """One attached sink and what became of its events."""

    __slots__ = ("dropped", "errors", "is_async", "loop", "sink", "task", "waiting", "wants_blocks", "wants_items")

    def __init__(self, sink: EventSink) -> None:
        self.sink = sink
        self.wants_items = bool(getattr(sink, "wants_items", False))
        self.wants_blocks = bool(getattr(sink, "wants_blocks", False))
        self.is_async = inspect.iscoroutinefunction(sink.emit)
        self.waiting: deque[Event | Awaitable[None]] = deque()
        self.task: asyncio.Task[None] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.errors = 0
        self.dropped = 0

    def failed(self) -> None:
        """Count an error of the sink; tell of the first."""
        self.errors += 1
        if self.errors == 1:
            name = type(self.sink).__name__
            _log.warning("event sink %s failed; the run goes on, further errors are only counted", name, exc_info=True)


class FanOut:
    """Hands each event to every attached sink, in order of attachment.

    `listening` is False while no sink is attached: emitters read it first, so that nobody listening costs an
    attribute read. What a sink raises is logged once and dropped. The events of an async sink are awaited in order by
    a task of its own on the loop that emits; `drain` waits for them. `redact(event)`, if given, sees each event
    before any sink does and may return another one, or None to drop it. May be called from several threads; sinks are
    called one event at a time (`shared=False` promises that one thread emits, which saves the lock).
    """

    def __init__(
        self,
        sinks: Iterable[EventSink] = (),
        *,
        redact: Callable[[Event], Event | None] | None = None,
        max_waiting: int = MAX_WAITING,
        shared: bool = True,
    ) -> None:
        self._shared = shared
        self._entries: tuple[_Entry, ...] = ()
        self._only: _Entry | None = None  # the one sink, where it is a plain one
        self._lock = threading.RLock()
        self._redact = redact
        self._redact_failed = False
        self._max_waiting = max_waiting
        self._failed_items: dict[tuple[str | None, str | None], set[tuple[int, ...]]] = {}
        self._merger = BlockMerger()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_loop: asyncio.AbstractEventLoop | None = None
        self.listening = False
        self.wants_items = False
        self.wants_spans = False
        self._of_blocks: tuple[_Entry, ...] = ()  # sinks that are given blocks as they come
        self._of_merged: tuple[_Entry, ...] = ()  # all others
        for sink in sinks:
            self.add(sink)

    # ------------------------------------------------------------ attaching

    def add(self, sink: EventSink) -> Callable[[], None]:
        """Attach `sink`; call what is returned to detach it. A sink attached twice gets each event twice."""
        entry = _Entry(sink)
        with self._lock:
            self._set((*self._entries, entry))

        def detach() -> None:
            with self._lock:
                self._set(tuple(other for other in self._entries if other is not entry))

        return detach

    append = add

    def remove(self, sink: EventSink) -> None:
        """Detach `sink` wherever it is attached."""
        with self._lock:
            self._set(tuple(entry for entry in self._entries if entry.sink is not sink))

    def _set(self, entries: tuple[_Entry, ...]) -> None:
        self._entries = entries
        self.listening = bool(entries)
        self._of_blocks = tuple(entry for entry in entries if entry.wants_blocks)
        self._of_merged = tuple(entry for entry in entries if not entry.wants_blocks) if self._of_blocks else entries
        self.wants_items = any(entry.wants_items for entry in entries)
        single = len(entries) == 1 and self._redact is None and not self.wants_items
        self._only = entries[0] if single and not entries[0].is_async else None
        #: a sink exports traces: attempts get a trace context, and the spans of workers come back as events
        self.wants_spans = any(getattr(entry.sink, "wants_spans", False) for entry in entries)

    @property
    def sinks(self) -> tuple[EventSink, ...]:
        """The attached sinks."""
        return tuple(entry.sink for entry in self._entries)

    def __iter__(self) -> Iterator[EventSink]:
        return iter(self.sinks)

    def __len__(self) -> int:
        return len(self._entries)

    def troubles(self) -> list[dict[str, Any]]:
        """Per sink that failed or could not keep up: its name, the number of errors and of dropped events."""
        return [
            {"sink": type(entry.sink).__name__, "errors": entry.errors, "dropped": entry.dropped}
            for entry in self._entries
            if entry.errors or entry.dropped
        ]

    # ------------------------------------------------------------ emitting

    def emit(self, event: Event) -> None:
        """Hand `event` to every sink. Never raises (a KeyboardInterrupt inside a sink excepted) and never waits."""
        only = self._only
        if only is not None and event.type != _ITEMS and not self._merger.holds:
            # one plain sink and no block of items: what follows, spelled out; three events a stage go this way
            if self._shared:
                with self._lock:
                    self._give(only, event)
                return
            try:
                result: Any = only.sink.emit(event)  # type: ignore[func-returns-value, unused-ignore]
                if result is not None and inspect.isawaitable(result):
                    self._queue(only, result)
            except KeyboardInterrupt:
                raise
            except BaseException:
                only.failed()
            return
        if not self._entries:
            return
        with self._lock:
            if event.type == names.STAGE_ITEMS:
                if self._of_blocks:
                    self._pass_on(event, self._of_blocks)
                if self._timer is None:
                    loop = _loop_here()
                    if loop is None:
                        self._pass_on(event, self._of_merged)  # nobody could pass on later what is held now
                        return
                    self._timer_loop = loop
                now = self._merger.add(event)
                if now is not None:
                    for block in now:
                        self._pass_on(block, self._of_merged)
                elif self._timer is None and self._timer_loop is not None:
                    self._timer = self._timer_loop.call_later(_HELD_AT_MOST, self._flush_blocks)
                return
            if self._merger.holds:
                self._flush_blocks()
            self._pass_on(event, self._entries)

    def emit_all(self, events: Sequence[Event]) -> None:
        """`emit` of each, in order; none of them is a block of items."""
        only = self._only
        if only is None or self._shared or self._merger.holds:
            for event in events:
                self.emit(event)
            return
        call = only.sink.emit
        for event in events:
            if self._only is not only:  # the one before has changed who listens
                self.emit(event)
                continue
            try:
                result: Any = call(event)  # type: ignore[func-returns-value, unused-ignore]
                if result is not None and inspect.isawaitable(result):
                    self._queue(only, result)
            except KeyboardInterrupt:
                raise
            except BaseException:
                only.failed()

    def _flush_blocks(self) -> None:
        """Pass on what the merger holds."""
        with self._lock:
            timer, self._timer = self._timer, None
            if timer is not None and self._timer_loop is _loop_here():
                timer.cancel()
            for block in self._merger.take():
                self._pass_on(block, self._of_merged)

    def _pass_on(self, event: Event, entries: tuple[_Entry, ...]) -> None:
        if self._redact is not None:
            shown = self._redacted(event)
            if shown is None:
                return
            event = shown
        for entry in entries:
            self._give(entry, event)
        if self.wants_items and entries is not self._of_blocks:
            self._expand(event)

    def _redacted(self, event: Event) -> Event | None:
        assert self._redact is not None
        try:
            return self._redact(event)
        except Exception:
            # What the hook could not clean is not shown.
            if not self._redact_failed:
                self._redact_failed = True
                _log.warning("the redaction hook failed; events it cannot clean are dropped", exc_info=True)
            return None

    def _give(self, entry: _Entry, event: Event) -> None:
        if entry.is_async:
            self._queue(entry, event)
            return
        try:
            result = entry.sink.emit(event)
            if result is not None and inspect.isawaitable(result):
                self._queue(entry, result)
        except KeyboardInterrupt:
            raise
        except BaseException:
            entry.failed()

    def _expand(self, event: Event) -> None:
        """Tell the sinks that want it of each item of a block. Derived events carry their block's seq and mean
        times."""
        where = (event.run_id, event.stage)
        if event.type in (names.STAGE_FAILED, names.STAGE_CANCELLED) and event.item is not None:
            self._failed_items.setdefault(where, set()).add(event.item)
            return
        if event.type in names.STAGE_ENDED and event.item is None:
            self._failed_items.pop(where, None)
            return
        if event.type != names.STAGE_ITEMS:
            return
        entries = [entry for entry in self._entries if entry.wants_items]
        for derived in items_of(event, self._failed_items.pop(where, set())):
            for entry in entries:
                self._give(entry, derived)

    # ------------------------------------------------------------ async sinks

    def _queue(self, entry: _Entry, what: Event | Awaitable[None]) -> None:
        loop = _loop_here()
        if loop is None or len(entry.waiting) >= self._max_waiting:
            entry.dropped += 1
            if inspect.iscoroutine(what):
                what.close()
            if entry.dropped == 1:
                why = "no event loop runs where the event was emitted" if loop is None else "it cannot keep up"
                _log.warning("async event sink %s loses events: %s", type(entry.sink).__name__, why)
            return
        entry.waiting.append(what)
        if entry.task is None or entry.task.done() or entry.loop is not loop:
            entry.loop = loop
            entry.task = loop.create_task(self._deliver(entry), name=f"events to {type(entry.sink).__name__}")

    async def _deliver(self, entry: _Entry) -> None:
        waiting = entry.waiting
        while waiting:
            what = waiting.popleft()
            try:
                awaitable = entry.sink.emit(what) if isinstance(what, Event) else what
                if awaitable is not None:
                    await awaitable
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                entry.failed()  # the sink raised it by itself
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:
                entry.failed()

    async def drain(self, timeout: float = 5.0) -> bool:
        """Wait until the async sinks of this loop have taken what was emitted; False if that took longer than
        `timeout` s.

        What a sink that is too slow has not taken by then is dropped and counted.
        """
        self._flush_blocks()
        loop = asyncio.get_running_loop()
        entries = [e for e in self._entries if e.task is not None and not e.task.done() and e.loop is loop]
        tasks = [entry.task for entry in entries if entry.task is not None]
        if not tasks:
            return True
        _, late = await asyncio.wait(tasks, timeout=timeout)
        for entry in entries:
            if entry.task in late:
                entry.dropped += len(entry.waiting) + 1
                self._discard(entry)
                entry.task.cancel()
                name = type(entry.sink).__name__
                _log.warning("event sink %s was still busy after %.3g s; its waiting events are dropped", name, timeout)
        if late:
            await asyncio.wait(late, timeout=1.0)
        return not late

    @staticmethod
    def _discard(entry: _Entry) -> None:
        while entry.waiting:
            what = entry.waiting.popleft()
            if inspect.iscoroutine(what):
                what.close()

    async def aclose(self, timeout: float = 5.0) -> None:
        """Drain, then close every sink that can be closed and detach all. `aclose()` of a sink is preferred to
        `close()`."""
        await self.drain(timeout)
        with self._lock:
            entries = self._entries
            self._set(())
        for entry in entries:
            aclose = getattr(entry.sink, "aclose", None)
            if aclose is None:
                close_all([entry.sink])
                continue
            try:
                await asyncio.wait_for(aclose(), timeout)
            except Exception:
                entry.failed()

    def close(self) -> None:
        """Close every sink that can be closed without a loop, and detach all."""
        self._flush_blocks()
        with self._lock:
            entries = self._entries
            self._set(())
        close_all(entry.sink for entry in entries)


def items_of(block: Event, failed: set[tuple[int, ...]] | frozenset[tuple[int, ...]] = frozenset()) -> Iterator[Event]:
    """One `stage.completed` per item of a `stage.items` event that is not in `failed`, with the block's mean times."""
    data = block.data
    given = data.get("items")
    paths: list[tuple[int, ...]]
    if given is not None:
        paths = [tuple(path) for path in given]
    else:
        ranges = data.get("ranges") or ((data["lo"], data["hi"]),)
        paths = [(i,) for lo, hi in ranges for i in range(lo, hi)]
    count = max(1, len(paths))
    seconds = (data.get("seconds") or 0.0) / count
    shared = {
        "seconds": seconds,
        "duration_ms": seconds * 1000.0,
        "cpu_seconds": (data.get("cpu_seconds") or 0.0) / count,
        "worker_pid": data.get("worker_pid") or 0,
        "started": data.get("started") or 0.0,
        "block": [data.get("lo"), data.get("hi")],
    }
    for path in paths:
        if path not in failed:
            yield msgspec.structs.replace(block, type=names.STAGE_COMPLETED, item=path, data=shared)


def _loop_here() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
