"""A sink that remembers every event, and assertions about what it saw.

sink = RecordingSink()
graph.run(inputs, event_sinks=[sink])
sink.assert_order("run.started", "stage.completed", "run.completed")
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from stageflow.events.event import Event

__all__ = ["RecordingSink"]


class RecordingSink:
    """Keeps events in the order they came. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Remember one event."""
        with self._lock:
            self._events.append(event)

    @property
    def events(self) -> list[Event]:
        """Everything so far."""
        with self._lock:
            return list(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._events.clear()

    def of(self, type: str | None = None, stage: str | None = None, **data: Any) -> list[Event]:
        """The events of that type (a trailing `*` stands for anything), of that stage, with those values in data."""
        return [event for event in self.events if _fits(event, type, stage, data)]

    def types(self, stage: str | None = None) -> list[str]:
        """The types in order, of one stage or of all."""
        return [event.type for event in self.events if stage is None or event.stage == stage]

    # ------------------------------------------------------------ assertions

    def assert_emitted(
        self, type: str, *, stage: str | None = None, times: int | None = None, **data: Any
    ) -> list[Event]:
        """At least one such event (exactly `times`, where given); returns them."""
        found = self.of(type, stage, **data)
        if not found if times is None else len(found) != times:
            wanted = "at least one" if times is None else f"exactly {times}"
            where = f" of stage {stage!r}" if stage else ""
            also = f" with {data}" if data else ""
            raise AssertionError(f"expected {wanted} {type!r}{where}{also}, saw {len(found)}; {self._shown()}")
        return found

    def assert_not_emitted(self, type: str, *, stage: str | None = None, **data: Any) -> None:
        """No such event."""
        found = self.of(type, stage, **data)
        if found:
            raise AssertionError(f"expected no {type!r}, saw {len(found)}, the first: {found[0]}")

    def assert_order(self, *types: str, stage: str | None = None) -> None:
        """These types came in this order; others may lie between."""
        seen = self.types(stage)
        place = 0
        for wanted in types:
            while place < len(seen) and not _named(seen[place], wanted):
                place += 1
            if place == len(seen):
                raise AssertionError(f"expected {' then '.join(types)}: {wanted!r} is missing there; {self._shown()}")
            place += 1

    def assert_that(self, what: str, condition: Callable[[list[Event]], bool]) -> None:
        """A condition of your own on all events; `what` says what was expected."""
        if not condition(self.events):
            raise AssertionError(f"expected {what}; {self._shown()}")

    def _shown(self) -> str:
        lines = [f"{event.type}({event.stage or ''})" for event in self.events]
        more = f" ... and {len(lines) - 40} more" if len(lines) > 40 else ""
        return f"events: {', '.join(lines[:40]) or 'none'}{more}"


def _named(type: str, wanted: str) -> bool:
    return type.startswith(wanted[:-1]) if wanted.endswith("*") else type == wanted


def _fits(event: Event, type: str | None, stage: str | None, data: dict[str, Any]) -> bool:
    if type is not None and not _named(event.type, type):
        return False
    if stage is not None and event.stage != stage:
        return False
    return all(event.data.get(name) == value for name, value in data.items())
