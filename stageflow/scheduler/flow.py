"""Streams: sources are pulled, blocks of items run, what survives goes on to the readers, without a barrier.

Depth first: finish old items before new ones. A source is pulled only when its readers run dry and the byte budget
allows; a stage
whose reader has enough waiting does not start; and if nothing of a run is running, its deepest waiting block starts
whatever the
limits say, so that draining is never refused.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.items import Done
from stageflow.core.output import ErrorInfo
from stageflow.pipeline.policies import DEFAULT_POLICIES
from stageflow.pipeline.spec import Role
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.backpressure import BLOCK_BYTES, SPILL_SHARE, View, pull_bytes, pull_count, strictest
from stageflow.scheduler.books import Lane, Run, Task
from stageflow.scheduler.layout import MAX_BLOCK
from stageflow.scheduler.outcomes import timeout_info
from stageflow.scheduler.states import ENDED, StageState
from stageflow.scheduler.streams import Chunk, Fold, Frontier, Join, Segment, Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState
CHAINED: Final = 4096  # items of one step of a fold without `combine`: its accumulator crosses once per step
MOST_PULLED: Final = 8192  # items a source may be asked for at once


class FlowRules:
    """Signals and decisions of stream stages."""

    # ------------------------------------------------------------ opening

    def _open_stream(self: Machine, run: Run, stage: int) -> None:
        """The empty books of a stream stage. A generator runner makes a map a flat-map: its output has an index space
        of its own."""
        layout = run.layout
        spec = layout.specs[stage]
        stream = Stream(stage)
        run.streams[stage] = stream
        policies = spec.policies
        role = layout.roles[stage]
        stream.can_block = bool(layout.block[stage])
        stream.keeps = stage in layout.keeps or stage in layout.collectors
        if stage in layout.collectors:
            stream.spill = all(
                layout.specs[reader].policies.spill
                for reader, producers in layout.graph.barriers.items()
                if stage in producers
            )
        if role == Role.SOURCE:
            stream.is_source = True
            run.sources.append(stream)
        if stage in layout.expands:
            run.sources.append(stream)
        if role == Role.REDUCE:
            reduce = spec.reduce
            if reduce is not None and reduce.combine is not None:
                stream.fold = Fold(reduce.block)
            else:
                stream.batch_frontier = Frontier()  # an ordered chain
                stream.serial = True
        elif policies.batch is not None:
            stream.batch = policies.batch
            stream.batch_frontier = Frontier()
        elif role == Role.SINK and policies.ordered:
            stream.batch_frontier = Frontier()
            stream.serial = True
        if role == Role.MAP and spec.is_generator:
            stream.flow_frontier = Frontier()
        elements = layout.elements[stage]
        if len(elements) > 1:
            stream.join = Join(len(elements))
        for producer in elements:
            if producer in run.streams:
                run.streams[producer].readers.append(stream)
        # producers declared after their readers
        for reader in layout.readers.get(stage, ()):
            opened = run.streams.get(reader)
            if opened is not None and opened not in stream.readers:
                stream.readers.append(opened)

    def _flow_begins(self: Machine, run: Run, stage: int, now: float) -> None:
        """Everything the stage needs as a whole is there: items may flow."""
        stream = run.streams[stage]
        stream.flowing = True
        stream.wait_since = now
        run.first_start.setdefault(stage, now)
        if run.listening:
            self._emit("stage.started", run, stage)
        self._offer(run, stream, now)
        self._maybe_over(run, stream, now)
        self._touch(run)

    # ------------------------------------------------------------ sources

    def _pull_sources(self: Machine, run: Run, now: float) -> None:
        for source in run.sources:
            if not source.flowing or source.pull_open or source.ended or source.stopped:
                continue
            if source.is_source and source.readers and not source.keeps and all(map(_gone, source.readers)):
                self._stop_source(run, source, "nobody reads it any more", now)
                continue
            wanted = self._appetite(run, source)
            if wanted <= 0:
                if source.is_source:
                    source.waits_for("memory" if self.pressure else "downstream", now)
                continue
            limit = self.memory
            room = pull_bytes(limit, self.live_bytes, self.promised)
            count, nbytes = pull_count(wanted, source.avg_bytes if source.is_source else source.in_bytes, room, limit)
            if count > 0 and not (self.policies and self._refused(run, source, count, "pull")):
                self._pull(run, source, count, now, nbytes)
            elif source.is_source:
                source.waits_for("bytes", now)

    def _appetite(self: Machine, run: Run, source: Stream) -> int:
        """How many more items the readers of a source can use now."""
        if self.pressure >= 1 and run.running:
            return 0
        readers = [source] if not source.is_source else source.readers
        if not readers:
            wanted = source.window
        else:
            wanted = MOST_PULLED
            for reader in readers:
                if reader is not source and _gone(reader):
                    continue
                slots = self.lanes[run.layout.lanes[reader.stage]].slots
                most = slots * (2 * reader.block_size(slots, MAX_BLOCK) if reader.can_block else 2)
                if reader.batch:
                    most = max(most, 2 * slots * reader.batch)
                if reader.fold is not None:
                    most = max(most, reader.fold.block * (slots + 1))
                wanted = min(wanted, max(most, source.window if reader.can_block else 1) - reader.ready_count)
            wanted = min(wanted, source.window)
        if wanted <= 0:
            return 0
        return wanted

    def _pull(self: Machine, run: Run, source: Stream, count: int, now: float, nbytes: int = 0) -> None:
        source.pull_open = True
        if source.is_source:
            source.waits_for("", now)
        each = source.avg_bytes if source.is_source else source.in_bytes
        source.promised = min(nbytes, int(count * each)) if each > 0 else nbytes
        self.promised += source.promised
        if source.started_at < 0:
            source.started_at = now
        source.granted = count
        run.pulling += 1
        self._out.append(act.PullSource(run.id, source.stage, count, nbytes))

    def _stop_source(self: Machine, run: Run, source: Stream, reason: str, now: float) -> None:
        """Nothing more is wanted of a source or of a value that is laid out; SourceEnded follows if it was begun."""
        source.stopped = True
        if source.started_at >= 0:
            run.pulling += 0 if source.pull_open else 1
            source.pull_open = True
            self._out.append(act.StopSource(run.id, source.stage, reason))
        elif source.is_source:
            self._stream_over(run, source, now)
        else:
            source.in_total = source.arrived
            self._input_complete(run, source, now)

    def _force_pull(self: Machine, run: Run, now: float) -> bool:
        """Nothing runs and nothing is blocked: a source that is still open must give its next item."""
        for source in run.sources:
            if source.flowing and not source.pull_open and not source.ended and not source.stopped:
                self._pull(run, source, 1, now, 1)
                return True
        return False

    def _on_items_arrived(self: Machine, signal: sig.ItemsArrived, now: float) -> None:
        run = self.runs.get(signal.run)
        if run is None:
            return
        stream = run.streams[signal.stage]
        count = signal.count
        self._touch(run)
        if stream.pull_open:
            stream.granted -= count
            brought = min(stream.promised, signal.nbytes)
            stream.promised -= brought
            self.promised -= brought
            if stream.granted <= 0 or signal.enough:
                self._pull_over(run, stream)
                stream.window = min(MOST_PULLED, stream.window * 2)
        if run.ending is not None:
            self._out.append(act.Release(run.id, (signal.handle,)))
            return
        if count == 0:
            return
        chunk = Chunk(signal.handle, 0, signal.nbytes, count)
        self._account(run, signal.nbytes)
        if stream.is_source:
            lo = stream.out_next
            stream.out_next = lo + count
            stream.ok += count
            stream.measure(count, signal.seconds, signal.nbytes)
            self._emit(
                "stage.items",
                run,
                stream.stage,
                data={"lo": lo, "hi": lo + count, "ok": count, "dropped": 0, "failed": 0, "seconds": signal.seconds,
                      "cpu_seconds": 0.0, "bytes_in": 0, "bytes_out": signal.nbytes, "worker_pid": 0,
                      "queued_ms": 0.0, "started": now - signal.seconds},
            )  # fmt: skip
            self._give(run, stream, lo, lo + count, -1, chunk, 0, now)
        else:
            lo = stream.arrived
            chunk.left = count
            stream.in_bytes = chunk.each
            self._accept(run, stream, Segment(lo, lo + count, -1, ((chunk, 0),), now), now)
        self._settle_ended(now)

    def _pull_over(self: Machine, run: Run, source: Stream) -> None:
        """What was asked for is there, or will not come."""
        source.pull_open = False
        run.pulling -= 1
        self.promised -= source.promised
        source.promised = 0

    def _on_source_ended(self: Machine, signal: sig.SourceEnded, now: float) -> None:
        run = self.runs.get(signal.run)
        if run is None:
            return
        stream = run.streams[signal.stage]
        self._touch(run)
        if stream.pull_open:
            self._pull_over(run, stream)
        if stream.ended:
            return
        if run.ending is not None:
            stream.ended = True
            return
        if stream.is_source:
            if signal.status == "error":
                stream.ended = True
                for reader in stream.readers:
                    reader.in_total = stream.out_next
                self._fail_stage(run, stream.stage, signal.error or ErrorInfo(type="Exception", message="failed"), now)
            else:
                self._stream_over(run, stream, now)
        else:
            stream.stopped = True  # nothing more to lay out
            stream.in_total = stream.arrived
            if signal.status == "error":
                self._fail_stream(run, stream, signal.error or _no_reason(), now, shed=False)
            self._input_complete(run, stream, now)
        self._settle_ended(now)

    # ------------------------------------------------------------ passing on

    def _account(self: Machine, run: Run, nbytes: int) -> None:
        run.live_bytes += nbytes
        self.live_bytes += nbytes

    def _give(
        self: Machine, run: Run, stream: Stream, lo: int, hi: int, mask: int, chunk: Chunk | None, at: int, now: float
    ) -> None:
        """Indices [lo, hi) of a stream are final: hand the survivors to its readers and keepers."""
        there = hi - lo if mask < 0 else mask.bit_count()
        if chunk is not None:
            if stream.keeps and (not stream.kept or stream.kept[-1] is not chunk):
                chunk.left += 1
                stream.kept.append(chunk)
            if stream.keeps:
                self._out.append(act.KeepItems(run.id, stream.stage, lo, hi, mask, chunk.handle, at))
            chunk.left += there * len(stream.readers)
        columns = ((chunk, at),) if chunk is not None else ()
        for reader in stream.readers:
            segment = Segment(lo, hi, mask, columns, now)
            if reader.join is None:
                self._accept(run, reader, segment, now)
            elif reader.ended:
                self._used(run, columns, there)
            else:
                elements = run.layout.elements[reader.stage]
                if chunk is None:
                    segment.columns = ((_NOTHING, 0),)
                for column, producer in enumerate(elements):
                    if producer == stream.stage:
                        for joined in reader.join.add(column, segment):
                            self._accept(run, reader, joined, now)
                        while reader.join.spent:
                            spent = reader.join.spent.pop()
                            if spent is not chunk and spent is not _NOTHING and spent.left <= 0:
                                self._free(run, spent)
        if chunk is not None and chunk.left <= 0:
            self._free(run, chunk)
        if stream.keeps and self.memory and self.live_bytes - self.spilling > self.memory * SPILL_SHARE:
            self._spill(run, now)

    def _spill(self: Machine, run: Run, now: float) -> None:
        """Too much is live: what only waits for the end of its stream goes to disk, oldest first."""
        for stage, stream in run.streams.items():
            if not stream.keeps or run.layout.roles[stage] == Role.REDUCE:
                continue
            if not stream.spill:
                self._overflow(run, stream, now)
                continue
            kept = stream.kept
            while stream.spill_at < len(kept):
                if self.live_bytes - self.spilling <= self.memory * SPILL_SHARE / 2:
                    return
                chunk = kept[stream.spill_at]
                if chunk.left > 1:
                    break  # somebody still reads it item by item
                stream.spill_at += 1
                if chunk.nbytes > 0:
                    run.spilling[chunk.handle] = chunk
                    self.spilling += chunk.nbytes
                    self._out.append(act.Spill(run.id, stage, chunk.handle))

    def _overflow(self: Machine, run: Run, stream: Stream, now: float) -> None:
        """What a `spill=False` stage waits for has outgrown the budget."""
        held = sum(max(0, chunk.nbytes) for chunk in stream.kept)
        if held <= self.memory:
            return
        layout = run.layout
        for stage, producers in layout.graph.barriers.items():
            if stream.stage in producers and not layout.specs[stage].policies.spill:
                name, of = layout.name(stage), layout.name(stream.stage)
                text = (
                    f"stage {name!r} waits for all of {of!r}, whose {held:,} bytes exceed the memory limit of "
                    f"{self.memory:,}, and it is declared spill=False"
                )
                error = ErrorInfo(type="stageflow.core.errors.CollectTooLargeError", message=text, code=_TOO_LARGE)
                self._end_run(run, "failed", text, now, error)
                return

    def _on_spilled(self: Machine, signal: sig.Spilled, now: float) -> None:
        run = self.runs.get(signal.run)
        chunk = run.spilling.pop(signal.handle, None) if run is not None else None
        if run is None or chunk is None:
            return
        self.spilling -= max(0, chunk.nbytes)
        if signal.ok and chunk.nbytes > 0:
            self._account(run, -chunk.nbytes)
            chunk.nbytes = 0
        self._touch(run)

    def _accept(self: Machine, run: Run, stream: Stream, segment: Segment, now: float) -> None:
        """Items come in at a stage."""
        stream.arrived += segment.hi - segment.lo
        if stream.ended:
            self._used(run, segment.columns, segment.count())
            return
        if stream.shedding:
            self._shed_segment(run, stream, segment, now)
        elif stream.fold is not None:
            before = len(stream.fold.jobs)
            stream.fold.add(segment)
            stream.ready_count += segment.count()
            if len(stream.fold.jobs) > before:
                self._offer(run, stream, now)
        elif stream.batch_frontier is not None:
            stream.batch_frontier.add(segment.lo, segment)
            for ordered in stream.batch_frontier.take(_end):
                self._in_order(run, stream, ordered, now)  # type: ignore[arg-type]
        elif segment.mask == 0:
            self._empty(run, stream, segment.lo, segment.hi, now)
        else:
            stream.push(segment)
            self._offer(run, stream, now)
        if stream.in_total >= 0:
            self._input_complete(run, stream, now)

    def _in_order(self: Machine, run: Run, stream: Stream, segment: Segment, now: float) -> None:
        """The next items of a stage that takes them in order: batches, ordered sinks, chained folds."""
        if segment.mask == 0:
            self._empty(run, stream, segment.lo, segment.hi, now)
            return
        if not stream.batch:
            stream.push(segment)
            self._offer(run, stream, now)
            return
        rest: Segment | None = segment
        stream.ready_count += segment.count()
        while rest is not None:
            missing = stream.batch - sum(part.count() for part in stream.batch_group)
            part, rest = rest.split_at(missing)
            stream.batch_group.append(part)
            if part.count() == missing:
                self._close_batch(run, stream, now)
        policies = run.layout.specs[stream.stage].policies
        if stream.batch_group and policies.batch_seconds is not None and not stream.batch_timer:

            def due(signal: sig.TimerDue, when: float) -> None:
                stream.batch_timer = 0
                if stream.batch_group:
                    self._close_batch(run, stream, when)

            stream.batch_timer = self._set_timer(run, now + policies.batch_seconds, due)

    def _close_batch(self: Machine, run: Run, stream: Stream, now: float) -> None:
        group, stream.batch_group = stream.batch_group, []
        if stream.batch_timer:
            self._drop_timer(stream.batch_timer)
            stream.batch_timer = 0
        stream.jobs.append(group)
        self._offer(run, stream, now)

    def _upstream_over(self: Machine, run: Run, stage: int, producer: int, now: float) -> None:
        """A stream that this stage reads has ended."""
        stream = run.streams[stage]
        if stream.ended or run.state[stage] >= ENDED:
            return
        at = run.state[producer]
        culprit = producer if at == _S.FAILED else run.blocked_by.get(producer)
        if culprit is not None and self._mode(run, culprit) == "best_effort":
            culprit = None
        if at in (_S.DONE, _S.FAILED):
            if stream.in_total < 0:
                stream.in_total = run.streams[producer].out_next
            # one that has begun finishes what came before the failure; what needs it as a whole is skipped
            begun = stream.arrived > 0 and run.state[stage] == _S.FLOWING
            if culprit is None or (begun and run.layout.roles[stage] != Role.REDUCE):
                if culprit is not None:
                    run.blocked_by[stage] = culprit
                    run.plain = False
                self._input_complete(run, stream, now)
                return
        self._let_go(run, stream)
        reason = f"all dependencies were skipped ({run.layout.name(producer)})"
        if culprit is not None:
            run.blocked_by[stage] = culprit
            reason = f"upstream_failed: {run.layout.name(culprit)}"
        self._skip(run, stage, reason)

    def _input_complete(self: Machine, run: Run, stream: Stream, now: float) -> None:
        """The length of the input is known: close what waits for more."""
        if stream.ended or stream.arrived < stream.in_total or not self._joined(stream):
            return
        if stream.fold is not None and stream.fold.total_blocks < 0:
            stream.fold.close(stream.in_total)
            if stream.fold.jobs:
                self._offer(run, stream, now)
        if stream.batch_group:
            self._close_batch(run, stream, now)
        self._maybe_over(run, stream, now)

    def _joined(self: Machine, stream: Stream) -> bool:
        return stream.join is None or not any(stream.join.pending)

    # ------------------------------------------------------------ starting

    def _offer(self: Machine, run: Run, stream: Stream, now: float) -> None:
        """Put the stage into its lane's queue if it has something to run."""
        if not stream.flowing or stream.queued or stream.blocked or stream.ended or run.ending is not None:
            return
        if stream.serial and (stream.running or stream.delayed or stream.delayed_folds):
            return
        if not stream.ready and not stream.jobs and not (stream.fold is not None and stream.fold.jobs):
            return
        stream.queued = True
        if not stream.running:
            stream.waits_for("slot", now)
        layout = run.layout
        lane = self.lanes[layout.lanes[stream.stage]]
        self._seq += 1
        priority = -layout.specs[stream.stage].policies.priority
        run.queued += 1
        lane.push((priority, -layout.depth[stream.stage], run.seq, self._seq, run, stream.stage, stream, now))

    def _start_flow(self: Machine, run: Run, stream: Stream, lane: Lane, entry: Any, now: float) -> None:
        """The stage's turn: start one block, and queue it again if there is more."""
        stage = stream.stage
        if run.layout.limited[stage] and not self._admit(run, stage, lane, entry, now):
            return
        held = self._held_back(run, stream)
        if held is not None and run.running:
            stream.blocked = True
            run.blocked.append(stream)
            if not stream.running:
                stream.waits_for(held, now)
            return
        self._start_blocks(run, stream, lane, now)
        self._offer(run, stream, now)

    def _held_back(self: Machine, run: Run, stream: Stream) -> str | None:
        """Why no more may start, None when it may: the readers have enough, bytes or memory are short."""
        for reader in stream.readers:
            slots = self.lanes[run.layout.lanes[reader.stage]].slots
            most = 4 * slots * (reader.block_size(slots, MAX_BLOCK) if reader.can_block else 1) + 16
            if reader.batch:
                most += 2 * slots * reader.batch
            if reader.fold is not None:
                most += reader.fold.block * (slots + 2)
            if reader.ready_count >= most:
                return "downstream"
        if self.memory or self.pressure >= 2 or self.policies:
            return self._refused(run, stream, 1, "start")
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
        kept = stream.avg_bytes if stream.readers or stream.keeps else 0.0
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
            each = sum(chunk.each for chunk, _ in segment.columns)
            if each > 0:
                size = max(1, min(size, int((BLOCK_BYTES - heavy) / each)))
            part, rest = segment.split_at(size)
            if rest is not None:
                stream.push(rest)
            segments.append(part)
            size -= part.count()
            heavy += part.nbytes()
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
                task.tokens = self.admission.take(run.layout.key, stream.stage, policies, now)
            if policies.total_timeout is not None:
                begun = run.first_start.get((stream.stage, segments[0].lo), now) if segments else now
                task.deadline = begun + policies.total_timeout
            if policies.timeout is not None or task.deadline is not None:
                self._arm_timeout(task, policies.timeout, now)
        return task

    # ------------------------------------------------------------ blocks come back

    def _on_block_part(self: Machine, signal: sig.BlockPart, now: float) -> None:
        task = self.tasks.get(signal.task)
        if task is None:
            return
        run, stream = task.run, task.stream
        assert stream is not None
        assert task.segments is not None
        if signal.final:
            self._drop_task(task, now)
            stream.running -= max(1, task.items)
        chunk = None
        if task.stopping == "timeout" and task.items == 1 and signal.final and not stream.batch:
            # its time was up: that is its outcome, whatever it answered in the end
            signal.done = Done((), seconds=signal.done.seconds, cpu_seconds=signal.done.cpu_seconds)
            if signal.handle:
                self._out.append(act.Release(run.id, (signal.handle,)))
                signal.handle = 0
        elif task.stopping is not None and signal.done.failures:
            signal.done = _without_stopped(signal.done)
        if signal.handle:
            chunk = Chunk(signal.handle, 1, signal.nbytes)  # held until all its ranges are given away
            self._account(run, signal.nbytes)
        if signal.done.ranges:
            self._take_ranges(run, task, stream, signal, chunk, now)
        if chunk is not None:
            chunk.left -= 1
            if chunk.left <= 0:
                self._free(run, chunk)
        if run.ending is None and signal.final:
            self._block_ended(run, task, stream, signal, now)
        if run.ending is None:
            if not stream.running:
                stream.waits_for("upstream", now)
            self._offer(run, stream, now)
            self._maybe_over(run, stream, now)
        self._settle_ended(now)
        self._touch(run)

    def _take_ranges(
        self: Machine, run: Run, task: Task, stream: Stream, signal: sig.BlockPart, chunk: Chunk | None, now: float
    ) -> None:
        """Book the finished indices of a part: survivors go on, failures are retried or counted."""
        done = signal.done
        items = dropped = 0
        retried: dict[int, tuple[float, Any]] = {}
        lost: set[int] = set()
        for place, failure in enumerate(done.failures):
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
            for start, stop in _without(lo, hi, retried):
                part_mask = mask if (start, stop) == (lo, hi) else _submask(lo, mask, start, stop)
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
        failed = len(lost)
        stream.ok += items
        stream.dropped += dropped
        stream.failed += failed
        stream.measure(items + dropped + failed, done.seconds, signal.nbytes)
        self._emit(
            "stage.items",
            run,
            stream.stage,
            attempt=task.attempt,
            data={"lo": done.ranges[0][0], "hi": done.ranges[-1][1], "ok": items, "dropped": dropped, "failed": failed,
                  "seconds": done.seconds, "cpu_seconds": done.cpu_seconds, "bytes_in": signal.bytes_in,
                  "bytes_out": signal.nbytes, "worker_pid": signal.worker_pid,
                  "queued_ms": max(0.0, now - task.since - done.seconds) * 1000.0, "started": signal.started},
        )  # fmt: skip

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
        frontier.add(lo, (hi, chunk if total else None, at, total))
        for found in frontier.take(_first):
            entry: tuple[int, Chunk | None, int, int] = found  # type: ignore[assignment]
            _, held, start, count = entry
            if held is not None:
                first = stream.out_next
                stream.out_next = first + count
                held.left -= 1
                self._give(run, stream, first, first + count, -1, held, start, now)

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
            if chunk.left <= 0 and chunk is not _NOTHING:
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
        rest = self._rest(task, signal)
        if not rest:
            return
        if stream.shedding or stream.ended:
            for segment in rest:
                self._shed_segment(run, stream, segment, now)
        elif task.stopping == "timeout" or signal.status in ("error", "refused"):
            self._whole_block_failed(run, task, stream, rest, signal, now)
        elif signal.status == "lost":
            self._block_lost(run, stream, rest, signal, now)
        elif signal.status == "ok" and not task.reported:
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
                self._put_back(stream, segment)

    def _put_back(self: Machine, stream: Stream, segment: Segment) -> None:
        if stream.batch:
            stream.jobs.appendleft([segment])
            stream.ready_count += segment.count()
        else:
            stream.push(segment)

    def _rest(self: Machine, task: Task, signal: sig.BlockPart) -> list[Segment]:
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

    # ------------------------------------------------------------ items that fail

    def _item_failed(
        self: Machine, run: Run, task: Task, stream: Stream, failure: Any, verdict: Any, now: float
    ) -> float | None:
        """Delay until the item's next attempt, or None: it has failed for good and is booked as such."""
        stage = stream.stage
        policies = run.layout.specs[stage].policies
        status = failure.status
        if status == "cancel":
            self._end_run(run, "cancelled", failure.info.message, now)
            return None
        if run.ending is not None or stream.shedding:
            self._item_lost(run, stream, failure.info, failure.path, task.attempt, now)
            return None
        retry, wait, roll = verdict
        question = sig.AttemptEnded(
            task.id, status, error=failure.info, retryable=failure.info.retryable, retry=retry, wait=wait, roll=roll,
            retry_after=failure.info.retry_after,
        )  # fmt: skip
        if status == "fail" and failure.info.type != "stageflow.StageOutput":
            question.status = "error"  # it raised
        delay = self._retry_delay(run, stage, task.attempt, question, now, policies, (stage, failure.index))
        if delay is not None:
            self._emit(
                "stage.retrying",
                run,
                stage,
                item=failure.path,
                attempt=task.attempt,
                data={"delay_ms": delay * 1000.0, "error": failure.info.message, "why": "failure"},
            )
            return delay
        self._item_lost(run, stream, failure.info, failure.path, task.attempt, now)
        return None

    def _item_lost(
        self: Machine,
        run: Run,
        stream: Stream,
        info: ErrorInfo,
        path: tuple[int, ...] | None,
        attempt: int,
        now: float,
    ) -> None:
        """One item has failed for good: end the run, spend the error budget, or go on without it."""
        stage = stream.stage
        policies = run.layout.specs[stage].policies
        run.failed_items[stage] = run.failed_items.get(stage, 0) + 1
        run.clean = False
        self._emit(
            "stage.failed",
            run,
            stage,
            item=path,
            attempt=attempt,
            data={"error": info.message, "error_type": info.type, "retryable": info.retryable, "error_info": info},
        )
        if policies.max_failed_items is not None:
            stream.last_failure = info
            self._check_budget(run, stream, now)
        elif self._mode(run, stage) == "fail_fast":
            name = run.layout.name(stage)
            where = f" at item {list(path)}" if path else ""
            self._end_run(run, "failed", f"stage {name!r} failed{where}: {info.message}", now, info)

    def _check_budget(self: Machine, run: Run, stream: Stream, now: float) -> bool:
        """True when more items of the stage have failed than it may lose. A share can only be told at the end."""
        stage = stream.stage
        budget = run.layout.specs[stage].policies.max_failed_items
        count = run.failed_items.get(stage, 0)
        if budget is None or stream.failing is not None:
            return False
        if isinstance(budget, int):
            over = count > budget
        else:
            over = stream.in_total >= 0 and stream.arrived >= stream.in_total and count > budget * stream.arrived
        if over:
            last = stream.last_failure or _no_reason()
            text = (
                f"stage {run.layout.name(stage)!r}: {count} of {stream.arrived} items failed; its budget is {budget}. "
                f"Last: {last.message}"
            )
            error = ErrorInfo(type=last.type, message=text, traceback=last.traceback)
            self._fail_stream(run, stream, error, now, shed=True)
        return over

    def _retry_item(self: Machine, run: Run, task: Task, stream: Stream, index: int, delay: float, now: float) -> None:
        assert task.segments is not None
        for segment in task.segments:
            if segment.lo <= index < segment.hi:
                single = segment.cut(index, index + 1)
                run.first_start.setdefault((stream.stage, index), task.begun)
                self._retry_segment(run, stream, single, task.attempt + 1, delay, now)
                return

    def _whole_block_failed(
        self: Machine, run: Run, task: Task, stream: Stream, rest: list[Segment], signal: sig.BlockPart, now: float
    ) -> None:
        """The call failed outside any item: a timeout, a value that cannot be encoded, a batch that raised."""
        error = signal.error or ErrorInfo(type="Exception", message="the block failed")
        status = "error"
        if task.stopping == "timeout":
            limit = task.limit
            name = run.layout.name(stream.stage)
            error = timeout_info(
                f"stage {name!r} (attempt {task.attempt}) exceeded its timeout of {limit:g} s",
                elapsed=max(limit, signal.done.seconds),
                limit=limit,
                lane=task.lane,
                attempt=task.attempt,
                abandoned=signal.abandoned or None,
            )
            status = "timeout"
        count = sum(segment.count() for segment in rest)
        retry, wait, roll = signal.retries[0] if signal.retries else (None, None, 1.0)
        question = sig.AttemptEnded(
            task.id, status, error=error, retry=retry, wait=wait, roll=roll, retryable=error.retryable,
            retry_after=error.retry_after,
        )  # fmt: skip
        key = (stream.stage, rest[0].lo)
        policies = run.layout.specs[stream.stage].policies
        if signal.status == "refused" and status != "timeout":
            question.status = "refused"
        if policies.total_timeout is not None:
            run.first_start.setdefault(key, task.begun)
        # a thread that goes on could run beside its own retry: side effects twice at once
        overlaps = signal.abandoned and run.layout.specs[stream.stage].kind == "work" and policies.idempotency is None
        delay = None if overlaps else self._retry_delay(run, stream.stage, task.attempt, question, now, policies, key)
        if delay is None and count > 1 and run.ending is None and not overlaps:
            # the guilty alone are lost: run the elements one by one
            for segment in rest:
                self._take_apart(run, stream, segment, now)
            return
        for segment in rest:
            if delay is not None:
                self._emit(
                    "stage.retrying",
                    run,
                    stream.stage,
                    item=(segment.lo,),
                    attempt=task.attempt,
                    data={"delay_ms": delay * 1000.0, "error": error.message, "why": "failure"},
                )
                self._retry_segment(run, stream, segment, task.attempt + 1, delay, now)
            else:
                item = ErrorInfo(
                    **{n: getattr(error, n) for n in error.__struct_fields__ if n != "item"}, item=(segment.lo,)
                )
                self._consume(run, task, segment.lo, segment.hi)
                stream.failed += segment.count()
                self._item_lost(run, stream, item, (segment.lo,), task.attempt, now)
                self._emit_block(run, stream, segment, task.attempt, now)
                self._empty(run, stream, segment.lo, segment.hi, now)

    def _emit_block(self: Machine, run: Run, stream: Stream, segment: Segment, attempt: int, now: float) -> None:
        """Book a failed item as a block of its own, so that every view counts it."""
        self._emit(
            "stage.items",
            run,
            stream.stage,
            attempt=attempt,
            data={"lo": segment.lo, "hi": segment.hi, "ok": 0, "dropped": 0, "failed": segment.count(), "seconds": 0.0,
                  "cpu_seconds": 0.0, "bytes_in": 0, "bytes_out": 0, "worker_pid": 0, "queued_ms": 0.0, "started": now},
        )  # fmt: skip

    def _retry_segment(
        self: Machine, run: Run, stream: Stream, segment: Segment, attempt: int, delay: float, now: float
    ) -> None:
        later = Segment(
            segment.lo, segment.hi, segment.mask, segment.columns, now, segment.deaths, attempt, segment.apart
        )
        run.retry_timers += 1

        def again(due: sig.TimerDue, when: float) -> None:
            run.retry_timers -= 1
            del stream.delayed[timer]
            later.since = when
            self._put_back(stream, later)
            self._offer(run, stream, when)

        timer = self._set_timer(run, now + delay, again)
        stream.delayed[timer] = later

    def _block_lost(
        self: Machine, run: Run, stream: Stream, rest: list[Segment], signal: sig.BlockPart, now: float
    ) -> None:
        """The worker died. A block is narrowed down to the guilty item; that item is lost after `poison_limit`
        deaths."""
        for segment in rest:
            if not signal.suspect:
                self._put_back(stream, segment)
                continue
            deaths = segment.deaths + 1
            count = segment.count()
            if count <= 1 and deaths >= self.poison_limit:
                info = signal.error or ErrorInfo(
                    type="stageflow.core.errors.WorkerDiedError", message="the worker died"
                )
                index = _indices(segment)[0] if count else segment.lo
                self._used(run, segment.columns, count)
                stream.failed += count
                self._item_lost(run, stream, info, (index,), segment.attempt, now)
                self._emit_block(run, stream, segment, segment.attempt, now)
                self._empty(run, stream, segment.lo, segment.hi, now)
                continue
            self._emit(
                "stage.retrying",
                run,
                stream.stage,
                item=(segment.lo,),
                attempt=segment.attempt,
                data={"delay_ms": 0.0, "error": signal.error.message if signal.error else "", "why": "infrastructure"},
            )
            share = max(1, count // 8)
            piece: Segment | None = segment
            while piece is not None:
                head, piece = piece.split_at(share)
                head.deaths = deaths
                head.since = now
                self._put_back(stream, head)

    # ------------------------------------------------------------ folds

    def _start_fold(self: Machine, run: Run, stream: Stream, lane: Lane, job: str, what: Any, now: float) -> None:
        accumulators: tuple[int, ...] = ()
        segments: list[Segment] = []
        if job == "fold":
            segments = what[1]
            stream.ready_count -= sum(segment.count() for segment in segments)
        elif job == "merge":
            accumulators = what[2]
        else:
            segments = what
            held = stream.kept[0].handle if stream.kept else 0
            if held:
                accumulators = (held,)
            else:
                job = "fold"
        attempt = segments[0].attempt if segments else stream.merge_attempts.pop(what[:2], 1)
        task = self._new_task(run, stream, lane, attempt, segments, now)
        task.job = job
        task.node = what
        task.accumulators = accumulators
        self._out.append(
            act.StartFold(
                task.id,
                run.id,
                stream.stage,
                lane.name,
                job,
                tuple(segment.wire() for segment in segments),
                accumulators,
                task.attempt,
                bool(segments and segments[0].deaths),
                task.tokens,
            )
        )

    def _fold_ended(self: Machine, task: Task, signal: sig.AttemptEnded, now: float) -> None:
        """A step of a reduce is over."""
        run, stream = task.run, task.stream
        assert stream is not None
        assert task.segments is not None
        stream.running -= max(1, task.items)
        status = signal.status
        if run.ending is not None or stream.ended:
            if signal.handle:
                self._out.append(act.Release(run.id, (signal.handle,)))
            for segment in task.segments:
                self._used(run, segment.columns, segment.count())
            if task.job == "merge":
                self._release_accumulators(run, stream, task.node[2])
            return
        if status == "cancel" and task.stopping is None:
            self._end_run(run, "cancelled", signal.reason or "cancelled by the stage", now)
            return
        if status == "ok" and task.stopping is None:
            self._fold_done(run, stream, task, signal, now)
        elif status == "lost" and task.stopping is None:
            self._fold_again(run, stream, task, signal, now)
        else:
            if task.stopping == "timeout":
                limit = task.limit
                signal.error = timeout_info(
                    f"a fold of stage {run.layout.name(stream.stage)!r} exceeded its timeout of {limit:g} s",
                    elapsed=max(limit, signal.seconds),
                    limit=limit,
                )
                signal.status = "timeout"
            key = (stream.stage, task.segments[0].lo if task.segments else task.node[:2])
            if task.attempt == 1:
                run.first_start[key] = task.begun
            delay = self._retry_delay(run, stream.stage, task.attempt, signal, now, None, key)
            if delay is None:
                error = signal.error or ErrorInfo(
                    type="stageflow.StageOutput", message=signal.reason or "the fold failed"
                )
                self._fold_failed(run, stream, task, error, now)
                return
            self._emit(
                "stage.retrying",
                run,
                stream.stage,
                attempt=task.attempt,
                data={
                    "delay_ms": delay * 1000.0,
                    "error": signal.error.message if signal.error else "",
                    "why": "failure",
                },
            )
            run.retry_timers += 1

            def again(due: sig.TimerDue, when: float) -> None:
                run.retry_timers -= 1
                del stream.delayed_folds[timer]
                self._redo_fold(run, stream, task, task.attempt + 1, when)

            timer = self._set_timer(run, now + delay, again)
            stream.delayed_folds[timer] = task

    def _fold_failed(self: Machine, run: Run, stream: Stream, task: Task, error: ErrorInfo, now: float) -> None:
        """A step has failed for good, and the reduce with it."""
        assert task.segments is not None
        for segment in task.segments:
            self._used(run, segment.columns, segment.count())
        if task.job == "merge":
            self._release_accumulators(run, stream, task.node[2])
        self._let_go(run, stream)
        self._fail_stage(run, stream.stage, error, now, attempt=task.attempt)

    def _release_accumulators(self: Machine, run: Run, stream: Stream, handles: Any) -> None:
        assert stream.fold is not None
        there = tuple(handle for handle in handles if handle)
        for handle in there:
            self._account(run, -stream.fold.sizes.pop(handle))
        if there:
            self._out.append(act.Release(run.id, there))

    def _fold_again(self: Machine, run: Run, stream: Stream, task: Task, signal: sig.AttemptEnded, now: float) -> None:
        """A lost worker redoes one block: no accumulator lives in a worker between tasks."""
        assert task.segments is not None
        if signal.suspect:
            key = (stream.stage, task.segments[0].lo if task.segments else task.node[:2])
            deaths = run.deaths[key] = run.deaths.get(key, 0) + 1
            if deaths >= self.poison_limit:
                error = signal.error or ErrorInfo(
                    type="stageflow.core.errors.WorkerDiedError", message="the worker died"
                )
                self._fold_failed(run, stream, task, error, now)
                return
            for segment in task.segments:
                segment.deaths = deaths
            self._emit(
                "stage.retrying",
                run,
                stream.stage,
                attempt=task.attempt,
                data={"delay_ms": 0.0, "error": signal.error.message if signal.error else "", "why": "infrastructure"},
            )
        self._redo_fold(run, stream, task, task.attempt, now)

    def _redo_fold(self: Machine, run: Run, stream: Stream, task: Task, attempt: int, now: float) -> None:
        assert task.segments is not None
        for segment in task.segments:
            segment.attempt = attempt
            segment.since = now
        if stream.fold is not None:
            if task.job == "merge":
                stream.merge_attempts[task.node[:2]] = attempt
            stream.fold.jobs.appendleft(("merge" if task.job == "merge" else "fold", task.node))
            stream.ready_count += sum(segment.count() for segment in task.segments)
        else:
            for segment in task.segments:
                stream.push(segment)
        self._offer(run, stream, now)

    def _fold_done(self: Machine, run: Run, stream: Stream, task: Task, signal: sig.AttemptEnded, now: float) -> None:
        assert task.segments is not None
        count = 0
        covered = 0
        for segment in task.segments:
            here = segment.count()
            count += here
            covered += segment.hi - segment.lo
            self._used(run, segment.columns, here)
        self._account(run, signal.nbytes)
        if task.attempt > 1 and task.segments:
            run.previous_delay.pop((stream.stage, task.segments[0].lo), None)
        fold = stream.fold
        if fold is not None:
            fold.sizes[signal.handle] = signal.nbytes
            if task.job == "merge":
                level, i, handles = task.node
                self._release_accumulators(run, stream, handles)
                fold.settle(level, i, signal.handle)
            else:
                fold.settle(0, task.node[0], signal.handle)
        else:
            stream.done += covered
            if stream.kept:
                self._free(run, stream.kept.pop())
            stream.kept.append(Chunk(signal.handle, 1, signal.nbytes))
        stream.ok += count
        stream.measure(count, signal.seconds, signal.nbytes)
        if not stream.running:
            stream.waits_for("upstream", now)
        lo = task.segments[0].lo if task.segments else 0
        self._emit(
            "stage.items",
            run,
            stream.stage,
            attempt=task.attempt,
            data={"lo": lo, "hi": lo + count, "ok": count, "dropped": 0, "failed": 0, "seconds": signal.seconds,
                  "cpu_seconds": signal.cpu_seconds, "bytes_in": signal.bytes_in, "bytes_out": signal.nbytes,
                  "worker_pid": signal.worker_pid, "queued_ms": max(0.0, now - task.since - signal.seconds) * 1000.0,
                  "started": signal.started},
        )  # fmt: skip
        self._offer(run, stream, now)
        self._maybe_over(run, stream, now)

    # ------------------------------------------------------------ ending

    def _maybe_over(self: Machine, run: Run, stream: Stream, now: float) -> None:
        """Everything that came in has been finished here: the stage is done."""
        if stream.ended or not stream.flowing or stream.running or stream.in_total < 0 or stream.is_source:
            return
        if stream.arrived < stream.in_total or not self._joined(stream):
            return
        if run.layout.roles[stream.stage] == Role.REDUCE:
            self._reduce_over(run, stream, now)
            return
        if stream.ready or stream.jobs or stream.batch_group or stream.delayed:
            return
        if stream.done < stream.arrived:
            return
        if stream.failing is None and run.failed_items.get(stream.stage):
            if self._check_budget(run, stream, now):
                return
        if stream.failing is not None:
            stream.ended = True
            self._fail_stage(run, stream.stage, stream.failing, now)
            return
        self._stream_over(run, stream, now)

    # ------------------------------------------------------------ failing as a whole

    def _fail_stream(self: Machine, run: Run, stream: Stream, error: ErrorInfo, now: float, *, shed: bool) -> None:
        """The stage has failed as a whole. Under fail_fast the run ends; else the stage ends FAILED when what runs has
        come back. With `shed` nothing more is started, and every index that is left counts as gone."""
        if stream.failing is not None or stream.ended:
            return
        stream.failing = error
        if self._mode(run, stream.stage) == "fail_fast":
            stream.ended = True
            self._fail_stage(run, stream.stage, error, now)
            return
        if not shed:
            return
        stream.shedding = True
        if stream.batch_timer:
            self._drop_timer(stream.batch_timer)
            stream.batch_timer = 0
        for timer, segment in list(stream.delayed.items()):
            self._drop_timer(timer)
            run.retry_timers -= 1
            del stream.delayed[timer]
            self._shed_segment(run, stream, segment, now)
        held = [entry[2] for entry in sorted(stream.ready, key=lambda entry: entry[:2])]
        held.extend(segment for job in stream.jobs for segment in job)
        held.extend(stream.batch_group)
        stream.ready.clear()
        stream.jobs.clear()
        stream.batch_group = []
        stream.ready_count = 0
        if stream.batch_frontier is not None:
            held.extend(stream.batch_frontier.drain())  # type: ignore[arg-type]
        for segment in held:
            self._shed_segment(run, stream, segment, now)
        if stream.stage in run.layout.expands and not stream.stopped:
            self._stop_source(run, stream, "the stage has failed", now)
        self._maybe_over(run, stream, now)

    def _shed_segment(self: Machine, run: Run, stream: Stream, segment: Segment, now: float) -> None:
        """These items will not be run: their indices are gone."""
        self._used(run, segment.columns, segment.count())
        if not stream.ended:
            self._empty(run, stream, segment.lo, segment.hi, now)

    def _let_go(self: Machine, run: Run, stream: Stream) -> None:
        """The stage ends without its items: give back all that it holds."""
        stream.ended = True
        for timer in (*stream.delayed, *stream.delayed_folds):
            self._drop_timer(timer)
            run.retry_timers -= 1
        if stream.batch_timer:
            self._drop_timer(stream.batch_timer)
            stream.batch_timer = 0
        held = [*(entry[2] for entry in stream.ready), *stream.delayed.values(), *stream.batch_group]
        held.extend(segment for job in stream.jobs for segment in job)
        if stream.batch_frontier is not None:
            held.extend(stream.batch_frontier.drain())  # type: ignore[arg-type]
        if stream.join is not None:
            for side in stream.join.pending:
                held.extend(side)
                side.clear()
        for task in stream.delayed_folds.values():
            held.extend(task.segments)
            if task.job == "merge":
                self._release_accumulators(run, stream, task.node[2])
        fold = stream.fold
        if fold is not None:
            held.extend(part for _, parts in fold.blocks.values() for part in parts)
            for job, what in fold.jobs:
                if job == "merge":
                    self._release_accumulators(run, stream, what[2])  # type: ignore[index]
                else:
                    held.extend(what[1])  # type: ignore[index]
            self._release_accumulators(run, stream, fold.nodes.values())
            fold.blocks.clear()
            fold.jobs.clear()
            fold.nodes.clear()
        stream.ready.clear()
        stream.delayed.clear()
        stream.delayed_folds.clear()
        stream.jobs.clear()
        stream.batch_group = []
        stream.ready_count = 0
        for segment in held:
            self._used(run, segment.columns, segment.count())
        if run.layout.roles[stream.stage] == Role.REDUCE:
            kept, stream.kept = stream.kept, []
            for chunk in kept:
                self._free(run, chunk)
        if stream.stage in run.layout.expands and not stream.stopped and stream.started_at >= 0:
            stream.stopped = True
            run.pulling += 0 if stream.pull_open else 1
            stream.pull_open = True
            self._out.append(act.StopSource(run.id, stream.stage, "the stage is over"))

    def _empty(self: Machine, run: Run, stream: Stream, lo: int, hi: int, now: float) -> None:
        """Indices [lo, hi) end here without a survivor. A queue, not recursion: chains of stages may be long."""
        queue = self._emptied
        queue.append((run, stream, lo, hi))
        if len(queue) > 1:
            return  # the loop below is at work
        while queue:
            run, stream, lo, hi = queue[0]
            self._finished(run, stream, lo, hi, 0, None, 0, now)
            self._maybe_over(run, stream, now)
            queue.popleft()

    def _take_apart(self: Machine, run: Run, stream: Stream, segment: Segment, now: float) -> None:
        """Let the items of a segment run each by itself; every index of it is covered."""
        lo = segment.lo
        indices = _indices(segment)
        for place, index in enumerate(indices):
            hi = segment.hi if place == len(indices) - 1 else index + 1
            single = segment.cut(lo, hi)
            self._put_back(stream, Segment(lo, hi, single.mask, single.columns, now, segment.deaths, 1, apart=True))
            lo = hi

    def _reduce_over(self: Machine, run: Run, stream: Stream, now: float) -> None:
        fold = stream.fold
        if fold is not None:
            if fold.total_blocks < 0:
                return
            handle = fold.root()
            if handle is None:
                return
        else:
            if stream.ready or stream.done < stream.arrived:
                return
            handle = stream.kept[0].handle if stream.kept else 0
        if handle == 0:
            reduce = run.layout.specs[stream.stage].reduce
            if reduce is None or not reduce.has_initial:
                name = run.layout.name(stream.stage)
                self._let_go(run, stream)
                error = ErrorInfo(
                    type="stageflow.core.errors.DefinitionError",
                    message=f"reduce {name!r} got no element and has no `initial`",
                )
                self._fail_stage(run, stream.stage, error, now)
                return
        self._out.append(act.KeepAccumulator(run.id, stream.stage, handle))
        self._stream_over(run, stream, now)

    def _stream_over(self: Machine, run: Run, stream: Stream, now: float) -> None:
        if run.state[stream.stage] >= ENDED:
            return
        stream.ended = True
        if stream.is_source or run.layout.roles[stream.stage] == Role.SINK:
            stream.in_total = max(stream.in_total, 0)
        stream.waits_for("", now)
        self._move(run, stream.stage, _S.DONE)
        joined = stream.join.dropped if stream.join is not None else 0
        begun = run.first_start.get(stream.stage, now)
        self._emit(
            "stage.completed",
            run,
            stream.stage,
            data={"duration_ms": (now - begun) * 1000.0, "items_in": stream.ok + stream.dropped + stream.failed,
                  "items_out": stream.ok, "dropped": stream.dropped, "failed": stream.failed,
                  "emitted": stream.out_next if stream.flow_frontier is not None else stream.ok,
                  "join_dropped": joined, "wait": stream.waits},
        )  # fmt: skip
        self._stage_over(run, stream.stage)

    def _collector_over(self: Machine, run: Run, producer: int) -> None:
        """A stage that needed a stream as a whole has ended."""
        stream = run.streams.get(producer)
        if stream is None:
            return
        stream.collected += 1
        if stream.collected >= run.layout.collectors.get(producer, 0) and producer not in run.layout.keeps:
            stream.keeps = False
            kept, stream.kept = stream.kept, []
            for chunk in kept:
                chunk.left -= 1
                if chunk.left <= 0:
                    self._free(run, chunk)

    def _release_stream(self: Machine, run: Run, stream: Stream) -> None:
        """The run is over: its values belong to the result, or to nobody; the driver drops the rest with the run."""
        stream.ready.clear()
        stream.kept.clear()


_TOO_LARGE: Final = "SF-COLLECT-TOO-LARGE"
#: stands for a column of which no item is there
_NOTHING: Final = Chunk(0, 1 << 60, -1)


def _no_reason() -> ErrorInfo:
    return ErrorInfo(type="Exception", message="failed without a reason")


def _gone(stream: Stream) -> bool:
    """Whether the stage takes no more items."""
    return stream.ended or stream.shedding


def _first(entry: Any) -> int:
    end: int = entry[0]
    return end


def _end(segment: Any) -> int:
    end: int = segment.hi
    return end


def _indices(segment: Segment) -> list[int]:
    if segment.mask < 0:
        return list(range(segment.lo, segment.hi))
    return [segment.lo + bit for bit in range(segment.hi - segment.lo) if segment.mask >> bit & 1]


def _without(lo: int, hi: int, points: Any) -> list[tuple[int, int]]:
    """[lo, hi) cut at the points, which are left out."""
    inside = sorted(point for point in points if lo <= point < hi)
    if not inside:
        return [(lo, hi)]
    found: list[tuple[int, int]] = []
    for point in inside:
        if lo < point:
            found.append((lo, point))
        lo = point + 1
    if lo < hi:
        found.append((lo, hi))
    return found


def _without_stopped(done: Done) -> Done:
    """A part of a task that was asked to stop: items that heeded it have not decided anything, so they are unrun."""
    stopped = {failure.index for failure in done.failures if failure.status == "cancel"}
    ranges = tuple(
        (start, stop, mask if (start, stop) == (lo, hi) else _submask(lo, mask, start, stop))
        for lo, hi, mask in done.ranges
        for start, stop in _without(lo, hi, stopped)
    )
    failures = tuple(failure for failure in done.failures if failure.index not in stopped)
    return msgspec.structs.replace(done, ranges=ranges, failures=failures)


def _submask(lo: int, mask: int, start: int, stop: int) -> int:
    if mask < 0:
        return -1
    part = (mask >> (start - lo)) & ((1 << (stop - start)) - 1)
    return -1 if part == (1 << (stop - start)) - 1 else part
