"""Items and streams that fail: retried, narrowed down, booked, or let go.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from stageflow.core.output import ErrorInfo
from stageflow.pipeline.spec import Role
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Run, Task
from stageflow.scheduler.outcomes import blamed, is_final, measured, timeout_info
from stageflow.scheduler.ranges import failure_data, indices_of, no_reason, path_of
from stageflow.scheduler.states import StageState
from stageflow.scheduler.streams import Segment, Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState


class LossRules:
    """Items and streams that fail: retried, narrowed down, booked, or let go."""

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
        delay = None
        if policies.replayable or failure.index not in stream.flowed:
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
            data=failure_data(info),
        )
        if policies.max_failed_items is not None:
            stream.last_failure = info
            self._check_budget(run, stream, now)
        elif self._mode(run, stage) == "fail_fast":
            name = run.layout.name(stage)
            where = f" at item {list(path)}" if path else ""
            if run.ending is None:
                run.culprit = stage
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
            last = stream.last_failure or no_reason()
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
            error = timed_out(run.layout.name(stream.stage), task, signal)
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
        begun = bool(stream.flowed) and self._has_flowed(stream, rest)
        final = overlaps or (begun and not policies.replayable)
        delay = None if final else self._retry_delay(run, stream.stage, task.attempt, question, now, policies, key)
        if delay is None and count > 1 and run.ending is None and not (overlaps or begun):
            # the guilty alone are lost: run the elements one by one
            for segment in rest:
                self._take_apart(run, stream, segment, now)
            return
        together: list[int] = []
        for segment in rest:
            path = path_of(signal, segment)
            if delay is not None:
                self._emit(
                    "stage.retrying",
                    run,
                    stream.stage,
                    item=path,
                    attempt=task.attempt,
                    data={"delay_ms": delay * 1000.0, "error": error.message, "why": "failure"},
                )
                self._retry_segment(run, stream, segment, task.attempt + 1, delay, now, together)
            else:
                item = msgspec.structs.replace(error, item=path)
                self._consume(run, task, segment.lo, segment.hi)
                stream.failed += segment.count()
                self._item_lost(run, stream, item, path, task.attempt, now)
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
        self: Machine,
        run: Run,
        stream: Stream,
        segment: Segment,
        attempt: int,
        delay: float,
        now: float,
        together: list[int] | None = None,
    ) -> None:
        """`together`: the timers of the other segments of its batch, which stays one."""
        later = Segment(
            segment.lo, segment.hi, segment.mask, segment.columns, now, segment.deaths, attempt, segment.apart
        )
        run.retry_timers += 1

        def again(due: sig.TimerDue, when: float) -> None:
            batch: list[Segment] = []
            for one in timers:
                found = stream.delayed.pop(one, None)
                if found is None:
                    continue  # stopped meanwhile
                run.retry_timers -= 1
                found.since = when
                batch.append(found)
                if one != timer:
                    self._drop_timer(one)
            self._put_back(stream, *batch)
            self._offer(run, stream, when)

        timer = self._set_timer(run, now + delay, again)
        timers = together if together is not None and stream.batch else []
        timers.append(timer)
        stream.delayed[timer] = later

    def _block_lost(
        self: Machine, run: Run, stream: Stream, rest: list[Segment], signal: sig.BlockPart, now: float
    ) -> None:
        """The worker died. A block is narrowed down to the guilty item; that item is lost after `poison_limit`
        deaths."""
        if not signal.suspect:
            self._put_back(stream, *rest)
            return
        for segment in rest:
            deaths = segment.deaths + 1
            count = segment.count()
            if count <= 1 and is_final(signal.error, deaths, self.poison_limit):
                info = signal.error or ErrorInfo(
                    type="stageflow.core.errors.WorkerDiedError", message="the worker died"
                )
                self._used(run, segment.columns, count)
                stream.failed += count
                path = path_of(signal, segment)
                info = msgspec.structs.replace(measured(info), item=path)
                self._item_lost(run, stream, info, path, segment.attempt, now)
                self._emit_block(run, stream, segment, segment.attempt, now)
                self._empty(run, stream, segment.lo, segment.hi, now)
                continue
            self._emit(
                "stage.retrying",
                run,
                stream.stage,
                item=path_of(signal, segment),
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
        indices = indices_of(segment)
        for place, index in enumerate(indices):
            hi = segment.hi if place == len(indices) - 1 else index + 1
            single = segment.cut(lo, hi)
            self._put_back(stream, Segment(lo, hi, single.mask, single.columns, now, segment.deaths, 1, apart=True))
            lo = hi


def timed_out(name: str, task: Task, signal: sig.BlockPart) -> ErrorInfo:
    """The failure of a stage whose call of items used up its time."""
    limit = task.limit
    error = timeout_info(
        f"stage {name!r} (attempt {task.attempt}) exceeded its timeout of {limit:g} s",
        elapsed=max(limit, signal.done.seconds),
        limit=limit,
        lane=task.lane,
        attempt=task.attempt,
        abandoned=signal.abandoned or None,
    )
    return blamed(signal.broken, error)
