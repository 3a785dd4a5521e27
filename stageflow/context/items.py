"""Runs map and reduce stages over blocks of items, in whichever lane.

A block is handed over whole and comes back in parts: at most a millisecond of finished items is unreported, and after
a time
slice the rest goes back unrun, so that a block that turns out slow never holds up a worker or the tail of a stream.

May import core, context, contracts and events only.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.attempt import Header, Program, drain_async, finish_context, finish_context_async, run_coroutine
from stageflow.context.stage_context import StageContext
from stageflow.core.errors import InvariantError, StageCancelledError
from stageflow.core.executor import Reply
from stageflow.core.failure import capture
from stageflow.core.kinds import DROP, Drop, StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.core.worker import stop_of, stops_item

if TYPE_CHECKING:
    from stageflow.core.worker import WorkerPort

REPORT_SECONDS: Final = 0.01  # finished results that a lost worker would take with it
PART_BYTES: Final = 256 << 10  # results that weigh this much are reported without waiting for more
SLICE_SECONDS: Final = 0.04  # a block is given back after this much work: twice what the largest is meant to take


class Piece(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A run of items of one block: indices [lo, hi) of which `mask` says who is there (bit 0 = lo; -1 = all).

    `columns` has one entry per element-wise parameter, the first is the map's `over`: (argument number, first
    position) when the
    surviving items lie next to each other in that argument's list, else (argument number, positions).
    """

    lo: int
    hi: int
    mask: int
    columns: tuple[tuple[int, int | tuple[int, ...]], ...]
    paths: tuple[tuple[int, ...], ...] | None = None

    def count(self) -> int:
        """How many items are there."""
        return self.hi - self.lo if self.mask < 0 else self.mask.bit_count()

    def indices(self) -> Sequence[int]:
        """Their indices, ascending."""
        if self.mask < 0:
            return range(self.lo, self.hi)
        return bits(self.mask, self.lo)

    def column(self, number: int, args: Sequence[Any]) -> Sequence[Any]:
        """The values of one element-wise parameter."""
        arg, start = self.columns[number]
        values: Sequence[Any] = args[arg]
        if isinstance(start, int):
            count = self.count()
            return values if start == 0 and len(values) == count else values[start : start + count]
        return [values[position] for position in start]

    def path(self, number: int, index: int) -> tuple[int, ...]:
        """The index path of the item at place `number` with index `index`."""
        return (index,) if self.paths is None else self.paths[number]


def bits(mask: int, lo: int = 0) -> list[int]:
    """Positions of the set bits, ascending, plus `lo`."""
    found = []
    while mask:
        low = mask & -mask
        found.append(lo + low.bit_length() - 1)
        mask ^= low
    return found


def weight(value: Any) -> int:
    """Bytes of one value as far as they can be told at once: buffers and strings, else 0."""
    kind = type(value)
    if kind is int or kind is float or kind is dict or kind is list:
        return 0
    if kind is bytes or kind is str or kind is bytearray:
        return len(value)
    nbytes = getattr(value, "nbytes", 0)
    return nbytes if type(nbytes) is int else 0


def mask_to_wire(mask: int) -> int | bytes:
    """A mask as it crosses: whole numbers above 63 bits do not fit a frame."""
    return mask if mask < 1 << 63 else mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def mask_from_wire(mask: int | bytes) -> int:
    """The mask again."""
    return mask if isinstance(mask, int) else int.from_bytes(mask, "little")


class ItemFailure(msgspec.Struct, frozen=True, array_like=True):
    """One item that did not come through. `status` is FAIL, RETRY or CANCEL."""

    index: int
    status: str
    info: ErrorInfo
    path: tuple[int, ...]
    member: int = 0  #: which stage of a region


class Done(msgspec.Struct, frozen=True, array_like=True):
    """What one part of a block says: which indices were finished, who of them survived, who failed, who was not run.

    `ranges` are (lo, hi, mask): all indices in [lo, hi) that were asked for are finished; `mask` has the survivors
    (-1 = every index).
    `counts` (flat-map) has the number of items each input item gave, in order. `inner` (region) has (ok, dropped,
    failed, seconds, CPU seconds) of each of its stages.
    """

    ranges: tuple[tuple[int, int, Any], ...]
    failures: tuple[ItemFailure, ...] = ()
    unrun: tuple[tuple[int, int], ...] = ()
    counts: tuple[int, ...] | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    inner: tuple[tuple[int, int, int, float, float], ...] | None = None


class ItemPort:
    """The port of one item of a block: a stop that is meant for another item does not reach it. `index` is the item
    under way."""

    __slots__ = ("buffer", "index", "lane", "note", "port", "progress", "worker_pid")

    def __init__(self, port: WorkerPort) -> None:
        self.port = port
        self.index = -1
        self.lane = port.lane
        self.worker_pid = port.worker_pid
        self.progress = port.progress
        self.note = port.note
        self.buffer = port.buffer

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


class ItemProgram(Program):
    """A map or sink stage. `flat` runners are generators that give any number of items per element."""

    __slots__ = ("batch", "flat", "keeps_values", "slices")

    def __init__(
        self, *, batch: bool = False, flat: bool = False, keeps_values: bool = True, slices: bool = True, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self.batch = batch
        self.flat = flat
        self.keeps_values = keeps_values
        self.slices = slices

    # ------------------------------------------------------------ threads and processes

    def __call__(
        self, port: WorkerPort, header: Header, snapshot: Any, pieces: tuple[Any, ...], *args: Any
    ) -> Generator[Reply, None, Reply]:
        """Run a block; yields a Reply per part and returns the last one, which ends the call together with it."""
        parsed = [piece if type(piece) is Piece else Piece(*piece) for piece in pieces]
        if self.batch:
            return self._run_batch(port, header, snapshot, parsed, args)
        started = time.perf_counter()
        last = len(parsed) - 1
        held: Reply | None = None  # finished pieces that are reported with the next: many small ones make one part
        held_seconds = 0.0
        for number, piece in enumerate(parsed):
            left_at, reply = yield from self._run_piece(port, header, snapshot, piece, args, started)
            piece_seconds = reply.meta.seconds
            if held is not None:
                reply = _merged(held, reply)
            held_seconds += piece_seconds
            if left_at is None and number == last:
                return reply
            if left_at is not None:
                unrun = [(left_at, piece.hi)] if left_at < piece.hi else []
                unrun.extend((later.lo, later.hi) for later in parsed[number + 1 :])
                reply.meta = msgspec.structs.replace(reply.meta, unrun=tuple(unrun))
                return reply
            if held_seconds + piece_seconds < REPORT_SECONDS:
                held = reply
            else:
                held, held_seconds = None, 0.0
                yield reply
        return Reply(None, Done(()), has_value=False)

    def _run_piece(
        self, port: WorkerPort, header: Header, snapshot: Any, piece: Piece, args: tuple[Any, ...], started: float
    ) -> Generator[Reply, None, tuple[int | None, Reply]]:
        """Run one piece; returns the index at which it stopped early (or None), and its last part, which ends the
        call together with it: one message less per block."""
        slots = len(self.plan.slots)
        commons = args[:slots]
        columns = [piece.column(number, args) for number in range(len(piece.columns))]
        indices = piece.indices()
        total = len(indices)
        simple = self._is_simple(len(columns))
        position = 0
        group = 1
        perf = time.perf_counter
        while True:
            part = _Part(self, piece, position)
            part_started = perf()
            cpu_started = time.thread_time()
            while position < total:
                stop = min(total, position + group)
                if simple:
                    position = part.run_simple(self.target(), columns[0], indices, position, stop, header)
                else:
                    position = part.run_each(
                        port, header, snapshot, commons, columns, indices, position, stop, part_started
                    )
                elapsed = perf() - part_started
                if elapsed > REPORT_SECONDS or port.cancelled() or part.is_big():
                    break
                if elapsed < REPORT_SECONDS / 4:
                    group = min(group * 8, 512)
            reply = part.reply(indices, position, perf() - part_started, time.thread_time() - cpu_started)
            if position >= total:
                return None, reply
            if port.cancelled() or (self.slices and perf() - started > SLICE_SECONDS):
                return int(indices[position]), reply
            yield reply

    def _is_simple(self, columns: int) -> bool:
        """A plain function of the element alone: the loop can run in C."""
        plan = self.plan
        return (
            columns == 1
            and plan.positional == (("element", 0),)
            and not plan.keywords
            and not plan.wants_ctx
            and not self.is_async
            and not self.flat
        )

    def call_item(
        self,
        port: WorkerPort,
        header: Header,
        snapshot: Any,
        commons: tuple[Any, ...],
        element: Sequence[Any],
        path: tuple[int, ...] | None,
    ) -> tuple[Any, StageContext | None]:
        """One call of the runner; a flat runner's items come back as a list."""
        plan = self.plan
        ctx = self.context(port, header, snapshot, commons, path) if plan.wants_ctx else None
        args, kwargs = self._arguments(commons, ctx, element)
        try:
            result = self.function(ctx, port)(*args, **kwargs)
            if self.flat:
                result = list(drain_async(result, port) if hasattr(result, "__aiter__") else result)
            elif self.is_async or inspect.isawaitable(result):
                result = run_coroutine(_awaited(result), port)
        except BaseException:
            finish_context(ctx)
            raise
        finish_context(ctx)
        return result, ctx

    def _arguments(
        self, commons: tuple[Any, ...], ctx: Any, element: Sequence[Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        """Slots below `len(commons)` are common to all items; an "element" slot names the column."""
        args: list[Any] = []
        plan = self.plan
        for kind, slot in plan.positional:
            if kind == "element":
                args.append(element[slot])
            elif kind == "ctx":
                args.append(ctx)
            elif kind == "const":
                args.append(slot)
            else:
                args.append(None if commons[slot] is msgspec.UNSET else commons[slot])
        kwargs: dict[str, Any] = {}
        for name, kind, slot in plan.keywords:
            if kind == "element":
                kwargs[name] = element[slot]
            elif kind == "ctx":
                kwargs[name] = ctx
            elif commons[slot] is not msgspec.UNSET:
                kwargs[name] = commons[slot]
            elif kind == "nullable":
                kwargs[name] = None
        return args, kwargs

    def _run_batch(
        self, port: WorkerPort, header: Header, snapshot: Any, pieces: list[Piece], args: tuple[Any, ...]
    ) -> Reply:
        """Hand the function one list of all items of the block; it returns as many, or (a generator) any number."""
        commons = args[: len(self.plan.slots)]
        width = max((len(piece.columns) for piece in pieces), default=1)
        columns: list[list[Any]] = [[] for _ in range(width)]
        indices: list[int] = []
        paths: list[tuple[int, ...]] = []
        for piece in pieces:
            for number in range(width):
                columns[number].extend(piece.column(number, args))
            for place, index in enumerate(piece.indices()):
                indices.append(index)
                paths.append(piece.path(place, index))
        started, cpu_started = time.perf_counter(), time.thread_time()
        result, _ = self.call_item(port, header, snapshot, commons, columns, paths[0] if paths else None)
        seconds, cpu = time.perf_counter() - started, time.thread_time() - cpu_started
        return self.batch_reply(result, pieces, indices, paths, seconds, cpu)

    def batch_reply(
        self,
        result: Any,
        pieces: list[Piece],
        indices: list[int],
        paths: list[tuple[int, ...]],
        seconds: float,
        cpu: float,
    ) -> Reply:
        """Check the length of a batch's result and sort its elements out."""
        if self.flat:
            kept = [value for value in result if value is not DROP]
            for value in kept:
                self.check(value)
            ranges = tuple((piece.lo, piece.hi, mask_to_wire(piece.mask)) for piece in pieces)
            counts = (len(kept), *([0] * (len(indices) - 1)))
            return Reply(kept, Done(ranges, counts=counts, seconds=seconds, cpu_seconds=cpu))
        try:
            values = list(result)
        except TypeError:
            raise TypeError(
                f"stage {self.name!r} has batch= and must return a sequence as long as its list, "
                f"not {type(result).__name__}"
            ) from None
        if len(values) != len(indices):
            raise ValueError(f"stage {self.name!r} got a batch of {len(indices)} and returned {len(values)} values")
        part = _Part(self, pieces[0], 0)
        part.whole = False  # several pieces: survivors are listed from the first on
        for value, index, path in zip(values, indices, paths, strict=True):
            part.take(value, index, path, None)
        survivors = set(part.survivors)
        ranges = tuple(
            (
                piece.lo,
                piece.hi,
                mask_to_wire(_mask_of((i for i in piece.indices() if i in survivors), piece.lo, piece.hi)),
            )
            for piece in pieces
        )
        done = Done(ranges, tuple(part.failures), seconds=seconds, cpu_seconds=cpu)
        return Reply(part.values if self.keeps_values else None, done, has_value=self.keeps_values)

    # ------------------------------------------------------------ the loop's own lane

    async def run_async(
        self, port: WorkerPort, header: Header, snapshot: Any, pieces: tuple[Piece, ...], *args: Any
    ) -> Reply:
        """Run a block on the caller's loop, item after item; all of it comes back as one part."""
        commons = args[: len(self.plan.slots)]
        if self.batch:
            return await self._run_batch_async(port, header, snapshot, list(pieces), args, commons)
        whole: Reply | None = None
        own: ItemPort | None = None
        if len(pieces) > 1 or pieces[0].count() > 1:
            own = ItemPort(port)
            port.on_cancel(partial(_end_item, own, asyncio.current_task()))
        for piece in pieces:
            reply = await self._run_piece_async(port, own, header, snapshot, piece, args, commons)
            whole = reply if whole is None else _merged(whole, reply)
            if port.cancelled():
                break
        return whole if whole is not None else Reply(None, Done(()), has_value=False)

    async def _run_piece_async(
        self,
        port: WorkerPort,
        own: ItemPort | None,
        header: Header,
        snapshot: Any,
        piece: Piece,
        args: tuple[Any, ...],
        commons: tuple[Any, ...],
    ) -> Reply:
        started = time.perf_counter()
        columns = [piece.column(number, args) for number in range(len(piece.columns))]
        indices = piece.indices()
        part = _Part(self, piece, 0)
        place = 0
        for place, index in enumerate(indices):
            path = piece.path(place, index)
            if own is not None:
                own.index = index
            try:
                result, ctx = await self._call_async(
                    own or port, header, snapshot, commons, [c[place] for c in columns], path
                )
                part.take(result, index, path, ctx)
            except StageCancelledError as error:
                part.cancel(index, path, error, header.attempt)
            except asyncio.CancelledError:
                if own is None or not (stops_item(port.cancel_reason()) and own.cancelled()):
                    raise  # all of the block is meant
                part.cancel(index, path, StageCancelledError("cancelled"), header.attempt)
            except (Exception, SystemExit) as error:
                part.fail(index, path, error, header.attempt)
            if port.cancelled():
                break  # the rest is run again without the item that was to stop
        return part.reply(indices, place + 1, time.perf_counter() - started, 0.0)

    async def _run_batch_async(
        self,
        port: WorkerPort,
        header: Header,
        snapshot: Any,
        pieces: list[Piece],
        args: tuple[Any, ...],
        commons: tuple[Any, ...],
    ) -> Reply:
        width = max((len(piece.columns) for piece in pieces), default=1)
        columns: list[list[Any]] = [[] for _ in range(width)]
        indices: list[int] = []
        paths: list[tuple[int, ...]] = []
        for piece in pieces:
            for number in range(width):
                columns[number].extend(piece.column(number, args))
            for place, index in enumerate(piece.indices()):
                indices.append(index)
                paths.append(piece.path(place, index))
        started = time.perf_counter()
        result, _ = await self._call_async(port, header, snapshot, commons, columns, paths[0] if paths else None)
        return self.batch_reply(result, pieces, indices, paths, time.perf_counter() - started, 0.0)

    async def _call_async(
        self,
        port: WorkerPort,
        header: Header,
        snapshot: Any,
        commons: tuple[Any, ...],
        element: Sequence[Any],
        path: tuple[int, ...] | None,
    ) -> tuple[Any, StageContext | None]:
        ctx = self.context(port, header, snapshot, commons, path) if self.plan.wants_ctx else None
        args, kwargs = self._arguments(commons, ctx, element)
        try:
            result = self.function(ctx, port)(*args, **kwargs)
            if self.flat:
                if hasattr(result, "__aiter__"):
                    result = [value async for value in result]
                else:
                    result = list(result)
            elif self.is_async or inspect.isawaitable(result):
                result = await result
        except BaseException:
            if ctx is not None:
                await finish_context_async(ctx)
            raise
        if ctx is not None:
            await finish_context_async(ctx)
        return result, ctx


class _Part:
    """Collects the results of consecutive items until they are reported."""

    __slots__ = ("counts", "failures", "first", "piece", "program", "survivors", "values", "whole")

    def __init__(self, program: ItemProgram, piece: Piece, first: int) -> None:
        self.program = program
        self.piece = piece
        self.first = first
        self.values: list[Any] = []
        self.survivors: list[int] = []  # indices; only kept once something did not survive (`whole` is False)
        self.failures: list[ItemFailure] = []
        self.counts: list[int] = []
        self.whole = True

    def run_simple(
        self,
        function: Callable[[Any], Any],
        column: Sequence[Any],
        indices: Sequence[int],
        position: int,
        stop: int,
        header: Header,
    ) -> int:
        """Call `function` on items [position, stop) with the loop in C; returns where it stopped."""
        values: list[Any] = []
        while position < stop:
            before = len(values)
            try:
                values.extend(map(function, islice(column, position, stop)))
            except Exception as error:
                # what was computed before the exception is in `values`: list.extend appends as it goes
                position += len(values) - before
                self._absorb(values, indices, position - len(values), header.attempt)
                values = []
                self.fail(indices[position], self.piece.path(position, indices[position]), error, header.attempt)
                position += 1
            else:
                position = stop
        self._absorb(values, indices, position - len(values), header.attempt)
        return position

    def _absorb(self, values: list[Any], indices: Sequence[int], first: int, attempt: int) -> None:
        """Take over plain results; single out DROP, StageOutput and what has to be looked at to be checked."""
        if not values:
            return
        kinds = set(map(type, values))
        if Drop in kinds or StageOutput in kinds or not self.program.passes(kinds):
            for offset, value in enumerate(values):
                index = indices[first + offset]
                path = self.piece.path(first + offset, index)
                try:
                    self.take(value, index, path, None)
                except Exception as error:
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
        while position < stop:
            index = own.index = indices[position]
            path = self.piece.path(position, index)
            try:
                result, ctx = program.call_item(
                    own, header, snapshot, commons, [column[position] for column in columns], path
                )
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
        lo = self.piece.lo if self.first == 0 else int(indices[self.first])
        hi = self.piece.hi if stop == len(indices) else int(indices[stop])
        if self.whole:
            mask = -1 if self.piece.mask < 0 else _mask_of(islice(indices, self.first, stop), lo, hi)
        else:
            mask = _mask_of(self.survivors, lo, hi)
        counts = tuple(self.counts) if self.program.flat else None
        done = Done(((lo, hi, mask_to_wire(mask)),), tuple(self.failures), (), counts, seconds, cpu)
        has_value = self.program.keeps_values and (bool(self.values) or self.program.flat)
        return Reply(self.values if has_value else None, done, has_value=has_value)


def _merged(first: Reply, second: Reply) -> Reply:
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
    )
    if not first.has_value:
        return Reply(second.value, done, second.has_value)
    if not second.has_value:
        return Reply(first.value, done)
    return Reply([*first.value, *second.value], done)


def _mask_of(indices: Any, lo: int, hi: int) -> int:
    mask = 0
    for index in indices:
        mask |= 1 << (index - lo)
    return -1 if mask == (1 << (hi - lo)) - 1 else mask


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _end_item(own: ItemPort, task: asyncio.Task[Any] | None) -> None:
    """Interrupt the item of a block that its task is at, if it is the one that was asked to stop."""
    if task is not None and stops_item(own.port.cancel_reason()) and own.cancelled():
        task.cancel()


def pairs(level: list[Any]) -> list[tuple[Any, Any]]:
    """Neighbours two by two; a last one without a partner is paired with UNSET, which stands for "nothing there"."""
    return [(level[i], level[i + 1] if i + 1 < len(level) else msgspec.UNSET) for i in range(0, len(level), 2)]


class ReduceProgram(Program):
    """A reduce stage: folds blocks of items, and merges accumulators."""

    __slots__ = ("combine", "has_initial", "initial")

    def __init__(
        self, *, combine: Callable[[Any, Any], Any] | None, initial: Any, has_initial: bool, **rest: Any
    ) -> None:
        super().__init__(**rest)
        self.combine = combine
        self.initial = initial
        self.has_initial = has_initial

    def __call__(self, port: WorkerPort, header: Header, snapshot: Any, job: str, pieces: Any, *args: Any) -> Reply:
        """`job` "fold": commons, then lists; "continue": commons, an accumulator, lists; "merge": accumulators in
        order."""
        started, cpu_started = time.perf_counter(), time.thread_time()
        if job == "merge":
            merge = self.merger()
            level = list(args)
            while len(level) > 1:
                level = [
                    a if b is msgspec.UNSET else b if a is msgspec.UNSET else self._settle(merge(a, b), port)
                    for a, b in pairs(level)
                ]
            accumulator = level[0]
        else:
            accumulator, items, extra, ctx = self._begin(port, header, snapshot, pieces, args, job)
            function = self.target()
            try:
                if self.is_async:
                    for item in items:
                        accumulator = self._settle(function(accumulator, item, **extra), port)
                else:
                    for item in items:
                        accumulator = function(accumulator, item, **extra)
            finally:
                finish_context(ctx)
        self._check(accumulator, job)
        done = Done((), seconds=time.perf_counter() - started, cpu_seconds=time.thread_time() - cpu_started)
        return Reply(accumulator, done)

    async def run_async(
        self, port: WorkerPort, header: Header, snapshot: Any, job: str, pieces: Any, *args: Any
    ) -> Reply:
        """The same on the caller's loop; an async runner is awaited."""
        started = time.perf_counter()
        if job == "merge":
            merge = self.merger()
            level = list(args)
            while len(level) > 1:
                merged = []
                for a, b in pairs(level):
                    both = a if b is msgspec.UNSET else b if a is msgspec.UNSET else merge(a, b)
                    merged.append(await both if inspect.isawaitable(both) else both)
                level = merged
            accumulator = level[0]
        else:
            accumulator, items, extra, ctx = self._begin(port, header, snapshot, pieces, args, job)
            function = self.target()
            try:
                for item in items:
                    accumulator = function(accumulator, item, **extra)
                    if self.is_async:
                        accumulator = await accumulator
            finally:
                if ctx is not None:
                    await finish_context_async(ctx)
        self._check(accumulator, job)
        return Reply(accumulator, Done((), seconds=time.perf_counter() - started))

    def merger(self) -> Callable[[Any, Any], Any]:
        """`combine`; only folds that have one are merged."""
        if self.combine is None:
            raise InvariantError(f"reduce {self.name!r} has no combine and was asked to merge")
        return self.combine

    def _check(self, accumulator: Any, job: str) -> None:
        """A declared contract is checked at every step; an annotation once per block, for looking through all of an
        accumulator after each step would cost the square of its size."""
        if self.contract is not None or job == "fold":
            self.check(accumulator)

    def _settle(self, value: Any, port: WorkerPort) -> Any:
        return run_coroutine(_awaited(value), port) if inspect.isawaitable(value) else value

    def _begin(
        self, port: WorkerPort, header: Header, snapshot: Any, pieces: Any, args: tuple[Any, ...], job: str
    ) -> tuple[Any, Iterator[Any], dict[str, Any], StageContext | None]:
        """The first accumulator, the items that are left, the further arguments, and the context."""
        slots = len(self.plan.slots)
        commons = args[:slots]
        ctx = self.context(port, header, snapshot, commons) if self.plan.wants_ctx else None
        extra: dict[str, Any] = {}
        for name, kind, slot in self.plan.keywords:
            if kind == "ctx":
                extra[name] = ctx
            elif commons[slot] is not msgspec.UNSET:
                extra[name] = commons[slot]
            elif kind == "nullable":
                extra[name] = None
        parsed = [piece if type(piece) is Piece else Piece(*piece) for piece in pieces]
        items = chain.from_iterable(piece.column(0, args) for piece in parsed)
        if job == "continue":
            return args[slots], items, extra, ctx
        if self.has_initial:
            return copy.deepcopy(self.initial), items, extra, ctx
        return next(items), items, extra, ctx
