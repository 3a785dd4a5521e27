"""Timers: of runs, of attempts, of limits.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Run, Task

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

STOOD: Final = 0.05  # seconds between two looks at the time of an attempt that stands still
CLOSE: Final = 1e-6  # seconds: clocks are floats, and a timer that is this early has come


class TimerRules:
    """Setting, dropping, and what their coming means."""

    def _set_timer(
        self: Machine, run: Run | None, at: float, then: Callable[[sig.TimerDue, float], None], task: int = 0
    ) -> int:
        self._next_timer = timer = self._next_timer + 1
        self._timer_run[timer] = run
        if run is not None:
            run.timers[timer] = then
        else:
            self._loose_timers[timer] = then
        self._out.append(act.SetTimer(timer, at, task))
        return timer

    @property
    def _loose_timers(self: Machine) -> dict[int, Callable[[sig.TimerDue, float], None]]:
        return self.admission.timers

    def _drop_timer(self: Machine, timer: int) -> None:
        run = self._timer_run.pop(timer, None)
        if run is not None:
            run.timers.pop(timer, None)
        self._out.append(act.CancelTimer(timer))

    def _on_timer(self: Machine, signal: sig.TimerDue, now: float) -> None:
        if signal.timer not in self._timer_run:
            return  # it was cancelled while it was on its way
        run = self._timer_run.pop(signal.timer)
        if run is None:
            self._loose_timers.pop(signal.timer)(signal, now)
            return
        then = run.timers.pop(signal.timer)
        then(signal, now)
        self._settle_ended(now)
        self._touch(run)

    def _arm_timeout(self: Machine, task: Task, limit: float | None, now: float, at: float | None = None) -> None:
        """Ask to be told when the attempt may have used up its `limit` (queueing does not count), or the stage its
        deadline (everything counts)."""

        def due(signal: sig.TimerDue, when: float) -> None:
            task.timer = 0
            if task.id not in self.tasks or task.stopping is not None:
                return
            elapsed = signal.elapsed
            if elapsed is not None:  # the time for which it stood still was not its own
                elapsed -= task.paused + (when - task.stood if task.stood is not None else 0.0)
            total = task.run.layout.specs[task.stage].policies.total_timeout
            if task.deadline is not None and when >= task.deadline - CLOSE:
                task.limit, task.total = total or 0.0, True
            elif limit is not None and elapsed is not None and elapsed >= limit - CLOSE:
                task.limit = limit
            else:
                left = limit - (elapsed or 0.0) if limit is not None else 0.0
                if task.stood is not None:
                    left = max(left, STOOD)
                self._arm_timeout(task, limit, when, when + left)
                return
            task.stopping = "timeout"
            self._out.append(act.StopAttempt(task.id, f"timeout after {task.limit:g} s", timeout=task.limit))

            def force(signal: sig.TimerDue, when: float) -> None:
                task.timer = 0
                if task.id in self.tasks:
                    self._out.append(act.StopAttempt(task.id, f"timeout after {task.limit:g} s", force=True))

            task.timer = self._set_timer(task.run, when + self.grace, force)

        if limit is None:
            at = task.deadline
        else:
            at = at if at is not None else now + limit
            if task.deadline is not None:
                at = min(at, task.deadline)
        assert at is not None
        task.timer = self._set_timer(task.run, at, due, task.id)
