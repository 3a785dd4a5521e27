"""Runs neighbouring map stages back to back over a block of items: only the last one's results leave the worker.

Every stage keeps its own counts and times, and a failure is the failing stage's own.

May import core, context, contracts and events only.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.attempt import Header
from stageflow.context.items import SLICE_SECONDS, ItemProgram
from stageflow.context.parts import PART_BYTES, REPORT_SECONDS, Part, run_pieces
from stageflow.context.pieces import Done, ItemFailure, Piece, mask_of, mask_to_wire, weight
from stageflow.context.tracing import Traced
from stageflow.core.executor import Reply

if TYPE_CHECKING:
    from stageflow.core.worker import WorkerPort

_NO_SCOPE: Final[AbstractContextManager[None]] = nullcontext()


class RegionProgram:
    """The stages of a region in order. The first may have parameters of any kind; the others take the element only.

    `traced` runs each of them inside the trace context of its stage.
    """

    __slots__ = ("members", "name", "plan", "tracers")

    def __init__(self, members: Sequence[ItemProgram], *, traced: bool = False) -> None:
        self.members = tuple(members)
        self.tracers = tuple(Traced(member, streaming=True) for member in members) if traced else ()
        self.name = " + ".join(member.name for member in members)
        self.plan = members[0].plan

    def scope(self, number: int, port: WorkerPort, header: Header) -> AbstractContextManager[None]:
        """The trace context of one of the stages; of none where nobody traces."""
        return self.tracers[number].scope(port, header) if self.tracers else _NO_SCOPE

    def __call__(
        self, port: WorkerPort, header: Header, snapshot: Any, pieces: tuple[Any, ...], *args: Any
    ) -> Generator[Reply, None, Reply]:
        """Run a block; yields a Reply per part, and returns the last."""
        parsed = [piece if type(piece) is Piece else Piece(*piece) for piece in pieces]
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
            part = _RegionPart(self, piece, indices, position)
            begun, cpu = perf(), time.thread_time()
            while position < total:
                stop = min(total, position + group)
                position = part.run(port, header, snapshot, commons, columns, position, stop, begun)
                elapsed = perf() - begun
                if elapsed > REPORT_SECONDS or port.cancelled() or part.is_big():
                    break
                if elapsed < REPORT_SECONDS / 4:
                    group = min(group * 8, 512)
            reply = part.reply(position, perf() - begun, time.thread_time() - cpu)
            if position >= total:
                return None, reply
            if port.cancelled() or perf() - started > SLICE_SECONDS:
                return int(indices[position]), reply
            yield reply


class _RegionPart:
    """What consecutive items gave, stage by stage, until it is reported."""

    __slots__ = ("counts", "failures", "first", "indices", "piece", "region", "survivors", "values")

    def __init__(self, region: RegionProgram, piece: Piece, indices: Sequence[int], first: int) -> None:
        self.region = region
        self.piece = piece
        self.indices = indices
        self.first = first
        self.values: list[Any] = []
        self.survivors: list[int] = []
        self.failures: list[ItemFailure] = []
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
        started, cpu = self._book(0, part, reached - position, len(survivors), started, cpu)
        values = part.values
        for number, program in enumerate(self.region.members[1:], 1):
            if not survivors:
                break
            piece = self._between(survivors)
            part = Part(program, piece, 0)
            port.items(part.under_way)
            count, at = len(survivors), 0
            with self.region.scope(number, port, header):
                if program._is_simple(1):
                    part.run_simple(program.target(), values, survivors, 0, count, header, port)
                else:
                    while at < count:
                        at = part.run_each(port, header, snapshot, (), [values], survivors, at, count, begun)
            left: Sequence[int] = survivors if part.whole else part.survivors
            started, cpu = self._book(number, part, count, len(left), started, cpu)
            survivors, values = left, part.values
        else:
            self.survivors.extend(survivors)
            self.values.extend(values)
        return reached

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

    def reply(self, stop: int, seconds: float, cpu: float) -> Reply:
        """Items [first, stop) of the piece are finished in all stages."""
        indices, piece = self.indices, self.piece
        lo = piece.lo if self.first == 0 else int(indices[self.first])
        hi = piece.hi if stop == len(indices) else int(indices[stop])
        mask = -1 if len(self.survivors) == hi - lo else mask_of(self.survivors, lo, hi)
        inner = tuple((int(ok), int(dropped), int(failed), s, c) for ok, dropped, failed, s, c in self.counts)
        done = Done(
            ((lo, hi, mask_to_wire(mask)),), tuple(self.failures), seconds=seconds, cpu_seconds=cpu, inner=inner
        )
        return Reply(self.values if self.values else None, done, has_value=bool(self.values))
