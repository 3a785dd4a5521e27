"""Runs reduce stages: folds of blocks of items, and merges of what they gave, in whichever lane.

May import core, context, contracts and events only.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from types import CoroutineType
from typing import TYPE_CHECKING, Any

import msgspec

from stageflow.context.attempt import Header, Program, awaited, finish_context, finish_context_async, run_coroutine
from stageflow.context.owning import private
from stageflow.context.pieces import Done, Piece
from stageflow.context.stage_context import StageContext
from stageflow.core.errors import InvariantError
from stageflow.core.executor import Reply

if TYPE_CHECKING:
    from stageflow.core.worker import WorkerPort


def pairs(level: list[Any]) -> list[tuple[Any, Any]]:
    """Neighbours two by two; a last one without a partner is paired with UNSET, which stands for "nothing there"."""
    return [(level[i], level[i + 1] if i + 1 < len(level) else msgspec.UNSET) for i in range(0, len(level), 2)]


class ReduceProgram(Program):
    """A reduce stage: folds blocks of items, and merges accumulators."""

    __slots__ = ("combine", "has_initial", "initial", "repeats")

    def __init__(
        self,
        *,
        combine: Callable[[Any, Any], Any] | None,
        initial: Any,
        has_initial: bool,
        repeats: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.repeats = repeats  #: a fold may be run again: then it does not change what the next try begins with
        self.combine = combine
        self.initial = initial
        self.has_initial = has_initial

    def __call__(self, port: WorkerPort, header: Header, snapshot: Any, job: str, pieces: Any, *args: Any) -> Reply:
        """`job` "fold": commons, then lists; "continue": commons, an accumulator, lists; "merge": accumulators in
        order."""
        started, cpu_started = time.perf_counter(), time.thread_time()
        if job == "merge":
            merge = self.merger()
            level = [self._kept(one, port) for one in args]
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
            level = [self._kept(one, port) for one in args]
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
        if type(accumulator) is CoroutineType:
            accumulator.close()
            raise TypeError(
                f"the function of reduce {self.name!r} returned a coroutine; make it an `async def` of its own, which "
                "is awaited at every step"
            )
        if self.contract is not None or job == "fold":
            self.check(accumulator)

    def _settle(self, value: Any, port: WorkerPort) -> Any:
        return run_coroutine(awaited(value), port) if inspect.isawaitable(value) else value

    def _begin(
        self, port: WorkerPort, header: Header, snapshot: Any, pieces: Any, args: tuple[Any, ...], job: str
    ) -> tuple[Any, Iterator[Any], dict[str, Any], StageContext | None]:
        """The first accumulator, the items that are left, the further arguments, and the context."""
        slots = len(self.plan.slots)
        commons = args[:slots]
        own, crossed = self.own, port.lane == "process"
        if own is not None:
            snapshot = snapshot if crossed else own.snapshot(snapshot)
            commons = own.values(commons, crossed=crossed)
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
        items: Iterator[Any] = chain.from_iterable(piece.column(0, args) for piece in parsed)
        if own is not None and own.elements:
            items = map(partial(own.element, crossed=crossed), items)
        if job == "continue":
            return self._kept(args[slots], port), items, extra, ctx
        if self.has_initial:
            return copy.deepcopy(self.initial), items, extra, ctx
        return private(next(items)), items, extra, ctx  # what a fold begins with it may change in place

    def _kept(self, accumulator: Any, port: WorkerPort) -> Any:
        """An accumulator that may be changed in place: it belongs to its fold."""
        return copy.deepcopy(accumulator) if self.repeats and port.lane != "process" else accumulator
