"""How attempts end: retries, failure modes, skips, and what they mean for the stages behind.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from stageflow.core.output import ErrorInfo
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import ON_LOOP, Run, Task
from stageflow.scheduler.ranges import failure_data
from stageflow.scheduler.states import StageState
from stageflow.scheduler.stops import stopped_info

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState


class OutcomeRules:
    """Signals of plain stages."""

    def _on_attempt_ended(self: Machine, signal: sig.AttemptEnded, now: float) -> None:
        task = self.tasks.get(signal.task)
        if task is None:
            return
        run, stage = task.run, task.stage
        self._drop_task(task, now)
        if task.stream is not None:
            self._fold_ended(task, signal, now)
            self._settle_ended(now)
            return
        status = signal.status
        if status == "ok" and task.stopping is None and run.ending is None:
            if task.lane in ON_LOOP and self._overran(run, task, signal.seconds):
                self._timed_out(run, task, signal, now)
            else:
                self._succeed(run, task, signal, now)
        elif run.ending is not None:
            self._move(run, stage, _S.CANCELLED)
            self._attempt_event(task, signal, "cancel")
            self._emit("stage.cancelled", run, stage, attempt=task.attempt, data={"reason": run.reason})
            self._stage_over(run, stage)
            self._ended.clear()  # nothing may start any more
        elif task.stopping == "timeout":
            self._timed_out(run, task, signal, now)
        elif task.stopping is not None:
            self._attempt_event(task, signal, "cancel")
            error = stopped_info(run.layout.name(stage), task.stopping)
            self._fail_stage(run, stage, error, now, attempt=task.attempt)
        elif status == "lost":
            self._attempt_event(task, signal, "lost")
            self._lost(run, task, signal, now)
        elif status == "skip":
            self._attempt_event(task, signal, "skip")
            self._skip(run, stage, signal.reason or "skipped by the stage")
        elif status == "cancel":
            self._attempt_event(task, signal, "cancel")
            self._move(run, stage, _S.CANCELLED)
            run.clean = run.plain = False
            reason = signal.reason or "cancelled by the stage"
            self._emit("stage.cancelled", run, stage, attempt=task.attempt, data={"reason": reason})
            run.open -= 1
            self._end_run(run, "cancelled", reason, now)
        else:
            self._attempt_event(task, signal, status)
            self._attempt_failed(run, task, signal, now)
        self._settle_ended(now)

    def _overran(self: Machine, run: Run, task: Task, seconds: float) -> bool:
        """Whether an attempt on the loop took longer than its timeout: what never waits cannot be interrupted there, so
        it is seen now."""
        limit = run.layout.specs[task.stage].policies.timeout
        task.limit = limit or 0.0
        return limit is not None and seconds > limit

    def _succeed(self: Machine, run: Run, task: Task, signal: sig.AttemptEnded, now: float) -> None:
        stage = task.stage
        self._move(run, stage, _S.DONE)
        layout = run.layout
        if task.lane == "process":
            key = (layout.key, stage)
            known = self.seconds.get(key)
            seconds = signal.seconds
            self.seconds[key] = seconds if known is None else known + 0.3 * (seconds - known)
        if signal.route is not None:
            run.decisions[stage] = signal.route
        if signal.skip_hint:
            run.skip_hints[stage] = signal.skip_hint
            run.plain = False
        if run.guards and stage in run.guards:
            self._guard_passed(run, stage)
        if run.listening:
            self._attempt_event(task, signal, "ok")
        data: dict[str, Any] = {
            "duration_ms": (now - task.since) * 1000.0,
            "seconds": signal.seconds,
            "cpu_seconds": signal.cpu_seconds,
            "bytes_in": signal.bytes_in,
            "bytes_out": signal.nbytes,
            "worker_pid": signal.worker_pid,
            "queued_ms": max(0.0, (now - task.since - signal.seconds)) * 1000.0,
            "started": signal.started,
        }
        if run.waits and stage in run.waits:
            data["wait"] = run.waits.pop(stage)
        self._emit("stage.completed", run, stage, attempt=task.attempt, data=data)
        self._stage_over(run, stage)

    def _attempt_event(self: Machine, task: Task, signal: sig.AttemptEnded, status: str) -> None:
        if not task.run.listening and status == "ok":
            return  # `stage.completed` says the same; what ended otherwise is in the run's numbers in any case
        self._emit(
            "stage.attempt",
            task.run,
            task.stage,
            attempt=task.attempt,
            data={
                "status": status,
                "seconds": signal.seconds,
                "cpu_seconds": signal.cpu_seconds,
                "bytes_in": signal.bytes_in,
                "bytes_out": signal.nbytes,
                "worker_pid": signal.worker_pid,
                "started": signal.started,
            },
        )

    # ------------------------------------------------------------ failures

    def _timed_out(self: Machine, run: Run, task: Task, signal: sig.AttemptEnded, now: float) -> None:
        """The attempt was stopped because its time was up, whatever it answered in the end."""
        policies = run.layout.specs[task.stage].policies
        limit = task.limit
        elapsed = max(now - run.first_start.get(task.stage, now) if task.total else signal.seconds, limit)
        name = run.layout.name(task.stage)
        abandoned = signal.abandoned
        which = "its total timeout" if task.total else "its timeout"
        text = f"stage {name!r} (attempt {task.attempt}) ran for {elapsed:.3f} s; {which} is {limit:g} s"
        if abandoned:
            text += "; its thread could not be stopped and was abandoned"
        signal.error = timeout_info(
            text,
            elapsed=elapsed,
            limit=limit,
            lane=task.lane,
            worker_pid=signal.worker_pid or None,
            attempt=task.attempt,
            traceback=signal.error.traceback if signal.error is not None else "",
            abandoned=abandoned or None,
        )
        signal.error = blamed(signal.broken, signal.error)
        signal.status = "timeout"
        self._attempt_event(task, signal, "timeout")
        # a thread that goes on could run beside its own retry: side effects twice at once
        if abandoned and run.layout.specs[task.stage].kind == "work" and policies.idempotency is None:
            self._fail_stage(run, task.stage, signal.error, now, attempt=task.attempt)
            return
        self._attempt_failed(run, task, signal, now)

    def _lost(self: Machine, run: Run, task: Task, signal: sig.AttemptEnded, now: float) -> None:
        """The worker died. Infrastructure spends no attempts; the death of `poison_limit` workers on one task is
        final, for want of memory that of two."""
        stage = task.stage
        if signal.suspect:
            deaths = run.deaths[stage] = run.deaths.get(stage, 0) + 1
            if is_final(signal.error, deaths, self.poison_limit):
                error = measured(signal.error or _unknown())
                self._fail_stage(run, stage, error, now, attempt=task.attempt)
                return
        self._emit("stage.retrying", run, stage, attempt=task.attempt, data=_retry_data(signal, 0.0, "infrastructure"))
        self._move(run, stage, _S.READY)
        self._push_ready(run, stage, now)

    def _attempt_failed(self: Machine, run: Run, task: Task, signal: sig.AttemptEnded, now: float) -> None:
        stage = task.stage
        delay = self._retry_delay(run, stage, task.attempt, signal, now)
        if delay is not None:
            run.tries[stage] = task.attempt
            self._emit("stage.retrying", run, stage, attempt=task.attempt, data=_retry_data(signal, delay, "failure"))
            self._move(run, stage, _S.BACKOFF)
            run.retry_timers += 1

            def again(due: sig.TimerDue, when: float) -> None:
                run.retry_timers -= 1
                if run.state[stage] != _S.BACKOFF:
                    return  # stopped meanwhile
                waits = run.waits.setdefault(stage, {})
                waits["retry"] = waits.get("retry", 0.0) + when - now
                self._move(run, stage, _S.READY)
                self._push_ready(run, stage, when)

            self._set_timer(run, now + delay, again)
            return
        if stage in run.layout.graph.guard_paths and self._guard_retry(run, task, signal, now):
            return
        self._fail_stage(run, stage, signal.error or _unknown(signal.reason), now, attempt=task.attempt)

    def _retry_delay(
        self: Machine,
        run: Run,
        stage: Any,
        attempt: int,
        signal: Any,
        now: float,
        policies: Any = None,
        key: Any = None,
    ) -> float | None:
        """Seconds until the next attempt, or None to give up. `key` tells the items of a map apart."""
        if policies is None:
            policies = run.layout.specs[stage].policies
        retry = policies.retry
        if retry is None or signal.retry is False:
            return None
        status = signal.status
        if status in ("fail", "refused") and not signal.retryable:
            return None
        if retry.stop is None and attempt >= retry.max_attempts:
            return None
        memory = stage if key is None else key
        if signal.wait is not None:
            delay = signal.wait
        else:
            delay = retry.delay_after(attempt, run.previous_delay.get(memory), signal.roll)
            if signal.retry_after is not None:
                delay = max(delay, signal.retry_after)
        run.previous_delay[memory] = delay
        if policies.total_timeout is not None:
            begun = run.first_start.get(memory, now)
            if now + delay >= begun + policies.total_timeout:
                return None
        return float(delay)

    def _fail_stage(
        self: Machine, run: Run, stage: int, error: ErrorInfo, now: float, *, attempt: int = 1, moved: bool = False
    ) -> None:
        """The stage has failed for good; its own failure mode says what that means."""
        if not moved:
            self._move(run, stage, _S.FAILED)
        run.clean = run.plain = False
        data = failure_data(error)
        if run.waits and stage in run.waits:
            data["wait"] = run.waits.pop(stage)
        self._emit("stage.failed", run, stage, attempt=attempt, data=data)
        if run.guards and stage in run.guards:
            self._guard_passed(run, stage, failed=True)
        self._stage_over(run, stage)
        if self._mode(run, stage) == "fail_fast":
            self._ended.clear()
            self._end_run(run, "failed", f"stage {run.layout.name(stage)!r} failed: {error.message}", now, error)

    def _mode(self: Machine, run: Run, stage: int) -> str:
        """The failing stage's own mode, or the run's."""
        own = run.layout.specs[stage].policies.on_failure
        return str(own) if own is not None else run.mode

    # ------------------------------------------------------------ readiness

    def _verdict(self: Machine, run: Run, stage: int) -> str | None:
        """None: run it. "decide": ask its predicate. Anything else: the reason for which it is skipped."""
        layout = run.layout
        graph = layout.graph
        policies = layout.specs[stage].policies
        state = run.state
        deps = graph.deps[stage]
        absent: list[int] = []
        for dep in deps:
            at = state[dep]
            if at == _S.FAILED or dep in run.blocked_by:
                culprit = run.blocked_by.get(dep, dep)
                if self._mode(run, culprit) != "best_effort":
                    run.blocked_by[stage] = culprit
                    return f"upstream_failed: {layout.name(culprit)}"
                absent.append(dep)
            elif at == _S.SKIPPED:
                absent.append(dep)
        route = graph.routes.get(stage)
        if route is not None:
            router, branch = route
            if state[router] != _S.DONE:
                return f"route: {layout.name(router)} did not run"
            chosen = run.decisions.get(router, ())
            if branch not in chosen:
                return f"route: {layout.name(router)} chose {', '.join(map(repr, chosen)) or 'nothing'}"
        if policies.conditional:
            for dep in deps:
                if state[dep] == _S.SKIPPED or dep in run.skip_hints:
                    return f"dependency {layout.name(dep)!r} was skipped: {run.skip_hints.get(dep, 'no reason given')}"
        skipped = [dep for dep in deps if state[dep] == _S.SKIPPED and dep not in run.blocked_by]
        if deps and len(skipped) == len(deps):
            return f"all dependencies were skipped ({', '.join(layout.name(dep) for dep in skipped[:4])})"
        required = layout.required.get(stage)
        if required:
            for dep in absent:
                if dep in required:
                    return f"input_absent: {layout.name(dep)}"
        over = layout.specs[stage].over
        if over in absent and stage in layout.expands:
            return f"input_absent: {layout.name(over)}"
        if callable(policies.when):
            return "decide"
        return None


def timeout_info(message: str, *, elapsed: float, limit: float, **where: Any) -> ErrorInfo:
    """The failure of whatever used up its time."""
    return ErrorInfo(
        type="stageflow.core.errors.StageTimeoutError",
        code="SF-TIMEOUT",
        message=message,
        retryable=True,
        elapsed=elapsed,
        limit=limit,
        **where,
    )


def is_final(error: ErrorInfo | None, deaths: int, poison_limit: int) -> bool:
    """Whether a task whose worker has died so often is given up. For want of memory twice is enough: the second time
    it ran alone."""
    return deaths >= (min(2, poison_limit) if error is not None and error.oom_killed else poison_limit)


def measured(error: ErrorInfo) -> ErrorInfo:
    """The failure of a task that was given up, with what it needed if that was memory."""
    if not error.oom_killed or not error.rss_bytes:
        return error
    needed = f"needs more memory than there is: alone in its worker it held {error.rss_bytes:,} bytes; {error.message}"
    return msgspec.structs.replace(error, message=needed)


def blamed(broken: ErrorInfo | None, error: ErrorInfo) -> ErrorInfo:
    """The failure that ends a task: that of the strategy which raised while it judged `error`, because of that."""
    return error if broken is None else msgspec.structs.replace(broken, cause=error)


def _unknown(reason: str | None = None) -> ErrorInfo:
    return ErrorInfo(type="stageflow.StageOutput", message=reason or "failed without a reason")


def _retry_data(signal: Any, delay: float, why: str) -> dict[str, Any]:
    error = signal.error.message if signal.error is not None else (signal.reason or "")
    return {"delay_ms": delay * 1000.0, "error": error, "why": why}
