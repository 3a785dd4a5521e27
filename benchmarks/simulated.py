"""The pure scheduler driven by a machine that exists only on paper: more cores than this box has, in virtual time.

`Simulation` performs the actions of `stageflow.scheduler.machine.Machine` against a heap of events. Service times are
given; the time the scheduler itself takes is measured (CPU seconds of `handle`) and, where asked for, charged to the
virtual clock, as if the scheduler process were one server in front of all cores. What it leaves out is the driver and
the channels: the numbers are of the scheduler alone.

May not import: asyncio, any executor, any peer.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

from stageflow import PipelineBuilder, StageKind
from stageflow.context.pieces import Done
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.layout import Layout
from stageflow.scheduler.machine import Machine


def _task() -> None:
    """A stage that is never called."""


def _source() -> Any:
    """A source that is never pulled from: the simulation answers for it."""
    yield 0


def _item(source: Any) -> Any:
    """A map function that is never called."""
    return source


def layout_of(deps: Sequence[Sequence[int]]) -> Layout:
    """A layout of plain process stages with these dependencies."""
    builder = PipelineBuilder("simulated")
    for number, before in enumerate(deps):
        builder.stage(
            f"s{number}", _task, [f"s{other}" for other in before], kind=StageKind.TRANSFORM, executor="process"
        )
    graph = builder.build()
    return Layout(graph, ["process"] * len(graph))


def stream_layout() -> Layout:
    """A source and one map over it."""
    graph = PipelineBuilder("stream").stage("source", _source).map("work", _item, over="source", keep=False).build()
    lanes = ["thread", "process"]
    return Layout(graph, lanes)


class Simulation:
    """One run on `cores` simulated cores. `seconds(stage)` is the service time of a task, or of one item of a stage.

    With `charge`, the scheduler's own measured time passes on the virtual clock too.
    """

    def __init__(
        self,
        layout: Layout,
        cores: int,
        seconds: Callable[[int], float],
        *,
        items: int = 0,
        charge: bool = False,
        ahead: int = 1,
    ) -> None:
        self.layout = layout
        self.machine = Machine({"process": cores, "thread": 4, "async": 64}, ahead={"process": ahead})
        self.cores = cores
        self.seconds = seconds
        self.items = items
        self.charge = charge
        self.now = 0.0
        self.free_at = 0.0  # when the scheduler has dealt with everything before
        self.own_seconds = 0.0  # spent in the scheduler
        self.signals = 0
        self.work = 0.0
        self.finished: str | None = None
        self.given = 0
        self.done_items = 0
        self._events: list[tuple[float, int, Any]] = []
        self._order = 0
        self._handles = 0
        self._timers: set[int] = set()
        self._idle = cores  # simulated cores that run nothing
        self._queue: list[tuple[float, Any]] = []

    def run(self) -> Simulation:
        """Until the run is over; returns itself."""
        self._tell(sig.RunSubmitted(1, "simulated", self.layout), 0.0)
        events = self._events
        while self.finished is None and events:
            at, _, signal = heappop(events)
            self.now = at
            if type(signal) is sig.TimerDue and signal.timer not in self._timers:
                continue
            if type(signal) is not sig.TimerDue and type(signal) is not sig.ItemsArrived:
                self._core_is_free(signal, at)
            self._tell(signal, at)
        if self.finished is None:
            raise RuntimeError("the simulated run stopped before its end")
        return self

    def _tell(self, signal: Any, at: float) -> None:
        if self.charge and self.free_at > at:
            at = self.free_at
        began = time.process_time_ns()
        actions = self.machine.handle(signal, at)
        own = (time.process_time_ns() - began) * 1e-9
        self.own_seconds += own
        self.signals += 1
        if self.charge:
            at = self.free_at = at + own
            self.now = max(self.now, at)
        for action in actions:
            self._perform(action, at)

    def _later(self, at: float, signal: Any) -> None:
        self._order += 1
        heappush(self._events, (at, self._order, signal))

    def _perform(self, action: Any, now: float) -> None:
        kind = type(action)
        if kind is act.StartAttempt:
            took = self.seconds(action.stage)
            self.work += took
            ended = sig.AttemptEnded(action.task, started=now, seconds=took, cpu_seconds=took)
            self._on_core(now, took, ended)
        elif kind is act.StartBlock:
            ranges = tuple((lo, hi, mask) for lo, hi, mask, _ in action.segments)
            count = sum(hi - lo for lo, hi, _ in ranges)
            took = count * self.seconds(action.stage)
            self.work += took
            self.done_items += count
            self._handles += 1
            done = Done(ranges, seconds=took, cpu_seconds=took)
            part = sig.BlockPart(action.task, done, self._handles, 8 * count, True, started=now)
            self._on_core(now, took, part)
        elif kind is act.PullSource:
            count = min(action.count, self.items - self.given)
            self.given += count
            if count:
                self._handles += 1
                self._later(now, sig.ItemsArrived(1, action.stage, count, self._handles, 8 * count))
            if self.given >= self.items:
                self._later(now, _ended(action.stage))
            elif count < action.count:
                raise RuntimeError("the source was asked for more than it has and less than its end")
        elif kind is act.SetTimer:
            self._timers.add(action.timer)
            self._later(action.at, sig.TimerDue(action.timer))
        elif kind is act.CancelTimer:
            self._timers.discard(action.timer)
        elif kind is act.FinishRun:
            self.finished = action.status

    def _on_core(self, now: float, took: float, signal: Any) -> None:
        """Start on an idle core, or wait for one (work sent ahead of need)."""
        if self._idle:
            self._idle -= 1
            self._later(now + took, signal)
        else:
            self._queue.append((took, signal))

    def _core_is_free(self, signal: Any, now: float) -> None:
        if type(signal) is sig.SourceEnded:
            return
        if self._queue:
            took, waiting = self._queue.pop(0)
            self._later(now + took, waiting)
        else:
            self._idle += 1


def _ended(stage: int) -> Any:
    return sig.SourceEnded(1, stage)


def lower_bound(deps: Sequence[Sequence[int]], seconds: Sequence[float], cores: int) -> float:
    """max(critical path, work / cores): no schedule is shorter. `deps` name earlier stages only."""
    longest = array("d", bytes(8 * len(deps)))
    for stage, before in enumerate(deps):
        longest[stage] = seconds[stage] + max((longest[other] for other in before), default=0.0)
    return max(max(longest), sum(seconds) / cores)
