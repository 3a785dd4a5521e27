"""The only place where loop, clock, executors and scheduler meet: feeds signals to the machine and performs its
actions.

One driver per engine and event loop; it serves all runs of the engine on that loop. Decides nothing. Not thread-safe:
every method is
called on its loop's thread, except `cancel_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from stageflow.context.attempt import ABSENT, Header
from stageflow.context.cancellation import CancellationToken
from stageflow.context.items import Done, ItemFailure, Piece, mask_from_wire
from stageflow.context.tracing import TRACE, current_traceparent
from stageflow.core.errors import InvariantError, StageFailedError, StageflowError, StageTimeoutError
from stageflow.core.executor import Call, Executor, Outcome, OutcomeKind, Payload
from stageflow.core.failure import capture
from stageflow.core.kinds import StageKind, StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.events import names
from stageflow.events.event import Event
from stageflow.events.fanout import FanOut
from stageflow.pipeline.policies import DEFAULT_POLICIES
from stageflow.pipeline.spec import Role
from stageflow.runtime.clock import DriverClock, RealClock
from stageflow.runtime.failing import FailingBlocks
from stageflow.runtime.inputs import stage_inputs
from stageflow.runtime.job import KEPT_FAILURES, Job
from stageflow.runtime.paths import located, of_block, of_results, of_segment
from stageflow.runtime.relay import Relay
from stageflow.runtime.result import Abandoned, FailureRecord
from stageflow.runtime.sampling import Sampler
from stageflow.runtime.sequence import Values
from stageflow.runtime.sources import InlineSource, SequenceSource, TaskSource, ThreadSource, sized
from stageflow.runtime.strategies import Verdict, judge
from stageflow.scheduler import actions as act
from stageflow.store.keys import digest
from stageflow.scheduler import signals as sig
from stageflow.scheduler.machine import Machine

_log = logging.getLogger("stageflow")
MOST_ROUNDS: Final = 64  # turns of signals and actions before the loop gets its own turn
_OK: Final = OutcomeKind.OK
#: values of which nothing needs to be looked at: they are no payload, output, mapping or route
_SCALARS: Final = frozenset({bool, int, float, str, bytes, list, tuple})
CROSSING_FROM: Final = 65536  # bytes of items from which their producer encodes them for readers in other processes
WIDTH: Final = len(act.ROW)
FROZEN: Final = 1.0  # a timer this late means the process was stopped or the loop blocked: deadlines move by the gap


#: every driver of this process: `ctx.spawn` finds the run of an attempt by it
live_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()


class Running(msgspec.Struct, eq=False, gc=False):
    """One attempt under way, as the driver knows it. `claim` is what acts around it, if anything.

    Not known to the collector, which would walk all that run: it is taken out by hand when the attempt ends."""

    job: Job
    action: Any
    executor: Executor
    since: float
    claim: Any = None
    timeout: float | None = None  # the limit that was used up
    at: float = 0.0  # where the parts of a block that came back end
    children: set[int] | None = None  # runs it has started


class Driver:
    """Performs what the machine decides."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        machine: Machine,
        executors: Mapping[str, Executor],
        *,
        clock: DriverClock,
        events: FanOut,
        policies: Any = None,
        engine: Any = None,
    ) -> None:
        self.loop = loop
        self.machine = machine
        self.executors = dict(executors)
        self.clock = clock
        self.events = events
        self.jobs: dict[int, Job] = {}
        self.running: dict[int, Running] = {}
        self.first_starts: dict[tuple[int, Any], float] = {}
        self.recorder: list[tuple[float, list[Any]]] | None = None  # a turn's time and signals, for `audit.replay`
        self.policies = policies  # interceptors and idempotency: `stageflow.runtime.around`
        self.engine = engine
        self.failing = FailingBlocks()
        self.sampler = Sampler(self)
        self.relay = Relay()
        self.watchers: tuple[Any, ...] = ()  # of memory and of the loop; begun and ended with the first and last run
        live_drivers.add(self)
        self._signals: list[Any] = []
        self._scheduled = False
        self._turning = False
        self.broken = False
        self._timers: dict[int, tuple[Any, float, int]] = {}
        self._next_run = 0
        self._next_handle = 0
        self._seq = 0
        self._now = clock.monotonic()  # of the turn
        self._settled = None if type(clock) is RealClock else clock.settled
        self._payload_types: dict[type, bool] = {}
        self._deliver_attempt = self._attempt_outcome
        self._deliver_block = self._guarded(self._block_outcome)
        self._deliver_fold = self._guarded(self._fold_outcome)
        for executor in self.executors.values():
            self._listen(executor)
        self._perform: dict[type, Callable[[Any], None]] = {
            act.StartAttempt: self._start_attempt,
            act.StartBlock: self._start_block,
            act.StartFold: self._start_fold,
            act.StopAttempt: self._stop_attempt,
            act.SetTimer: self._set_timer,
            act.CancelTimer: self._cancel_timer,
            act.PullSource: self._pull_source,
            act.StopSource: self._stop_source,
            act.Decide: self._decide,
            act.Release: self._release,
            act.Emit: self._emit,
            act.Completed: self._completed,
            act.KeepItems: self._keep_items,
            act.KeepAccumulator: self._keep_accumulator,
            act.Spill: self._spill,
            act.FinishRun: self._finish_run,
        }

    def _listen(self, executor: Any) -> None:
        executor.on_note = self._noted
        if hasattr(executor, "on_worker_event"):
            executor.on_worker_event = self._worker_event

    def attach(self, lane: str, executor: Executor) -> None:
        """Give the driver an open lane."""
        self.executors[lane] = executor
        self._listen(executor)

    def executor(self, lane: str) -> Executor:
        """The executor of a lane."""
        found = self.executors.get(lane)
        if found is None:
            raise InvariantError(f"the driver has no lane {lane!r}")
        return found

    # ------------------------------------------------------------ turns

    def signal(self, signal: Any) -> None:
        """Take note of a signal; it is handled in this turn of the loop or the next."""
        self._signals.append(signal)
        if not self._scheduled and not self._turning:
            self._scheduled = True
            self.loop.call_soon(self.turn)

    def turn(self) -> None:
        """Handle the signals that came in, perform the actions, until nothing is left or the loop needs its turn."""
        self._scheduled = False
        if self._turning:
            return
        self._turning = True
        try:
            for _ in range(MOST_ROUNDS):
                signals = self._signals
                if not signals:
                    break
                self._signals = []
                now = self._now = self.clock.monotonic()
                if self.recorder is not None:
                    self.recorder.append((now, signals))
                actions = self.machine.handle_all(signals, now)
                perform = self._perform
                for action in actions:
                    perform[type(action)](action)
        except BaseException as error:
            self._broken(error)
        finally:
            self._turning = False
        if self.failing and not self._signals:
            self.failing.clear()
        if self._signals and not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self.turn)
        elif self._settled is not None:
            self._settled(self.loop, len(self.running))

    def _broken(self, error: BaseException) -> None:
        """A bug of ours: end every run with it rather than hang. The engine uses another driver from now on."""
        self.broken = True
        _log.error("the scheduler failed; every run on this loop ends", exc_info=error)
        for job in list(self.jobs.values()):
            if not job.finished.done():
                failure = (
                    error if isinstance(error, StageflowError) else InvariantError(f"{type(error).__name__}: {error}")
                )
                failure.__cause__ = error
                job.finished.set_exception(failure)
        self.jobs.clear()
        for watcher in self.watchers:
            watcher.end()
        for task in list(self.running):
            self.running[task].executor.cancel(task, reason="the scheduler failed", force=True)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error

    # ------------------------------------------------------------ runs

    def submit(self, job_of: Callable[[int], Job], *, mode: str, deadline: float | None) -> Job:
        """Begin a run."""
        self._next_run += 1
        job = job_of(self._next_run)
        self.jobs[job.id] = job
        job.started = self.clock.monotonic()
        job.started_ns = self.clock.time_ns()
        job.stats.begins(job.started, job.started_ns)
        job.listening = listening = self.events.listening or job.sinks is not None
        if listening:
            self.sampler.begin()
        if len(self.jobs) == 1:
            for watcher in self.watchers:
                watcher.begin()
        if self.events.wants_spans or (job.sinks is not None and job.sinks.wants_spans):
            job.trace = current_traceparent() or ""
            job.header = None  # each attempt is told its trace
        self.signal(
            sig.RunSubmitted(job.id, job.run_id, job.code.layout, mode, deadline, listening, job.depth)
        )  # fmt: skip
        if job.token is not None:
            self._follow(job, job.token)
        return job

    def _follow(self, job: Job, token: CancellationToken) -> None:
        """Cancel the run with its token. A token cancelled before the start comes right behind the submission: nothing
        of the run starts. A token's deadline is noticed when somebody looks: a timer of the loop does."""
        unregister = token.on_cancel(lambda reason: self.cancel_threadsafe(job, reason))
        left = token.remaining
        if left is None or token.cancelled:
            job.unlink = unregister
            return
        timer: list[Any] = []

        def look() -> None:
            timer.clear()
            if token.cancelled:  # reading it runs the callback above
                return
            wait = max(token.remaining or 0.0, 0.001)
            timer.append(self.clock.call_at(self.loop, self.clock.monotonic() + wait, look))

        timer.append(self.clock.call_at(self.loop, self.clock.monotonic() + left, look))

        def unlink() -> None:
            unregister()
            for handle in timer:
                handle.cancel()

        job.unlink = unlink

    def cancel(self, job: Job, reason: str, *, force: bool = False) -> None:
        """Stop a run."""
        if job.id in self.jobs:
            self.signal(sig.CancelRequested(job.id, reason, force))
            for child in list(job.children):
                found = self.jobs.get(child)
                if found is not None:
                    self.cancel(found, reason, force=force)

    def stop_stage(self, job: Job, stage: int, reason: str) -> None:
        """Stop one stage of a run; its failure mode says what becomes of the run."""
        if job.id in self.jobs:
            self.signal(sig.StopStage(job.id, stage, reason))

    def cancel_threadsafe(self, job: Job, reason: str) -> None:
        """`cancel` from any thread."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self.loop:
            self.cancel(job, reason)
            return
        try:
            self.loop.call_soon_threadsafe(self.cancel, job, reason)
        except RuntimeError:
            pass  # the loop is closed: the run is over

    def _finish_run(self, action: act.FinishRun) -> None:
        job = self.jobs.pop(action.run)
        if not self.jobs:
            self.sampler.end()
            for watcher in self.watchers:
                watcher.end()
        now = self.clock.monotonic()
        for stage, pump in list(job.pumps.items()):
            # it had the whole grace to close
            stack = pump.stack() if hasattr(pump, "stack") else ""
            job.abandoned.append(Abandoned(job.graph.specs[stage].name, None, 1, stack))
            pump.stop("the run is over")
        job.pumps.clear()
        states = self.final_states.pop(action.run, b"")
        kind = {"completed": "run.completed", "failed": "run.failed", "cancelled": "run.cancelled"}[action.status]
        result = job.finish(action.status, action.reason, action.error, now, states)
        data: dict[str, Any] = {"status": action.status, "duration_ms": result.duration_ms}
        if action.status == "failed":
            data["error"] = result.error
        elif action.status == "cancelled":
            data["reason"] = action.reason
        self._event(kind, job, None, None, None, None, data)
        if job.unlink is not None:
            job.unlink()
        if self.policies is not None:
            self.policies.forget(job.run_id)
        if job.parent is not None:
            job.parent.children.discard(job.id)
        if self.first_starts:
            for key in [key for key in self.first_starts if key[0] == job.id]:
                del self.first_starts[key]
        job.book.handles.clear()
        if job.cleanups:
            self.loop.create_task(self._after_cleanups(job, result))
        else:
            self._tell(job, result)

    async def _after_cleanups(self, job: Job, result: Any) -> None:
        """Every cleanup has run before the caller gets the result."""
        await asyncio.wait(job.cleanups, timeout=self.machine.grace)
        self._tell(job, result)

    def _tell(self, job: Job, result: Any) -> None:
        """Give the caller the result, or the bug that kept us from making a true one."""
        if job.finished.done():
            return
        if job.broken is not None:
            job.finished.set_exception(job.broken)
        else:
            job.finished.set_result(result)

    @property
    def final_states(self) -> dict[int, bytes]:
        """States of the runs that the machine has just finished."""
        return self.machine.final_states

    # ------------------------------------------------------------ starting attempts

    def _header(self, job: Job, action: Any, spec: Any, item: tuple[int, ...] | None = None) -> Header:
        if job.header is not None and action.attempt == 1 and spec.policies is DEFAULT_POLICIES and not job.book.ends:
            return job.header  # nothing about this attempt is special
        failed: tuple[str, ...] = ()
        skipped: tuple[str, ...] = ()
        if job.book.ends:
            failed, skipped = self._missing(job, action.stage)
        extras: dict[str, Any] | None = None
        if action.tokens:
            extras = {"tokens": action.tokens}
        feedback = getattr(action, "feedback", None)
        if feedback is not None:
            feedback = {**feedback, "data": self._guard_data(job, feedback["guard"])}
            extras = {**(extras or {}), "feedback": feedback}
        if job.depth:
            extras = {**(extras or {}), "depth": job.depth}
        if job.trace is not None:
            extras = {**(extras or {}), TRACE: job.trace}
        deadline = None
        policies = spec.policies
        if policies is not DEFAULT_POLICIES and policies.timeout is not None:
            deadline = self.clock.monotonic() + policies.timeout
        return Header(job.run_id, action.attempt, item, deadline, failed, skipped, extras)

    def _guard_data(self, job: Job, guard: str) -> Any:
        """What a guard's failing output carried; the machine handles no values, the book has it."""
        end = job.book.ends.get(job.graph.index[guard])
        return end.data if end is not None and end.status is StageStatus.FAIL else None

    def _missing(self, job: Job, stage: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        failed: list[str] = []
        skipped: list[str] = []
        for dep in job.graph.deps[stage]:
            end = job.book.ends.get(dep)
            if end is None:
                continue
            if end.status is StageStatus.FAIL:
                failed.append(job.graph.specs[dep].name)
            elif end.status is StageStatus.SKIP:
                skipped.append(job.graph.specs[dep].name)
        return tuple(failed), tuple(skipped)

    def _values(self, job: Job, sources: tuple[int | str, ...], lane: str, executor: Executor | None) -> list[Any]:
        """The values of a call's slots, in the form the lane takes them."""
        found: list[Any] = []
        if not sources:
            return found
        book = job.book
        inputs = job.snapshot.inputs
        crosses = lane == "process"
        for source in sources:
            if isinstance(source, str):
                found.append(inputs.get(source, ABSENT))
                continue
            if book.graph.streams[source]:
                found.append(book.sequence(source) if source not in book.ends or source in book.kept else ABSENT)
                continue
            value = book.values[source]
            if value is ABSENT:
                found.append(ABSENT)
            elif not crosses:
                found.append(book.value(source))
            elif book.encoded[source]:
                found.append(value)
            else:
                shared = book.shared.get(source)
                if shared is None and executor is not None and len(book.graph.dependents[source]) > 1:
                    shared = book.shared[source] = executor.encode(value)
                found.append(shared if shared is not None else value)
        return found

    def _snapshot(self, job: Job, lane: str, executor: Executor) -> Any:
        if lane != "process":
            return job.snapshot
        wire = job.snapshot_wire
        if wire is None:
            wire = job.snapshot_wire = executor.encode(job.snapshot)
        return wire

    def _start_attempt(self, action: act.StartAttempt) -> None:
        job = self.jobs[action.run]
        lane, stage = action.lane, action.stage
        if job.listening:
            self._started(job, job.graph.specs[stage].name, action.attempt, lane)
        executor = self.executors.get(lane) or self.executor(lane)
        self.running[action.task] = running = Running(job, action, executor, self._now)
        if job.header is not None and action.attempt == 1 and not job.book.ends:
            direct = job.code.direct(stage)
            if direct is not None:  # a function of nothing, on this loop: there is nothing to put together
                executor.start(Call(action.task, direct), self._deliver_attempt)
                return
        spec = job.graph.specs[stage]
        try:
            if spec.form == "graph":
                self.loop.create_task(self._subpipeline(running, spec))
                return
            code = job.code.stage(action.stage)
            values = self._values(job, code.sources, lane, executor)
            snapshot = self._snapshot(job, lane, executor) if code.passes_snapshot else None
            header = self._header(job, action, spec)
            shipped = code.call(lane, job.trace)
            policies = spec.policies
            call = Call(
                action.task,
                shipped,
                (header, snapshot, *values),
                action.short,
                action.alone,
                policies.writable,
            )
        except Exception as error:
            self._refuse(running, error)
            return
        if policies is not DEFAULT_POLICIES and self.policies is not None and self.policies.wanted(policies):
            self.policies.around(self, running, call, spec)
        else:
            executor.start(call, self._deliver_attempt)

    def _started(self, job: Job, name: str, attempt: int, lane: str) -> None:
        """`_event`, for an event of every attempt."""
        self._seq = seq = self._seq + 1
        event = Event("stage.started", self.clock.time_ns(), seq, job.run_id, name, None, attempt, lane, {})
        job.stats.add(event)
        if job.sinks is not None:
            job.sinks.emit(event)
        if self.events.listening:
            self.events.emit(event)

    def _refuse(self, running: Running, error: BaseException) -> None:
        """A call could not even be made: that is its outcome."""
        outcome = Outcome(running.action.task, OutcomeKind.ERROR, error=capture(error), exception=error)
        self.loop.call_soon(self.outcome, outcome)

    def is_payload(self, value: Any) -> bool:
        """Whether a value is one that an executor holds in encoded form."""
        kind = type(value)
        known = self._payload_types.get(kind)
        if known is None:
            known = self._payload_types[kind] = isinstance(value, Payload)
        return known

    async def sleep(self, seconds: float) -> None:
        """Wait on the driver's clock."""
        future: asyncio.Future[None] = self.loop.create_future()
        handle = self.clock.call_at(
            self.loop, self.clock.monotonic() + seconds, lambda: None if future.done() else future.set_result(None)
        )
        try:
            await future
        finally:
            handle.cancel()

    def event(self, type: str, running: Running, data: dict[str, Any], item: tuple[int, ...] | None = None) -> None:
        """Send an event of an attempt to the sinks."""
        action = running.action
        name = running.job.graph.specs[action.stage].name
        self._event(type, running.job, name, item, action.attempt, action.lane, data)

    def outcome(self, outcome: Outcome) -> None:
        """Take the outcome of any call."""
        running = self.running.get(outcome.call_id)
        if running is None:
            return
        if type(running.action) is act.StartBlock:
            self._deliver_block(outcome)
        elif type(running.action) is act.StartFold:
            self._deliver_fold(outcome)
        else:
            self._deliver_attempt(outcome)

    def _start_block(self, action: act.StartBlock) -> None:
        job = self.jobs[action.run]
        spec = job.graph.specs[action.stage]
        lane = action.lane
        executor = self.executors.get(lane) or self.executor(lane)
        running = Running(job, action, executor, self.clock.monotonic())
        self.running[action.task] = running
        try:
            code = job.code.stage(action.stage)
            commons = self._values(job, code.sources, lane, executor)
            pieces, lists = self._pieces(job, action.segments, len(commons), lane)
            if job.code.nested and action.stage in job.code.nested and code.program.plan.wants_ctx:
                pieces = tuple(
                    msgspec.structs.replace(piece, paths=tuple(p for _, p in of_segment(segment, job.book.handles)))
                    for piece, segment in zip(pieces, action.segments, strict=True)
                )
            snapshot = self._snapshot(job, lane, executor) if code.passes_snapshot else None
            header = self._header(job, action, spec)
            shipped = code.call(lane, job.trace)
            call = Call(
                action.task,
                shipped,
                (header, snapshot, pieces, *commons, *lists),
                action.short,
                action.alone,
                bool(spec.policies.writable),
            )
        except Exception as error:
            self._refuse(running, error)
            return
        if self.policies is not None and self.policies.wanted(spec.policies):
            self.policies.around(self, running, call, spec)
        else:
            executor.start(call, self._deliver_block)

    def _pieces(self, job: Job, segments: Any, first: int, lane: str) -> tuple[tuple[Piece, ...], list[Any]]:
        """Segments as a call carries them: each list of values once, addressed by its place among the arguments."""
        handles = job.book.handles
        crosses = lane == "process"
        if len(segments) == 1 and len(segments[0][3]) == 1:
            lo, hi, mask, ((handle, at),) = segments[0]
            held = handles[handle]
            if type(at) is int and (not crosses or held.payload is None):
                # only what the block needs: a slice costs pointers, encoding the whole list costs its bytes
                items = held.load()
                count = hi - lo if mask < 0 else mask.bit_count()
                if count != len(items):
                    return (Piece(lo, hi, mask, ((first, 0),)),), [items[at : at + count]]
            return (Piece(lo, hi, mask, ((first, at),)),), [held.form(crosses)]
        places: dict[int, int] = {}
        lists: list[Any] = []
        pieces: list[Piece] = []
        for lo, hi, mask, columns in segments:
            wired = []
            for handle, at in columns:
                place = places.get(handle)
                held = handles[handle]
                if type(at) is int and crosses and held.payload is None:
                    items = held.load()
                    count = hi - lo if mask < 0 else mask.bit_count()
                    if count != len(items):
                        wired.append((first + len(lists), 0))
                        lists.append(items[at : at + count])
                        continue
                if place is None:
                    place = places[handle] = first + len(lists)
                    lists.append(handles[handle].form(crosses))
                wired.append((place, at))
            pieces.append(Piece(lo, hi, mask, tuple(wired)))
        return tuple(pieces), lists

    def _start_fold(self, action: act.StartFold) -> None:
        job = self.jobs[action.run]
        spec = job.graph.specs[action.stage]
        lane = action.lane
        executor = self.executors.get(lane) or self.executor(lane)
        running = Running(job, action, executor, self.clock.monotonic())
        self.running[action.task] = running
        try:
            code = job.code.stage(action.stage)
            handles = job.book.handles
            shipped = code.call(lane, job.trace)
            header = self._header(job, action, spec)
            args: tuple[Any, ...]
            if action.job == "merge":
                args = (None, *(handles[h].form(lane == "process") if h else ABSENT for h in action.accumulators))
            else:
                commons = self._values(job, code.sources, lane, executor)
                if action.accumulators:
                    commons.append(handles[action.accumulators[0]].form(lane == "process"))
                pieces, lists = self._pieces(job, action.segments, len(commons), lane)
                args = (pieces, *commons, *lists)
            snapshot = self._snapshot(job, lane, executor) if code.passes_snapshot else None
            call = Call(action.task, shipped, (header, snapshot, action.job, *args), False, action.alone)
        except Exception as error:
            self._refuse(running, error)
            return
        executor.start(call, self._deliver_fold)

    # ------------------------------------------------------------ outcomes

    def _guarded(self, take: Callable[[Outcome], None]) -> Callable[[Outcome], None]:
        """`take`, of which a bug ends the run instead of leaving it to wait for a signal that never comes."""

        def deliver(outcome: Outcome) -> None:
            running = self.running.get(outcome.call_id)
            if running is None:
                return
            try:
                take(outcome)
            except BaseException as error:
                self._misread(running, outcome, error)

        return deliver

    def _misread(self, running: Running, outcome: Outcome, error: BaseException) -> None:
        """A bug of ours while an outcome was taken in: that run ends with it, the others go on."""
        if not isinstance(error, Exception):
            self._broken(error)
            return
        _log.error("an outcome could not be taken in; its run ends", exc_info=error)
        job, task = running.job, running.action.task
        failure = error if isinstance(error, StageflowError) else InvariantError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error if failure is not error else error.__cause__
        job.broken = job.broken or failure
        self.signal(sig.CancelRequested(job.id, str(failure), force=True))
        if not outcome.final:
            return  # the call still has its last word to say
        self.running.pop(outcome.call_id, None)
        info = capture(error, lane=running.action.lane, attempt=running.action.attempt)
        if type(running.action) is act.StartBlock:
            self.signal(sig.BlockPart(task, Done(()), final=True, status="cancelled", error=info))
        else:
            self.signal(sig.AttemptEnded(task, "cancelled", error=info))

    def _attempt_outcome(self, outcome: Outcome) -> None:
        """An attempt of a plain stage has ended."""
        if not outcome.final:
            return
        running = self.running.pop(outcome.call_id, None)
        if running is None:
            return
        try:
            job, action, value = running.job, running.action, outcome.value
            code, kind = job.code, type(value)
            if (
                outcome.kind is _OK
                and outcome.meta is None
                and (value is None or (kind in _SCALARS and not code.empty[action.stage]))
                and running.timeout is None
                and not code.routes
                and not job.survivors
            ):
                # most outcomes, so `_ended` and `_succeeded` are spelled out for them; it must do what they do
                book, stage = job.book, action.stage
                if book.shared or book.outputs or book.ends:
                    book.put(stage, value, encoded=False, meta=None)
                else:
                    book.values[stage] = value
                    book.encoded[stage] = 0
                ended = sig.AttemptEnded(
                    action.task,
                    "ok",
                    0,
                    outcome.bytes_out,
                    outcome.seconds,
                    outcome.cpu_seconds,
                    outcome.bytes_in,
                    outcome.worker_pid,
                    outcome.started,
                )
            else:
                if outcome.meta is None and outcome.kind is _OK:
                    self._look(job, action.stage, outcome, value)
                ended = self._ended(running, outcome)
            self._signals.append(ended)
        except BaseException as error:
            self._misread(running, outcome, error)
            return
        if self._scheduled or self._turning:
            return
        if not self.running:
            self.turn()  # nothing else could come in beside it: a chain needs no second turn of the loop
        else:
            self._scheduled = True
            self.loop.call_soon(self.turn)

    def _look(self, job: Job, stage: int, outcome: Outcome, value: Any) -> None:
        """What a stage's program does with a value before it leaves, for one that was run without (`GraphCode.direct`):
        take an output apart, check what was to be None."""
        if isinstance(value, StageOutput):
            outcome.value, outcome.meta = value.data, msgspec.structs.replace(value, data=None)
            value = value.data if value.status is StageStatus.OK else None
        if value is not None and job.code.empty[stage]:
            try:
                job.code.stage(stage).program.check(value)
            except Exception as error:
                outcome.kind, outcome.value, outcome.meta = OutcomeKind.ERROR, None, None
                outcome.error, outcome.exception = capture(error, lane=job.code.lanes[stage]), error

    def _ended(self, running: Running, outcome: Outcome) -> sig.AttemptEnded:
        job, action = running.job, running.action
        ended = sig.AttemptEnded(
            action.task,
            "ok",
            0,
            0,
            outcome.seconds,
            outcome.cpu_seconds,
            outcome.bytes_in,
            outcome.worker_pid,
            outcome.started,
        )
        kind = outcome.kind
        if kind == OutcomeKind.OK:
            meta: StageOutput | None = outcome.meta
            if meta is None or meta.status is StageStatus.OK:
                self._succeeded(job, action, ended, outcome, meta)
            else:
                self._declined(job, running, ended, meta, outcome)
            if job.survivors:
                job.survivors.pop(action.task, None)
            if running.timeout is not None:
                self._judge_timeout(running, action.stage, ended)
            return ended
        self._unsuccessful(running, ended, outcome)
        if running.timeout is not None:
            self._judge_timeout(running, running.action.stage, ended)
        return ended

    def _succeeded(
        self, job: Job, action: Any, ended: sig.AttemptEnded, outcome: Outcome, meta: StageOutput | None
    ) -> None:
        stage = action.stage
        encoded = action.lane == "process" and self.is_payload(outcome.value)
        value = outcome.value
        ended.nbytes = outcome.bytes_out
        spec = job.graph.specs[stage]
        if spec.kind is StageKind.ROUTE:
            route = self._route(job, stage, value.load() if encoded else value)
            if isinstance(route, ErrorInfo):
                ended.status, ended.error = "fail", route
                return
            ended.route = route
        job.book.put(stage, value, encoded=encoded, meta=meta)
        if encoded and stage in job.code.hinted:
            value = job.book.value(stage)
        if type(value) is dict:
            hint = value.get("skip_reason")
            if isinstance(hint, str) and hint:
                ended.skip_hint = hint
        if meta is not None and (meta.events or meta.artifacts):
            self._forward(job, action, meta)

    def _declined(
        self, job: Job, running: Running, ended: sig.AttemptEnded, meta: StageOutput, outcome: Outcome
    ) -> None:
        """The stage answered SKIP, CANCEL, FAIL or RETRY."""
        action = running.action
        ended.status = str(meta.status)
        ended.reason = meta.skip_reason or meta.cancel_reason or meta.error
        ended.retryable = meta.retryable
        data = outcome.value
        if self.is_payload(data):
            data = data.load()
        if meta.status in (StageStatus.FAIL, StageStatus.RETRY):
            info = meta.error_info or ErrorInfo(
                type="stageflow.StageOutput",
                message=meta.error or "failed without a reason",
                retryable=meta.retryable,
                lane=action.lane,
                worker_pid=outcome.worker_pid,
                attempt=action.attempt,
            )
            ended.error = info
            self._judge(running, ended, info, None)
            ended.digest = _guard_digest(job, action.stage, info.message, data)
            job.book.failure(action.stage, info, data)
        elif meta.status is StageStatus.SKIP or meta.status is StageStatus.CANCEL:
            job.book.end(action.stage, meta)
        if meta.events or meta.artifacts:
            self._forward(job, action, meta)

    def _unsuccessful(self, running: Running, ended: sig.AttemptEnded, outcome: Outcome) -> None:
        job, action = running.job, running.action
        kind = outcome.kind
        info = outcome.error
        if info is not None:
            info = _located(info, action.lane, outcome.worker_pid, action.attempt)
        if kind == OutcomeKind.LOST:
            ended.status, ended.error, ended.suspect = "lost", info, outcome.suspect
            self._run_survivors(job, action.task)
            return
        if kind == OutcomeKind.CANCELLED:
            ended.status = "cancelled"
            ended.error = info or ErrorInfo(
                type="asyncio.CancelledError", message="the attempt was cancelled", lane=action.lane
            )
            if isinstance(outcome.meta, dict) and outcome.meta.get("abandoned"):
                ended.abandoned = True
                name = job.graph.specs[action.stage].name
                job.abandoned.append(Abandoned(name, None, action.attempt, outcome.meta.get("stack", "")))
            self._run_survivors(job, action.task)
            return
        if info is None:
            info = ErrorInfo(type="Exception", message="the attempt failed without a reason", lane=action.lane)
        ended.error = info
        if info.code == "SF-CANCELLED":
            ended.status, ended.reason = "cancel", info.message
            return
        ended.status = "refused" if kind == OutcomeKind.REFUSED else "error"
        ended.retryable = info.retryable
        ended.retry_after = info.retry_after
        self._judge(running, ended, info, outcome.exception)
        ended.digest = _guard_digest(job, action.stage, info.message, None)
        job.book.failure(action.stage, info)

    def _judge(
        self, running: Running, ended: sig.AttemptEnded, info: ErrorInfo, exception: BaseException | None
    ) -> None:
        verdict = self.judge(running, running.action.stage, info, exception)
        if verdict is None:
            return
        ended.retry, ended.wait, ended.roll = verdict.retry, verdict.wait, verdict.roll
        if verdict.broken is not None:
            ended.error = capture(verdict.broken, lane=running.action.lane, attempt=running.action.attempt)

    def _judge_timeout(self, running: Running, key: Any, ended: sig.AttemptEnded) -> None:
        """The attempt was stopped for its timeout: that is the failure to judge, whatever it answered."""
        verdict = self._timeout_verdict(running, key)
        if verdict is not None:
            ended.retry, ended.wait, ended.roll = verdict.retry, verdict.wait, verdict.roll

    def _timeout_verdict(self, running: Running, key: Any) -> Verdict | None:
        if running.job.graph.specs[running.action.stage].policies.retry is None:
            return None
        limit = running.timeout or 0.0
        elapsed = self.clock.monotonic() - running.since
        error = StageTimeoutError(f"the attempt exceeded {limit:g} s", elapsed=elapsed, limit=limit)
        return self.judge(running, key, capture(error), error)

    def judge(self, running: Running, key: Any, info: ErrorInfo, exception: BaseException | None) -> Verdict | None:
        """The user's strategies and the dice, on one failure; None where there is no retry policy."""
        job = running.job
        retry = job.graph.specs[running.action.stage].policies.retry
        if retry is None:
            return None
        now = self.clock.monotonic()
        first = self.first_starts.setdefault((job.id, key), running.since)
        return judge(retry, info, exception, running.action.attempt, now - first, 0.0, job.dice_for(retry.seed, key))

    def _route(self, job: Job, stage: int, value: Any) -> tuple[str, ...] | ErrorInfo:
        """The branches a router chose."""
        if isinstance(value, Mapping) and "route" in value:
            value = value["route"]
        known = job.code.layout.branches.get(stage, set())
        chosen = (
            (value,)
            if isinstance(value, str)
            else tuple(value or ())
            if isinstance(value, list | tuple | set)
            else None
        )
        name = job.graph.specs[stage].name
        if chosen is None or not all(isinstance(one, str) for one in chosen):
            if not known:
                return ()  # nobody routes by it
            text = f"route stage {name!r} returned {type(value).__name__}, not the name of a branch (or several)"
            return ErrorInfo(type="stageflow.core.errors.DefinitionError", message=text)
        unknown = [one for one in chosen if one not in known]
        if unknown and known:
            listed = ", ".join(sorted(known))
            text = (
                f"route stage {name!r} chose {unknown[0]!r}, which no stage is declared for (`when=`); known: {listed}"
            )
            return ErrorInfo(type="stageflow.core.errors.DefinitionError", message=text)
        return chosen

    def _forward(self, job: Job, action: Any, meta: StageOutput) -> None:
        """Events and artifacts attached to an output go to the sinks."""
        name = job.graph.specs[action.stage].name
        for event in meta.events:
            self._event(event.type, job, name, None, action.attempt, action.lane, dict(event.data))
        for artifact in meta.artifacts:
            data = {"type": artifact.artifact_type, "id": artifact.id, "name": artifact.name}
            self._event("stage.artifact", job, name, None, action.attempt, action.lane, data)

    def _block_outcome(self, outcome: Outcome) -> None:
        """A part, or the end, of a block of items."""
        running = self.running.get(outcome.call_id)
        if running is None:
            return
        job, action = running.job, running.action
        part = sig.BlockPart(
            action.task,
            Done(()),
            final=outcome.final,
            bytes_in=outcome.bytes_in,
            worker_pid=outcome.worker_pid,
            started=outcome.started,
        )
        if outcome.final:
            del self.running[outcome.call_id]
        meta = outcome.meta
        if outcome.kind == OutcomeKind.OK and meta is not None:
            meta = part.done = _done(meta)
            # a block is one call, each of its parts begins where the one before it ended
            begun = max(outcome.started, running.at) or self.clock.monotonic() - meta.seconds
            part.started, running.at = begun, begun + meta.seconds
            if outcome.value is not None and _survivors(meta):
                part.handle, part.nbytes = self._hold(job, action.lane, outcome)
            if job.code.nested or meta.counts is not None:
                meta = self._trace(running, part, meta)
            if meta.failures:
                if job.listening:
                    self.failing.note(job, action)
                part.retries = tuple(self._item_verdict(running, failure) for failure in meta.failures)
            if running.timeout is not None:
                verdict = self._timeout_verdict(running, (action.stage, action.segments[0][0]))
                if verdict is not None:
                    part.retries = ((verdict.retry, verdict.wait, verdict.roll),) * max(1, len(meta.failures))
        elif outcome.kind != OutcomeKind.OK:
            self._block_failed(running, part, outcome)
        self.signal(part)

    def _trace(self, running: Any, part: sig.BlockPart, meta: Done) -> Done:
        """Keep the paths of items that a flat-map gave, and of what became of them; name failures by them."""
        job, action = running.job, running.action
        nested = action.stage in job.code.nested
        if not nested and meta.counts is None:
            return meta
        handles = job.book.handles
        known = of_block(action.segments, handles)
        if part.handle and (meta.counts is not None or job.code.layout.readers.get(action.stage)):
            handles[part.handle].paths = of_results(known, meta)
        if nested and meta.failures:
            failures = tuple(located(failure, known.get(failure.index, failure.path)) for failure in meta.failures)
            meta = part.done = msgspec.structs.replace(meta, failures=failures)
        return meta

    def _hold(self, job: Job, lane: str, outcome: Outcome) -> tuple[int, int]:
        self._next_handle = handle = self._next_handle + 1
        if self.is_payload(outcome.value):
            nbytes = outcome.bytes_out
            job.book.hold(handle, Values(None, outcome.value, nbytes))
        else:
            nbytes = sized(outcome.value)
            job.book.hold(handle, Values(outcome.value, None, nbytes))
        return handle, nbytes

    def _item_verdict(self, running: Running, failure: Any) -> tuple[bool | None, float | None, float]:
        if isinstance(failure, list | tuple):
            failure = ItemFailure(*failure)
        verdict = self.judge(running, (running.action.stage, failure.index), failure.info, None)
        return (None, None, 1.0) if verdict is None else (verdict.retry, verdict.wait, verdict.roll)

    def _block_failed(self, running: Running, part: sig.BlockPart, outcome: Outcome) -> None:
        action = running.action
        if running.job.listening:
            self.failing.note(running.job, action)
        info = outcome.error
        if info is not None:
            info = _located(info, action.lane, outcome.worker_pid, action.attempt)
        part.error = info
        if outcome.kind == OutcomeKind.LOST:
            part.status, part.suspect = "lost", outcome.suspect
            self._run_survivors(running.job, action.task)
            return
        if outcome.kind == OutcomeKind.CANCELLED:
            part.status = "cancelled"
            self._run_survivors(running.job, action.task)
            if running.timeout is not None:
                verdict = self._timeout_verdict(running, (action.stage, action.segments[0][0]))
                if verdict is not None:
                    part.retries = ((verdict.retry, verdict.wait, verdict.roll),)
            if isinstance(outcome.meta, dict) and outcome.meta.get("abandoned"):
                part.abandoned = True
                name = running.job.graph.specs[action.stage].name
                item = (action.segments[0][0],)
                running.job.abandoned.append(Abandoned(name, item, action.attempt, outcome.meta.get("stack", "")))
            return
        part.status = "refused" if outcome.kind == OutcomeKind.REFUSED else "error"
        verdict = self.judge(running, (action.stage, action.segments[0][0]), info, outcome.exception) if info else None
        if verdict is not None:
            part.retries = ((verdict.retry, verdict.wait, verdict.roll),)

    def _fold_outcome(self, outcome: Outcome) -> None:
        """A step of a reduce has ended."""
        if not outcome.final:
            return
        running = self.running.pop(outcome.call_id, None)
        if running is None:
            return
        job, action = running.job, running.action
        ended = sig.AttemptEnded(
            action.task,
            seconds=outcome.seconds,
            cpu_seconds=outcome.cpu_seconds,
            bytes_in=outcome.bytes_in,
            worker_pid=outcome.worker_pid,
            started=outcome.started,
        )
        if outcome.kind == OutcomeKind.OK:
            self._next_handle = ended.handle = self._next_handle + 1
            if self.is_payload(outcome.value):
                ended.nbytes = outcome.bytes_out
                job.book.hold(ended.handle, Values(None, outcome.value, outcome.bytes_out))
            else:
                ended.nbytes = sized(outcome.value)
                job.book.hold(ended.handle, Values(outcome.value, None, ended.nbytes))
        else:
            self._unsuccessful(running, ended, outcome)
        self.signal(ended)

    # ------------------------------------------------------------ subpipelines

    async def _subpipeline(self, running: Running, spec: Any) -> None:
        from stageflow.runtime.spawn import run_child

        job, action = running.job, running.action
        started = self.clock.monotonic()
        outcome = Outcome(action.task)
        try:
            code = job.code.stage(action.stage)
            values = self._values(job, code.sources, "async", running.executor)
            inputs = {
                slot.param or slot.name: value
                for slot, value in zip(code.program.plan.slots, values, strict=True)
                if value is not ABSENT
            }
            self.signal(sig.ChildrenWait(action.task, True))
            result = await run_child(self, job, spec.runner, inputs, {}, stage=spec.name, task=action.task)
            if result.success:
                outcome.value = {name: output.data for name, output in result.outputs.items()}
            else:
                # a child that ended itself does not end its parent: its failure mode decides
                how = "was cancelled" if result.cancelled else "failed"
                text = f"subpipeline {spec.runner.name!r} {how}: {result.error or result.cancel_reason}"
                failed = StageOutput.fail(text, data=result.failures.to_dict(), retryable=not result.cancelled)
                info = ErrorInfo(
                    type=f"{StageFailedError.__module__}.{StageFailedError.__qualname__}",
                    message=text,
                    code=StageFailedError.code,
                    cause=result.error_info,
                    retryable=failed.retryable,
                    lane=action.lane,
                    attempt=action.attempt,
                )
                outcome.value = failed.data
                outcome.meta = msgspec.structs.replace(failed, error_info=info, data=None)
        except Exception as error:
            outcome.kind = OutcomeKind.ERROR
            outcome.error = capture(error, lane="async", attempt=action.attempt)
            outcome.exception = error
        outcome.started = started
        outcome.seconds = self.clock.monotonic() - started
        self._deliver_attempt(outcome)

    # ------------------------------------------------------------ the other actions

    def _stop_attempt(self, action: act.StopAttempt) -> None:
        running = self.running.get(action.task)
        if running is None:
            return
        if action.timeout is not None:
            running.timeout = action.timeout
        running.executor.cancel(action.task, reason=action.reason, force=action.force)
        if running.claim is not None and hasattr(running.claim, "cancel"):
            running.claim.cancel()
        for child in list(running.children or ()):
            found = self.jobs.get(child)
            if found is not None:
                self.cancel(found, action.reason, force=action.force)

    def _set_timer(self, action: act.SetTimer) -> None:
        timer, at, task = action.timer, action.at, action.task
        handle = self.clock.call_at(self.loop, at, lambda: self._timer_due(timer))
        self._timers[timer] = (handle, at, task)

    def _cancel_timer(self, action: act.CancelTimer) -> None:
        found = self._timers.pop(action.timer, None)
        if found is not None:
            found[0].cancel()

    def _timer_due(self, timer: int) -> None:
        found = self._timers.pop(timer, None)
        if found is None:
            return
        _, at, task = found
        late = self.clock.monotonic() - at
        if late > FROZEN:
            self._timers[timer] = found
            self._thaw(late)
            return
        elapsed = None
        if task:
            running = self.running.get(task)
            if running is not None:
                since = running.executor.running_since(task)
                if since is None and running.job.graph.specs[running.action.stage].form == "graph":
                    since = running.since  # a subpipeline is no call of the lane
                if since is not None:
                    elapsed = self.clock.monotonic() - self.clock.entered(since, running.since)
        self.signal(sig.TimerDue(timer, elapsed))
        if not self._turning:
            self.turn()

    def _thaw(self, gap: float) -> None:
        """The process was stopped, or its loop blocked: every deadline moves by the gap."""
        for timer, (handle, at, task) in list(self._timers.items()):
            handle.cancel()
            self._set_timer(act.SetTimer(timer, at + gap, task))

    def _release(self, action: act.Release) -> None:
        job = self.jobs.get(action.run)
        if job is not None:
            for handle in action.handles:
                job.book.release(handle)

    def _keep_items(self, action: act.KeepItems) -> None:
        count = action.hi - action.lo if action.mask < 0 else action.mask.bit_count()
        self.jobs[action.run].book.keep(action.stage, action.lo, count, action.at, action.handle)

    def loop_blocked(self, seconds: float, codes: list[Any], stack: str) -> None:
        """A stage on the loop has kept it busy for so long. Called by the watchdog, in its thread."""
        for job in list(self.jobs.values()):
            for spec, lane in zip(job.graph.specs, job.code.lanes, strict=True):
                runner = spec.runner if spec.form == "function" else getattr(spec.runner, "execute", None)
                if lane == "async" and getattr(runner, "__code__", None) in codes:
                    _log.warning(
                        "stage %r has blocked the event loop for %.0f ms; make it a plain function, or give it "
                        "executor='thread'\n%s", spec.name, seconds * 1000.0, stack,
                    )  # fmt: skip
                    data = {"seconds": seconds, "stack": stack}
                    self.loop.call_soon_threadsafe(
                        self._event, names.STAGE_BLOCKED_LOOP, job, spec.name, None, None, lane, data
                    )
                    return

    def _spill(self, action: act.Spill) -> None:
        job = self.jobs[action.run]
        values = job.book.handles.get(action.handle)
        done = sig.Spilled(action.run, action.stage, action.handle)
        if values is None:
            self.signal(done)
            return
        from stageflow.runtime.spill import SpillFile, spill

        def write() -> bool:
            try:
                spill(file, values)
                return True
            except Exception:
                _log.warning("values of stage %r stay in memory", job.graph.specs[action.stage].name, exc_info=True)
                return False

        def written(future: Any) -> None:
            done.ok = not future.cancelled() and future.result()
            self.signal(done)

        file = job.spill_file = job.spill_file or SpillFile()
        self.loop.run_in_executor(None, write).add_done_callback(written)

    def _keep_accumulator(self, action: act.KeepAccumulator) -> None:
        import copy

        job = self.jobs[action.run]
        if action.handle == 0:
            reduce = job.graph.specs[action.stage].reduce
            assert reduce is not None
            job.book.put(action.stage, copy.deepcopy(reduce.initial), encoded=False, meta=None)
            return
        values = job.book.handles.pop(action.handle)
        payload = values.payload
        job.book.put(
            action.stage, payload if payload is not None else values.load(), encoded=payload is not None, meta=None
        )

    # ------------------------------------------------------------ sources

    def _pull_source(self, action: act.PullSource) -> None:
        job = self.jobs[action.run]
        pump = job.pumps.get(action.stage)
        if pump is None:
            try:
                pump = job.pumps[action.stage] = self._open_source(job, action.stage)
            except Exception as error:
                self._source_ended(job, action.stage, error)
                return
        pump.pull(action.count, action.nbytes)

    def _open_source(self, job: Job, stage: int) -> Any:
        spec = job.graph.specs[stage]
        run = job.id

        def arrived(given: Any, nbytes: int, seconds: float, enough: bool) -> None:
            if run not in self.jobs:
                return
            self._next_handle = handle = self._next_handle + 1
            count = len(given)
            values = given if isinstance(given, Values) else Values(given, None, nbytes)
            job.book.hold(handle, values)
            self.signal(sig.ItemsArrived(run, stage, count, handle, nbytes, seconds, enough))

        def ended(error: BaseException | None) -> None:
            job.pumps.pop(stage, None)
            self._source_ended(job, stage, error)

        if spec.role != Role.SOURCE:
            return self._open_expander(job, stage, arrived, ended)
        code = job.code.stage(stage)
        lane = job.code.lanes[stage]
        values = self._values(job, code.sources, "async", None)
        header = Header(job.run_id)
        port = SourcePort(self, job, stage, lane)

        def begin() -> Any:
            return code.program.iterate(port, header, job.snapshot, *values)

        if spec.is_async:
            return TaskSource(begin, arrived, ended, self.loop)
        if lane == "inline":
            return InlineSource(begin, arrived, ended, self.loop)
        return ThreadSource(begin, arrived, ended, self.loop, spec.name, self._encoder(job, stage))

    def _encoder(self, job: Job, stage: int) -> Any:
        """Encodes lists of big items where another process reads them, on the thread that made them: then they exist
        once, and are counted as what they are."""
        layout = job.code.layout
        executor = self.executors.get("process")
        if executor is None or not any(layout.lanes[reader] == "process" for reader in layout.readers.get(stage, ())):
            return None

        def encode(items: list[Any], nbytes: int) -> Values:
            if nbytes < CROSSING_FROM:
                return Values(items, None, nbytes)
            try:
                payload = executor.encode(items)
            except Exception:
                return Values(items, None, nbytes)  # whoever reads them says what is wrong
            return Values(None, payload, payload.nbytes, len(items))

        return encode

    def _open_expander(self, job: Job, stage: int, arrived: Any, ended: Any) -> Any:
        """Lay out the elements of a value that a map goes over."""
        spec = job.graph.specs[stage]
        if spec.over >= 0:
            value = job.book.value(spec.over)
            origin = f"stage {job.graph.specs[spec.over].name!r}"
        else:
            value = job.snapshot.inputs[str(spec.over_input)]
            origin = f"input {spec.over_input!r}"
        if hasattr(value, "__aiter__"):
            return TaskSource(lambda: (value, None), arrived, ended, self.loop)
        if isinstance(value, Mapping | set | frozenset):
            value = list(value)
        if hasattr(value, "__getitem__") and hasattr(value, "__len__") and not isinstance(value, str | bytes):
            return SequenceSource(value, arrived, ended, self.loop)
        if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
            from stageflow.core.errors import DefinitionError

            raise DefinitionError(
                f"stage {spec.name!r} goes over {origin}, which is {type(value).__name__} and no sequence of elements",
                hint="return a list (or a generator), or use `.stage` instead of `.map`",
            )
        if job.code.lanes[stage] == "inline":
            return InlineSource(lambda: (value, None), arrived, ended, self.loop)
        return ThreadSource(lambda: (value, None), arrived, ended, self.loop, spec.name)

    def _source_ended(self, job: Job, stage: int, error: BaseException | None) -> None:
        if job.id not in self.jobs:
            return
        if error is None:
            self.signal(sig.SourceEnded(job.id, stage))
            return
        info = capture(error, lane=job.code.lanes[stage], attempt=1)
        job.book.failure(stage, info)
        self.signal(sig.SourceEnded(job.id, stage, "error", info))

    def _stop_source(self, action: act.StopSource) -> None:
        pump = self.jobs[action.run].pumps.get(action.stage)
        if pump is not None:
            pump.stop(action.reason)
        else:
            self.signal(sig.SourceEnded(action.run, action.stage, "cancelled"))

    # ------------------------------------------------------------ predicates

    def _decide(self, action: act.Decide) -> None:
        job = self.jobs[action.run]
        decided = sig.Decided(action.run, action.stage)
        try:
            when = job.graph.specs[action.stage].policies.when
            decided.go = bool(when(stage_inputs(job, action.stage)))
        except Exception as error:
            decided.error = capture(error, lane="async", attempt=1)
            job.book.failure(action.stage, decided.error)
        self.signal(decided)

    # ------------------------------------------------------------ events

    def _completed(self, action: act.Completed) -> None:
        """Stages have succeeded: into the books, and told to whoever listens."""
        job = self.jobs[action.run]
        if not (job.listening or self.events.listening):
            self._seq += len(action.rows) // WIDTH
            job.stats.take(action.rows)
            return
        job.stats.take(action.rows, told=1 + job.listening)
        specs, lanes, run_id = job.graph.specs, job.code.lanes, job.run_id
        time_ns, told = self.clock.time_ns, job.listening
        sinks = [sinks for sinks in (job.sinks, self.events) if sinks is not None and sinks.listening]
        rows = iter(action.rows)
        for stage, attempt, _, duration, seconds, cpu_seconds, bytes_in, bytes_out, pid, started in zip(*[rows] * WIDTH):
            name, lane = specs[stage].name, lanes[stage]
            data = {  # of both events
                "status": "ok",
                "duration_ms": duration * 1000.0,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "bytes_in": bytes_in,
                "bytes_out": bytes_out,
                "worker_pid": pid,
                "queued_ms": (duration - seconds) * 1000.0 if duration > seconds else 0.0,
                "started": started,
            }
            at, seq = time_ns(), self._seq
            self._seq = seq + 2
            last = Event("stage.completed", at, seq + 2, run_id, name, None, attempt, lane, data)
            if told:
                first = Event("stage.attempt", at, seq + 1, run_id, name, None, attempt, lane, data)
                for sink in sinks:
                    sink.emit(first)
            for sink in sinks:
                sink.emit(last)

    def _emit(self, action: act.Emit) -> None:
        job = self.jobs[action.run]
        stage = action.stage
        type_, data = action.type, action.data
        if stage < 0:
            self._event(type_, job, None, None, None, None, self._run_data(job) if type_ == "run.started" else data)
            return
        name = job.graph.specs[stage].name
        if type_ != "stage.completed" or "items_in" in data:
            data = self._book_end(job, name, action)
        self._event(type_, job, name, action.item, action.attempt, job.code.lanes[stage], data)

    def _book_end(self, job: Job, name: str, action: act.Emit) -> dict[str, Any]:
        """Note in the run's book how a stage ended; what the event says."""
        stage, type_, data = action.stage, action.type, action.data
        book = job.book
        if type_ == "stage.failed":
            data = self._book_failure(job, name, action)
        elif type_ == "stage.skipped":
            if stage not in book.ends:
                book.end(stage, StageOutput.skip(data["reason"]))
        elif type_ == "stage.cancelled":
            if stage not in book.ends:
                book.end(stage, StageOutput.cancel(data.get("reason") or "cancelled"))
        elif type_ == "stage.completed":
            if job.graph.specs[stage].role != Role.REDUCE:
                counts = {"items": data["emitted"], "dropped": data["dropped"], "failed": data["failed"]}
                book.end(stage, StageOutput(metadata=counts))
        elif type_ == "stage.retrying" and action.item is None:
            book.ends.pop(stage, None)
        return data

    def _book_failure(self, job: Job, name: str, action: act.Emit) -> dict[str, Any]:
        info: ErrorInfo = action.data["error_info"]
        if action.item is None:
            known = job.book.ends.get(action.stage)
            if known is None or known.error_info is None or known.error_info.message != info.message:
                job.book.failure(action.stage, info)
        else:
            job.failed_items += 1
        if len(job.failures) < KEPT_FAILURES:
            job.failures.append(
                FailureRecord(
                    stage=name,
                    error=info.message,
                    error_type=info.type,
                    recoverable=info.retryable,
                    timestamp=self.clock.time_ns() / 1e9,
                    item=action.item,
                    attempts=action.attempt or 1,
                    error_info=info,
                )
            )
        return {**action.data, "error_info": info.to_dict()}

    def _run_data(self, job: Job) -> dict[str, Any]:
        graph = job.graph
        specs = graph.specs
        data: dict[str, Any] = {
            "pipeline": graph.name,
            "workers": self.machine.lanes["process"].slots,
            "memory_limit": self.machine.memory or None,
            "monotonic": self.clock.monotonic(),
        }
        if job.trace:
            data["traceparent"] = job.trace
        if len(specs) <= 10_000:
            data.update(job.code.outline())
        data.update(job.identity.ids())
        data.update(job.about)
        data.pop("pipeline_run_id", None)
        return data

    def _event(
        self,
        type: str,
        job: Job | None,
        stage: str | None,
        item: tuple[int, ...] | None,
        attempt: int | None,
        lane: str | None,
        data: dict[str, Any],
    ) -> None:
        self._seq += 1
        event = Event(
            type,
            self.clock.time_ns(),
            self._seq,
            job.run_id if job is not None else None,
            stage,
            item,
            attempt,
            lane,
            data,
        )
        if job is not None:
            job.stats.add(event)
            if job.sinks is not None:
                job.sinks.emit(event)
        if self.events.listening:
            self.events.emit(event)

    def _noted(self, call_id: int, kind: str, data: Any) -> None:
        """What a running attempt sent."""
        running = self.running.get(call_id)
        if running is None:
            return
        job, action = running.job, running.action
        name = job.graph.specs[action.stage].name
        if kind == "event":
            item = data.get("item")
            self._event(
                str(data["type"]),
                job,
                name,
                tuple(item) if item is not None else None,
                data.get("attempt", action.attempt),
                action.lane,
                dict(data.get("data") or {}),
            )
        elif kind == "defer":
            job.survivors.setdefault(call_id, {})[data["index"]] = (data["call"], data.get("name"))
        elif kind == "deferred":
            job.survivors.pop(call_id, None)
        else:
            fields = dict(data) if isinstance(data, Mapping) else {"value": data}
            self._event(f"stage.{kind}", job, name, None, action.attempt, action.lane, fields)
            if kind in ("print", "log"):
                now, attempt = self.clock.time_ns(), action.attempt
                said = Event(f"stage.{kind}", now, self._seq, job.run_id, name, None, attempt, action.lane, fields)
                self.relay.tell(said, job.sinks, self.events)

    def _run_survivors(self, job: Job, task: int) -> None:
        """The worker is lost: the cleanups that were to survive it run here, last registered first."""
        found = job.survivors.pop(task, None)
        if not found:
            return
        calls = [found[index] for index in sorted(found, reverse=True)]

        def run_all() -> None:
            for shipped, name in calls:
                try:
                    callback, args = pickle.loads(shipped)  # from our own child
                    callback(*args)
                except Exception:
                    _log.exception("cleanup %s of a lost attempt failed", name or "(unnamed)")

        job.cleanups.append(self.loop.run_in_executor(None, run_all))

    def _worker_event(self, type: str, data: dict[str, Any]) -> None:
        """Workers serve every run: each run's own sinks are told too, of the same event."""
        self._event(type, None, None, None, None, "process", dict(data))
        for job in self.jobs.values():
            event = Event(type, self.clock.time_ns(), self._seq, job.run_id, lane="process", data=dict(data))
            job.stats.add(event)
            if job.sinks is not None:
                job.sinks.emit(event)


class SourcePort:
    """The worker port of a source, which the parent drives."""

    __slots__ = ("_driver", "_job", "_reason", "_stage", "lane")

    def __init__(self, driver: Driver, job: Job, stage: int, lane: str) -> None:
        self._driver = driver
        self._job = job
        self._stage = stage
        self.lane = lane
        self._reason: str | None = None

    @property
    def worker_pid(self) -> int:
        """This process."""
        import os

        return os.getpid()

    def cancelled(self) -> bool:
        """True once the run is over or being stopped."""
        return self._job.id not in self._driver.jobs or self._stage not in self._job.pumps

    def cancel_reason(self) -> str | None:
        """Why."""
        return "the run is over" if self.cancelled() else None

    def progress(self, done: float, total: float) -> None:
        """A source's progress is its items."""

    def note(self, kind: str, data: Any) -> None:
        """Send an event from the source's own thread."""
        if kind != "event":
            return
        name = self._job.graph.specs[self._stage].name
        loop = self._driver.loop
        fields = (str(data["type"]), self._job, name, None, 1, self.lane, dict(data.get("data") or {}))
        try:
            loop.call_soon_threadsafe(self._driver._event, *fields)
        except RuntimeError:
            pass  # the loop is closed: the run is over

    def buffer(self, nbytes: int) -> memoryview:
        """Plain memory."""
        return memoryview(bytearray(nbytes))

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Sources look at `cancelled` between items; they are closed when the run ends."""


def _done(meta: Any) -> Done:
    """What a part says, with masks as whole numbers whatever form they crossed in."""
    done = meta if isinstance(meta, Done) else Done(*meta)
    if any(not isinstance(mask, int) for _, _, mask in done.ranges):
        done = msgspec.structs.replace(
            done, ranges=tuple((lo, hi, mask_from_wire(mask)) for lo, hi, mask in done.ranges)
        )
    return done


def _survivors(done: Any) -> bool:
    return bool(done.ranges)


def _located(info: ErrorInfo, lane: str, pid: int, attempt: int) -> ErrorInfo:
    """The same failure, with where it happened."""
    return msgspec.structs.replace(
        info, lane=info.lane or lane, worker_pid=info.worker_pid or pid or None, attempt=attempt
    )


def _guard_digest(job: Job, stage: int, text: str, data: Any) -> str | None:
    """Tells whether two failures of a guard are the same: their text and data, of which `hash_fields` may choose."""
    policy = job.graph.specs[stage].policies.guard_retry
    if policy is None:
        return None
    if policy.hash_fields is not None and isinstance(data, Mapping):
        data = {name: data[name] for name in policy.hash_fields if name in data}
    try:
        return digest((text, data))
    except Exception:  # what cannot be hashed by its content is told by its looks
        return digest((text, repr(data)))
