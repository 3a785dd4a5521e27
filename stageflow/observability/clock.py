"""When an attempt began, in Unix time: attempts report the monotonic clock, events carry Unix time."""

from __future__ import annotations

from typing import Final

from stageflow.events import names
from stageflow.events.event import Event

#: A guess that puts an attempt further than this from its event is not believed (another machine, another boot).
_PLAUSIBLE_NS: Final = 60_000_000_000


class ClockMap:
    """Relates the monotonic clock to Unix time.

    Exact when `run.started` says so (`monotonic`); else the smallest difference seen, since an event can only be later
    than the end of the attempt it tells of.
    """

    __slots__ = ("_exact", "_offset")

    def __init__(self) -> None:
        self._offset: int | None = None
        self._exact = False

    def span(self, event: Event) -> tuple[int, int]:
        """Start and end in Unix nanoseconds of what `event` (the end of an attempt, block, stage or run) tells of."""
        data = event.data
        end = event.time_unix_ns
        if event.type == names.RUN_STARTED:
            monotonic = data.get("monotonic")
            if monotonic:
                self._offset = end - int(monotonic * 1e9)
                self._exact = True
            return end, end
        seconds = data.get("seconds")
        if seconds is None:
            return end - int((data.get("duration_ms") or 0.0) * 1e6), end
        length = int(seconds * 1e9)
        started = data.get("started")
        if not started:
            return end - length, end
        began = int(started * 1e9)
        overlapping = event.type == names.STAGE_ITEMS and event.lane != "process"
        if not self._exact and not (overlapping and self._offset is not None):
            difference = end - (began + length)
            if self._offset is None or difference < self._offset or difference - self._offset > _PLAUSIBLE_NS:
                self._offset = difference
        assert self._offset is not None
        start = began + self._offset
        if start > end or end - start - length > _PLAUSIBLE_NS:
            return end - length, end
        # Items of a block in the async lane overlap, so their seconds add up to more than passed.
        return start, min(end, start + length)
