"""Drives a source in a worker: gives what it is allowed to, in parts, and stands still until it may give more.

May import core, context, contracts and events only.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, Final, cast

from stageflow.context.attempt import Program, finish_context
from stageflow.context.sizes import sized
from stageflow.core.errors import DefinitionError
from stageflow.core.executor import Reply

if TYPE_CHECKING:
    from stageflow.context.attempt import Header
    from stageflow.core.worker import PacedPort, WorkerPort

PART_SECONDS: Final = 0.005  # what was given is handed on at least this often, if the generator lets us look
PART_ITEMS: Final = 1024
PART_BYTES: Final = 1 << 20


class SourceProgram:
    """A source as a call: `count` and `nbytes` are its first credit, each go-ahead brings the next. The meta of a part
    is [items, their bytes, seconds, whether the bytes of the credit are spent]."""

    __slots__ = ("name", "program")

    def __init__(self, program: Program) -> None:
        self.program = program
        self.name = program.name

    def __call__(
        self, port: WorkerPort, header: Header, snapshot: Any, skip: int, credit: tuple[int, int], *values: Any
    ) -> Generator[Reply, None, Reply]:
        """Run in a worker, from the first item to the close."""
        iterator: Any = None
        ctx = None
        count, room = credit
        try:
            items, ctx = self.program.iterate(port, header, snapshot, *values)
            iterator = iter(items)
            pass_over(iterator, skip, self.name)
            while not port.cancelled():
                given, weight, seconds, over = _gather(iterator, count, room)
                spent = bool(room) and weight >= room
                count = 0 if spent else count - len(given)
                room = max(1, room - weight) if room else 0
                meta = [len(given), weight, seconds, spent]
                if over:
                    return Reply(given, meta, has_value=bool(given))
                asks = count <= 0
                if given or asks:
                    yield Reply(given, meta, has_value=bool(given), asks=asks)
                if asks:
                    given = []
                    count, room = cast("PacedPort", port).stand(port.cancelled) or (0, 0)
            return Reply(None, [0, 0, 0.0, False], has_value=False)
        finally:
            try:
                close = getattr(iterator, "close", None)
                if close is not None:
                    close()
            finally:
                finish_context(ctx)


def pass_over(iterator: Iterator[Any], count: int, name: str) -> None:
    """Leave out what an earlier attempt has given. Raises where there is less."""
    for given in range(count):
        try:
            next(iterator)
        except StopIteration:
            raise DefinitionError(
                f"source {name!r} is declared replayable, but gave {given} items after it had given {count}",
                hint="replayable=True is for generators that give the same items again",
            ) from None


def _gather(iterator: Iterator[Any], count: int, room: int) -> tuple[list[Any], int, float, bool]:
    """Up to `count` items, or as many as weigh `room` (0 = any) or are due: with their bytes, the seconds it took, and
    whether there are no more."""
    given: list[Any] = []
    weight = 0
    most = min(count, PART_ITEMS)
    started = time.perf_counter()
    while len(given) < most:
        try:
            item = next(iterator)
        except StopIteration:
            return given, weight, time.perf_counter() - started, True
        given.append(item)
        weight += sized(item)
        seconds = time.perf_counter() - started
        if seconds > PART_SECONDS or weight >= PART_BYTES or (room and weight >= room):
            break
    return given, weight, time.perf_counter() - started, False
