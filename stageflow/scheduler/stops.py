"""Stopping one stage of a run, or one item of a map.

A stage: what runs of it is asked to stop, what waits is not started, and it ends FAILED. An item: it is taken out of
wherever it waits, or its attempt is asked to stop; it ends CANCELLED, and is absent behind that stage like one that was
dropped. Its neighbours in a block lose nothing: the block ends early, and what it has not begun is run again without
the item.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from heapq import heapify
from typing import TYPE_CHECKING

import msgspec

from stageflow.context.pieces import Done, ranges_without
from stageflow.core.output import ErrorInfo
from stageflow.pipeline.spec import Role
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Run, Task
from stageflow.scheduler.ranges import submask
from stageflow.scheduler.states import ENDED, StageState
from stageflow.scheduler.streams import Segment, Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState


class StopRules:
    """Stages and items cancelled from outside."""

    def _on_stop_stage(self: Machine, signal: sig.StopStage, now: float) -> None:
        """The stage fails with the reason, without a retry; its failure mode says what that means for the run."""
        run = self.runs.get(signal.run)
        if run is None or run.ending is not None:
            return
        stage = signal.stage
        state = run.state[stage]
        if state >= ENDED:
            return
        self._touch(run)
        error = stopped_info(run.layout.name(stage), signal.reason)
        stream = run.streams.get(stage)
        if stream is not None and state == _S.FLOWING:
            for task in [task for task in run.tasks.values() if task.stage == stage]:
                self._ask(run, task, signal.reason, now)
            self._fail_stream(run, stream, error, now, shed=True)
        elif state == _S.RUNNING:
            for task in [task for task in run.tasks.values() if task.stage == stage]:
                self._ask(run, task, signal.reason, now)
        else:
            self._fail_stage(run, stage, error, now, attempt=run.tries.get(stage, 0) + 1)
        self._settle_ended(now)

    def _ask(self: Machine, run: Run, task: Task, reason: str, now: float) -> None:
        """Ask one attempt to stop, and insist after the grace."""
        if task.stopping is not None:
            return
        task.stopping = reason
        if task.timer:
            self._drop_timer(task.timer)
        self._out.append(act.StopAttempt(task.id, reason))
        self._arm_force(run, task, reason, now)

    def _arm_force(self: Machine, run: Run, task: Task, reason: str, now: float) -> None:
        """Use force after the grace. Which item of a block is under way then, nobody knows."""

        def force(due: sig.TimerDue, when: float) -> None:
            task.timer = 0
            if task.id in self.tasks:
                self._out.append(act.StopAttempt(task.id, reason, force=True))

        task.timer = self._set_timer(run, now + self.grace, force)

    # ------------------------------------------------------------ one item

    def _on_stop_item(self: Machine, signal: sig.StopItem, now: float) -> None:
        """Take the item out, wherever it is. One that has been through already stays what it has become."""
        run = self.runs.get(signal.run)
        stream = run.streams.get(signal.stage) if run is not None else None
        if run is None or stream is None or run.ending is not None or is_over(run, stream):
            return
        self._touch(run)
        index = signal.index
        if not self._doom_running(run, stream, index, signal.reason, now):
            segment = self._waiting_with(run, stream, index)
            if segment is not None:
                self._remove(run, stream, segment, index, signal.reason, now)
            else:
                stream.doomed = {**(stream.doomed or {}), index: signal.reason}
        self._settle_ended(now)

    def _doom_running(self: Machine, run: Run, stream: Stream, index: int, reason: str, now: float) -> bool:
        """Ask the attempt that has the item to stop it; False where none has."""
        stage = stream.stage
        for task in run.tasks.values():
            if task.stage != stage and stage not in (task.region or ()):
                continue
            held = next((segment for segment in task.segments or () if segment.has(index)), None)
            if held is None or any(lo <= index < hi for lo, hi in task.reported or ()):
                continue
            if task.doomed is None:
                task.doomed = {}
            task.doomed.setdefault(index, (stage, reason))
            if stage != task.stage:  # of a region: taken out when it comes to its stage by itself
                stream.doomed = {**(stream.doomed or {}), index: reason}
            if task.items == 1 or stream.batch:
                self._ask(run, task, reason, now)
            elif task.stopping is None:
                self._out.append(act.StopAttempt(task.id, reason, item=index))
                # a thread left behind may have done the neighbours' work already: they must not run again
                if not task.timer and not stream.brief:
                    self._arm_force(run, task, reason, now)
            return True
        return False

    def _waiting_with(self: Machine, run: Run, stream: Stream, index: int) -> Segment | None:
        """The segment in which the item waits for its turn, for its batch or for its retry."""
        waiting = [entry[2] for entry in stream.ready]
        waiting.extend(segment for job in stream.jobs for segment in job)
        waiting.extend(stream.batch_group)
        waiting.extend(stream.delayed.values())
        if stream.batch_frontier is not None:
            waiting.extend(stream.batch_frontier.waiting())  # type: ignore[arg-type]
        return next((segment for segment in waiting if segment.has(index)), None)

    def _remove(self: Machine, run: Run, stream: Stream, segment: Segment, index: int, reason: str, now: float) -> None:
        """Take a waiting item out; a segment of which nothing is left goes with it."""
        early = stream.batch_frontier is not None and segment in stream.batch_frontier.waiting()
        attempt = segment.attempt
        self._used(run, segment.take_out(index), 1)
        timers = [timer for timer, later in stream.delayed.items() if later is segment]
        if not timers and not early:
            stream.ready_count -= 1
        self._item_cancelled(run, stream, index, reason, attempt)
        if segment.mask or early:  # one that came too early is looked at when its turn comes
            return
        for timer in timers:
            self._drop_timer(timer)
            run.retry_timers -= 1
            del stream.delayed[timer]
        stream.ready[:] = [entry for entry in stream.ready if entry[2] is not segment]
        heapify(stream.ready)
        stream.batch_group = [part for part in stream.batch_group if part is not segment]
        for job in list(stream.jobs):
            if segment in job:
                job.remove(segment)
                if not job:
                    stream.jobs.remove(job)
        self._empty(run, stream, segment.lo, segment.hi, now)

    def _item_cancelled(self: Machine, run: Run, stream: Stream, index: int, reason: str, attempt: int) -> None:
        """Book it."""
        stream.cancelled += 1
        run.cancelled_items += 1
        run.previous_delay.pop((stream.stage, index), None)
        run.first_start.pop((stream.stage, index), None)
        self._emit("stage.cancelled", run, stream.stage, item=(index,), attempt=attempt, data={"reason": reason})

    def _sift(self: Machine, run: Run, stream: Stream, segment: Segment) -> None:
        """Take out of a segment that comes in what was cancelled before it came."""
        doomed = stream.doomed or {}
        for index in [index for index in doomed if segment.has(index)]:
            self._used(run, segment.take_out(index), 1)
            self._item_cancelled(run, stream, index, doomed.pop(index), segment.attempt)

    def _heed(self: Machine, run: Run, task: Task, stream: Stream, signal: sig.BlockPart) -> None:
        """What the part says of items that were asked to stop. Those that heeded it have decided nothing: they are
        left over when the block ends, and booked then. A call of one item, or one whose results cannot be told apart,
        counts for nothing at all."""
        done, doomed = signal.done, task.doomed or {}
        if task.items == 1 or (stream.batch and stream.flow_frontier is not None):
            signal.done = Done((), seconds=done.seconds, cpu_seconds=done.cpu_seconds)
            if signal.handle:
                self._out.append(act.Release(run.id, (signal.handle,)))
                signal.handle = 0
            return
        heeded = [failure for failure in done.failures if failure.index in doomed and failure.status == "cancel"]
        if not heeded:
            return
        points = {failure.index for failure in heeded}
        ranges = tuple(
            (start, stop, mask if (start, stop) == (lo, hi) else submask(lo, mask, start, stop))
            for lo, hi, mask in done.ranges
            for start, stop in ranges_without(lo, hi, points)
        )
        inner = done.inner
        if inner is not None:  # of a region: nor have the stages it had been through
            rows = [list(row) for row in inner]
            for failure in heeded:
                rows[failure.member][2] -= 1
                for row in rows[: failure.member]:
                    row[0] -= 1
            inner = tuple(map(tuple, rows))  # type: ignore[arg-type]
        failures = tuple(failure for failure in done.failures if failure not in heeded)
        retries = tuple(
            verdict for failure, verdict in zip(done.failures, signal.retries, strict=False) if failure not in heeded
        )
        signal.retries = retries
        signal.done = msgspec.structs.replace(done, ranges=ranges, failures=failures, inner=inner)

    def _spare(self: Machine, run: Run, task: Task, rest: list[Segment], now: float) -> list[Segment]:
        """The block is over: book the doomed items that are left of it; what remains."""
        stream, doomed, left = task.stream, task.doomed or {}, []
        assert stream is not None
        for segment in rest:
            for index in [index for index in doomed if doomed[index][0] == task.stage and segment.has(index)]:
                self._used(run, segment.take_out(index), 1)
                self._item_cancelled(run, stream, index, doomed.pop(index)[1], task.attempt)
            if segment.mask:
                left.append(segment)
            else:
                self._empty(run, stream, segment.lo, segment.hi, now)
        return left


def is_over(run: Run, stream: Stream) -> bool:
    """Whether no item of the stage can be stopped any more, or it has none of its own."""
    role = run.layout.roles[stream.stage]
    return stream.ended or stream.shedding or role not in (Role.MAP, Role.SINK)


def stopped_info(name: str, reason: str, item: tuple[int, ...] | None = None) -> ErrorInfo:
    """The failure of a stage that was stopped, or of an item of it."""
    where = f"stage {name!r}" if item is None else f"item {list(item)} of stage {name!r}"
    return ErrorInfo(
        type="stageflow.core.errors.StageCancelledError",
        code="SF-CANCELLED",
        message=f"{where} was cancelled: {reason}",
        item=item,
    )
