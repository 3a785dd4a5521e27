"""What a failed attempt was called with, for whoever saves failures: found while the engine still holds the values.

The values of plain stages lie in the book of their run. Those of items are let go of as soon as the scheduler has
booked them, in the turn that also tells of their failure, so the driver notes the lists of a block that failed until
that turn is over. Loop thread only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stageflow.context.attempt import ABSENT
from stageflow.context.items import Piece
from stageflow.runtime.book import NOTHING
from stageflow.runtime.paths import of_segment

if TYPE_CHECKING:
    from stageflow.events.event import Event
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.job import Job
    from stageflow.runtime.sequence import Values


class FailingBlocks:
    """The blocks of which an item failed in this turn, with the lists they read."""

    __slots__ = ("blocks",)

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, int], list[tuple[Any, dict[int, Values]]]] = {}

    def note(self, job: Job, action: Any) -> None:
        """Hold on to what the block of `action` was given."""
        handles = job.book.handles
        held: dict[int, Values] = {}
        for _, _, _, columns in action.segments:
            for handle, _ in columns:
                found = handles.get(handle)
                if found is not None:
                    held[handle] = found
        self.blocks.setdefault((job.id, action.stage), []).append((action.segments, held))

    def clear(self) -> None:
        """The turn is over."""
        self.blocks.clear()

    def elements(self, job: Job, stage: int, item: tuple[int, ...]) -> list[Any] | None:
        """The element of the item, one per column, of the last block that had it; None where none is known."""
        for segments, held in reversed(self.blocks.get((job.id, stage), ())):
            for segment in segments:
                columns = segment[3]
                if any(handle not in held for handle, _ in columns):
                    continue
                for place, (_, path) in enumerate(of_segment(segment, held)):
                    if path == item:
                        return [
                            held[handle].load()[at + place if isinstance(at, int) else at[place]]
                            for handle, at in columns
                        ]
        return None

    def batch(self, job: Job, stage: int, item: tuple[int, ...]) -> list[list[Any]] | None:
        """As `elements`, of the whole batch that the item is in."""
        for segments, held in reversed(self.blocks.get((job.id, stage), ())):
            if not any(path == item for segment in segments for _, path in of_segment(segment, held)):
                continue
            width = len(segments[0][3])
            made: list[list[Any]] = [[] for _ in range(width)]
            for lo, hi, mask, columns in segments:
                for number, (handle, at) in enumerate(columns):
                    if handle not in held:
                        return None
                    count = Piece(lo, hi, mask, ()).count()
                    places = range(at, at + count) if isinstance(at, int) else at
                    values = held[handle].load()
                    made[number].extend(values[place] for place in places)
            return made
        return None


def attempt_values(event: Event) -> dict[str, Any] | None:
    """The values that the failed attempt of `event` (a `stage.failed`) was called with, by the name of the stage or
    input they came from. None where the engine no longer has them.

    To be called by a sink while the event is emitted. Dependencies that gave no value are None.
    """
    from stageflow.runtime.running import live_drivers

    for driver in list(live_drivers):
        for job in driver.jobs.values():
            if job.run_id == event.run_id:
                number = job.graph.index.get(event.stage or "")
                return None if number is None else _values(driver, job, number, event.item)
    return None


def _values(driver: Driver, job: Job, stage: int, item: tuple[int, ...] | None) -> dict[str, Any] | None:
    graph, book = job.graph, job.book
    spec = graph.specs[stage]
    found: dict[str, Any] = dict.fromkeys(spec.declared_deps)
    for source in job.code.stage(stage).sources:
        if isinstance(source, int):
            value = None
            if graph.streams[source]:
                if source in book.kept:
                    value = list(book.sequence(source))
            elif book.values[source] is not NOTHING and book.values[source] is not ABSENT:
                value = book.value(source)
            found[graph.specs[source].name] = value
    if item is None:
        return found
    ask = driver.failing.elements if spec.policies.batch is None else driver.failing.batch
    elements = ask(job, stage, item)
    if elements is None:
        return None
    producers = job.code.layout.elements.get(stage) or ()
    for number, element in enumerate(elements):
        if number < len(producers):
            found[graph.specs[producers[number]].name] = element
        elif spec.over >= 0:
            found[graph.specs[spec.over].name] = element
        else:
            found[str(spec.over_input)] = element
    return found
