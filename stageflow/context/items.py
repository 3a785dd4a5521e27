"""Runs map and sink stages over blocks of items, in whichever lane.

A block is handed over whole and comes back in parts: only a few milliseconds of finished items are unreported, and
after a time slice the rest goes back unrun, so that a block that turns out slow never holds up a worker or the tail of
a stream. The records of a block are in `pieces`, what collects its results in `parts`, reduces in `folds`.

May import core, context, contracts and events only.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from stageflow.context.attempt import (
    Header,
    Program,
    awaited,
    drain_async,
    finish_context,
    finish_context_async,
    run_coroutine,
)
from stageflow.context.flowing import FLOW_SECONDS, HELD_BYTES, HELD_ITEMS, Flowing
from stageflow.context.parts import PART_BYTES, REPORT_SECONDS, ItemPort, Part, merged, run_pieces
from stageflow.context.pieces import Done, Piece, batch_of, mask_of, mask_to_wire
from stageflow.context.stage_context import StageContext
from stageflow.core.errors import StageCancelledError
from stageflow.core.executor import Reply
from stageflow.core.kinds import DROP
from stageflow.core.worker import stops_item

if TYPE_CHECKING:
    from stageflow.core.worker import TellingPort, WorkerPort

SLICE_SECONDS: Final = 0.08  # a block is given back after this much work: twice what the largest is meant to take
BRIEF_SECONDS: Final = 0.04  # the same on a loop, which has others to serve, and of stages that may wait outside
GROUP: Final = 512  # calls between two looks at the clock, at most
BRIEF_GROUP: Final = 16  # the same of stages that may wait outside, where the other items could wait side by side


class ItemProgram(Program):
    """A map or sink stage. `flat` runners are generators that give any number of items per element."""

    __slots__ = ("batch", "flat", "flows", "group", "keeps_values", "seconds")

    def __init__(
        self,
        *,
        batch: bool = False,
        flat: bool = False,
        flows: bool = False,
        keeps_values: bool = True,
        brief: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.batch = batch
        self.flat = flat
        self.flows = flows
        self.keeps_values = keeps_values
        self.group = BRIEF_GROUP if brief else GROUP
        self.seconds = BRIEF_SECONDS if brief else SLICE_SECONDS

    # ------------------------------------------------------------ threads and processes

    def __call__(
        self, port: WorkerPort, header: Header, snapshot: Any, pieces: tuple[Any, ...], *args: Any
    ) -> Generator[Reply, None, Reply]:
        """Run a block; yields a Reply per part and returns the last one, which ends the call together with it."""
        parsed = [piece if type(piece) is Piece else Piece(*piece) for piece in pieces]
        if self.batch:
            return (yield from self._run_batch(port, header, snapshot, parsed, args))
        started = time.perf_counter()
        return (
            yield from run_pieces(parsed, lambda piece: self._run_piece(port, header, snapshot, piece, args, started))
        )

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
        brief = self.seconds == BRIEF_SECONDS
        position = 0
        group = 1
        perf = time.perf_counter
        while True:
            part = Part(self, piece, position)
            port.items(part.under_way)
            part_started = perf()
            cpu_started = time.thread_time()
            all_started = time.process_time() if brief else 0.0
            while position < total:
                stop = min(total, position + group)
                if simple:
                    position = part.run_simple(self.target(), columns[0], indices, position, stop, header, port)
                else:
                    position = part.run_each(
                        port, header, snapshot, commons, columns, indices, position, stop, part_started
                    )
                elapsed = perf() - part_started
                if part.flowing is not None:
                    flowing = part.flowing
                    part = yield from self._flow(header, part, flowing, indices, position, part_started)
                    part_started = flowing.began
                    position += 1
                    break
                if elapsed > REPORT_SECONDS or port.cancelled() or part.is_big():
                    break
                if elapsed < REPORT_SECONDS / 4:
                    group = min(group * 8, self.group)
            seconds = perf() - part_started
            reply = part.reply(indices, position, seconds, time.thread_time() - cpu_started)
            if brief:
                outside = max(0.0, seconds - (time.process_time() - all_started))
                reply.meta = msgspec.structs.replace(reply.meta, outside=outside)
            if position >= total:
                return None, reply
            if port.cancelled() or perf() - started > self.seconds:
                return int(indices[position]), reply
            yield reply

    def _flow(
        self, header: Header, part: Part, flowing: Flowing, indices: Sequence[int], position: int, started: float
    ) -> Generator[Reply, None, Part]:
        """Report an item that gives more than may be held while its generator runs; returns what its end is reported
        with. The items before it, and the gap, are reported apart: the item is then known by its index alone."""
        piece, index = part.piece, int(indices[position])
        path = piece.path(position, index)
        if position > part.first or index > piece.lo:
            yield part.reply(indices, position, flowing.began - started, 0.0)
        last = Part(self, piece, position)
        last.begun = index
        failure: BaseException | None = None
        try:
            going = True
            while going:
                flowing.check(self.check)
                yield flowing.part(index)
                if flowing.asks:
                    flowing.stand()
                if flowing.port.cancelled():
                    raise StageCancelledError(flowing.port.cancel_reason() or "cancelled")
                going = flowing.more()
            last.take(flowing.values, index, path, flowing.ctx)
        except GeneratorExit:
            raise
        except BaseException as error:  # as for any item: not the worker's end
            failure = error
        finally:
            flowing.close()
            finish_context(flowing.ctx)
        if failure is not None:
            if flowing.values and not flowing.port.cancelled():
                yield flowing.part(index, last=True)  # what came before the failure, however it was divided into parts
            stopped = isinstance(failure, asyncio.CancelledError) and flowing.port.cancelled()
            if stopped or isinstance(failure, StageCancelledError):
                last.cancel(index, path, failure, header.attempt)
            else:
                last.fail(index, path, failure, header.attempt)
        last.flows = ((index, flowing.told),)
        return last

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
            and not self._awaits
            and self.own is None
        )

    def makes_coroutines(self) -> None:
        """The function is none, but returns some: from now on its calls are made one by one, each with its port."""
        self._awaits = True

    def call_item(
        self,
        port: WorkerPort,
        header: Header,
        snapshot: Any,
        commons: tuple[Any, ...],
        element: Sequence[Any],
        path: tuple[int, ...] | None,
        skip: int = 0,
    ) -> tuple[Any, StageContext | None]:
        """One call of the runner; a flat runner's items come back as a list, or Flowing if they are too many."""
        plan = self.plan
        if self.own is not None:
            snapshot, commons, element = self._owned(port, snapshot, commons, element)
        ctx = self.context(port, header, snapshot, commons, path) if plan.wants_ctx else None
        args, kwargs = self._arguments(commons, ctx, element)
        try:
            function = self.target() if self.inside is None else self.function(ctx, port)
            result = function(*args, **kwargs)
            if self.flat:
                result = drain_async(result, port) if hasattr(result, "__aiter__") else result
                if self.flows:
                    flowing = Flowing(result, ctx, port, skip)
                    if flowing.hold():
                        return flowing, ctx
                    result = flowing.values
                else:
                    result = list(result)
            elif self.is_async or inspect.isawaitable(result):
                result = run_coroutine(awaited(result), port)
        except BaseException:
            finish_context(ctx)
            raise
        finish_context(ctx)
        return result, ctx

    def _owned(
        self, port: WorkerPort, snapshot: Any, commons: tuple[Any, ...], element: Sequence[Any]
    ) -> tuple[Any, tuple[Any, ...], Sequence[Any]]:
        """The inputs of one item, with copies of what is the stage's own. Commons are read by the items beside it
        too, so a copy that has crossed is not enough for them."""
        own = self.own
        assert own is not None
        crossed = port.lane == "process"
        snapshot = snapshot if crossed else own.snapshot(snapshot)
        return snapshot, own.values(commons), [own.element(one, crossed=crossed) for one in element]

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
    ) -> Generator[Reply, None, Reply]:
        """Hand the function one list of all items of the block; it returns as many, or (a generator) any number."""
        commons = args[: len(self.plan.slots)]
        columns, indices, paths = batch_of(pieces, args)
        port.items(lambda: (self.name, paths[0] if paths else None))  # as `ctx.item` has it
        started, cpu_started = time.perf_counter(), time.thread_time()
        path = paths[0] if paths else None
        result, _ = self.call_item(port, header, snapshot, commons, columns, path, pieces[0].skip)
        if self.flat and type(result) is not list:
            return (yield from self._flow_batch(result, pieces, indices, cpu_started))
        seconds, cpu = time.perf_counter() - started, time.thread_time() - cpu_started
        return self.batch_reply(result, pieces, indices, paths, seconds, cpu)

    def _flow_batch(
        self, flowing: Flowing, pieces: list[Piece], indices: list[int], cpu_started: float
    ) -> Generator[Reply, None, Reply]:
        """Report a batch that gives more than may be held while its generator runs. It is known by its first item; a
        gap before that is reported apart."""
        index = indices[0]
        if pieces[0].lo < index:
            yield _gap(pieces[0].lo, index)
        try:
            going = True
            while going:
                flowing.check(self.check)
                yield flowing.part(index)
                if flowing.asks:
                    flowing.stand()
                if flowing.port.cancelled():
                    raise StageCancelledError(flowing.port.cancel_reason() or "cancelled")
                going = flowing.more()
            flowing.check(self.check)
        except GeneratorExit:
            raise
        except BaseException:
            if flowing.values and not flowing.port.cancelled():
                yield flowing.part(index, last=True)  # what came before the failure
            raise
        finally:
            flowing.close()
            finish_context(flowing.ctx)
        seconds = time.perf_counter() - flowing.began
        return _flowed(flowing, pieces, indices, seconds, time.thread_time() - cpu_started)

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
            flows = ((indices[0], pieces[0].skip),) if pieces[0].skip else ()
            return Reply(kept, Done(ranges, counts=counts, seconds=seconds, cpu_seconds=cpu, flows=flows))
        try:
            values = list(result)
        except TypeError:
            raise TypeError(
                f"stage {self.name!r} has batch= and must return a sequence as long as its list, "
                f"not {type(result).__name__}"
            ) from None
        if len(values) != len(indices):
            raise ValueError(f"stage {self.name!r} got a batch of {len(indices)} and returned {len(values)} values")
        part = Part(self, pieces[0], 0)
        part.whole = False  # several pieces: survivors are listed from the first on
        for value, index, path in zip(values, indices, paths, strict=True):
            part.take(value, index, path, None)
        survivors = set(part.survivors)
        ranges = tuple(
            (
                piece.lo,
                piece.hi,
                mask_to_wire(mask_of((i for i in piece.indices() if i in survivors), piece.lo, piece.hi)),
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
        until = time.perf_counter() + BRIEF_SECONDS
        own: ItemPort | None = None
        if len(pieces) > 1 or pieces[0].count() > 1:
            own = ItemPort(port)
            port.on_cancel(partial(_end_item, own, asyncio.current_task()))
        for piece in pieces:
            reply = await self._run_piece_async(port, own, header, snapshot, piece, args, commons, until)
            whole = reply if whole is None else merged(whole, reply)
            if port.cancelled() or time.perf_counter() > until:
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
        until: float,
    ) -> Reply:
        perf = time.perf_counter
        started = perf()
        columns = [piece.column(number, args) for number in range(len(piece.columns))]
        indices = piece.indices()
        simple = self.target() if self._is_simple(len(columns)) and self.inside is None else None
        part = Part(self, piece, 0)
        place = 0
        for place, index in enumerate(indices):
            path = piece.path(place, index)
            if own is not None:
                own.index = index
            try:
                if simple is None:
                    result, ctx = await self._call_async(
                        own or port, header, snapshot, commons, [c[place] for c in columns], path, piece.skip
                    )
                    if type(result) is Flowing:
                        part = await self._flow_async(port, header, part, result, indices, place, started)
                        started = result.began
                        if port.cancelled() or perf() > until:
                            break
                        continue
                else:
                    result, ctx = simple(columns[0][place]), None
                    if inspect.isawaitable(result):
                        result = await result
                part.take(result, index, path, ctx)
            except StageCancelledError as error:
                part.cancel(index, path, error, header.attempt)
            except asyncio.CancelledError:
                if own is None or not (stops_item(port.cancel_reason()) and own.cancelled()):
                    raise  # all of the block is meant
                part.cancel(index, path, StageCancelledError("cancelled"), header.attempt)
            except (Exception, SystemExit) as error:
                part.fail(index, path, error, header.attempt)
            if port.cancelled() or perf() > until:
                break  # the rest is run again, without the item that was to stop
        return part.reply(indices, place + 1, perf() - started, 0.0)

    async def _flow_async(
        self,
        port: WorkerPort,
        header: Header,
        part: Part,
        flowing: Flowing,
        indices: Sequence[int],
        place: int,
        started: float,
    ) -> Part:
        """`_flow` on the caller's loop: what is told goes by the port. Returns what the item's end is reported with."""
        piece, index = part.piece, int(indices[place])
        path = piece.path(place, index)
        if place > part.first or index > piece.lo:
            await cast("TellingPort", port).tell(part.reply(indices, place, flowing.began - started, 0.0))
        last = Part(self, piece, place)
        last.begun = index
        own = flowing.port
        failure: BaseException | None = None
        try:
            going = True
            while going:
                flowing.check(self.check)
                await flowing.tell(index)
                if own.cancelled():
                    raise StageCancelledError(own.cancel_reason() or "cancelled")
                going = await flowing.gather(HELD_ITEMS, PART_BYTES, FLOW_SECONDS)
            last.take(flowing.values, index, path, flowing.ctx)
        except asyncio.CancelledError as error:
            if not (stops_item(port.cancel_reason()) and own.cancelled()):
                raise  # all of the block is meant
            failure = StageCancelledError(str(error) or "cancelled")
        except (Exception, SystemExit) as error:
            failure = error
        finally:
            await flowing.aclose()
            if flowing.ctx is not None:
                await finish_context_async(flowing.ctx)
        if isinstance(failure, StageCancelledError):
            last.cancel(index, path, failure, header.attempt)
        elif failure is not None:
            if flowing.values:
                await flowing.tell(index, last=True)  # what came before the failure
            last.fail(index, path, failure, header.attempt)
        last.flows = ((index, flowing.told),)
        return last

    async def _run_batch_async(
        self,
        port: WorkerPort,
        header: Header,
        snapshot: Any,
        pieces: list[Piece],
        args: tuple[Any, ...],
        commons: tuple[Any, ...],
    ) -> Reply:
        columns, indices, paths = batch_of(pieces, args)
        started = time.perf_counter()
        path = paths[0] if paths else None
        result, _ = await self._call_async(port, header, snapshot, commons, columns, path, pieces[0].skip)
        if type(result) is Flowing:
            return await self._flow_batch_async(port, result, pieces, indices)
        return self.batch_reply(result, pieces, indices, paths, time.perf_counter() - started, 0.0)

    async def _flow_batch_async(
        self, port: WorkerPort, flowing: Flowing, pieces: list[Piece], indices: list[int]
    ) -> Reply:
        """`_flow_batch` on the caller's loop: what is told goes by the port."""
        index = indices[0]
        if pieces[0].lo < index:
            await cast("TellingPort", port).tell(_gap(pieces[0].lo, index))
        try:
            going = True
            while going:
                flowing.check(self.check)
                await flowing.tell(index)
                if port.cancelled():
                    raise StageCancelledError(port.cancel_reason() or "cancelled")
                going = await flowing.gather(HELD_ITEMS, PART_BYTES, FLOW_SECONDS)
            flowing.check(self.check)
        except Exception:
            if flowing.values and not port.cancelled():
                await flowing.tell(index, last=True)  # what came before the failure
            raise
        finally:
            await flowing.aclose()
            if flowing.ctx is not None:
                await finish_context_async(flowing.ctx)
        return _flowed(flowing, pieces, indices, time.perf_counter() - flowing.began, 0.0)

    async def _call_async(
        self,
        port: WorkerPort,
        header: Header,
        snapshot: Any,
        commons: tuple[Any, ...],
        element: Sequence[Any],
        path: tuple[int, ...] | None,
        skip: int = 0,
    ) -> tuple[Any, StageContext | None]:
        if self.own is not None:
            snapshot, commons, element = self._owned(port, snapshot, commons, element)
        ctx = self.context(port, header, snapshot, commons, path) if self.plan.wants_ctx else None
        args, kwargs = self._arguments(commons, ctx, element)
        try:
            function = self.target() if self.inside is None else self.function(ctx, port)
            result = function(*args, **kwargs)
            if self.flat:
                if self.flows and getattr(port, "tell", None) is not None:
                    flowing = Flowing(result, ctx, port, skip)
                    if await flowing.gather(HELD_ITEMS, HELD_BYTES, 0.0):
                        return flowing, ctx
                    result = flowing.values
                elif hasattr(result, "__aiter__"):
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


def _end_item(own: ItemPort, task: asyncio.Task[Any] | None) -> None:
    """Interrupt the item of a block that its task is at, if it is the one that was asked to stop."""
    if task is not None and stops_item(own.port.cancel_reason()) and own.cancelled():
        task.cancel()


def _gap(lo: int, hi: int) -> Reply:
    """Indices of which none is there."""
    return Reply(None, Done(((lo, hi, 0),), counts=()), has_value=False)


def _flowed(flowing: Flowing, pieces: list[Piece], indices: list[int], seconds: float, cpu: float) -> Reply:
    """The end of a batch whose values left before it: the last of them, and that its items are finished."""
    index = indices[0]
    ranges = tuple(
        (index, piece.hi, mask_to_wire(mask_of(piece.indices(), index, piece.hi)))
        if place == 0
        else (piece.lo, piece.hi, mask_to_wire(piece.mask))
        for place, piece in enumerate(pieces)
    )
    counts = (len(flowing.values), *([0] * (len(indices) - 1)))
    flows = ((index, flowing.told),)
    return Reply(flowing.values, Done(ranges, counts=counts, seconds=seconds, cpu_seconds=cpu, flows=flows))
