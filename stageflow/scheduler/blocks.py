"""Blocks of items: which run, how they come back, what their finished items free.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from stageflow.context.pieces import Done, ranges_without
from stageflow.core.output import ErrorInfo
from stageflow.pipeline.policies import DEFAULT_POLICIES
from stageflow.pipeline.spec import Role
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.backpressure import BLOCK_BYTES, View, strictest, unseen_bytes
from stageflow.scheduler.books import ON_LOOP, Lane, Run, Task
from stageflow.scheduler.layout import MAX_BLOCK
from stageflow.scheduler.ranges import (
    NOTHING,
    first_of,
    own_seconds,
    submask,
    values_of,
    without_stopped,
)
from stageflow.scheduler.states import StageState
from stageflow.scheduler.streams import Chunk, Segment, Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState
CHAINED: Final = 4096  # items of one step of a fold without `combine`: its accumulator crosses once per step


class BlockRules:
    """Blocks of items: which run, how they come back, what their finished items free."""

    def _offer(self: Machine, run: Run, stream: Stream, now: float) -> None:
        """Put the stage into its lane's queue if it has something to run."""
        if not stream.flowing or stream.queued or stream.blocked or stream.ended or run.ending is not None:
            return
        if stream.serial and (stream.running or stream.delayed or stream.delayed_folds):
            return
        if not stream.has_work():
            return
        stream.queued = True
        stream.held_for("slot", now)
        layout = run.layout
        lane = self.lanes[layout.lanes[stream.stage]]
        self._seq += 1
        priority = -layout.specs[stream.stage].policies.priority
        run.queued += 1
        lane.push((priority, -layout.depth[stream.stage], run.seq, self._seq, run, stream.stage, stream, now))

    def _start_flow(self: Machine, run: Run, stream: Stream, lane: Lane, entry: Any, now: float) -> None:
        """The stage's turn: start one block, and queue it again if there is more."""
        stage = stream.stage
        if not stream.has_work():
            self._touch(run)  # it ended, or its items were stopped, while it waited: others may have to move
            return
        if run.layout.limited[stage] and not self._admit(run, stage, lane, entry, now):
            return
        held = self._held_back(run, stream)
        if held is not None and not _moving(run, stream):  # it would be forced: a deeper one goes first
            deeper = self._lane_of_deeper(run, stage, lane)
            if deeper is not None:
                self._dispatch_lane(deeper, now)
                if run.ending is not None or not stream.has_work() or self._is_full(lane, run, stage, stream):
                    self._offer(run, stream, now)
                    self._touch(run)
                    return
        if held is not None and _moving(run, stream):
            stream.blocked = True
            run.blocked.append(stream)
            stream.held_for(held, now)
            return
        self._start_blocks(run, stream, lane, now)
        self._offer(run, stream, now)

    def _lane_of_deeper(self: Machine, run: Run, stage: int, own: Lane) -> Lane | None:
        """Another lane with room in which a deeper stage of the run waits for its turn."""
        layout, lanes = run.layout, self.lanes
        depth = layout.depth[stage]
        for other in run.streams.values():
            if other.queued and layout.depth[other.stage] > depth:
                lane = lanes[layout.lanes[other.stage]]
                if lane is not own and lane.used < lane.slots:
                    return lane
        return None

    def _refused(self: Machine, run: Run, stream: Stream, items: int, what: str) -> str | None:
        """Why the stage (or the pull of a source) has to wait for bytes; None when it need not."""
        layout = run.layout
        if what == "pull":
            need, waiting = int(stream.avg_bytes * items), max((r.ready_count for r in stream.readers), default=0)
        else:
            head = stream.ready[0][2] if stream.ready else None
            each = head.nbytes() / max(1, head.count()) if head is not None else 0.0
            need, waiting = self._need(run, stream, each, 1), stream.ready_count
        view = View(what, layout.name(stream.stage), self.memory, self.live_bytes, self.promised, need, waiting,
                    run.running, self.pressure, layout.depth[stream.stage] / layout.deepest)  # fmt: skip
        if what == "pull":  # bytes were asked for already
            return next((said for policy in self.policies if (said := policy(view)) is not None), None)
        return strictest(self.policies, view)

    def _need(self: Machine, run: Run, stream: Stream, bytes_in: float, items: int) -> int:
        """Bytes that running some items adds: what a reader decodes, and the results; in another process both exist
        there before they are handed over."""
        crossing = run.layout.lanes[stream.stage] == "process"
        each = stream.avg_bytes if stream.measured else unseen_bytes(self.memory)
        kept = each if stream.readers or stream.keeps else 0.0
        return int(bytes_in + (2.0 if crossing else 1.0) * kept * items)

    def _start_blocks(self: Machine, run: Run, stream: Stream, lane: Lane, now: float, *, forced: bool = False) -> None:
        if stream.fold is not None:
            if stream.fold.jobs:
                job, what = stream.fold.jobs.popleft()
                self._start_fold(run, stream, lane, job, what, now)
            return
        layout = run.layout
        stage = stream.stage
        if stream.jobs:
            segments = stream.jobs.popleft()
            stream.ready_count -= sum(part.count() for part in segments)
        elif stream.ready:
            segments = self._form(run, stream, lane)
        else:
            return
        if layout.roles[stage] == Role.REDUCE:
            self._start_fold(run, stream, lane, "continue", segments, now)
            return
        task = self._new_task(run, stream, lane, segments[0].attempt, segments, now)
        alone = segments[0].deaths > 0
        short = stream.can_block and not alone and stream.measured > 0
        self._out.append(
            act.StartBlock(
                task.id,
                run.id,
                stage,
                lane.name,
                tuple(segment.wire() for segment in segments),
                task.attempt,
                alone,
                short,
                task.tokens,
                self._region_of(run, task, segments, now),
                self._begun(stream, segments),
            )
        )

    def _form(self: Machine, run: Run, stream: Stream, lane: Lane) -> list[Segment]:
        """Take the oldest items up to a block; retried and suspect ones run by themselves."""
        chained = run.layout.roles[stream.stage] == Role.REDUCE
        size = CHAINED if chained else stream.block_size(lane.slots, MAX_BLOCK)
        segments: list[Segment] = []
        heavy = 0.0
        while stream.ready and size > 0:
            head = stream.ready[0][2]
            plain = head.attempt == 1 and head.deaths == 0 and not head.apart
            if segments and not plain:
                break
            segment = stream.pop()
            if not plain:
                return [segment]
            # what comes out of a small element may be large: that counts as well
            each = max(sum(chunk.each for chunk, _ in segment.columns), stream.avg_bytes)
            if each > 0:
                size = max(1, min(size, int((BLOCK_BYTES - heavy) / each)))
            part, rest = segment.split_at(size)
            if rest is not None:
                stream.push(rest)
            segments.append(part)
            size -= part.count()
            heavy += part.count() * each
            if heavy > BLOCK_BYTES:
                break
            if not stream.can_block and not chained:
                break
        return segments

    def _new_task(
        self: Machine, run: Run, stream: Stream, lane: Lane, attempt: int, segments: list[Segment], now: float
    ) -> Task:
        self._next_task += 1
        task = Task(self._next_task, run, stream.stage, lane.name, attempt)
        task.stream = stream
        task.segments = segments
        task.items = sum(segment.count() for segment in segments)
        task.since = segments[0].since if segments else now
        task.begun = now
        task.expected = self._need(run, stream, sum(segment.nbytes() for segment in segments), task.items)
        self.promised += task.expected
        stream.waits_for("", now)
        stream.running += max(1, task.items)
        lane.used += 1
        run.running += 1
        self.tasks[task.id] = task
        run.tasks[task.id] = task
        policies = run.layout.specs[stream.stage].policies
        if policies is not DEFAULT_POLICIES:
            if run.layout.limited[stream.stage]:
                self._reserve(task, policies, lane, now)
            if policies.total_timeout is not None:
                begun = run.first_start.get((stream.stage, segments[0].lo), now) if segments else now
                task.deadline = begun + policies.total_timeout
            if policies.timeout is not None or task.deadline is not None:
                self._arm_timeout(task, policies.timeout, now)
        return task

    def _on_block_part(self: Machine, signal: sig.BlockPart, now: float) -> None:
        task = self.tasks.get(signal.task)
        if task is None:
            return
        run, stream = task.run, task.stream
        assert stream is not None
        assert task.segments is not None
        if task.stood is not None:  # it was asked to stop, and does
            self._go_on(run, task, stream, now)
        if signal.done.flows and not signal.done.ranges:
            self._take_flow(run, task, stream, signal, now)
            return
        if signal.final:
            self._drop_task(task, now)
            stream.running -= max(1, task.items)
        chunk = None
        if signal.final and signal.status == "ok" and task.stopping is None and task.lane in ON_LOOP:
            # a batch is many, and what its generator gave has gone on
            single = task.items == 1 and not stream.batch and stream.flow_frontier is None
            if single and self._overran(run, task, signal.done.seconds):
                task.stopping = "timeout"
        if task.stopping == "timeout" and task.items == 1 and signal.final and not stream.batch:
            # its time was up: that is its outcome, whatever it answered in the end
            signal.done = Done((), seconds=signal.done.seconds, cpu_seconds=signal.done.cpu_seconds)
            if signal.handle:
                self._out.append(act.Release(run.id, (signal.handle,)))
                signal.handle = 0
        elif task.doomed is not None:
            self._heed(run, task, stream, signal)
        elif task.stopping is not None and signal.done.failures:
            signal.done = without_stopped(signal.done)
        if signal.handle:
            # held until all its ranges are given away
            chunk = Chunk(signal.handle, 1, signal.nbytes, values_of(signal.done))
            self._account(run, signal.nbytes)
        if signal.done.ranges or signal.done.handed:
            self._take_ranges(run, task, stream, signal, chunk, now)
        if chunk is not None:
            chunk.left -= 1
            if chunk.left <= 0:
                self._free(run, chunk)
        if run.ending is None and signal.final:
            self._block_ended(run, task, stream, signal, now)
        if run.ending is None:
            stream.rests(now)
            self._offer(run, stream, now)
            self._maybe_over(run, stream, now)
        self._settle_ended(now)
        self._touch(run)

    def _take_ranges(
        self: Machine, run: Run, task: Task, stream: Stream, signal: sig.BlockPart, chunk: Chunk | None, now: float
    ) -> None:
        """Book the finished indices of a part: survivors go on, failures are retried or counted."""
        done = signal.done
        if done.inner is not None and task.region is not None:
            self._take_region(run, task, task.region, signal, chunk, now)
            return
        items = dropped = 0
        retried: dict[int, tuple[float, Any]] = {}
        lost: set[int] = set()
        stopped = 0
        doomed = task.doomed or {}
        for place, failure in enumerate(done.failures):
            if failure.index in doomed:
                lost.add(failure.index)
                continue
            stopped += failure.status == "cancel"  # it asked for the end of the run, and has decided nothing
            verdict = signal.retries[place] if place < len(signal.retries) else (None, None, 1.0)
            delay = self._item_failed(run, task, stream, failure, verdict, now)
            if delay is not None:
                retried[failure.index] = (delay, failure)
            else:
                lost.add(failure.index)
        if task.reported is None:
            task.reported = []
        task.reported.extend((lo, hi) for lo, hi, _ in done.ranges)
        at = 0
        counted = list(done.counts) if done.counts is not None else None
        for lo, hi, mask in done.ranges:
            there = hi - lo if mask < 0 else mask.bit_count()
            asked = self._asked(task, lo, hi)
            items += there
            dropped += asked - there - sum(1 for index in (*retried, *lost) if lo <= index < hi)
            gone = [index for index in doomed if lo <= index < hi] if doomed else ()
            pieces = ranges_without(lo, hi, {*retried, *gone} if gone else retried)
            if gone:  # whatever they answered: their values are passed over
                pieces = sorted([*pieces, *((index, index + 1) for index in gone)])
            for start, stop in pieces:
                if start in gone:
                    survived = mask < 0 or bool(mask >> (start - lo) & 1)
                    items, dropped = items - survived, dropped - (not survived and start not in lost)
                    passed = self._take_counts(counted, task, start, stop, start in lost)
                    at += passed if counted is not None else survived
                    lost.discard(start)
                    self._consume(run, task, start, stop)
                    self._item_cancelled(run, stream, start, doomed.pop(start)[1], task.attempt)
                    self._finished(run, stream, start, stop, 0, None, 0, now)
                    continue
                part_mask = mask if (start, stop) == (lo, hi) else submask(lo, mask, start, stop)
                here = stop - start if part_mask < 0 else part_mask.bit_count()
                self._consume(run, task, start, stop)
                if stream.flow_frontier is not None:
                    without = sum(1 for index in lost if start <= index < stop)
                    total = self._take_counts(counted, task, start, stop, without)
                    self._hold(run, stream, start, stop, chunk, at, total, now)
                    at += total
                else:
                    self._finished(run, stream, start, stop, part_mask, chunk, at, now)
                    at += here
        for index, (delay, _) in retried.items():
            self._retry_item(run, task, stream, index, delay, now)
        failed = len(lost) - stopped
        stream.ok += items
        stream.dropped += dropped
        stream.failed += failed
        stream.measure(items + dropped + failed, own_seconds(done), signal.nbytes)
        data = {"lo": done.ranges[0][0], "hi": done.ranges[-1][1], "ok": items, "dropped": dropped, "failed": failed,
                "seconds": done.seconds, "cpu_seconds": done.cpu_seconds, "bytes_in": signal.bytes_in,
                "bytes_out": signal.nbytes, "worker_pid": signal.worker_pid,
                "queued_ms": max(0.0, now - task.since - done.seconds) * 1000.0, "started": signal.started}  # fmt: skip
        if stream.flow_frontier is not None:
            data["emitted"], stream.told = stream.out_next - stream.told, stream.out_next
        self._emit("stage.items", run, stream.stage, attempt=task.attempt, data=data)

    def _asked(self: Machine, task: Task, lo: int, hi: int) -> int:
        """How many items of the task lie in [lo, hi)."""
        assert task.segments is not None
        total = 0
        for segment in task.segments:
            start, stop = max(lo, segment.lo), min(hi, segment.hi)
            if start < stop:
                total += segment.cut(start, stop).count()
        return total

    def _take_counts(self: Machine, counts: list[int] | None, task: Task, lo: int, hi: int, without: int) -> int:
        """Items that the inputs in [lo, hi) gave; `without` of them failed and have no count."""
        if counts is None:
            return 0
        wanted = self._asked(task, lo, hi) - without
        taken, counts[:] = counts[:wanted], counts[wanted:]
        return sum(taken)

    def _hold(
        self: Machine, run: Run, stream: Stream, lo: int, hi: int, chunk: Chunk | None, at: int, total: int, now: float
    ) -> None:
        """A flat-map's items leave in the order of its input: only then do they get their indices."""
        frontier = stream.flow_frontier
        assert frontier is not None
        stream.done += hi - lo
        if chunk is not None and total:
            chunk.left += 1  # held
        for index in [index for index in stream.flowed if lo <= index < hi]:
            del stream.flowed[index]
        frontier.add(lo, (hi, chunk if total else None, at, total))
        self._release_flow(run, stream, now)
        for found in frontier.take(first_of):
            entry: tuple[int, Chunk | None, int, int] = found  # type: ignore[assignment]
            _, held, start, count = entry
            if held is not None:
                self._let_flow(run, stream, held, start, count, now)
            self._release_flow(run, stream, now)

    def _finished(
        self: Machine, run: Run, stream: Stream, lo: int, hi: int, mask: int, chunk: Chunk | None, at: int, now: float
    ) -> None:
        """Indices [lo, hi) are done at this stage."""
        if stream.flow_frontier is not None:
            self._hold(run, stream, lo, hi, None, 0, 0, now)
            return
        stream.done += hi - lo
        stream.out_next = max(stream.out_next, hi)
        if stream.readers or (chunk is not None and stream.keeps):
            self._give(run, stream, lo, hi, mask, chunk, at, now)

    def _consume(self: Machine, run: Run, task: Task, lo: int, hi: int) -> None:
        """The inputs in [lo, hi) are not needed by this stage any more."""
        assert task.segments is not None
        for segment in task.segments:
            start, stop = max(lo, segment.lo), min(hi, segment.hi)
            if start < stop:
                part = segment.cut(start, stop)
                self._used(run, part.columns, part.count())
        if task.attempt > 1:  # its retries are over
            run.previous_delay.pop((task.stage, lo), None)
            run.first_start.pop((task.stage, lo), None)

    def _used(self: Machine, run: Run, columns: Any, count: int) -> None:
        for chunk, _ in columns:
            chunk.left -= count
            if chunk.left <= 0 and chunk is not NOTHING:
                self._free(run, chunk)

    def _free(self: Machine, run: Run, chunk: Chunk) -> None:
        if chunk.nbytes >= 0:
            if run.spilling.pop(chunk.handle, None) is not None:
                self.spilling -= chunk.nbytes
            self._account(run, -chunk.nbytes)
            chunk.nbytes = -1  # freed
            self._out.append(act.Release(run.id, (chunk.handle,)))

    def _block_ended(self: Machine, run: Run, task: Task, stream: Stream, signal: sig.BlockPart, now: float) -> None:
        """The task is over: what it did not finish goes back, or fails with it."""
        assert task.segments is not None
        rest = self._unreported(task)
        if task.doomed is not None and not (stream.shedding or stream.ended):
            if signal.error is not None and signal.error.code == "SF-CANCELLED":
                signal.status = "cancelled"  # a batch that heeded it
            rest = self._spare(run, task, rest, now)
        if stream.flowed and not (stream.shedding or stream.ended):
            rest = self._begun_apart(run, task, stream, rest, signal, now)
        if not rest or run.ending is not None:
            return
        if stream.shedding or stream.ended:
            for segment in rest:
                self._shed_segment(run, stream, segment, now)
        elif task.region is not None and task.stopping == "timeout":
            self._tail_timed_out(run, task, task.region, rest[0], signal, now)
        elif task.region is not None and signal.status in ("error", "refused"):
            for segment in rest:  # which of its stages it was shows when they run by themselves
                self._take_apart(run, stream, segment, now)
        elif task.stopping == "timeout" or signal.status in ("error", "refused"):
            self._whole_block_failed(run, task, stream, rest, signal, now)
        elif signal.status == "lost":
            self._block_lost(run, stream, rest, signal, now)
        elif signal.status == "ok" and not task.reported and task.doomed is None:
            # a lane that loses results would be asked for ever
            signal.status = "error"
            signal.error = ErrorInfo(
                type="stageflow.core.errors.InvariantError",
                code="SF-INVARIANT",
                message="a block came back without the outcome of a single item",
            )
            self._whole_block_failed(run, task, stream, rest, signal, now)
        else:
            for segment in rest:
                segment.since = now
            self._put_back(stream, *rest)

    def _put_back(self: Machine, stream: Stream, *segments: Segment) -> None:
        """These are to run again; what was a batch stays one."""
        if stream.batch:
            stream.jobs.appendleft(list(segments))
            stream.ready_count += sum(segment.count() for segment in segments)
        else:
            for segment in segments:
                stream.push(segment)

    def _unreported(self: Machine, task: Task) -> list[Segment]:
        """The parts of the task's segments that no part has reported."""
        assert task.segments is not None
        reported = task.reported or []
        rest: list[Segment] = []
        for segment in task.segments:
            lo = segment.lo
            for start, stop in sorted(reported):
                if stop <= lo or start >= segment.hi:
                    continue
                if start > lo:
                    rest.append(segment.cut(lo, start))
                lo = max(lo, stop)
            if lo < segment.hi:
                rest.append(segment.cut(lo, segment.hi))
        return [segment for segment in rest if segment.count() or segment.hi > segment.lo]


def _moving(run: Run, stream: Stream) -> bool:
    """Whether a stage that is held back has somebody to wait for: what runs and does not stand still, or calls of its
    own that stand, which go on before others begin."""
    return run.running > run.standing or bool(stream.standing)
