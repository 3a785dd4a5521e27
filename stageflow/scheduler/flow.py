"""Streams: blocks of items run, what survives goes on to the readers, without a barrier.

Depth first: finish old items before new ones. A source is pulled (`sourcing`) only when its readers run dry and the
byte budget allows; a stage whose reader has enough waiting does not start; and if nothing of a run is running, its
deepest waiting block starts whatever the limits say, so that draining is never refused.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stageflow.core.output import ErrorInfo
from stageflow.pipeline.spec import Role
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.backpressure import SPILL_SHARE
from stageflow.scheduler.books import Run
from stageflow.scheduler.layout import BRIEF, MAX_BLOCK
from stageflow.scheduler.ranges import NOTHING, TOO_LARGE, end_of, failure_data
from stageflow.scheduler.states import ENDED, StageState
from stageflow.scheduler.streams import NEAR_SECONDS, Chunk, Fold, Frontier, Join, Segment, Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState


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
        stream.can_block = layout.block[stage] > 0
        stream.brief = layout.block[stage] == BRIEF
        if layout.lanes[stage] != "process":
            stream.ample = NEAR_SECONDS
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
                    segment.columns = ((NOTHING, 0),)
                for column, producer in enumerate(elements):
                    if producer == stream.stage:
                        for joined in reader.join.add(column, segment):
                            self._accept(run, reader, joined, now)
                        while reader.join.spent:
                            spent = reader.join.spent.pop()
                            if spent is not chunk and spent is not NOTHING and spent.left <= 0:
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
                error = ErrorInfo(type="stageflow.core.errors.CollectTooLargeError", message=text, code=TOO_LARGE)
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
        there = segment.count()
        stream.came += there
        if stream.ended:
            self._used(run, segment.columns, there)
            return
        if stream.doomed:
            self._sift(run, stream, segment)
        if stream.resumed:
            self._resume(stream, segment)
        if stream.shedding:
            self._shed_segment(run, stream, segment, now)
        elif stream.fold is not None:
            before = len(stream.fold.jobs)
            stream.fold.add(segment)
            stream.ready_count += there
            if len(stream.fold.jobs) > before:
                self._offer(run, stream, now)
        elif stream.batch_frontier is not None:
            stream.batch_frontier.add(segment.lo, segment)
            for ordered in stream.batch_frontier.take(end_of):
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

    def _held_back(self: Machine, run: Run, stream: Stream) -> str | None:
        """Why no more may start, None when it may: the readers have enough, bytes or memory are short."""
        if stream.standing or self._is_fed(run, stream, 1):
            return "downstream"
        if self.memory or self.pressure >= 2 or self.policies:
            return self._refused(run, stream, 1, "start")
        return None

    def _is_fed(self: Machine, run: Run, stream: Stream, part: int) -> bool:
        """Whether a reader has enough waiting, or that divided by `part`.

        Who was held back goes on at the half: short items then come in blocks. One at a time, each would cost a block.
        """
        for reader in self._outlet(run, stream).readers:
            slots = self.lanes[run.layout.lanes[reader.stage]].slots
            most = 4 * slots * (reader.block_size(slots, MAX_BLOCK) if reader.can_block else 1) + 16
            if reader.batch:
                most += 2 * slots * reader.batch
            if reader.fold is not None:
                most += reader.fold.block * (slots + 2)
            if reader.ready_count * part >= most:
                return True
        return False

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

    def _stream_over(self: Machine, run: Run, stream: Stream, now: float) -> None:
        if run.state[stream.stage] >= ENDED:
            return
        stream.ended = True
        if stream.is_source or run.layout.roles[stream.stage] == Role.SINK:
            stream.in_total = max(stream.in_total, 0)
        stream.waits_for("", now)
        self._move(run, stream.stage, _S.DONE)
        self._tell_rest(run, stream, 0, now)
        self._emit("stage.completed", run, stream.stage, data=self._totals(run, stream, 0, now))
        self._stage_over(run, stream.stage)

    def _emitted(self: Machine, run: Run, stream: Stream) -> int:
        """How many values have left the stage."""
        if run.layout.roles[stream.stage] == Role.REDUCE:
            return int(run.state[stream.stage] == _S.DONE)
        return stream.out_next if stream.flow_frontier is not None else stream.ok

    def _totals(self: Machine, run: Run, stream: Stream, stopped: int, now: float) -> dict[str, Any]:
        """What the event that closes a stream says; `stopped` of its items came in and were not finished."""
        return {
            "duration_ms": (now - run.first_start.get(stream.stage, now)) * 1000.0,
            "items_in": stream.ok + stream.dropped + stream.failed + stream.cancelled + stopped,
            "items_out": stream.ok,
            "dropped": stream.dropped,
            "failed": stream.failed,
            "cancelled": stream.cancelled + stopped,
            "emitted": self._emitted(run, stream),
            "join_dropped": stream.join.dropped if stream.join is not None else 0,
            "wait": stream.waits,
        }

    def _tell_rest(self: Machine, run: Run, stream: Stream, stopped: int, now: float) -> None:
        """Tell what no block has told: values that left after their own block, and items that the end has stopped."""
        apart = stream.flow_frontier is not None or run.layout.roles[stream.stage] == Role.REDUCE
        late = self._emitted(run, stream) - stream.told if apart else 0
        if late or stopped:
            stream.told += late
            self._emit(
                "stage.items",
                run,
                stream.stage,
                data={"lo": stream.done, "hi": stream.done, "ok": 0, "dropped": 0, "failed": 0, "cancelled": stopped,
                      "emitted": late, "seconds": 0.0, "cpu_seconds": 0.0, "bytes_in": 0, "bytes_out": 0,
                      "worker_pid": 0, "queued_ms": 0.0, "started": now},
            )  # fmt: skip

    def _stopped_streams(self: Machine, run: Run, now: float) -> None:
        """The run is over before its streams were: every item that came in is counted by what became of it."""
        for stage, stream in run.streams.items():
            gone = stream.ok + stream.dropped + stream.failed + stream.cancelled
            stopped = 0 if stream.is_source else stream.came - gone
            self._tell_rest(run, stream, stopped, now)
            if run.state[stage] < ENDED and stream.flowing:
                stream.waits_for("", now)
                totals = self._totals(run, stream, stopped, now)
                if stage == run.culprit and run.error is not None:
                    run.state[stage] = _S.FAILED
                    self._emit("stage.failed", run, stage, data={**totals, **failure_data(run.error)})
                else:
                    run.state[stage] = _S.CANCELLED
                    self._emit("stage.cancelled", run, stage, data={**totals, "reason": run.reason})

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
