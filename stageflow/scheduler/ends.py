"""How runs end: cancelled, failed, or with nothing left to do; and what is said when nothing can start.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING

from stageflow.core.output import ErrorInfo
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Run
from stageflow.scheduler.states import ENDED, StageState

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState


class EndRules:
    """The end of a run."""

    def _on_cancel(self: Machine, signal: sig.CancelRequested, now: float) -> None:
        run = self.runs.get(signal.run)
        if run is None:
            return
        if run.ending is None:
            self._end_run(run, "cancelled", signal.reason, now)
        if signal.force:
            self._force(run, signal.reason)
        self._touch(run)

    def _force(self: Machine, run: Run, reason: str) -> None:
        """The grace is over: stop attempts by the strongest means, and wait for no source any more."""
        for task in list(run.tasks.values()):
            self._out.append(act.StopAttempt(task.id, reason, force=True))
        for source in run.sources:
            if source.pull_open:
                source.pull_open = False
                source.ended = True
                run.pulling -= 1

    def _end_run(self: Machine, run: Run, status: str, reason: str, now: float, error: ErrorInfo | None = None) -> None:
        """From now on nothing of the run starts; what runs is asked to stop."""
        if run.ending is not None:
            return
        run.ending = status
        run.reason = reason
        run.error = error
        of_tasks = {task.timer for task in run.tasks.values()}
        for timer in list(run.timers):
            if timer not in of_tasks:
                self._drop_timer(timer)
        run.retry_timers = 0
        for task in run.tasks.values():
            if task.stopping is None:
                task.stopping = reason
                self._out.append(act.StopAttempt(task.id, reason))
        for source in run.sources:
            if not source.ended and not source.stopped and source.started_at >= 0:
                source.stopped = True
                if not source.pull_open:  # its end is waited for
                    source.pull_open = True
                    run.pulling += 1
                self._out.append(act.StopSource(run.id, source.stage, reason))
        if run.running or run.pulling:

            def force(due: sig.TimerDue, at: float) -> None:
                run.grace_timer = 0
                self._force(run, reason)

            run.grace_timer = self._set_timer(run, now + self.grace, force)
        self._touch(run)

    def _finish(self: Machine, run: Run, now: float) -> None:
        """Nothing runs any more: close the books."""
        status = run.ending
        if run.streams and (status is not None or not run.clean or not run.plain):
            self._stopped_streams(run, now)
        if status is not None:
            state = run.state
            for stage in range(run.layout.size):
                if state[stage] < ENDED:
                    state[stage] = _S.CANCELLED
                    if run.listening:
                        self._emit("stage.cancelled", run, stage, data={"reason": run.reason})
            run.open = 0
        else:
            # a stage that failed and then passed on a guard's retry path did not fail
            bad = not run.clean and (run.state.count(_S.FAILED) or run.state.count(_S.CANCELLED))
            status = "failed" if bad or run.failed_items or run.cancelled_items else "completed"
        for timer in list(run.timers):
            self._drop_timer(timer)
        del self.runs[run.id]
        self.final_states[run.id] = bytes(run.state)
        for stream in run.streams.values():
            self.promised -= stream.promised
            stream.promised = 0
        self.spilling -= sum(max(0, chunk.nbytes) for chunk in run.spilling.values())
        run.spilling.clear()
        for stream in run.streams.values():
            self._release_stream(run, stream)
        self.live_bytes -= run.live_bytes
        run.live_bytes = 0
        self._out.append(act.FinishRun(run.id, status, run.reason, run.error))

    def _check_over(self: Machine, run: Run, now: float) -> None:
        if run.running or run.pulling:
            return
        if run.open == 0 or run.ending is not None:
            if run.grace_timer:
                self._drop_timer(run.grace_timer)
                run.grace_timer = 0
            self._finish(run, now)
            return
        self._unstick(run, now)

    def _unstick(self: Machine, run: Run, now: float) -> None:
        """Nothing of the run is running. Draining is never refused: a blocked stream may start now (the deepest
        goes first); else a source must give, or something waits for its time; else say who waits for whom."""
        if run.blocked:
            blocked, run.blocked = run.blocked, []
            for stream in blocked:
                stream.blocked = False
                self._offer(run, stream, now)
            for lane in self._lane_list:
                if lane:
                    self._dispatch_lane(lane, now)
        if run.running or run.queued or run.retry_timers:
            return
        if self._force_pull(run, now):
            return
        waits = "; ".join(self._waits(run))
        error = ErrorInfo(
            type="stageflow.core.errors.NoProgressError",
            code="SF-NO-PROGRESS",
            message=f"nothing runs and nothing can start: {waits}",
        )
        self._end_run(run, "failed", error.message, now, error)
        self._check_over(run, now)

    def _waits(self: Machine, run: Run) -> list[str]:
        """Who waits for whom, for the first stages that have not ended."""
        layout, said = run.layout, []
        open_stages = [i for i in range(layout.size) if run.state[i] < ENDED]
        for i in open_stages[:8]:
            missing = [layout.name(dep) for dep in layout.graph.deps[i] if run.state[dep] < ENDED]
            stream = run.streams.get(i)
            reason = f"stage {layout.name(i)!r} waits for {', '.join(map(repr, missing)) or 'a slot'}"
            if stream is not None and stream.flowing:
                at = stream.wait_for or "running"
                reason += f" ({at}; {stream.ready_count} items ready, {stream.running} running)"
            said.append(reason)
        if len(open_stages) > 8:
            said.append(f"and {len(open_stages) - 8} more")
        return said
