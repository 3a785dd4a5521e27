"""The life of a stage of which nothing is special, spelled out: the scheduler's floor.

Part of `Machine`; see there for what this may not import. Everything here has a general form elsewhere in the machine
and must do what that does: `Machine.unrolled = False` takes the general one, and tests hold them side by side.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from stageflow.core.errors import InvariantError
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.books import Lane, Run, Task

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

_ENDED: Final = sig.AttemptEnded
_START: Final = act.StartAttempt
_COMPLETED: Final = act.Completed
SHORT_SECONDS: Final = 0.005  # below this a process task is worth sending ahead (rules of the process lane)
#: below this so many times as many: they share frames, and what hearing of each costs is a good part of the whole
BRIEF_SECONDS: Final = 0.0003
BRIEF_TIMES: Final = 4


class PlainRules:
    """Start and success of plain stages."""

    _stirred: Lane | None  # where one of them ended or came ready in this turn

    def _hand_on(self: Machine, signal: sig.AttemptEnded, now: float) -> list[Any] | None:
        """A turn in which all that happened is that one plain stage ended well, by which one other came ready, in a
        lane in which nothing waits: every turn of a chain. `_take_plain` and `_start_plain`, with no queue between
        them. None, and nothing was touched, if it is not such a turn."""
        task = self.tasks.get(signal.task)
        if task is None:
            return None
        run, stage = task.run, task.stage
        layout = run.layout
        dependents = layout.dependents[stage]
        if (
            len(dependents) != 1
            or signal.status != "ok"
            or signal.route is not None
            or signal.skip_hint
            or task.stopping is not None
            or task.spawning
        ):
            return None
        tasks, name = self.tasks, task.lane
        waiting, state, simple, lane = run.waiting, run.state, layout.simple, self.lanes[name]
        if not simple[stage] or not run.plain or run.ending is not None or run.deaths:
            return None
        (after,) = dependents
        if (
            waiting[after] != 1
            or state[after]
            or not simple[after]
            or layout.lanes[after] != name
            or lane.fifo
            or lane.heap
            or self._touched
            or self.holders
            or (lane.used > lane.slots and not self._goes_ahead(lane, lane.used - 1, run, after, None))
        ):
            return None
        id = task.id
        del tasks[id], run.tasks[id]
        state[stage], state[after], waiting[after] = 6, 3, 0  # RUNNING -> DONE, WAITING -> READY -> RUNNING
        run.open -= 1
        self._seq += 1  # the place in a queue that it did not need
        self._next_task = id = self._next_task + 1
        tasks[id] = run.tasks[id] = Task(id, run, after, name, 1, now)
        seconds = signal.seconds
        row = [
            stage,
            task.attempt,
            now,
            now - task.since,
            seconds,
            signal.cpu_seconds,
            signal.bytes_in,
            signal.nbytes,
            signal.worker_pid,
            signal.started,
        ]
        if name != "process":
            return [_COMPLETED(run.id, row), _START(id, run.id, after, name)]
        short = self._measured(layout.key, stage, seconds, after)
        return [_COMPLETED(run.id, row), _START(id, run.id, after, name, 1, False, short)]

    def _measured(self: Machine, key: int, stage: int, seconds: float, after: int) -> bool:
        """Take in how long a process stage took; whether the one after it is known to be short."""
        times, at = self.seconds, (key, stage)
        known = times.get(at)
        times[at] = seconds if known is None else known + 0.3 * (seconds - known)
        return times.get((key, after), 1.0) < SHORT_SECONDS

    def _start_plain(self: Machine, lane: Lane) -> bool:
        """`_dispatch_lane` and `_start` for the stages at the front of a queue that have no policies (`Layout.simple`)
        and of which no worker has died: every stage of most graphs, so it is spelled out. It must do what those do.
        False if what is next in the queue is none of them; True if nothing is, or no slot is free for it."""
        fifo, heap, slots, name = lane.fifo, lane.heap, lane.slots, lane.name
        tasks, out = self.tasks, self._out
        crosses = name == "process"
        while fifo or heap:
            used = lane.used
            if used >= slots and name not in self.ahead:
                return True
            entry = lane.first() if heap else fifo[0]
            _, _, _, _, run, stage, _, since = entry
            layout = run.layout
            if not layout.simple[stage] or run.state[stage] != 2 or run.ending is not None or run.deaths:
                return False
            if used >= slots and not self._goes_ahead(lane, used, run, stage, None):
                return True
            short = crosses and self.seconds.get((layout.key, stage), 1.0) < SHORT_SECONDS
            if heap:
                lane.pop()
            else:
                fifo.popleft()
            self._next_task = id = self._next_task + 1
            run_id = run.id
            tasks[id] = run.tasks[id] = Task(id, run, stage, name, 1, since)
            lane.used = used + 1
            run.queued -= 1
            run.running += 1
            run.state[stage] = 3  # READY -> RUNNING
            out.append(_START(id, run_id, stage, name, 1, False, short) if short else _START(id, run_id, stage, name))
        return True

    def _take_plain(self: Machine, signals: list[Any], at: int, now: float) -> int:
        """`_on_attempt_ended` for stages without policies (`Layout.simple`) that succeeded in a run in which nothing
        has failed or been skipped: nearly every signal, so it is spelled out. Takes the signals from `at` on and
        returns the place of the first that is for the general rules. What it does must be what they do (but for its
        `Completed` in place of their two `Emit`)."""
        tasks = self.tasks
        for place in range(at, len(signals)):
            signal = signals[place]
            if type(signal) is not _ENDED:
                return place
            task = tasks.get(signal.task)
            if task is None:
                return place
            run, stage = task.run, task.stage
            layout = run.layout
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
                return place
            del tasks[task.id], run.tasks[task.id]
            run.running -= 1
            name = task.lane
            lane = self.lanes[name]
            lane.used -= 1
            if self._stirred is not lane:
                if self._stirred is not None:
                    self._mixed = True
                self._stirred = lane
            run.state[stage] = 6  # RUNNING -> DONE
            seconds = signal.seconds
            if name == "process":
                key = (layout.key, stage)
                known = self.seconds.get(key)
                self.seconds[key] = seconds if known is None else known + 0.3 * (seconds - known)
            if self._rows_of != run.id:
                if self._rows:
                    self._tell_rows()
                self._rows_of = run.id
            self._rows += (
                stage,
                task.attempt,
                now,
                now - task.since,
                seconds,
                signal.cpu_seconds,
                signal.bytes_in,
                signal.nbytes,
                signal.worker_pid,
                signal.started,
            )
            run.open -= 1
            dependents = layout.dependents[stage]
            if dependents:
                waiting, special, state = run.waiting, layout.special, run.state
                for dependent in dependents:
                    left = waiting[dependent] = waiting[dependent] - 1
                    if left > 0:
                        continue
                    if left or special[dependent] or state[dependent]:
                        self._came_special(run, dependent, left, now)
                        continue
                    state[dependent] = 2  # WAITING -> READY
                    self._seq = seq = self._seq + 1
                    run.queued += 1
                    first = -layout.priority(dependent) if layout.priorities else 0
                    to = lane
                    if layout.lanes[dependent] != name:
                        to, self._mixed = self.lanes[layout.lanes[dependent]], True
                    entry = (first, -layout.depth[dependent], run.seq, seq, run, dependent, None, now)
                    if to.fifo:
                        to.push(entry)
                    else:
                        to.fifo.append(entry)
            if self._ended:
                self._settle_ended(now)
            if not (run.running or run.queued):
                self._touched[run.id] = run  # it may be over
        return len(signals)

    def _came_special(self: Machine, run: Run, stage: int, left: int, now: float) -> None:
        """All that a stage depends on is done, and there are rules about what that means for it."""
        if left < 0:
            raise InvariantError(f"stage {run.layout.name(stage)!r} was told more ends than it waits for")
        self._tell_rows()
        self._came_ready(run, stage, now)
        self._touched[run.id] = run
