"""Checks that the scheduler's books balance, replays its log, and tells how a stage came to be where it is.

For tests and debugging: an audit walks everything that is alive. Nothing here is touched unless somebody asks.

May not import: asyncio, threading, time, random, logging, `stageflow.runtime`, any executor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from stageflow.core.errors import InvariantError
from stageflow.pipeline.spec import Role
from stageflow.scheduler.admission import slots_of
from stageflow.scheduler.books import Run
from stageflow.scheduler.machine import Machine
from stageflow.scheduler.states import ENDED, StageState
from stageflow.scheduler.streams import Chunk, Segment, Stream

_S = StageState

#: what `Driver.recorder` holds: the time of a turn and the signals handled in it
Log = Iterable[tuple[float, list[Any]]]


def audit(machine: Machine) -> None:
    """Raise InvariantError if the books do not balance. Between two signals only; costs as much as there is alive."""
    _audit_lanes(machine)
    total = 0
    for run in machine.runs.values():
        _audit_run(machine, run)
        total += run.live_bytes
    _check(machine.live_bytes == total, "live bytes are the sum of those of the runs", machine.live_bytes, total)
    _check(not machine._ended and not machine._emptied, "nothing waits to be settled", len(machine._ended))


def replay(log: Log, machine: Machine) -> list[Any]:
    """The actions that a fresh `machine` gives for a recorded log: equal signals in equal order, equal actions."""
    actions: list[Any] = []
    for now, signals in log:
        actions.extend(machine.handle_all(signals, now))
    return actions


class Story:
    """Remembers every move of every stage of a machine: `Story(machine)` before the run, `of(run, stage)` after."""

    def __init__(self, machine: Machine) -> None:
        self._moves: dict[tuple[str, str], list[str]] = {}
        move = machine._move

        def remembered(run: Run, stage: int, to: StageState) -> None:
            came_from = StageState(run.state[stage])
            moves = self._moves.setdefault((run.run_id, run.layout.name(stage)), [])
            moves.append(f"{came_from.name} -> {to.name}")
            move(run, stage, to)

        machine._move = remembered  # type: ignore[method-assign]
        machine.unrolled = False

    def of(self, run_id: str, stage: str) -> tuple[str, ...]:
        """The moves of one stage, oldest first. A plain stage's step from WAITING to READY may be left out."""
        return tuple(self._moves.get((run_id, stage), ()))


def _check(fine: bool, rule: str, *seen: Any) -> None:
    if not fine:
        raise InvariantError(f"the scheduler's books do not balance: {rule} ({', '.join(map(str, seen))})")


# ---------------------------------------------------------------- slots and queues


def _audit_lanes(machine: Machine) -> None:
    held: Counter[str] = Counter()
    by_run: Counter[int] = Counter()
    for task in machine.tasks.values():
        by_run[task.run.id] += 1
        if not task.spawning and task.stood is None:
            held[task.lane] += task.slots
        _check(machine.runs.get(task.run.id) is task.run, "a task belongs to a live run", task.id)
        _check(task.run.tasks.get(task.id) is task, "a run knows its tasks", task.id)
    holding = {task.id for task in machine.tasks.values() if task.spawning and task.run.layout.limited[task.stage]}
    _check(set(machine.holders) == holding, "who holds something and waits for a run is known", holding)
    for lane in machine.lanes.values():
        _check(lane.used == held[lane.name], "a slot is used iff a task holds it", lane.name, lane.used, held)
        room = lane.used < lane.slots
        waiting = [entry for entry in lane.entries() if entry[4].ending is None]
        if room and waiting:  # the first may wait for more than one slot, and the others then wait behind it
            first = min(waiting)
            room = lane.used + slots_of(first[4].layout.specs[first[5]].policies, lane.name, lane.slots) <= lane.slots
        _check(not (room and waiting), "nothing waits for a lane that has room", lane.name, len(waiting))
    for run in machine.runs.values():
        standing = [task for stream in run.streams.values() for task in stream.standing]
        known = [task.id for task in run.tasks.values() if task.stood is not None]
        _check(sorted(task.id for task in standing) == known, "who stands still is known", len(standing), known)
        _check(run.standing == len(standing), "standing counts them", run.standing, len(standing))
        stuck = run.standing and run.standing == run.running and run.ending is None
        waits = run.retry_timers or run.spilling or run.queued
        _check(not stuck or bool(waits), "something of a run moves or is waited for", run.run_id)
        _check(run.running == by_run[run.id], "running counts the tasks of a run", run.running, by_run[run.id])
    queued: Counter[int] = Counter()
    streams: Counter[int] = Counter()
    for entry in _entries(machine):
        queued[entry[4].id] += 1
        if entry[6] is not None:
            streams[id(entry[6])] += 1
    for run in machine.runs.values():
        _check(run.queued == queued[run.id], "queued counts a run's entries", run.queued, queued[run.id])
        for stream in run.streams.values():
            seen = streams[id(stream)]
            _check(seen == int(stream.queued), "a stream is queued once or not at all", stream.stage, seen)
    _audit_limits(machine)


def _entries(machine: Machine) -> Iterator[Any]:
    for lane in machine.lanes.values():
        yield from lane.entries()
    for _, entry in machine.admission.waiting():
        yield entry


def _audit_limits(machine: Machine) -> None:
    admission = machine.admission
    busy: Counter[tuple[int, int]] = Counter()
    tokens: Counter[str] = Counter()
    for task in machine.tasks.values():
        policies = task.run.layout.specs[task.stage].policies
        if policies.concurrency is not None:
            busy[task.run.layout.key, task.stage] += 1
            most = busy[task.run.layout.key, task.stage]
            _check(most <= policies.concurrency, "no more attempts at once than allowed", most, policies.concurrency)
        for name, indices in (task.tokens or {}).items():
            tokens[name] += len(indices)
            wanted = policies.resources.tokens[name] if policies.resources is not None else 0
            _check(len(indices) == wanted, "an attempt holds the tokens it asked for", name, indices, wanted)
    _check(dict(busy) == admission.busy, "attempts at once are counted", busy, admission.busy)
    for name, total in admission.total_tokens.items():
        free = admission.free_tokens[name]
        _check(len(set(free)) == len(free), "a token exists once", name, free)
        _check(len(free) + tokens[name] == total, "tokens are neither lost nor invented", name, free, tokens[name])
    _audit_waiting_at(machine, tokens)


def _audit_waiting_at(machine: Machine, tokens: Counter[str]) -> None:
    """Who waits at a limit waits for somebody who holds it or is on the way to it."""
    admission = machine.admission
    coming: Counter[tuple[Any, str]] = Counter()
    for lane in machine.lanes.values():
        for entry in lane.entries():
            if entry[3] in admission.woken:
                limit, where, need = admission.woken[entry[3]]
                _check(where == lane.name, "who was woken goes to its lane", where, lane.name)
                coming[limit, where] += need  # type: ignore[assignment]
    _check(dict(coming) == admission.coming, "who was woken is on the way", coming, admission.coming)
    for (kind, what), lanes in admission.parked.items():
        expected = any(limit == (kind, what) for limit, _ in coming)
        if expected or not any(entry[4].ending is None for heap in lanes.values() for entry in heap):
            continue
        if kind == "concurrency":
            _check(admission.busy.get(what, 0) > 0, "who waits for a turn waits for somebody", what)
        elif kind == "token":
            _check(tokens[what] > 0, "who waits for a token waits for its holder", what)
        elif kind == "memory":
            _check(admission.memory_used > 0, "who waits for memory waits for its holder", what)
        elif kind == "cpu":
            _check(admission.cores_used > 0, "who waits for cores waits for their holder", what)
        else:
            _check(bool(admission.timers), "who waits for a rate waits for a timer", what)


# ---------------------------------------------------------------- runs


def _audit_run(machine: Machine, run: Run) -> None:
    layout, state = run.layout, run.state
    live = sum(1 for at in state if at < ENDED)
    _check(run.open == live, "open counts the stages that have not ended", run.open, live)
    tasks = Counter(task.stage for task in run.tasks.values())
    for stage in range(layout.size):
        if layout.roles[stage] == Role.TASK:
            wanted = 1 if state[stage] == _S.RUNNING else 0
            _check(tasks[stage] == wanted, "a stage runs iff it holds a slot", layout.name(stage), tasks[stage])
    if run.ending is None:
        _audit_progress(machine, run)
        _audit_waiting(run)
    for stream in run.streams.values():
        _audit_stream(run, stream)
    if run.ending is None:
        _audit_values(run)  # the values of a run that is being stopped go with it


def _audit_progress(machine: Machine, run: Run) -> None:
    pulls = sum(1 for stream in run.streams.values() if stream.pull_open)
    deciding = run.state.count(_S.DECIDING)
    _check(run.pulling == pulls + deciding, "pulling counts pulls and decisions", run.pulling, pulls, deciding)
    waits = run.state.count(_S.BACKOFF) + sum(
        len(stream.delayed) + len(stream.delayed_folds) for stream in run.streams.values()
    )
    _check(run.retry_timers == waits, "every retry to come has a timer", run.retry_timers, waits)
    _check(
        run.running + run.pulling + run.queued + run.retry_timers > 0,
        "a run that is not over has something that will happen",
        [(run.layout.name(i), StageState(at).name) for i, at in enumerate(run.state) if at < ENDED][:6],
    )
    _check(not run.blocked or run.running > 0, "a stream is held back only while something runs", len(run.blocked))
    for stream in run.blocked:
        _check(stream.blocked, "a stream knows that it is held back", stream.stage)


def _audit_waiting(run: Run) -> None:
    layout, state = run.layout, run.state
    for stage in range(layout.size):
        if state[stage] != _S.WAITING:
            continue
        elements = layout.elements.get(stage, ())
        needed = [dep for dep in layout.graph.deps[stage] if dep not in elements]
        needed.extend(layout.gates.get(stage, ()))
        left = sum(1 for dep in needed if state[dep] < ENDED)
        _check(run.waiting[stage] == left, "waiting counts what has not ended", layout.name(stage), left)
        _check(left > 0, "a stage that waits for nothing does not wait", layout.name(stage))


def _audit_stream(run: Run, stream: Stream) -> None:
    name = run.layout.name(stream.stage)
    running = sum(max(1, task.items) for task in run.tasks.values() if task.stream is stream)
    _check(stream.running == running, "running counts the items under way", name, stream.running, running)
    counted = sum(segment.count() for segment in _ready_segments(stream))
    if not stream.ended:
        _check(stream.ready_count == counted, "ready counts the items that may run", name, stream.ready_count, counted)
    weights: Counter[int] = Counter()
    for segment in _ready_segments(stream):
        for column, (chunk, _) in enumerate(segment.columns):
            weights[column] += int(chunk.each * segment.count())
    for weight in weights.values():
        _check(weight <= run.live_bytes, "items weigh no more than the values they lie in", name, weight)
    if run.ending is None and run.state[stream.stage] == _S.FLOWING and stream.in_total >= 0:
        _check(stream.arrived <= stream.in_total, "no more items come in than there are", name, stream.arrived)


def _ready_segments(stream: Stream) -> Iterator[Segment]:
    for _, _, segment in stream.ready:
        yield segment
    for job in stream.jobs:
        yield from job
    yield from stream.batch_group
    fold = stream.fold
    if fold is not None:
        for _, parts in fold.blocks.values():
            yield from parts
        for kind, what in fold.jobs:
            if kind == "fold":
                yield from what[1]  # type: ignore[index]


# ---------------------------------------------------------------- values


def _audit_values(run: Run) -> None:
    """Every live value is held by somebody who will let it go, and counted once."""
    left: Counter[int] = Counter()
    chunks: dict[int, Chunk] = {}

    def reads(chunk: Chunk, count: int) -> None:
        if chunk.handle:
            chunks[id(chunk)] = chunk
            left[id(chunk)] += count

    def held(segments: Iterable[Any]) -> None:
        for segment in segments:
            for chunk, _ in segment.columns:
                reads(chunk, segment.count())

    accumulators = 0
    for stream in run.streams.values():
        held(_ready_segments(stream))
        held(stream.delayed.values())
        if stream.batch_frontier is not None:
            held(stream.batch_frontier.waiting())
        if stream.join is not None:
            for side in stream.join.pending:
                held(side)
        if stream.flow_frontier is not None:
            for entry in stream.flow_frontier.waiting():
                chunk = entry[1]  # type: ignore[index]
                if chunk is not None:
                    reads(chunk, 1)
            for parts in stream.early.values():
                for chunk, _ in parts:
                    reads(chunk, 1)
        for task in stream.delayed_folds.values():
            held(task.segments)
        for chunk in stream.kept:
            reads(chunk, 1)
        if stream.fold is not None:
            accumulators += sum(stream.fold.sizes.values())
            nodes = {handle for handle in stream.fold.nodes.values() if handle}
            _check(nodes <= set(stream.fold.sizes), "every accumulator is accounted for", stream.stage)
    for task in run.tasks.values():
        for segment in task.segments or ():
            for part in _unreported(segment, task.reported or []):
                held([part])
    for key, chunk in chunks.items():
        _check(chunk.nbytes >= 0, "what is still to be read has not been freed", chunk.handle, left[key])
        _check(chunk.left == left[key], "reads to come are counted", chunk.handle, chunk.left, left[key])
    total = accumulators + sum(chunk.nbytes for chunk in chunks.values())
    _check(run.live_bytes == total, "live bytes are those of the values held", run.live_bytes, total)


def _unreported(segment: Segment, reported: list[tuple[int, int]]) -> Iterator[Segment]:
    lo = segment.lo
    for start, stop in sorted(reported):
        if stop <= lo or start >= segment.hi:
            continue
        if start > lo:
            yield segment.cut(lo, start)
        lo = max(lo, stop)
    if lo < segment.hi:
        yield segment.cut(lo, segment.hi)
