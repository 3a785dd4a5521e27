"""Regions: a block of items goes through several stages in one task, and each stage's books are kept as if it had
run by itself.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from stageflow.context.pieces import Done, ItemFailure
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Run, Task
from stageflow.scheduler.losses import timed_out
from stageflow.scheduler.ranges import indices_of, path_of
from stageflow.scheduler.streams import Chunk, Segment, Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine


class RegionRules:
    """Blocks of a region: when, and what their parts mean."""

    def _region_of(self: Machine, run: Run, task: Task, segments: list[Segment], now: float) -> tuple[int, ...] | None:
        """The stages to take a block through; None to run it in its own stage alone."""
        region = run.layout.regions.get(task.stage) if run.layout.regions else None
        if region is None:
            return None
        for segment in segments:
            if segment.deaths or segment.attempt > 1 or segment.apart:
                return None  # after a worker was lost, stage by stage, to tell whose fault it is
            if any(segment.has(index) for member in region[1:] for index in run.streams[member].doomed or ()):
                return None  # it is to end at a stage further on
        task.region = region
        for member in region[1:]:
            run.streams[member].waits_for("", now)
        limit = run.layout.specs[region[-1]].policies.timeout
        if limit is not None:
            self._arm_timeout(task, limit, now)  # its clock stands until the last stage begins
        return region

    def _outlet(self: Machine, run: Run, stream: Stream) -> Stream:
        """The stream that the results of a stage's blocks go to: of a region, its last stage's."""
        region = run.layout.regions.get(stream.stage) if run.layout.regions else None
        return stream if region is None else run.streams[region[-1]]

    def _take_region(
        self: Machine,
        run: Run,
        task: Task,
        region: tuple[int, ...],
        signal: sig.BlockPart,
        chunk: Chunk | None,
        now: float,
    ) -> None:
        """Book a part of a region: its first stage used the items, its last one gives the results, and each stage in
        between has seen what its forerunner left."""
        done = signal.done
        streams = [run.streams[member] for member in region]
        head, tail = streams[0], streams[-1]
        given = {lo for lo, hi, _, _ in done.handed if hi == lo + 1}
        delays: dict[int, float | None] = {}
        again = 0
        for place, failure in enumerate(done.failures):
            verdict = (False, None, 1.0)  # without the value that it was given nothing can be tried again
            if failure.index in given and place < len(signal.retries):
                verdict = signal.retries[place]  # type: ignore[assignment]
            delay = self._item_failed(run, task, streams[failure.member], failure, verdict, now)
            delays[failure.index] = delay
            again += delay is not None
        if task.reported is None:
            task.reported = []
        at = 0
        for lo, hi, mask in done.ranges:
            self._through(run, task, streams, lo, hi, now)
            if tail.readers or (chunk is not None and tail.keeps):
                self._give(run, tail, lo, hi, mask, chunk, at, now)
            at += hi - lo if mask < 0 else mask.bit_count()
        for lo, hi, mask, member in done.handed:
            assert chunk is not None
            there = hi - lo if mask < 0 else mask.bit_count()
            segment = Segment(lo, hi, mask, ((chunk, at),), now)
            at += there
            if lo not in delays or hi > lo + 1:
                self._through(run, task, streams[:member], lo, hi, now)
                chunk.left += there
                self._accept(run, streams[member], segment, now)
            elif delays[lo] is not None:
                self._through(run, task, streams[:member], lo, hi, now)
                chunk.left += 1
                streams[member].arrived += 1
                streams[member].came += 1
                self._retry_segment(run, streams[member], segment, task.attempt + 1, delays[lo] or 0.0, now)
            else:
                self._through(run, task, streams, lo, hi, now)
                if tail.readers:
                    self._give(run, tail, lo, hi, 0, None, 0, now)
        self._count_region(run, task, streams, signal, again, now)
        if not head.running:
            for stream in streams[1:]:
                stream.waits_for("upstream", now)

    def _through(self: Machine, run: Run, task: Task, streams: list[Stream], lo: int, hi: int, now: float) -> None:
        """Indices [lo, hi) of a region's input are done in these stages, its first among them."""
        assert task.reported is not None
        task.reported.append((lo, hi))
        self._consume(run, task, lo, hi)
        for number, stream in enumerate(streams):
            stream.done += hi - lo
            stream.out_next = max(stream.out_next, hi)
            if number:
                stream.arrived += hi - lo

    def _count_region(
        self: Machine, run: Run, task: Task, streams: list[Stream], signal: sig.BlockPart, again: int, now: float
    ) -> None:
        """Count for each stage what it did; `again`: items that failed in the last one, and are tried again."""
        done = signal.done
        spans = sorted([(lo, hi) for lo, hi, _ in done.ranges] + [(lo, hi) for lo, hi, _, _ in done.handed])
        given = 0
        for number, (stream, counts) in enumerate(zip(streams, done.inner or (), strict=True)):
            ok, dropped, failed, seconds, cpu_seconds = counts
            if number == len(streams) - 1:
                failed -= again
            stream.ok += ok
            stream.dropped += dropped
            stream.failed += failed
            if number:
                stream.came += ok + dropped + failed
            given = given or ok + dropped + failed
            self._emit(
                "stage.items",
                run,
                stream.stage,
                attempt=task.attempt,
                data={"lo": spans[0][0], "hi": spans[-1][1], "ok": ok, "dropped": dropped, "failed": failed,
                      "seconds": seconds, "cpu_seconds": cpu_seconds,
                      "bytes_in": signal.bytes_in if number == 0 else 0,
                      "bytes_out": signal.nbytes if stream is streams[-1] else 0, "worker_pid": signal.worker_pid,
                      "queued_ms": max(0.0, now - task.since - done.seconds) * 1000.0 if number == 0 else 0.0,
                      "started": signal.started},
            )  # fmt: skip
        streams[0].measure(given, done.seconds, signal.nbytes)

    def _tail_timed_out(
        self: Machine,
        run: Run,
        task: Task,
        region: tuple[int, ...],
        segment: Segment,
        signal: sig.BlockPart,
        now: float,
    ) -> None:
        """The last stage of a region used up its time. What it was given went with the call: where it is to try again,
        the stages before it give it once more, each by itself."""
        tail = run.streams[region[-1]]
        index = indices_of(segment)[0]
        path = path_of(signal, segment)
        error = timed_out(run.layout.name(tail.stage), task, signal)
        retry, wait, roll = signal.retries[0] if signal.retries else (None, None, 1.0)
        question = sig.AttemptEnded(task.id, "timeout", error=error, retry=retry, wait=wait, roll=roll)
        policies = run.layout.specs[tail.stage].policies
        delay = self._retry_delay(run, tail.stage, task.attempt, question, now, policies, (tail.stage, index))
        if delay is not None:
            data = {"delay_ms": delay * 1000.0, "error": error.message, "why": "failure"}
            self._emit("stage.retrying", run, tail.stage, item=path, attempt=task.attempt, data=data)
            tail.resumed[index] = task.attempt + 1
            segment.apart = True
            self._retry_segment(run, run.streams[task.stage], segment, 1, delay, now)
            return
        error = msgspec.structs.replace(error, item=path)
        failure = ItemFailure(index, "fail", error, path, len(region) - 1)
        inner = (*(((1, 0, 0, 0.0, 0.0),) * (len(region) - 1)), (0, 0, 1, signal.done.seconds, 0.0))
        signal.done = Done(((segment.lo, segment.hi, 0),), (failure,), seconds=signal.done.seconds, inner=inner)
        signal.retries = ()
        self._take_region(run, task, region, signal, None, now)

    def _resume(self: Machine, stream: Stream, segment: Segment) -> None:
        """An item whose last attempt used up its time has been given once more, by itself."""
        for index in [index for index in stream.resumed if segment.has(index)]:
            segment.attempt = stream.resumed.pop(index)
