"""What a failed attempt was called with, for whoever saves failures: found while the engine still holds the values.

The values of plain stages lie in the book of their run. Those of items are let go of as soon as the scheduler has
booked them, in the turn that also tells of their failure, so the driver notes the lists of a block that failed until
that turn is over. Loop thread only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from stageflow.context.attempt import ABSENT
from stageflow.context.pieces import Piece
from stageflow.pipeline.spec import Role
from stageflow.runtime.book import NOTHING
from stageflow.runtime.paths import of_segment

if TYPE_CHECKING:
    from stageflow.events.event import Event
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.job import Job
    from stageflow.runtime.sequence import Values


class FoldStep(msgspec.Struct, frozen=True):
    """What one step of a reduce was called with: the elements of a block ("fold"; "continue": onto the one
    accumulator), or the accumulators that were to become one ("merge"; UNSET stands for an empty block)."""

    job: str
    elements: list[Any] = []
    accumulators: list[Any] = []


class FailingBlocks:
    """The blocks of which an item failed in this turn, with the lists they read, and the steps of reduces."""

    __slots__ = ("_steps", "blocks")

    def __init__(self) -> None:
        self.blocks: dict[tuple[int, int], list[tuple[Any, dict[int, Values]]]] = {}
        self._steps: dict[tuple[int, int], tuple[str, list[Values | None]]] = {}  # kind and accumulators

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

    def note_given(self, job: Job, action: Any, done: Any, handle: int) -> None:
        """Hold on to what stages of a region were given that failed."""
        held = {handle: job.book.handles[handle]}
        at = sum(Piece(lo, hi, mask, ()).count() for lo, hi, mask in done.ranges)
        for lo, hi, mask, member in done.handed:
            segments = [(lo, hi, mask, ((handle, at),))]
            self.blocks.setdefault((job.id, action.region[member]), []).append((segments, held))
            at += Piece(lo, hi, mask, ()).count()

    def note_step(self, job: Job, action: Any) -> None:
        """Hold on to what a step of a reduce was given."""
        self.note(job, action)
        handles = job.book.handles
        self._steps[job.id, action.stage] = (action.job, [handles.get(handle) for handle in action.accumulators])

    def clear(self) -> None:
        """The turn is over."""
        self.blocks.clear()
        self._steps.clear()

    def step(self, job: Job, stage: int) -> FoldStep | None:
        """The step of this reduce that failed; None where none is known."""
        found = self._steps.get((job.id, stage))
        if found is None:
            return None
        kind, accumulators = found
        segments, held = self.blocks[job.id, stage][-1]
        elements = _columns(segments, held) if segments else []
        if elements is None:
            return None
        # an accumulator is a value of its own, not a list of items
        loaded: list[Any] = [ABSENT if values is None else values.load() for values in accumulators]
        return FoldStep(kind, elements[0] if elements else [], loaded)

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
            return _columns(segments, held)
        return None


def _columns(segments: Any, held: dict[int, Values]) -> list[list[Any]] | None:
    """The elements of all segments, column by column; None where a list of them is gone."""
    made: list[list[Any]] = [[] for _ in segments[0][3]]
    for lo, hi, mask, columns in segments:
        for number, (handle, at) in enumerate(columns):
            if handle not in held:
                return None
            count = Piece(lo, hi, mask, ()).count()
            places = range(at, at + count) if isinstance(at, int) else at
            values = held[handle].load()
            made[number].extend(values[place] for place in places)
    return made


def attempt_values(event: Event) -> dict[str, Any] | None:
    """The values that the failed attempt of `event` (a `stage.failed`) was called with, by the name of the stage or
    input they came from. None where the engine no longer has them.

    To be called by a sink while the event is emitted. Dependencies that gave no value are None. What a reduce folded
    is a `FoldStep`, by the name of what it folds over.
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
    over = graph.specs[spec.over].name if spec.over >= 0 else str(spec.over_input)
    if item is None:
        if spec.role in (Role.MAP, Role.SINK):
            return None  # the stage as a whole failed, not one call of it
        if spec.role is Role.REDUCE:
            found[over] = driver.failing.step(job, stage)
            return None if found[over] is None else found
        return found
    ask = driver.failing.elements if spec.policies.batch is None else driver.failing.batch
    elements = ask(job, stage, item)
    if elements is None:
        return None
    producers = job.code.layout.elements.get(stage) or ()
    for number, element in enumerate(elements):
        if number < len(producers):
            found[graph.specs[producers[number]].name] = element
        else:
            found[over] = element
    return found
