"""Where events go. A sink can be slow, raise or be broken: it never hurts a run."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol, runtime_checkable

from stageflow.events.event import Event


@runtime_checkable
class EventSink(Protocol):
    """Receives every event of the runs it is attached to. `emit` may be sync or async; what it raises is reported
    once and dropped.

    A sink that sets `wants_items = False` is not given one event per map item, only the per-block ones.
    """

    def emit(self, event: Event) -> Awaitable[None] | None:
        """Take one event. Called on the loop that runs the pipeline."""
        ...
