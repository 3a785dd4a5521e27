"""Sources: pulled when their readers run dry and the byte budget allows, made anew when they fail and may be.

A value that is laid out for a flat-map or a map over an input is pulled the same way.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING

from stageflow.core.output import ErrorInfo
from stageflow.pipeline.policies import SOURCE_AHEAD
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.backpressure import pull_bytes, pull_count
from stageflow.scheduler.books import Run
from stageflow.scheduler.layout import MAX_BLOCK
from stageflow.scheduler.ranges import is_gone, no_reason
from stageflow.scheduler.streams import Chunk, Segment, Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine


class SourceRules:
    """When sources are pulled, and what comes of it."""

    def _pull_sources(self: Machine, run: Run, now: float) -> None:
        for source in run.sources:
            if not source.flowing or source.pull_open or source.ended or source.stopped:
                continue
            if source.is_source and source.readers and not source.keeps and all(map(is_gone, source.readers)):
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
            wanted = SOURCE_AHEAD
            for reader in readers:
                if reader is not source and is_gone(reader):
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
        again = source.attempt > 1
        self._out.append(
            act.PullSource(run.id, source.stage, count, nbytes, source.attempt, source.out_next if again else 0)
        )

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
            # one that was told to stop is waited for until it has: what it holds is closed before the run is over
            if not stream.stopped and (stream.granted <= 0 or signal.enough):
                self._pull_over(run, stream)
                if not stream.is_source or any(not reader.ready_count for reader in stream.readers):
                    # a reader ran dry before this came: only then it is worth while for a source to be further ahead
                    stream.window = min(SOURCE_AHEAD, stream.window * 2)
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
                if self._source_again(run, stream, signal, now):
                    return
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
                self._fail_stream(run, stream, signal.error or no_reason(), now, shed=False)
            self._input_complete(run, stream, now)
        self._settle_ended(now)

    def _source_again(self: Machine, run: Run, source: Stream, signal: sig.SourceEnded, now: float) -> bool:
        """Whether a source that failed is made anew after a while. Once it has given an item that takes one that gives
        the same items again: those that are in the books are skipped."""
        policies = run.layout.specs[source.stage].policies
        if policies.retry is None or (source.out_next and not policies.replayable):
            return False
        error = signal.error or no_reason()
        question = sig.AttemptEnded(
            0, "error", error=error, retry=signal.retry, wait=signal.wait, roll=signal.roll,
            retryable=error.retryable, retry_after=error.retry_after,
        )  # fmt: skip
        delay = self._retry_delay(run, source.stage, source.attempt, question, now, policies)
        if delay is None:
            return False
        data = {"delay_ms": delay * 1000.0, "error": error.message, "why": "failure"}
        self._emit("stage.retrying", run, source.stage, attempt=source.attempt, data=data)
        source.attempt += 1
        source.stopped = True  # nothing is pulled meanwhile
        run.retry_timers += 1

        def again(due: sig.TimerDue, when: float) -> None:
            run.retry_timers -= 1
            source.stopped = False

        self._set_timer(run, now + delay, again)
        return True
