"""The life of a stage of which nothing is special, spelled out: the scheduler's floor.

Part of `Machine`; see there for what this may not import. Everything here has a general form elsewhere in the machine
and must do what that does: `Machine.unrolled = False` takes the general one, and tests hold them side by side.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stageflow.core.errors import InvariantError
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Lane, Run, Task

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

SHORT_SECONDS: Final = 0.005  # below this a process task is worth sending ahead (rules of the process lane)


class PlainRules:
    """Start and success of plain stages."""

    def _start_plain(self: Machine, run: Run, stage: int, lane: Lane, since: float) -> None:
        """`_start` for the first attempt of a stage without policies (`Layout.simple`), of which no worker has died:
        every stage of most graphs, so it is spelled out. It must do what `_start` does."""
        self._next_task = id = self._next_task + 1
        name = lane.name
        self.tasks[id] = run.tasks[id] = Task(id, run, stage, name, 1, since)
        lane.used += 1
        run.running += 1
        run.state[stage] = 3  # READY -> RUNNING
        short = name == "process" and self.seconds.get((run.layout.key, stage), 1.0) < SHORT_SECONDS
        self._out.append(act.StartAttempt(id, run.id, stage, name, 1, False, short))

    def _plain_ended(self: Machine, signal: sig.AttemptEnded, now: float) -> bool:
        """`_on_attempt_ended` for a stage without policies (`Layout.simple`) that succeeded in a run in which nothing
        has failed or been skipped: nearly every signal, so it is spelled out. False leaves it to the general rules;
        what it does must be what they do (but for its `Completed` in place of their two `Emit`)."""
        task = self.tasks.get(signal.task)
        if task is None or not self.unrolled:
            return False
        run, stage, id = task.run, task.stage, task.id
        layout, state = run.layout, run.state
        if (
            not layout.simple[stage]
            or not run.plain
            or run.ending is not None
            or signal.status != "ok"
            or task.stopping is not None
            or task.spawning
            or signal.route is not None
            or signal.skip_hint
        ):
            return False
        del self.tasks[id], run.tasks[id]
        run.running -= 1
        self.lanes[task.lane].used -= 1
        state[stage] = 6  # RUNNING -> DONE
        seconds = signal.seconds
        if task.lane == "process":
            key = (layout.key, stage)
            known = self.seconds.get(key)
            self.seconds[key] = seconds if known is None else known + 0.3 * (seconds - known)
        if self._rows_of != run.id:
            if self._rows:
                self._tell_rows()
            self._rows_of = run.id
        self._rows.append(
            (stage, task.attempt, now, now - task.since, seconds, signal.cpu_seconds, signal.bytes_in, signal.nbytes,
             signal.worker_pid, signal.started)
        )  # fmt: skip
        run.open -= 1
        dependents = layout.dependents[stage]
        if dependents:
            waiting, special, depth, lanes = run.waiting, layout.special, layout.depth, layout.lanes
            priorities = layout.priorities
            for dependent in dependents:
                left = waiting[dependent] = waiting[dependent] - 1
                if left == 0:
                    if special[dependent] or state[dependent]:
                        self._tell_rows()
                        self._came_ready(run, dependent, now)
                        continue
                    state[dependent] = 2  # WAITING -> READY
                    self._seq = seq = self._seq + 1
                    run.queued += 1
                    first = -priorities.get(dependent, 0) if priorities else 0
                    entry = (first, -depth[dependent], run.seq, seq, run, dependent, None, now)
                    lane = self.lanes[lanes[dependent]]
                    if lane.fifo:
                        lane.push(entry)
                    else:
                        lane.fifo.append(entry)
                elif left < 0:
                    raise InvariantError(f"stage {layout.name(dependent)!r} was told more ends than it waits for")
            if self._ended:
                self._settle_ended(now)
        self._touched[run.id] = run
        return True
