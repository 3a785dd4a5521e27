"""The only place where loop, clock, executors and scheduler meet: feeds signals to the machine and performs its
actions.

One driver per engine and event loop; it serves all runs of the engine on that loop. Decides nothing. Not thread-safe:
every method is called on its loop's thread, except `cancel_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from stageflow.context.attempt import TRACE, Header
from stageflow.context.cancellation import CancellationToken
from stageflow.core.errors import InvariantError, StageflowError
from stageflow.core.executor import Executor, Paces, Payload
from stageflow.core.worker import item_stop
from stageflow.events.fanout import FanOut
from stageflow.runtime import switching
from stageflow.runtime.clock import DriverClock, RealClock
from stageflow.runtime.failing import FailingBlocks
from stageflow.runtime.feeding import Feeding
from stageflow.runtime.job import Job
from stageflow.runtime.moving import Moving
from stageflow.runtime.outcomes import Outcomes
from stageflow.runtime.paths import of_block
from stageflow.runtime.relay import Relay
from stageflow.runtime.result import Abandoned
from stageflow.runtime.running import SOURCES, Running, live_drivers
from stageflow.runtime.sampling import Sampler
from stageflow.runtime.starting import Starting
from stageflow.runtime.telling import Telling
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.machine import Machine

_log = logging.getLogger("stageflow")
MOST_ROUNDS: Final = 64  # turns of signals and actions before the loop gets its own turn
FROZEN: Final = 1.0  # a timer this late means the process was stopped or the loop blocked: deadlines move by the gap


def _nothing() -> None:
    """No engine."""


class Driver(Starting, Outcomes, Moving, Feeding, Telling):
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
        self._engine = weakref.ref(engine) if engine is not None else _nothing
        self.memory_limit: int = engine.memory_bytes() if engine is not None else machine.memory  # as it was given
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
        self._monotonic = clock.monotonic
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
            act.Stand: self._stand,
            act.GoOn: self._go_on,
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

    @property
    def engine(self) -> Any:
        """Whose driver it is. Not held: a loop that somebody keeps would keep the engine, and its workers."""
        return self._engine()

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
            rounds, perform = MOST_ROUNDS, self._perform
            while rounds and (signals := self._signals):
                rounds -= 1
                self._signals = []
                now = self._now = self._monotonic()
                if self.recorder is not None:
                    self.recorder.append((now, signals))
                for action in self.machine.handle_all(signals, now):
                    perform[type(action)](action)
        except BaseException as error:
            self._broken(error)
        finally:
            self._turning = False
        if self._signals:
            if not self._scheduled:
                self._scheduled = True
                self.loop.call_soon(self.turn)
            return
        if self.failing.blocks:
            self.failing.clear()
        if self._settled is not None:
            self.settled()

    def settled(self) -> None:
        """Tell a clock of its own how many attempts do something: not those that an interceptor lets wait, nor those
        that wait for a run they have started. A source that was asked for items does something too."""
        if self._settled is None:
            return
        tasks, busy = self.machine.tasks, sum(run.pulling for run in self.machine.runs.values())
        for number, running in self.running.items():
            if number >= SOURCES:
                continue  # it counts while it is pulled
            task = tasks.get(number)
            waits = running.claim is not None and running.claim.waits
            if task is not None and (task.spawning or task.stood is not None):
                waits = True
            busy += not waits
        self._settled(self.loop, busy)

    def _broken(self, error: BaseException) -> None:
        """A bug of ours: end every run with it rather than hang. The engine uses another driver from now on."""
        self.broken = True
        _log.error("the scheduler failed; every run on this loop ends", exc_info=error)
        for job in list(self.jobs.values()):
            self._switched_back(job)
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

    def submit(self, job_of: Callable[[int], Job], *, mode: str, deadline: float | None, waited: int = 0) -> Job:
        """Begin a run; the attempt `waited` waits for it (0: none of this loop)."""
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
        if "thread" in job.code.needed and self.engine is not None and self.engine.config.switch_interval:
            job.switching = self.engine.config.switch_interval
            switching.enter(job.switching)
        if self.events.wants_spans or (job.sinks is not None and job.sinks.wants_spans):
            from stageflow.context.tracing import current_traceparent

            job.trace = current_traceparent() or ""
            if job.header is not None:
                job.header = Header(job.run_id, extras={TRACE: job.trace})
        self.signal(sig.RunSubmitted(job.id, job.run_id, job.code.layout, mode, deadline, listening, waited))
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

    def stop_item(self, job: Job, stage: int, item: tuple[int, ...], reason: str) -> None:
        """Stop one item of a map, by its index path. Where items have paths of more than one number, the scheduler's
        index of one is known once it has begun."""
        if job.id not in self.jobs:
            return
        if stage not in job.code.nested:
            self.signal(sig.StopItem(job.id, stage, item[0], reason))
            return
        job.doomed[stage, item] = reason
        for running in self.running.values():
            if running.job is job and running.action.stage == stage and type(running.action) is act.StartBlock:
                self._find_doomed(job, running.action)

    def _find_doomed(self, job: Job, action: act.StartBlock) -> None:
        """Stop the items of a block that are known by their path."""
        for index, path in of_block(action.segments, job.book.handles).items():
            for stage in action.region or (action.stage,):
                reason = job.doomed.pop((stage, path), None)
                if reason is not None:
                    job.paths[stage, index] = path
                    self.signal(sig.StopItem(job.id, stage, index, reason))

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

    def _switched_back(self, job: Job) -> None:
        if job.switching:
            seconds, job.switching = job.switching, 0.0
            switching.leave(seconds)

    def _finish_run(self, action: act.FinishRun) -> None:
        job = self.jobs.pop(action.run)
        self._switched_back(job)
        if not self.jobs:
            self.sampler.end()
            for watcher in self.watchers:
                watcher.end()
        now = self.clock.monotonic()
        for stage, pump in list(job.pumps.items()):
            # it had the whole grace to close
            if hasattr(pump, "kill"):
                pump.kill()
                continue
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
        job.book.shared.clear()
        job.inputs_wire.clear()
        if job.cleanups:
            self.loop.create_task(self._after_cleanups(job, result))
        else:
            self._tell(job, result)

    async def _after_cleanups(self, job: Job, result: Any) -> None:
        """Every cleanup has run before the caller gets the result."""
        await asyncio.wait(job.cleanups, timeout=self.machine.grace)
        self._tell(job, result)

    @property
    def final_states(self) -> dict[int, bytes]:
        """States of the runs that the machine has just finished."""
        return self.machine.final_states

    # ------------------------------------------------------------ starting attempts

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

    # ------------------------------------------------------------ the other actions

    def _stop_attempt(self, action: act.StopAttempt) -> None:
        running = self.running.get(action.task)
        if running is None:
            return
        running.asked = True
        if action.timeout is not None:
            running.timeout = action.timeout
        if action.item >= 0:
            running.executor.cancel(action.task, reason=item_stop(action.item, action.reason))
            return
        running.executor.cancel(action.task, reason=action.reason, force=action.force)
        if running.claim is not None and hasattr(running.claim, "cancel"):
            running.claim.cancel()
        for child in list(running.children or ()):
            found = self.jobs.get(child)
            if found is not None:
                self.cancel(found, action.reason, force=action.force)

    def _stand(self, action: act.Stand) -> None:
        running = self.running.get(action.task)
        if running is not None:
            cast("Paces", running.executor).stand(action.task)

    def _go_on(self, action: act.GoOn) -> None:
        running = self.running.get(action.task)
        if running is not None:
            cast("Paces", running.executor).go_on(action.task)

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
