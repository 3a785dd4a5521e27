"""Items of a flat-map that give more than may be held: their values go on while their generators run.

An item whose values have begun to go on is final: it is not run again, unless its stage says that it gives the same
again (`replayable`); then what went on is passed over.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING

from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Run, Task
from stageflow.scheduler.outcomes import is_final
from stageflow.scheduler.streams import Chunk, Segment, Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine


class FlowingRules:
    """Values of items that have not ended."""

    def _take_flow(self: Machine, run: Run, task: Task, stream: Stream, signal: sig.BlockPart, now: float) -> None:
        """More values of an item whose generator still runs: they go on if it is the oldest, else wait for their
        turn."""
        ((index, told),) = signal.done.flows
        (count,) = signal.done.counts or (0,)
        unwanted = run.ending is not None or stream.ended or stream.shedding
        doomed = task.doomed or ()
        if unwanted or not signal.handle or index in doomed or (doomed and stream.batch):
            if signal.handle:
                self._out.append(act.Release(run.id, (signal.handle,)))
            if signal.done.asks:
                self._out.append(act.GoOn(task.id))
            self._touch(run)
            return
        chunk = Chunk(signal.handle, 1, signal.nbytes, count)
        self._account(run, signal.nbytes)
        stream.flowed[index] = told + count
        stream.early.setdefault(index, []).append((chunk, count))
        self._release_flow(run, stream, now)
        data = {"lo": index, "hi": index, "ok": 0, "dropped": 0, "failed": 0, "emitted": stream.out_next - stream.told,
                "seconds": 0.0, "cpu_seconds": 0.0, "bytes_in": 0, "bytes_out": signal.nbytes,
                "worker_pid": signal.worker_pid, "queued_ms": 0.0, "started": signal.started}  # fmt: skip
        stream.told = stream.out_next
        self._emit("stage.items", run, stream.stage, attempt=task.attempt, data=data)
        task.item = index
        task.gave += signal.nbytes
        if signal.done.asks:
            self._asks(run, task, stream, now)
        self._settle_ended(now)
        self._touch(run)

    def _release_flow(self: Machine, run: Run, stream: Stream, now: float) -> None:
        """Pass on what the oldest item that has not ended has given so far."""
        if not stream.early:
            return
        frontier = stream.flow_frontier
        assert frontier is not None
        for chunk, count in stream.early.pop(frontier.next, ()):
            self._let_flow(run, stream, chunk, 0, count, now)

    def _let_flow(self: Machine, run: Run, stream: Stream, chunk: Chunk, at: int, count: int, now: float) -> None:
        """Values that were held get their indices and go on."""
        first = stream.out_next
        stream.out_next = first + count
        chunk.left -= 1
        self._give(run, stream, first, first + count, -1, chunk, at, now)

    def _begun(self: Machine, stream: Stream, segments: list[Segment]) -> int:
        """How many values of the one item of a block, or of a batch, have gone on already."""
        if not stream.flowed or (len(segments) != 1 and not stream.batch):
            return 0
        segment = segments[0]
        return next((count for index, count in stream.flowed.items() if segment.has(index)), 0)

    def _begun_apart(
        self: Machine, run: Run, task: Task, stream: Stream, rest: list[Segment], signal: sig.BlockPart, now: float
    ) -> list[Segment]:
        """A block has ended before items whose values have begun to go on: they fail, or are to run by themselves.
        Returns what is left of it."""
        if stream.batch:
            return self._begun_batch(run, task, stream, rest, signal, now)
        left: list[Segment] = []
        for segment in rest:
            lo = segment.lo
            for index in sorted(index for index in stream.flowed if segment.has(index)):
                if lo < index:
                    self._keep_rest(run, stream, segment.cut(lo, index), left, now)
                single = segment.cut(index, index + 1)
                lo = index + 1
                if run.layout.specs[stream.stage].policies.replayable:
                    single.apart = True
                    left.append(single)
                else:
                    self._whole_block_failed(run, task, stream, [single], signal, now)
            if lo == segment.lo:
                left.append(segment)
            elif lo < segment.hi:
                self._keep_rest(run, stream, segment.cut(lo, segment.hi), left, now)
        return left

    def _begun_batch(
        self: Machine, run: Run, task: Task, stream: Stream, rest: list[Segment], signal: sig.BlockPart, now: float
    ) -> list[Segment]:
        """A batch has ended before its values had all gone on: it is run again as it is, or all of it fails. What is
        left of one of which nothing has gone on."""
        if not rest or not self._has_flowed(stream, task.segments or rest):
            return rest
        if signal.status == "lost" and run.layout.specs[stream.stage].policies.replayable:
            deaths = max(segment.deaths for segment in rest) + signal.suspect
            if not (signal.suspect and is_final(signal.error, deaths, self.poison_limit)):
                for segment in rest:
                    segment.deaths = deaths
                self._put_back(stream, *rest)
                return []
        if signal.status == "ok" and task.stopping is None:
            self._put_back(stream, *rest)  # its lane gave it back
            return []
        self._whole_block_failed(run, task, stream, rest, signal, now)
        return []

    def _has_flowed(self: Machine, stream: Stream, segments: list[Segment]) -> bool:
        """Whether values of one of these items, or of the batch that they are, have gone on."""
        return any(segments[0].lo <= index < segments[-1].hi for index in stream.flowed)

    def _keep_rest(self: Machine, run: Run, stream: Stream, segment: Segment, left: list[Segment], now: float) -> None:
        """What lies beside such an item: nothing is run where there is only a gap."""
        if segment.count():
            left.append(segment)
        else:
            self._empty(run, stream, segment.lo, segment.hi, now)
