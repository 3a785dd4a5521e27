"""Which attempts were followed by another: an attempt ends before anybody has decided whether it is tried again."""

from __future__ import annotations

import msgspec

from stageflow.events import names
from stageflow.events.event import Event

_Key = tuple[str | None, str | None, tuple[int, ...] | None]

#: Attempts that wait for their verdict. They wait for one event, so more than this are of runs that died.
_MAX_WAITING = 65_536


class RetriedAttempts:
    """Joins `stage.attempt` with the `stage.retrying` that follows it, so that a retried attempt is told once, with
    its times.

    An attempt that says `final=False` itself is told at once; a `stage.retrying` without an attempt stands for one.
    """

    __slots__ = ("_told", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[_Key, Event] = {}
        self._told: set[_Key] = set()

    def add(self, event: Event) -> Event | None:
        """Take any event; a `stage.attempt` with status "retry" when it completes the tale of a retried attempt."""
        type_ = event.type
        if type_ == names.STAGE_ATTEMPT:
            return self._attempt(event)
        if type_ == names.STAGE_RETRYING:
            return self._retrying(event)
        if type_ in names.STAGE_ENDED and self._waiting:
            self._waiting.pop((event.run_id, event.stage, event.item), None)
        return None

    def _attempt(self, event: Event) -> Event | None:
        key = (event.run_id, event.stage, event.item)
        if event.data.get("final") is False:
            if len(self._told) >= _MAX_WAITING:
                self._told.clear()
            self._told.add(key)
            return event
        if event.data.get("status") != "ok":
            if len(self._waiting) >= _MAX_WAITING:
                self._waiting.pop(next(iter(self._waiting)))
            self._waiting[key] = event
        return None

    def _retrying(self, event: Event) -> Event | None:
        key = (event.run_id, event.stage, event.item)
        if key in self._told:
            self._told.discard(key)
            return None
        ended = self._waiting.pop(key, None)
        data = {**(ended.data if ended is not None else {}), "status": "retry", "final": False}
        for name in ("error", "error_type"):
            if event.data.get(name):
                data[name] = event.data[name]
        return msgspec.structs.replace(ended if ended is not None else event, type=names.STAGE_ATTEMPT, data=data)
