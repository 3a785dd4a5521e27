"""Flat-map items whose generators give more than is wanted: they stand still until their readers have caught up.

A generator that has given about as much as may be on its way asks whether to go on. It does while its readers want more
and the bytes allow; else it stands, and its slot is another's: its readers may need it. Whose turn it is (the oldest
item of the stage) may use as much of the budget as any task of its depth, those behind it only what sources may. When
all that runs stands, nothing would ever free a byte: then the deepest and oldest goes on whatever the budget says.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from typing import TYPE_CHECKING

from stageflow.scheduler import actions as act
from stageflow.scheduler.backpressure import View, pull_bytes, strictest
from stageflow.scheduler.books import Run, Task
from stageflow.scheduler.streams import Stream

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine


class StandingRules:
    """Calls that ask whether to go on."""

    def _asks(self: Machine, run: Run, task: Task, stream: Stream, now: float) -> None:
        """A generator has given its share, and gives no more until it is told to."""
        reason = self._held_up(run, task, stream, 1)
        if reason is None:
            self._expect(task, task.gave)
            task.gave = 0
            self._out.append(act.GoOn(task.id))
            return
        self._expect(task, 0)
        task.stood = now
        run.standing += 1
        stream.standing.append(task)
        if not task.spawning:
            self.lanes[task.lane].used -= task.slots
        if sum(max(1, one.items) for one in stream.standing) == stream.running:
            stream.waits_for(reason, now)
        self._out.append(act.Stand(task.id))

    def _expect(self: Machine, task: Task, nbytes: int) -> None:
        """What a call is expected to add from now on: it is the bytes between two of its questions."""
        self.promised += nbytes - task.expected
        task.expected = nbytes

    def _held_up(self: Machine, run: Run, task: Task, stream: Stream, part: int) -> str | None:
        """Why a generator has to wait; None when it may go on. `part`: what the readers have waiting, divided by it, is
        what counts."""
        if self._is_fed(run, stream, part):
            return "downstream"
        if not (self.memory or self.pressure >= 2 or self.policies):
            return None
        frontier = stream.flow_frontier
        if self.memory and frontier is not None and frontier.next != task.item:
            if pull_bytes(self.memory, self.live_bytes, self.promised - task.expected) < task.gave:
                return "bytes"
        layout = run.layout
        view = View("start", layout.name(stream.stage), self.memory, self.live_bytes, self.promised - task.expected,
                    task.gave, stream.ready_count, run.running, self.pressure,
                    layout.depth[stream.stage] / layout.deepest)  # fmt: skip
        return strictest(self.policies, view)

    def _let_go_on(self: Machine, run: Run, now: float) -> None:
        """Something has changed: those go on that may, the deepest and oldest first."""
        for task in self._standing_of(run):
            assert task.stream is not None
            if self._held_up(run, task, task.stream, 2) is None:
                self._go_on(run, task, task.stream, now)

    def _standing_of(self: Machine, run: Run) -> list[Task]:
        depth = run.layout.depth
        found = [task for stream in run.streams.values() for task in stream.standing]
        return sorted(found, key=lambda task: (-depth[task.stage], task.item))

    def _go_on(self: Machine, run: Run, task: Task, stream: Stream, now: float) -> None:
        self._stands_no_more(run, task, stream, now)
        self._expect(task, task.gave)
        task.gave = 0
        if not task.spawning:
            self.lanes[task.lane].used += task.slots
        stream.waits_for("", now)
        self._out.append(act.GoOn(task.id))

    def _stands_no_more(self: Machine, run: Run, task: Task, stream: Stream, now: float) -> None:
        assert task.stood is not None
        task.paused += now - task.stood
        task.stood = None
        run.standing -= 1
        stream.standing.remove(task)

    def _all_stand(self: Machine, run: Run, now: float) -> None:
        """All that runs stands still. What is deeper and was held back goes first; what waits for a slot, for its time
        or for the disk is waited for; else the first of them goes on."""
        first = self._standing_of(run)[0]
        depth = run.layout.depth
        deeper = [stream for stream in run.blocked if depth[stream.stage] > depth[first.stage]]
        if deeper:
            run.blocked = [stream for stream in run.blocked if stream not in deeper]
            for stream in deeper:
                stream.blocked = False
                self._offer(run, stream, now)
            for lane in self._lane_list:
                if lane:
                    self._dispatch_lane(lane, now)
        if run.running > run.standing or run.retry_timers or run.spilling or not run.standing:
            return
        parked = sum(entry[4] is run for _, entry in self.admission.waiting()) if run.queued else 0
        if run.queued > parked:
            return  # something is about to get a slot
        assert first.stream is not None
        self._go_on(run, first, first.stream, now)
