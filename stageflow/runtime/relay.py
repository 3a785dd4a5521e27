"""What stages print and log in worker processes comes out in this process, as it would without workers, unless a sink
shows it. Loop thread only."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from stageflow.events import names

if TYPE_CHECKING:
    from stageflow.events.event import Event
    from stageflow.events.fanout import FanOut

_SHOWN_BY: Final = {names.STAGE_PRINT: "shows_prints", names.STAGE_LOG: "shows_logs"}


class Relay:
    """Prints to this process's own streams, and hands records to the loggers of the same names."""

    __slots__ = ("_logs",)

    def __init__(self) -> None:
        self._logs: Any = None

    def tell(self, event: Event, *fans: FanOut | None) -> None:
        """Show a `stage.print` or `stage.log` that no sink of `fans` shows. Never raises."""
        mark = _SHOWN_BY.get(event.type)
        if mark is None:
            return
        if any(getattr(sink, mark, False) for fan in fans if fan is not None for sink in fan.sinks):
            return
        if event.type == names.STAGE_LOG:
            if self._logs is None:
                from stageflow.observability.logs import LogSink

                self._logs = LogSink()
            self._logs.emit(event)
            return
        stream = sys.stderr if event.data.get("stream") == "stderr" else sys.stdout
        text = str(event.data.get("text") or "")
        # a closed pipe or an encoding that lacks a letter is no reason to fail a run
        with suppress(AttributeError, OSError, ValueError):
            try:
                stream.write(text)
            except UnicodeEncodeError:
                stream.write(text.encode("ascii", "backslashreplace").decode())
            stream.flush()
