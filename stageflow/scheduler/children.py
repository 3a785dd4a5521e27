"""Attempts that wait for runs they have started, and the waits among them that never end.

An attempt that waits for a child run gives its slot back and keeps what else it holds: it may go on working beside the
child, so its tokens, its turn and its memory are not lent. A child whose stages can only start with what such attempts
hold waits for an attempt that waits for it: it ends with an error that names them. Only what cannot pass whatever else
ends is such a wait.

Part of `Machine`; see there for what this may not import.
"""

# mypy: disable-error-code="misc"
# The rules of `Machine` are spread over modules by subject; each method names Machine as its self.

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from stageflow.core.output import ErrorInfo
from stageflow.scheduler import signals as sig
from stageflow.scheduler.admission import Limit, demands
from stageflow.scheduler.books import Run, Task

if TYPE_CHECKING:
    from stageflow.scheduler.machine import Machine

Parked = dict[int, list[tuple[Limit, Any]]]  # run -> what of it waits at a limit


class ChildRules:
    """Child runs and who waits for them."""

    def _on_children(self: Machine, signal: sig.ChildrenWait, now: float) -> None:
        """An attempt may wait for several runs at once: its slot is free until it has them all."""
        task = self.tasks.get(signal.task)
        if task is None or not (signal.waiting or task.spawning):
            return
        lane = self.lanes[task.lane]
        if signal.waiting:
            task.spawning += 1
            if task.spawning == 1:
                lane.used -= task.slots if task.stood is None else 0
                if task.run.layout.limited[task.stage]:
                    self.holders[task.id] = task
        else:
            task.spawning -= 1
            if not task.spawning:
                lane.used += task.slots if task.stood is None else 0
                self.holders.pop(task.id, None)
        self._touch(task.run)

    def _free_circles(self: Machine, now: float) -> bool:
        """End the youngest run that waits for an attempt that waits for it; whether there was one. Costs a look at
        what waits at limits, where an attempt that holds something waits for a child."""
        caught = self._caught()
        if caught is None:
            return False
        stuck, tasks, parked = caught
        run = max((run for run in stuck.values() if run.id in parked), key=lambda run: run.seq)
        message = f"nothing of the run can start: {'; '.join(_circle(run, stuck, tasks, parked))}"
        error = ErrorInfo(type="stageflow.core.errors.NoProgressError", code="SF-NO-PROGRESS", message=message)
        self._end_run(run, "failed", message, now, error)
        self._check_over(run, now)
        return True

    def _caught(self: Machine) -> tuple[dict[int, Run], dict[int, Task], Parked] | None:
        """The runs that never move again, the attempts that wait for nothing but those, and where they wait."""
        parked: Parked = {}
        for limit, entry in self.admission.waiting():
            if entry[4].parent and entry[4].ending is None:
                parked.setdefault(entry[4].id, []).append((limit, entry))
        if not parked:
            return None
        children: dict[int, list[Run]] = {}
        for run in self.runs.values():
            if run.parent:
                children.setdefault(run.parent, []).append(run)
        stuck = {run.id: run for runs in children.values() for run in runs if _rests(run, len(parked.get(run.id, ())))}
        while stuck:
            tasks = {
                number: self.tasks[number]
                for number, runs in children.items()
                if number in self.tasks
                and self.tasks[number].spawning == len(runs)
                and self.tasks[number].stopping is None
                and all(run.id in stuck for run in runs)
            }
            held: Counter[Limit] = Counter()
            for task in tasks.values():
                for limit, need in demands(task.run.layout, task.stage, task.lane):
                    held[limit] += need  # type: ignore[assignment]
            moving = [
                run
                for run in stuck.values()
                if any(task.id not in tasks for task in run.tasks.values())
                or any(
                    self.admission.may_pass(limit, entry, run.layout.lanes[entry[5]], held[limit])
                    for limit, entry in parked.get(run.id, ())
                )
            ]
            if not moving:
                return stuck, tasks, parked
            for run in moving:
                del stuck[run.id]
        return None


def _rests(run: Run, parked: int) -> bool:
    """Whether nothing of a run moves but by the end of its attempts' children or with room at a limit."""
    if run.ending is not None or run.pulling or run.retry_timers or run.queued != parked:
        return False
    return bool(parked or run.tasks) and all(task.spawning for task in run.tasks.values())


def _circle(run: Run, stuck: dict[int, Run], tasks: dict[int, Task], parked: Parked) -> list[str]:
    """One sentence for each attempt that holds what the next run waits for, until it comes round."""
    said: list[str] = []
    seen: set[int] = set()
    while run.id not in seen:
        seen.add(run.id)
        limit, entry = parked[run.id][0]
        holders = [
            task
            for task in tasks.values()
            if any(found == limit for found, _ in demands(task.run.layout, task.stage, task.lane))
        ]
        above = _above(run, tasks)
        holder = next((task for task in holders if task.id in above), holders[0])
        layout = holder.run.layout
        text = f"stage {layout.name(holder.stage)!r} of run {holder.run.run_id} holds {_what(limit, holder)}"
        below = holder
        while True:  # down to a run of which something waits at a limit
            run = next(child for child in stuck.values() if child.parent == below.id)
            text += f" and waits for its child run {run.run_id}"
            if run.id in parked:
                break
            below = next(iter(run.tasks.values()))
            text += f", whose stage {run.layout.name(below.stage)!r} runs"
        limit, entry = parked[run.id][0]
        said.append(f"{text}, whose stage {run.layout.name(entry[5])!r} waits for {_what(limit, None)}")
    return said


def _above(run: Run, tasks: dict[int, Task]) -> set[int]:
    """The attempts that wait for a run, directly or for one between."""
    found: set[int] = set()
    while run.parent in tasks:
        found.add(run.parent)
        run = tasks[run.parent].run
    return found


def _what(limit: Limit, holder: Task | None) -> str:
    kind, name = limit
    if kind == "token":
        return f"the token {name!r}"
    if kind == "concurrency":
        return "its turn" if holder is None else "the turn of its stage (`concurrency`)"
    return "reserved memory" if kind == "memory" else "cores"
