"""Guard retry: a guard that fails may have the path from an earlier stage up to itself run again, with its feedback.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Run, Task
from stageflow.scheduler.states import ENDED, StageState

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_S = StageState


class GuardState:
    """What one guard of one run has seen."""

    __slots__ = ("attempts", "last", "since", "stagnation")

    def __init__(self, now: float) -> None:
        self.attempts = 0
        self.stagnation = 0
        self.last: str | None = None
        self.since = now


class GuardRules:
    """Guard retry policies."""

    def _guard_retry(self: Machine, run: Run, task: Task, signal: sig.AttemptEnded, now: float) -> bool:
        """True when the path is run again; False when the guard's failure stands."""
        guard = task.stage
        layout = run.layout
        policy = layout.specs[guard].policies.guard_retry
        if policy is None:
            return False
        path = layout.graph.guard_paths[guard]
        known: GuardState | None = run.guards.get(guard)
        if known is None:
            known = run.guards[guard] = GuardState(now)
        known.attempts += 1
        if signal.digest is not None and signal.digest == known.last:
            known.stagnation += 1
        else:
            known.stagnation = 0
        known.last = signal.digest
        retried = layout.name(path[0])
        common: dict[str, Any] = {
            "guard": layout.name(guard),
            "retry_stage": retried,
            "stagnation_hits": known.stagnation,
            "timeout_seconds": policy.timeout_seconds,
        }
        self._emit(
            "guard_retry.attempt",
            run,
            guard,
            data={**common, "attempt": known.attempts, "max_attempts": policy.max_attempts},
        )
        reason = None
        if policy.timeout_seconds is not None and now - known.since >= policy.timeout_seconds:
            reason = "timeout"
        elif known.stagnation >= policy.stagnation_limit:
            reason = "stagnation"
        elif known.attempts >= policy.max_attempts:
            reason = "max_attempts"
        if reason is not None:
            self._emit(
                "guard_retry.exhausted", run, guard, data={**common, "attempts": known.attempts, "reason": reason}
            )
            return False
        self._emit("guard_retry.scheduled", run, guard, data={**common, "attempt": known.attempts})
        error = signal.error
        self._rerun_path(
            run,
            path,
            {
                "guard": layout.name(guard),
                "error": error.message if error is not None else signal.reason,
                "attempt": known.attempts,
            },
            now,
        )
        return True

    def _rerun_path(self: Machine, run: Run, path: tuple[int, ...], feedback: dict[str, Any], now: float) -> None:
        """Put every stage of the path back to WAITING and start again at its head."""
        layout = run.layout
        inside = set(path)
        for stage in path:
            was_over = run.state[stage] >= ENDED
            if run.state[stage] != _S.WAITING:
                self._move(run, stage, _S.WAITING)
            run.tries.pop(stage, None)
            run.previous_delay.pop(stage, None)
            run.first_start.pop(stage, None)
            run.skip_hints.pop(stage, None)
            run.blocked_by.pop(stage, None)
            run.feedback[stage] = feedback
            if was_over:
                run.open += 1
                # its end was already counted by those outside the path: they will be told again
                for reader in (*layout.dependents[stage], *layout.gated_by.get(stage, ())):
                    if reader not in inside:
                        run.waiting[reader] += 1
        for stage in path:
            needed = (*layout.graph.deps[stage], *layout.gates.get(stage, ()))
            run.waiting[stage] = sum(1 for dep in needed if dep in inside)
        self._came_ready(run, path[0], now)

    def _guard_passed(self: Machine, run: Run, guard: int, failed: bool = False) -> None:
        known: GuardState = run.guards[guard]
        if not failed and known.attempts:
            self._emit(
                "guard_retry.recovered",
                run,
                guard,
                data={"guard": run.layout.name(guard), "attempts": known.attempts},
            )
