"""Regions: a block of items goes through several stages in one task, and each stage's books are kept as if it had
run by itself.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING

from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Run, Task
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
        for failure in done.failures:
            self._item_failed(run, task, streams[failure.member], failure, (False, None, 1.0), now)
        if task.reported is None:
            task.reported = []
        at = 0
        for lo, hi, mask in done.ranges:
            task.reported.append((lo, hi))
            self._consume(run, task, lo, hi)
            for stream in streams:
                stream.done += hi - lo
                stream.out_next = max(stream.out_next, hi)
                if stream is not head:
                    stream.arrived += hi - lo
            if tail.readers or (chunk is not None and tail.keeps):
                self._give(run, tail, lo, hi, mask, chunk, at, now)
            at += hi - lo if mask < 0 else mask.bit_count()
        given = 0
        for number, (stream, counts) in enumerate(zip(streams, done.inner or (), strict=True)):
            ok, dropped, failed, seconds, cpu_seconds = counts
            stream.ok += ok
            stream.dropped += dropped
            stream.failed += failed
            if stream is not head:
                stream.came += ok + dropped + failed
            given = given or ok + dropped + failed
            self._emit(
                "stage.items",
                run,
                stream.stage,
                attempt=task.attempt,
                data={"lo": done.ranges[0][0], "hi": done.ranges[-1][1], "ok": ok, "dropped": dropped, "failed": failed,
                      "seconds": seconds, "cpu_seconds": cpu_seconds,
                      "bytes_in": signal.bytes_in if number == 0 else 0,
                      "bytes_out": signal.nbytes if stream is tail else 0, "worker_pid": signal.worker_pid,
                      "queued_ms": max(0.0, now - task.since - done.seconds) * 1000.0 if number == 0 else 0.0,
                      "started": signal.started},
            )  # fmt: skip
        head.measure(given, done.seconds, signal.nbytes)
        if not head.running:
            for stream in streams[1:]:
                stream.waits_for("upstream", now)
