"""Reduces: folds of blocks, merges of accumulators, and how they end.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stageflow.core.output import ErrorInfo
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import ON_LOOP, Lane, Run, Task
from stageflow.scheduler.outcomes import blamed, timeout_info
from stageflow.scheduler.states import StageState
from stageflow.scheduler.streams import Chunk, Segment, Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState


class FoldRules:
    """Reduces: folds of blocks, merges of accumulators, and how they end."""

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
        if status == "ok" and task.stopping is None and task.lane in ON_LOOP:
            if self._overran(run, task, signal.seconds):
                task.stopping = "timeout"
        if status == "ok" and task.stopping is not None and signal.handle:
            self._out.append(act.Release(run.id, (signal.handle,)))
            signal.handle = 0
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
                signal.error = blamed(signal.broken, signal.error)
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
        stream.rests(now)
        lo = task.segments[0].lo if task.segments else 0
        self._emit(
            "stage.items",
            run,
            stream.stage,
            attempt=task.attempt,
            data={"lo": lo, "hi": lo + count, "ok": count, "dropped": 0, "failed": 0, "emitted": 0,
                  "seconds": signal.seconds, "cpu_seconds": signal.cpu_seconds,
                  "bytes_in": signal.bytes_in, "bytes_out": signal.nbytes,
                  "worker_pid": signal.worker_pid, "queued_ms": max(0.0, now - task.since - signal.seconds) * 1000.0,
                  "started": signal.started},
        )  # fmt: skip
        self._offer(run, stream, now)
        self._maybe_over(run, stream, now)

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
