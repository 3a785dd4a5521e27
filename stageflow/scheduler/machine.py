"""Decides when each stage may run.

Takes signals (an attempt ended, items arrived, a timer fired), returns actions (start, stop, set a timer). Performs
none of them:
`stageflow.runtime.driver` does.

May not import: asyncio, threading, time, random, logging, `stageflow.runtime`, any executor.
Guarantees: actions come in the order they must be performed; equal signals in equal order give equal actions; every
task ends
exactly once; a run is finished only when nothing of it is running.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from stageflow.core.errors import InvariantError
from stageflow.pipeline.policies import DEFAULT_POLICIES, Policies
from stageflow.pipeline.spec import Role
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.admission import Admission, Limit, slots_of
from stageflow.scheduler.backpressure import Policy
from stageflow.scheduler.blocks import BlockRules
from stageflow.scheduler.books import Lane, Run, Task
from stageflow.scheduler.children import ChildRules
from stageflow.scheduler.ends import EndRules
from stageflow.scheduler.flow import FlowRules
from stageflow.scheduler.flowing import FlowingRules
from stageflow.scheduler.folding import FoldRules
from stageflow.scheduler.fused import RegionRules
from stageflow.scheduler.guards import GuardRules
from stageflow.scheduler.losses import LossRules
from stageflow.scheduler.outcomes import OutcomeRules, timeout_info
from stageflow.scheduler.plain import BRIEF_SECONDS, BRIEF_TIMES, SHORT_SECONDS, PlainRules
from stageflow.scheduler.sourcing import SourceRules
from stageflow.scheduler.standing import StandingRules
from stageflow.scheduler.states import ALLOWED, StageState
from stageflow.scheduler.stops import StopRules
from stageflow.scheduler.streams import Stream
from stageflow.scheduler.timers import TimerRules

_S = StageState
_COMPLETED: Final = act.Completed
_ENDED: Final = sig.AttemptEnded


class Machine(
    PlainRules,
    OutcomeRules,
    FlowRules,
    SourceRules,
    BlockRules,
    FlowingRules,
    StandingRules,
    LossRules,
    FoldRules,
    RegionRules,
    GuardRules,
    StopRules,
    EndRules,
    ChildRules,
    TimerRules,
):
    """The scheduler of one event loop: any number of runs, one set of lanes.

    `lanes` maps a lane's name to its slots; `tokens` names to how many there are; `memory` is the byte budget of live
    values
    (0 = none); `grace` is the time between asking and forcing.
    """

    def __init__(
        self,
        lanes: Mapping[str, int],
        *,
        tokens: Mapping[str, int] | None = None,
        memory: int = 0,
        grace: float = 5.0,
        poison_limit: int = 3,
        ahead: Mapping[str, int] | None = None,
        policies: Iterable[Policy] = (),
    ) -> None:
        self.lanes = {name: Lane(name, slots) for name, slots in lanes.items()}
        self._lane_list = tuple(self.lanes.values())
        self.runs: dict[int, Run] = {}
        self.tasks: dict[int, Task] = {}
        self.grace = grace
        self.memory = memory
        self.poison_limit = poison_limit
        self.live_bytes = 0
        self.promised = 0  # bytes that running work and open pulls are expected to add
        self.policies = tuple(policies)
        self.spilling = 0  # bytes that are on their way to disk
        self.pressure = 0
        self.pressure_reason = ""
        self.admission = Admission(tokens or {}, memory, lanes.get("process", 0))
        self.holders: dict[int, Task] = {}  # attempts that hold something of a limit and wait for child runs
        self._woke = False  # somebody who waited at a limit is in the queue of a lane again
        self.ahead = dict(ahead or {})
        self.seconds: dict[tuple[int, int], float] = {}  # (layout key, stage) -> smoothed seconds of an attempt
        self.unrolled = True  # take the short way for plain stages (tests compare it with the long one)
        self.final_states: dict[int, bytes] = {}  # of finished runs, until the driver takes them
        self._out: list[Any] = []
        self._rows: list[Any] = []  # of `_rows_of`: attempts that ended well in this turn
        self._rows_of: int = 0
        self._stirred: Lane | None = None  # where a plain stage ended or came ready in this turn
        self._mixed: bool = False  # there is more than one such lane
        self._seq: int = 0
        self._next_task: int = 0
        self._next_timer: int = 0
        self._timer_run: dict[int, Run | None] = {}
        self._ended: deque[tuple[Run, int]] = deque()
        self._emptied: deque[tuple[Run, Stream, int, int]] = deque()
        self._touched: dict[int, Run] = {}
        self._due: list[tuple[int, int]] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            sig.RunSubmitted: self._on_submitted,
            sig.AttemptEnded: self._on_attempt_ended,
            sig.BlockPart: self._on_block_part,
            sig.ItemsArrived: self._on_items_arrived,
            sig.SourceEnded: self._on_source_ended,
            sig.Decided: self._on_decided,
            sig.Spilled: self._on_spilled,
            sig.TimerDue: self._on_timer,
            sig.CapacityChanged: self._on_capacity,
            sig.PressureChanged: self._on_pressure,
            sig.CancelRequested: self._on_cancel,
            sig.StopStage: self._on_stop_stage,
            sig.StopItem: self._on_stop_item,
            sig.ChildrenWait: self._on_children,
        }

    def handle(self, signal: Any, now: float) -> list[Any]:
        """Take one signal; return what must happen next, in order. Never waits."""
        return self.handle_all([signal], now)

    def handle_all(self, signals: list[Any], now: float) -> list[Any]:
        """Take several signals of one loop turn; dispatch once."""
        if self.unrolled and len(signals) == 1 and type(signals[0]) is _ENDED:
            done = self._hand_on(signals[0], now)
            if done is not None:
                return done
        self._out = out = []
        at = self._take_plain(signals, 0, now) if self.unrolled else 0
        if at < len(signals):
            self._take_mixed(signals, at, now)
        rows = self._rows
        if rows:
            self._rows = []
            out.append(_COMPLETED(self._rows_of, rows))
        stirred, self._stirred = self._stirred, None
        if stirred is None or self._mixed or self._touched or self.holders:
            self._mixed = False
            self._dispatch(now)
            return out
        # nothing has changed for any other lane, and no run can be over
        if stirred.fifo or stirred.heap:
            self._dispatch_lane(stirred, now)
            if self._woke:
                self._dispatch(now)
        return out

    def _take_mixed(self, signals: list[Any], at: int, now: float) -> None:
        """The rest of a turn's signals, of which the first is not for the short way."""
        self._mixed = True
        while at < len(signals):
            if self._rows:
                self._tell_rows()
            signal = signals[at]
            self._handlers[type(signal)](signal, now)
            at = self._take_plain(signals, at + 1, now) if self.unrolled else at + 1

    def _tell_rows(self) -> None:
        """Pass on what ended well, before anything that came of a later signal."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        self._out.append(act.Completed(self._rows_of, rows))

    # ------------------------------------------------------------ runs

    def _on_submitted(self, signal: sig.RunSubmitted, now: float) -> None:
        self._seq += 1
        run = Run(signal, self._seq, now)
        self.runs[run.id] = run
        layout = run.layout
        if run.listening:
            self._emit("run.started", run, -1)
        if signal.deadline is not None:
            deadline = signal.deadline

            def expired(due: sig.TimerDue, at: float) -> None:
                text = f"the run took longer than its timeout of {deadline:g} s"
                error = timeout_info(text, elapsed=max(at - run.started_at, deadline), limit=deadline)
                self._end_run(run, "failed", text, at, error)

            self._set_timer(run, now + deadline, expired)
        for stage in layout.elements:
            self._open_stream(run, stage)
        waiting = run.waiting
        for stage in range(layout.size):
            if waiting[stage] == 0:
                self._came_ready(run, stage, now)
        self._settle_ended(now)
        self._touch(run)

    # ------------------------------------------------------------ moving

    def _move(self, run: Run, stage: int, to: StageState) -> None:
        """The only place that writes a stage's state (but for the sweep of `_finish`)."""
        came_from = run.state[stage]
        if not ALLOWED[came_from * 16 + to]:
            raise InvariantError(
                f"illegal move of stage {run.layout.name(stage)!r}: {StageState(came_from).name} -> {to.name}",
                stage=run.layout.name(stage),
                run_id=run.run_id,
            )
        run.state[stage] = to

    def _came_ready(self, run: Run, stage: int, now: float) -> None:
        """Everything stage depends on has ended: decide whether it runs."""
        if run.ending is not None or run.state[stage] != _S.WAITING:
            return
        layout = run.layout
        if layout.special[stage] or not run.plain:
            verdict = self._verdict(run, stage)
            if verdict is not None:
                if verdict == "decide":
                    self._move(run, stage, _S.DECIDING)
                    run.pulling += 1
                    self._out.append(act.Decide(run.id, stage))
                else:
                    self._skip(run, stage, verdict)
                return
        self._enqueue_stage(run, stage, now)

    def _enqueue_stage(self, run: Run, stage: int, now: float) -> None:
        layout = run.layout
        if layout.roles[stage] != Role.TASK:
            self._move(run, stage, _S.FLOWING)
            self._flow_begins(run, stage, now)
            return
        self._move(run, stage, _S.READY)
        self._push_ready(run, stage, now)

    def _push_ready(self, run: Run, stage: int, now: float) -> None:
        layout = run.layout
        lane = self.lanes[layout.lanes[stage]]
        self._seq += 1
        run.queued += 1
        lane.push((-layout.priority(stage), -layout.depth[stage], run.seq, self._seq, run, stage, None, now))

    def _on_decided(self, signal: sig.Decided, now: float) -> None:
        run = self.runs.get(signal.run)
        if run is None:
            return
        run.pulling -= 1
        self._touch(run)
        if run.ending is not None or run.state[signal.stage] != _S.DECIDING:
            return
        if signal.error is not None:
            self._fail_stage(run, signal.stage, signal.error, now)
        elif signal.go:
            self._enqueue_stage(run, signal.stage, now)
        else:
            self._skip(run, signal.stage, "condition: `when` said no")
        self._settle_ended(now)

    def _skip(self, run: Run, stage: int, reason: str) -> None:
        self._move(run, stage, _S.SKIPPED)
        run.plain = False
        run.skip_hints[stage] = reason
        self._emit("stage.skipped", run, stage, data={"reason": reason})
        self._stage_over(run, stage)

    def _stage_over(self, run: Run, stage: int) -> None:
        """The stage has ended; its dependents are looked at by `_settle_ended`."""
        run.open -= 1
        self._ended.append((run, stage))

    def _settle_ended(self, now: float) -> None:
        """Tell the dependents of ended stages, without recursion."""
        ended = self._ended
        while ended:
            run, stage = ended.popleft()
            layout = run.layout
            waiting = run.waiting
            if layout.plain and run.plain and run.ending is None:
                self._settle_plain(run, stage, now)
                continue
            readers = layout.readers.get(stage)
            for dependent in layout.dependents[stage]:
                if readers is not None and dependent in readers:
                    continue
                left = waiting[dependent] - 1
                waiting[dependent] = left
                if left == 0:
                    self._came_ready(run, dependent, now)
                elif left < 0:
                    raise InvariantError(f"stage {layout.name(dependent)!r} was told more ends than it waits for")
            if readers is not None:
                for reader in readers:
                    self._upstream_over(run, reader, stage, now)
            if layout.gated_by and stage in layout.gated_by:
                for gated in layout.gated_by[stage]:
                    waiting[gated] -= 1
                    if waiting[gated] == 0:
                        self._came_ready(run, gated, now)
            for producer in run.layout.graph.barriers.get(stage, ()):
                self._collector_over(run, producer)
            self._touch(run)

    def _settle_plain(self, run: Run, stage: int, now: float) -> None:
        """`_settle_ended` for a graph of plain stages of which none has failed or been skipped, unrolled."""
        layout = run.layout
        waiting, state, special = run.waiting, run.state, layout.special
        for dependent in layout.dependents[stage]:
            left = waiting[dependent] - 1
            waiting[dependent] = left
            if left == 0:
                if special[dependent] or state[dependent]:
                    self._came_ready(run, dependent, now)
                    continue
                state[dependent] = 2  # WAITING -> READY
                self._seq = seq = self._seq + 1
                run.queued += 1
                entry = (-layout.priority(dependent), -layout.depth[dependent], run.seq, seq, run, dependent, None, now)
                self.lanes[layout.lanes[dependent]].push(entry)
            elif left < 0:
                raise InvariantError(f"stage {layout.name(dependent)!r} was told more ends than it waits for")
        self._touched[run.id] = run

    # ------------------------------------------------------------ slots

    def _dispatch(self, now: float) -> None:
        """Give free slots to what is ready: priority, then depth, then age."""
        lanes = self._lane_list
        self._woke = False
        for lane in lanes:
            if lane.fifo or lane.heap:
                self._dispatch_lane(lane, now)
        if self._touched:
            touched, self._touched = self._touched, {}
            again = False
            for run in touched.values():
                if run.streams:
                    self._after(run, now)
                    again = True
            if again:
                for lane in lanes:
                    if lane:
                        self._dispatch_lane(lane, now)
            for run in touched.values():
                if not run.running and not run.pulling and run.id in self.runs:
                    self._check_over(run, now)
                elif run.standing and run.standing == run.running and run.ending is None:
                    self._all_stand(run, now)
        while self._woke:
            self._woke = False
            for lane in lanes:
                if lane:
                    self._dispatch_lane(lane, now)
        if self.holders and self.admission.parked and self._free_circles(now):
            self._dispatch(now)

    def _dispatch_lane(self, lane: Lane, now: float) -> None:
        heap, fifo = lane.heap, lane.fifo
        unrolled = self.unrolled
        while fifo or heap:
            if unrolled and (heap or fifo)[0][6] is None and self._start_plain(lane):  # [6]: the stream, if it is one
                return
            if lane.used >= lane.slots:
                _, _, _, _, run, stage, stream, _ = lane.first()
                if not self._goes_ahead(lane, lane.used, run, stage, stream):
                    return
            entry = lane.pop() if heap else fifo.popleft()
            if self.admission.woken:
                limit = self.admission.arrived(entry[3])
                if limit is not None:
                    served = self._serve(lane, entry, now)
                    self._unpark(limit, now)
                    if served:
                        continue
                    return
            if not self._serve(lane, entry, now):
                return

    def _serve(self, lane: Lane, entry: Any, now: float) -> bool:
        """The turn of one entry. False if it went back to the front of the queue, to wait for more slots at once."""
        _, _, _, _, run, stage, stream, since = entry
        run.queued -= 1
        if run.ending is not None:
            if stream is not None:
                stream.queued = False
            return True
        if run.layout.limited[stage] and lane.used:
            slots = slots_of(run.layout.specs[stage].policies, lane.name, lane.slots)
            if slots > 1 and lane.used + slots > lane.slots:
                run.queued += 1
                if stream is not None:
                    stream.held_for("slot", now)
                lane.push(entry)
                return False
        if stream is None:
            if run.state[stage] == _S.READY:
                if not run.layout.limited[stage] or self._admit(run, stage, lane, entry, now):
                    self._start(run, stage, lane, since, now)
        else:
            stream.queued = False
            self._start_flow(run, stream, lane, entry, now)
        return True

    def _is_full(self, lane: Lane, run: Run, stage: int, stream: Stream | None) -> bool:
        """Whether a lane takes no more of a stage: its slots are used, and what is short may not go ahead either."""
        if lane.used < lane.slots:
            return False
        return lane.used >= lane.slots * self.ahead.get(lane.name, 1) or not self._is_short(run, stage, stream)

    def _is_short(self, run: Run, stage: int, stream: Stream | None) -> bool:
        """Measured to take less than SHORT_SECONDS, and free of a timeout (whose clock would run in a queue)."""
        policies = run.layout.specs[stage].policies
        if policies is not DEFAULT_POLICIES and policies.timeout is not None:
            return False
        if stream is not None and stream.can_block and stream.measured:
            return True  # blocks are cut to a few milliseconds
        return self.seconds.get((run.layout.key, stage), 1.0) < SHORT_SECONDS

    def _goes_ahead(self, lane: Lane, used: int, run: Run, stage: int, stream: Stream | None) -> bool:
        """Whether it may be handed over although `used` of a lane's slots, which is all or more, are taken."""
        ahead = self.ahead.get(lane.name, 1) * lane.slots
        if used < ahead:
            return self._is_short(run, stage, stream)
        if stream is not None or used >= ahead * BRIEF_TIMES or ahead <= lane.slots:
            return False
        return self.seconds.get((run.layout.key, stage), 1.0) < BRIEF_SECONDS and self._is_short(run, stage, None)

    def _admit(self, run: Run, stage: int, lane: Lane, entry: Any, now: float) -> bool:
        """Ask the limits of a stage; when refused, the entry waits at the limit that refused it."""
        limit = self.admission.ask(lane.name, entry, run.layout.specs[stage].policies, now)
        if limit is None:
            return True
        run.queued += 1
        if entry[6] is not None:
            entry[6].queued = True
            entry[6].held_for(limit[0], now)
        else:
            self._held_at(run, stage, limit[0], now)
        self.admission.park(limit, lane.name, entry)
        self._look_again(limit)
        return False

    def _held_at(self, run: Run, stage: int, reason: str, now: float) -> None:
        """From now on a plain stage waits for this ("" = it starts)."""
        held = run.held.pop(stage, None)
        if held is not None:
            waits = run.waits.setdefault(stage, {})
            waits[held[0]] = waits.get(held[0], 0.0) + now - held[1]
        if reason:
            run.held[stage] = (reason, now)

    def _unpark(self, limit: Limit, now: float) -> None:
        """A limit may have room: queue who can pass."""
        for lane, entry in self.admission.wake(limit, now):
            self.lanes[lane].push(entry)
            self._woke = True
        self._look_again(limit)

    def _look_again(self, limit: Limit) -> None:
        """Who waits for a rate is woken by a timer."""
        at = self.admission.alarm(limit)
        if at is not None:

            def due(signal: sig.TimerDue, when: float) -> None:
                self.admission.timed.discard(limit)
                self._unpark(limit, when)

            self._set_timer(None, at, due)

    def _start(self, run: Run, stage: int, lane: Lane, since: float, now: float) -> None:
        self._next_task = id = self._next_task + 1
        attempt = run.tries.get(stage, 0) + 1 if run.tries else 1
        name = lane.name
        task = Task(id, run, stage, name, attempt, since)
        layout = run.layout
        lane.used += 1
        run.running += 1
        self.tasks[id] = task
        run.tasks[id] = task
        self._move(run, stage, _S.RUNNING)
        policies = layout.specs[stage].policies
        if policies is not DEFAULT_POLICIES:
            run.first_start.setdefault(stage, now)
            if run.held:
                self._held_at(run, stage, "", now)
            if attempt == 1 and policies.retry is not None:  # later attempts do not tell when it came ready
                run.waits.setdefault(stage, {}).setdefault("upstream", since - run.started_at)
            if layout.limited[stage]:
                self._reserve(task, policies, lane, now)
            if policies.total_timeout is not None:
                task.deadline = run.first_start[stage] + policies.total_timeout
            if policies.timeout is not None or task.deadline is not None:
                self._arm_timeout(task, policies.timeout, now)
        alone = bool(run.deaths) and run.deaths.get(stage, 0) > 0
        short = name == "process" and self._is_short(run, stage, None)
        feedback = run.feedback.get(stage) if run.feedback else None
        self._out.append(act.StartAttempt(id, run.id, stage, name, attempt, alone, short, task.tokens, feedback))

    def _reserve(self, task: Task, policies: Policies, lane: Lane, now: float) -> None:
        """Take what a task's stage was admitted for."""
        task.tokens = self.admission.take(lane.name, task.run.layout.key, task.stage, policies, now)
        resources = policies.resources
        if resources is None:
            return
        task.slots = slots_of(policies, lane.name, lane.slots)
        lane.used += task.slots - 1
        if resources.memory is not None:  # said, so neither measured nor guessed
            self.promised += int(resources.memory) - task.expected
            task.expected = int(resources.memory)

    def _drop_task(self, task: Task, now: float) -> None:
        """The task is over: give back what it held."""
        run = task.run
        del self.tasks[task.id]
        del run.tasks[task.id]
        run.running -= 1
        self.promised -= task.expected
        lane = self.lanes[task.lane]
        if not task.spawning and task.stood is None:
            lane.used -= task.slots
        elif self.holders:
            self.holders.pop(task.id, None)
        if task.stood is not None and task.stream is not None:
            self._stands_no_more(run, task, task.stream, now)
        if task.timer:
            self._drop_timer(task.timer)
            task.timer = 0
        if run.layout.limited[task.stage]:
            for limit in self.admission.give_back(
                task.lane, run.layout.key, task.stage, run.layout.specs[task.stage].policies, task.tokens
            ):
                self._unpark(limit, now)
        self._touch(run)

    def _on_capacity(self, signal: sig.CapacityChanged, now: float) -> None:
        self.lanes[signal.lane].slots = signal.slots
        for run in self.runs.values():
            self._touch(run)

    def _on_pressure(self, signal: sig.PressureChanged, now: float) -> None:
        self.pressure, self.pressure_reason = signal.level, signal.reason
        for run in self.runs.values():
            self._touch(run)

    # ------------------------------------------------------------ the end of a turn

    def _touch(self, run: Run) -> None:
        self._touched[run.id] = run

    def _after(self, run: Run, now: float) -> None:
        """Once per signal and touched run: let blocked streams try again, pull sources."""
        if run.id not in self.runs or run.ending is not None or not run.streams:
            return
        if run.standing:
            self._let_go_on(run, now)
        if run.blocked:
            blocked, run.blocked = run.blocked, []
            for stream in blocked:
                fed = stream.pending == "downstream" and (stream.standing or self._is_fed(run, stream, 2))
                if run.running > run.standing and fed:
                    run.blocked.append(stream)
                else:
                    stream.blocked = False
                    self._offer(run, stream, now)
        self._pull_sources(run, now)

    def _emit(
        self,
        type: str,
        run: Run,
        stage: int,
        *,
        item: tuple[int, ...] | None = None,
        attempt: int | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        self._out.append(act.Emit(type, run.id, stage, item, attempt, data or {}))
