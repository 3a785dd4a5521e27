"""The results of consecutive items of a block, collected until they are reported.

May import core, context, contracts and events only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from operator import add
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.attempt import Header, run_coroutine
from stageflow.context.pieces import Done, ItemFailure, Piece, given_back, mask_of, mask_to_wire, weight
from stageflow.context.stage_context import StageContext
from stageflow.core.errors import StageCancelledError
from stageflow.core.executor import Reply
from stageflow.core.failure import capture
from stageflow.core.kinds import DROP, Drop, StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.core.worker import UnderWay, stop_of

if TYPE_CHECKING:
    from stageflow.context.flowing import Flowing
    from stageflow.context.items import ItemProgram
    from stageflow.core.worker import WorkerPort

REPORT_SECONDS: Final = 0.02  # finished results that a lost worker would take with it
PART_BYTES: Final = 256 << 10  # results that weigh this much are reported without waiting for more


class ItemPort:
    """The port of one item of a block: a stop that is meant for another item does not reach it. `index` is the item
    under way."""

    __slots__ = ("buffer", "index", "items", "lane", "note", "port", "progress", "stand", "tell", "worker_pid")

    def __init__(self, port: WorkerPort) -> None:
        self.port = port
        self.index = -1
        self.lane = port.lane
        self.worker_pid = port.worker_pid
        self.progress = port.progress
        self.note = port.note
        self.buffer = port.buffer
        self.stand = getattr(port, "stand", None)
        self.tell = getattr(port, "tell", None)
        self.items = port.items

    def cancelled(self) -> bool:
        """True once this item was asked to stop."""
        return self.port.cancelled() and stop_of(self.port.cancel_reason(), self.index) is not None

    def cancel_reason(self) -> str | None:
        """Why."""
        return stop_of(self.port.cancel_reason(), self.index)

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the item that is under way now is asked to stop."""
        index, port = self.index, self.port

        def asked() -> None:
            if stop_of(port.cancel_reason(), index) is not None:
                callback()

        port.on_cancel(asked)


class Part:
    """Collects the results of consecutive items until they are reported.

    `flowing` is the item after them, if it gives more than may be held; `begun` is where a part begins that is not
    the first of its piece, though none of the piece's items is in an earlier one.
    """

    __slots__ = ("_at", "_done", "_indices", "begun", "counts", "failures", "first", "flowing", "flows", "piece",
                 "program", "survivors", "values", "whole")  # fmt: skip

    def __init__(self, program: ItemProgram, piece: Piece, first: int) -> None:
        self.program = program
        self.piece = piece
        self.first = first
        self.begun: int | None = None
        self.flowing: Flowing | None = None
        self.flows: tuple[tuple[int, int], ...] = ()
        self.values: list[Any] = []
        self.survivors: list[int] = []  # indices; only kept once something did not survive (`whole` is False)
        self.failures: list[ItemFailure] = []
        self.counts: list[int] = []
        self.whole = True
        # the item under way is at place `_at` of `_indices`, and as many further as `_done` has results
        self._at = first
        self._done: Sequence[Any] = ()
        self._indices: Sequence[int] = ()

    def under_way(self) -> UnderWay:
        """The stage, and the index path of the item that runs now."""
        indices = self._indices
        place = min(self._at + len(self._done), len(indices) - 1)
        return self.program.name, None if place < 0 else self.piece.path(place, int(indices[place]))

    def run_simple(
        self,
        function: Callable[[Any], Any],
        column: Sequence[Any],
        indices: Sequence[int],
        position: int,
        stop: int,
        header: Header,
        port: WorkerPort,
    ) -> int:
        """Call `function` on items [position, stop) with the loop in C; returns where it stopped."""
        values: list[Any] = []
        self._indices = indices
        while position < stop:
            before = len(values)
            self._at, self._done = position, values
            try:
                values.extend(map(function, islice(column, position, stop)))
            except Exception as error:
                # what was computed before the exception is in `values`: list.extend appends as it goes
                position += len(values) - before
                self._absorb(values, indices, position - len(values), header.attempt, port)
                values = []
                self.fail(indices[position], self.piece.path(position, indices[position]), error, header.attempt)
                position += 1
            else:
                position += len(values) - before
                if position < stop:
                    # a StopIteration of the function ends `map` without a word: its item must not get lost with it
                    self._absorb(values, indices, position - len(values), header.attempt, port)
                    values = []
                    self.fail(
                        indices[position], self.piece.path(position, indices[position]), _stopped(), header.attempt
                    )
                    position += 1
        self._absorb(values, indices, position - len(values), header.attempt, port)
        return position

    def _absorb(self, values: list[Any], indices: Sequence[int], first: int, attempt: int, port: WorkerPort) -> None:
        """Take over plain results; single out DROP, StageOutput and what has to be looked at to be checked."""
        if not values:
            return
        kinds = set(map(type, values))
        coroutines = CoroutineType in kinds
        if coroutines:
            self.program.makes_coroutines()
        if coroutines or Drop in kinds or StageOutput in kinds or not self.program.passes(kinds):
            for offset, value in enumerate(values):
                index = indices[first + offset]
                path = self.piece.path(first + offset, index)
                try:
                    result = run_coroutine(value, port) if type(value) is CoroutineType else value
                    self.take(result, index, path, None)
                except (Exception, SystemExit) as error:
                    self.fail(index, path, error, attempt)
            return
        if not self.whole:
            self.survivors.extend(indices[first : first + len(values)])
        if self.program.keeps_values:
            if self.values:
                self.values.extend(values)
            else:
                self.values = values

    def run_each(
        self,
        port: WorkerPort,
        header: Header,
        snapshot: Any,
        commons: tuple[Any, ...],
        columns: list[Sequence[Any]],
        indices: Sequence[int],
        position: int,
        stop: int,
        started: float,
    ) -> int:
        """Call the runner on items [position, stop) with everything on, until the part that began at second `started`
        is to be reported; returns where it stopped."""
        program = self.program
        own = ItemPort(port)
        self._indices, self._done = indices, ()
        while position < stop:
            self._at = position
            index = own.index = indices[position]
            path = self.piece.path(position, index)
            try:
                result, ctx = program.call_item(
                    own, header, snapshot, commons, [column[position] for column in columns], path, self.piece.skip
                )
                if program.flat and type(result) is not list:
                    self.flowing = result
                    break
                if self.piece.skip:
                    self.flows = ((index, self.piece.skip),)
                self.take(result, index, path, ctx)
            except BaseException as error:  # SystemExit in a stage is that item's failure, not the worker's end
                stopped = isinstance(error, asyncio.CancelledError) and own.cancelled()
                if stopped or isinstance(error, StageCancelledError):
                    self.cancel(index, path, error, header.attempt)
                else:
                    self.fail(index, path, error, header.attempt)
            position += 1
            if port.cancelled() or time.perf_counter() - started > REPORT_SECONDS or self.is_big():
                break
        return position

    def is_big(self) -> bool:
        """Values that weigh so much that they had better leave than wait for others."""
        values = self.values
        return bool(values) and len(values) * weight(values[-1]) > PART_BYTES

    def take(self, result: Any, index: int, path: tuple[int, ...], ctx: StageContext | None) -> None:
        """Sort out one result."""
        if isinstance(result, StageOutput):
            if result.status is StageStatus.OK:
                result = result.data
            elif result.status is StageStatus.SKIP:
                result = DROP
            else:
                self._split(index)
                text = result.error or result.cancel_reason or str(result.status)
                info = result.error_info or ErrorInfo(
                    type="stageflow.StageOutput", message=text, retryable=result.retryable, item=path
                )
                self.failures.append(ItemFailure(index, result.status.value, info, path))
                return
        if result is DROP:
            self._split(index)
            if self.program.flat:
                self.counts.append(0)
            return
        if self.program.flat:
            kept = [value for value in result if value is not DROP]
            for value in kept:
                self.program.check(value)
            self.counts.append(len(kept))
            self.values.extend(kept)
            if not self.whole:
                self.survivors.append(index)
            return
        self.program.check(result)
        if not self.whole:
            self.survivors.append(index)
        if self.program.keeps_values:
            self.values.append(result)

    def fail(self, index: int, path: tuple[int, ...], error: BaseException, attempt: int) -> None:
        """Note a failure."""
        self._split(index)
        info = capture(error, attempt=attempt, item=path)
        self.failures.append(ItemFailure(index, StageStatus.FAIL.value, info, path))

    def cancel(self, index: int, path: tuple[int, ...], error: BaseException, attempt: int) -> None:
        """The item asks for the end of the run."""
        self._split(index)
        info = capture(error, attempt=attempt, item=path, keep_pickle=False)
        self.failures.append(ItemFailure(index, StageStatus.CANCEL.value, info, path))

    def _split(self, index: int) -> None:
        """From now on survivors are listed one by one; `index` is the first that did not survive."""
        if self.whole:
            self.whole = False
            indices = self.piece.indices()
            for place in range(self.first, len(indices)):
                if indices[place] == index:
                    break
                self.survivors.append(indices[place])

    def reply(self, indices: Sequence[int], stop: int, seconds: float, cpu: float) -> Reply:
        """The part as a Reply: items [first, stop) of the piece are finished."""
        lo = self.begun
        if lo is None:
            lo = self.piece.lo if self.first == 0 else int(indices[self.first])
        hi = self.piece.hi if stop == len(indices) else int(indices[stop])
        if self.whole:
            mask = -1 if self.piece.mask < 0 else mask_of(islice(indices, self.first, stop), lo, hi)
        else:
            mask = mask_of(self.survivors, lo, hi)
        counts = tuple(self.counts) if self.program.flat else None
        ranges = ((lo, hi, mask_to_wire(mask)),)
        done = Done(ranges, tuple(self.failures), (), counts, seconds, cpu, flows=self.flows)
        has_value = self.program.keeps_values and (bool(self.values) or self.program.flat)
        return Reply(self.values if has_value else None, done, has_value=has_value)


def _stopped() -> StopIteration:
    """The StopIteration of a function that was called in C: what it said is gone with it."""
    error = StopIteration("raised by the stage's function")
    error.add_note("most often a bare next() that found nothing; give it a default: next(items, None)")
    return error


def run_pieces(
    pieces: Sequence[Piece], run: Callable[[Piece], Generator[Reply, None, tuple[int | None, Reply]]]
) -> Generator[Reply, None, Reply]:
    """Run the pieces of a block one after the other; yields a Reply per part and returns the last one, which ends the
    call together with it. `run` says at which index it stopped early (or None)."""
    last = len(pieces) - 1
    held: Reply | None = None  # finished pieces that are reported with the next: many small ones make one part
    held_seconds = 0.0
    for number, piece in enumerate(pieces):
        left_at, reply = yield from run(piece)
        piece_seconds = reply.meta.seconds
        if held is not None:
            reply = merged(held, reply)
        held_seconds += piece_seconds
        if left_at is None and number == last:
            return reply
        if left_at is not None:
            unrun = [(left_at, piece.hi)] if left_at < piece.hi else []
            unrun.extend((later.lo, later.hi) for later in pieces[number + 1 :])
            reply.meta = msgspec.structs.replace(reply.meta, unrun=tuple(unrun))
            return reply
        if held_seconds + piece_seconds < REPORT_SECONDS:
            held = reply
        else:
            held, held_seconds = None, 0.0
            yield reply
    return Reply(None, Done(()), has_value=False)


def merged(first: Reply, second: Reply) -> Reply:
    """Two parts as one, in their order."""
    a: Done = first.meta
    b: Done = second.meta
    counts = None if a.counts is None and b.counts is None else (*(a.counts or ()), *(b.counts or ()))
    done = Done(
        (*a.ranges, *b.ranges),
        (*a.failures, *b.failures),
        (*a.unrun, *b.unrun),
        counts,
        a.seconds + b.seconds,
        a.cpu_seconds + b.cpu_seconds,
        inner=None if a.inner is None or b.inner is None else tuple(map(_added, a.inner, b.inner)),
        flows=(*a.flows, *b.flows),
        outside=-1.0 if min(a.outside, b.outside) < 0.0 else a.outside + b.outside,
        handed=(*a.handed, *b.handed),
    )
    if a.handed and second.has_value:  # behind all results
        return Reply(_results_first(first.value, a, second.value, b), done)
    if not first.has_value:
        return Reply(second.value, done, second.has_value)
    if not second.has_value:
        return Reply(first.value, done)
    return Reply([*first.value, *second.value], done)


def _results_first(left: list[Any], a: Done, right: list[Any], b: Done) -> list[Any]:
    """The values of two parts of a region: the results of both, then what their stages were given."""
    mine, others = len(left) - given_back(a), len(right) - given_back(b)
    return [*left[:mine], *right[:others], *left[mine:], *right[others:]]


def _added(
    first: tuple[int, int, int, float, float], second: tuple[int, int, int, float, float]
) -> tuple[int, int, int, float, float]:
    """What two parts say of one stage of a region."""
    ok, dropped, failed, seconds, cpu_seconds = map(add, first, second)
    return int(ok), int(dropped), int(failed), seconds, cpu_seconds
