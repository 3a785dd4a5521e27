"""Stopping one stage of a run: what runs of it is asked to stop, what waits is not started, and it ends FAILED.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING

from stageflow.core.output import ErrorInfo
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Run, Task
from stageflow.scheduler.states import ENDED, StageState

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState


class StopRules:
    """A stage cancelled from outside."""

    def _on_stop_stage(self: Machine, signal: sig.StopStage, now: float) -> None:
        """The stage fails with the reason, without a retry; its failure mode says what that means for the run."""
        run = self.runs.get(signal.run)
        if run is None or run.ending is not None:
            return
        stage = signal.stage
        state = run.state[stage]
        if state >= ENDED:
            return
        self._touch(run)
        error = stopped_info(run.layout.name(stage), signal.reason)
        stream = run.streams.get(stage)
        if stream is not None and state == _S.FLOWING:
            for task in [task for task in run.tasks.values() if task.stage == stage]:
                self._ask(run, task, signal.reason, now)
            self._fail_stream(run, stream, error, now, shed=True)
        elif state == _S.RUNNING:
            for task in [task for task in run.tasks.values() if task.stage == stage]:
                self._ask(run, task, signal.reason, now)
        else:
            self._fail_stage(run, stage, error, now, attempt=run.tries.get(stage, 0) + 1)
        self._settle_ended(now)

    def _ask(self: Machine, run: Run, task: Task, reason: str, now: float) -> None:
        """Ask one attempt to stop, and insist after the grace."""
        if task.stopping is not None:
            return
        task.stopping = reason
        if task.timer:
            self._drop_timer(task.timer)
        self._out.append(act.StopAttempt(task.id, reason))

        def force(due: sig.TimerDue, when: float) -> None:
            task.timer = 0
            if task.id in self.tasks:
                self._out.append(act.StopAttempt(task.id, reason, force=True))

        task.timer = self._set_timer(run, now + self.grace, force)


def stopped_info(name: str, reason: str) -> ErrorInfo:
    """The failure of a stage that was stopped."""
    return ErrorInfo(
        type="stageflow.core.errors.StageCancelledError",
        code="SF-CANCELLED",
        message=f"stage {name!r} was cancelled: {reason}",
    )
