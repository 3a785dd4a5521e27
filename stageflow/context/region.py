"""Runs neighbouring map stages back to back over a block of items: only the last one's results leave the worker.

Every stage keeps its own counts and times, and a failure is the failing stage's own: the value that it was given goes
back with it, so that its stage can try again without those before it. Where the first stage takes batches, what the
others have no time for goes back as well.

May import core, context, contracts and events only.
"""

from __future__ import annotations

import pickle
import time
from bisect import bisect_left
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from stageflow.context.attempt import Header
from stageflow.context.items import SLICE_SECONDS, ItemProgram
from stageflow.context.parts import PART_BYTES, REPORT_SECONDS, Part, run_pieces
from stageflow.context.pieces import (
    Done,
    ItemFailure,
    Piece,
    batch_of,
    bits,
    mask_from_wire,
    mask_of,
    mask_to_wire,
    ranges_without,
    weight,
)
from stageflow.context.tracing import Traced
from stageflow.core.executor import Reply
from stageflow.core.kinds import StageStatus

if TYPE_CHECKING:
    from stageflow.core.worker import TimedPort, WorkerPort

_NO_SCOPE: Final[AbstractContextManager[None]] = nullcontext()


Span = tuple[int, int]


class RegionProgram:
    """The stages of a region in order. The first may have parameters of any kind; the others take the element only.

    `traced` runs each of them inside the trace context of its stage. `timed`: the call's time is that of its last
    stage, and it has one item.
    """

    __slots__ = ("members", "name", "plan", "timed", "tracers")

    def __init__(self, members: Sequence[ItemProgram], *, traced: bool = False, timed: bool = False) -> None:
        self.members = tuple(members)
        self.tracers = tuple(Traced(member, streaming=True) for member in members) if traced else ()
        self.name = " + ".join(member.name for member in members)
        self.plan = members[0].plan
        self.timed = timed

    def scope(self, number: int, port: WorkerPort, header: Header) -> AbstractContextManager[None]:
        """The trace context of one of the stages; of none where nobody traces."""
        return self.tracers[number].scope(port, header) if self.tracers else _NO_SCOPE

    def __call__(
        self, port: WorkerPort, header: Header, snapshot: Any, pieces: tuple[Any, ...], *args: Any
    ) -> Generator[Reply, None, Reply]:
        """Run a block; yields a Reply per part, and returns the last."""
        parsed = [piece if type(piece) is Piece else Piece(*piece) for piece in pieces]
        if self.members[0].batch:
            return self._run_batch(port, header, snapshot, parsed, args)
        started = time.perf_counter()
        return (
            yield from run_pieces(parsed, lambda piece: self._run_piece(port, header, snapshot, piece, args, started))
        )

    def _run_piece(
        self, port: WorkerPort, header: Header, snapshot: Any, piece: Piece, args: tuple[Any, ...], started: float
    ) -> Generator[Reply, None, tuple[int | None, Reply]]:
        columns = [piece.column(number, args) for number in range(len(piece.columns))]
        commons = args[: len(self.plan.slots)]
        indices = piece.indices()
        total = len(indices)
        position, group = 0, 1
        perf = time.perf_counter
        while True:
            part = _RegionPart(self, piece, indices)
            first = position
            begun, cpu = perf(), time.thread_time()
            while position < total:
                stop = min(total, position + group)
                position = part.run(port, header, snapshot, commons, columns, position, stop, begun)
                elapsed = perf() - begun
                if elapsed > REPORT_SECONDS or port.cancelled() or part.is_big():
                    break
                if elapsed < REPORT_SECONDS / 4:
                    group = min(group * 8, 512)
            lo = piece.lo if first == 0 else int(indices[first])
            hi = piece.hi if position == total else int(indices[position])
            reply = part.reply([(lo, hi)], perf() - begun, time.thread_time() - cpu)
            if position >= total:
                return None, reply
            if port.cancelled() or perf() - started > SLICE_SECONDS:
                return int(indices[position]), reply
            yield reply

    def _run_batch(
        self, port: WorkerPort, header: Header, snapshot: Any, pieces: list[Piece], args: tuple[Any, ...]
    ) -> Reply:
        """A batch for the first stage, then as many of its results for the others as there is time for."""
        head = self.members[0]
        perf = time.perf_counter
        begun, cpu = perf(), time.thread_time()
        columns, indices, paths = batch_of(pieces, args)
        port.items(lambda: (head.name, paths[0] if paths else None))
        with self.scope(0, port, header):
            commons = args[: len(self.plan.slots)]
            result, _ = head.call_item(port, header, snapshot, commons, columns, paths[0] if paths else None)
            given = head.batch_reply(result, pieces, indices, paths, 0.0, 0.0)
        survivors = [index for lo, hi, mask in given.meta.ranges for index in _there(lo, hi, mask)]
        values: list[Any] = given.value
        spans = [(piece.lo, piece.hi) for piece in pieces]
        part = _RegionPart(self, Piece(spans[0][0], spans[-1][1], 0, (), tuple(paths)), indices)
        part.take_batch(given.meta.failures, len(indices), len(survivors), perf() - begun, time.thread_time() - cpu)
        position, group, total = 0, 1, len(survivors)
        until = perf() + SLICE_SECONDS
        while position < total:
            stop = min(total, position + group)
            part.follow(port, header, snapshot, survivors[position:stop], values[position:stop])
            position = stop
            if port.cancelled() or perf() > until:
                break
            group = min(group * 8, 512)
        rest: list[Span] = []
        if position < total:
            spans, rest = _parted(spans, survivors[position])
        return part.reply(
            spans, perf() - begun, time.thread_time() - cpu, rest, survivors[position:], values[position:]
        )  # fmt: skip


class _RegionPart:
    """What consecutive items gave, stage by stage, until it is reported."""

    __slots__ = ("counts", "failures", "given", "indices", "piece", "region", "survivors", "values")

    def __init__(self, region: RegionProgram, piece: Piece, indices: Sequence[int]) -> None:
        self.region = region
        self.piece = piece
        self.indices = indices
        self.values: list[Any] = []
        self.survivors: list[int] = []
        self.failures: list[ItemFailure] = []
        self.given: list[tuple[int, int, Any]] = []  # index, stage and its input, of what failed
        self.counts = [[0, 0, 0, 0.0, 0.0] for _ in region.members]  # ok, dropped, failed, seconds, CPU seconds

    def run(
        self,
        port: WorkerPort,
        header: Header,
        snapshot: Any,
        commons: tuple[Any, ...],
        columns: list[Sequence[Any]],
        position: int,
        stop: int,
        begun: float,
    ) -> int:
        """Take items [position, stop) through all stages; returns where the first stage stopped."""
        head = self.region.members[0]
        if self.region.timed:
            cast("TimedPort", port).clock(False)
        started, cpu = time.perf_counter(), time.thread_time()
        part = Part(head, self.piece, position)
        port.items(part.under_way)
        with self.region.scope(0, port, header):
            if head._is_simple(len(columns)):
                reached = part.run_simple(head.target(), columns[0], self.indices, position, stop, header, port)
            else:
                reached = part.run_each(
                    port, header, snapshot, commons, columns, self.indices, position, stop, begun
                )  # fmt: skip
        survivors: Sequence[int] = self.indices[position:reached] if part.whole else part.survivors
        self._book(0, part, reached - position, len(survivors), started, cpu)
        self.follow(port, header, snapshot, survivors, part.values)
        return reached

    def follow(
        self, port: WorkerPort, header: Header, snapshot: Any, survivors: Sequence[int], values: list[Any]
    ) -> None:
        """Take what the first stage gave for the items `survivors` through the others."""
        last = len(self.region.members) - 1
        started, cpu = time.perf_counter(), time.thread_time()
        for number, program in enumerate(self.region.members[1:], 1):
            if not survivors:
                break
            piece = self._between(survivors)
            part = Part(program, piece, 0)
            port.items(part.under_way)
            count, at = len(survivors), 0
            if self.region.timed and number == last:
                cast("TimedPort", port).clock(True)
            with self.region.scope(number, port, header):
                if program._is_simple(1):
                    part.run_simple(program.target(), values, survivors, 0, count, header, port)
                else:
                    while at < count:
                        at = part.run_each(port, header, snapshot, (), [values], survivors, at, count, started)
            left: Sequence[int] = survivors if part.whole else part.survivors
            started, cpu = self._book(number, part, count, len(left), started, cpu)
            for failure in part.failures:
                value = values[survivors.index(failure.index)]
                if failure.status != StageStatus.CANCEL.value and _crosses(value):
                    self.given.append((failure.index, number, value))
            survivors, values = left, part.values
        else:
            self.survivors.extend(survivors)
            self.values.extend(values)

    def take_batch(self, failures: Sequence[ItemFailure], given: int, left: int, seconds: float, cpu: float) -> None:
        """The first stage has had its batch."""
        self.failures.extend(failures)
        failed = len(failures)
        self.counts[0][:] = [left, given - left - failed, failed, seconds, cpu]

    def _between(self, survivors: Sequence[int]) -> Piece:
        """The items that are left, as a piece of their own."""
        lo, hi = survivors[0], survivors[-1] + 1
        mask = -1 if len(survivors) == hi - lo else mask_of(survivors, lo, hi)
        paths = None
        if self.piece.paths is not None:
            place = {index: number for number, index in enumerate(self.indices)}
            paths = tuple(self.piece.paths[place[index]] for index in survivors)
        return Piece(lo, hi, mask, ((0, 0),), paths)

    def _book(self, number: int, part: Part, given: int, left: int, started: float, cpu: float) -> tuple[float, float]:
        now, cpu_now = time.perf_counter(), time.thread_time()
        counts = self.counts[number]
        failed = len(part.failures)
        counts[0] += left
        counts[1] += given - left - failed
        counts[2] += failed
        counts[3] += now - started
        counts[4] += cpu_now - cpu
        for failure in part.failures:
            self.failures.append(msgspec.structs.replace(failure, member=number))
        return now, cpu_now

    def is_big(self) -> bool:
        """Results that weigh so much that they had better leave than wait for others."""
        values = self.values
        return bool(values) and len(values) * weight(values[-1]) > PART_BYTES

    def reply(
        self,
        spans: Sequence[Span],
        seconds: float,
        cpu: float,
        rest: Sequence[Span] = (),
        left: Sequence[int] = (),
        inputs: Sequence[Any] = (),
    ) -> Reply:
        """The items of `spans` are finished in all stages. Those of `rest` in the first: the values of the ones that
        are `left` go to the second stage."""
        given = sorted(self.given, key=lambda one: one[0])
        values = self.values
        handed: tuple[tuple[int, int, Any, int], ...] = ()
        if given or rest:
            handed = (
                *((index, index + 1, -1, member) for index, member, _ in given),
                *((lo, hi, mask, 1) for lo, hi, mask in _masked(rest, left)),
            )
            values = [*values, *(value for _, _, value in given), *inputs]
        if given:
            spans = [cut for lo, hi in spans for cut in ranges_without(lo, hi, {index for index, _, _ in given})]
        ranges = tuple(_masked(spans, self.survivors))
        inner = tuple((int(ok), int(dropped), int(failed), s, c) for ok, dropped, failed, s, c in self.counts)
        done = Done(
            ranges, tuple(self.failures), seconds=seconds, cpu_seconds=cpu, inner=inner, handed=handed
        )  # fmt: skip
        return Reply(values if values else None, done, has_value=bool(values))


def _there(lo: int, hi: int, mask: int | bytes) -> Sequence[int]:
    """The indices of a range as it crosses."""
    return range(lo, hi) if mask == -1 else bits(mask_from_wire(mask), lo)


def _masked(spans: Sequence[Span], there: Sequence[int]) -> list[tuple[int, int, int | bytes]]:
    """The spans, with who of the ascending indices `there` is in each."""
    if len(spans) == 1:
        ((lo, hi),) = spans
        return [(lo, hi, mask_to_wire(-1 if len(there) == hi - lo else mask_of(there, lo, hi)))]
    found: list[tuple[int, int, int | bytes]] = []
    at = 0
    for lo, hi in spans:
        stop = bisect_left(there, hi, at)
        found.append((lo, hi, mask_to_wire(mask_of(there[at:stop], lo, hi))))
        at = stop
    return found


def _parted(spans: Sequence[Span], index: int) -> tuple[list[Span], list[Span]]:
    """The spans before an index, and from it on."""
    return (
        [(lo, min(hi, index)) for lo, hi in spans if lo < index],
        [(max(lo, index), hi) for lo, hi in spans if hi > index],
    )


def _crosses(value: Any) -> bool:
    """Whether a value between two stages could leave the worker. Asked of failed items only."""
    try:
        pickle.dumps(value, protocol=5, buffer_callback=lambda _: None)
    except Exception:
        return False
    return True
