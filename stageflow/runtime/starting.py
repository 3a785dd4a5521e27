"""Makes calls: what a stage is called with, in the form its lane takes."""

# mypy: disable-error-code="misc"
# The driver is spread over modules by subject; each method names Driver as its self.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.attempt import ABSENT, TRACE, Header
from stageflow.context.owning import read_only
from stageflow.context.pieces import Piece
from stageflow.core.errors import StageFailedError
from stageflow.core.executor import Call, Executor, Outcome, OutcomeKind, Shipped
from stageflow.core.failure import capture
from stageflow.core.kinds import StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.events.event import Event
from stageflow.pipeline.policies import DEFAULT_POLICIES
from stageflow.runtime.job import Job
from stageflow.runtime.paths import of_segment
from stageflow.runtime.running import DriverCounters, Running
from stageflow.runtime.sequence import ItemSequence
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig

#: cross as they are; nothing is gained by keeping their encoded form
_WORDS: Final = frozenset((type(None), bool, int, float, type(ABSENT)))

if TYPE_CHECKING:
    from stageflow.runtime.code import StageCode
    from stageflow.runtime.driver import Driver


class Starting(DriverCounters):
    """Makes calls: what a stage is called with, in the form its lane takes."""

    def _header(self: Driver, job: Job, action: Any, spec: Any, item: tuple[int, ...] | None = None) -> Header:
        feedback = getattr(action, "feedback", None)
        if (
            job.header is not None
            and action.attempt == 1
            and item is None
            and not (action.tokens or feedback or job.book.ends)
            and spec.policies.timeout is None
        ):
            return job.header  # nothing about this attempt is special
        failed: tuple[str, ...] = ()
        skipped: tuple[str, ...] = ()
        if job.book.ends:
            failed, skipped = self._missing(job, action.stage)
        extras: dict[str, Any] | None = None
        if action.tokens:
            extras = {"tokens": action.tokens}
        if feedback is not None:
            feedback = {**feedback, "data": self._guard_data(job, feedback["guard"])}
            extras = {**(extras or {}), "feedback": feedback}
        if job.depth:
            extras = {**(extras or {}), "depth": job.depth}
        if job.trace is not None:
            extras = {**(extras or {}), TRACE: job.trace}
        deadline = None
        if spec.policies.timeout is not None:
            deadline = self.clock.monotonic() + spec.policies.timeout
        return Header(job.run_id, action.attempt, item, deadline, failed, skipped, extras)

    def _header_form(self: Driver, job: Job, action: Any, spec: Any, lane: str, executor: Executor) -> Any:
        """The header in the form its lane takes; that of attempts of which nothing is special is encoded once."""
        header = self._header(job, action, spec)
        if lane != "process" or header is not job.header:
            return header
        wire = job.header_wire
        if wire is None:
            wire = job.header_wire = executor.encode(header)
        return wire

    def _guard_data(self: Driver, job: Job, guard: str) -> Any:
        """What a guard's failing output carried; the machine handles no values, the book has it."""
        end = job.book.ends.get(job.graph.index[guard])
        return end.data if end is not None and end.status is StageStatus.FAIL else None

    def _missing(self: Driver, job: Job, stage: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
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

    def _values(
        self: Driver,
        job: Job,
        sources: tuple[int | str, ...],
        lane: str,
        executor: Executor | None,
        *,
        many: bool = False,
    ) -> list[Any]:
        """The values of a call's slots, in the form the lane takes them. `many`: other calls of the stage take them
        too."""
        found: list[Any] = []
        if not sources:
            return found
        book = job.book
        inputs = job.snapshot.inputs
        crosses = lane == "process"
        for source in sources:
            if isinstance(source, str):
                value = inputs.get(source, ABSENT)
                if crosses and type(value) not in _WORDS and (many or job.code.readers(source) > 1):
                    value = _once(value, source, job.inputs_wire, executor)
                found.append(value if crosses else read_only(value))
                continue
            if crosses and book.encoded[source]:
                found.append(book.values[source])
                continue
            if book.graph.streams[source]:
                whole = book.sequence(source) if source not in book.ends or source in book.kept else ABSENT
                if crosses and many and whole is not ABSENT:
                    whole = _once(whole, source, book.shared, executor)
                found.append(whole)
                continue
            value = book.values[source]
            if value is ABSENT:
                found.append(ABSENT)
            elif not crosses:
                found.append(read_only(book.value(source)))
            elif many or len(book.graph.dependents[source]) > 1:
                found.append(_once(value, source, book.shared, executor))
            else:
                found.append(value)
        return found

    def _snapshot(self: Driver, job: Job, lane: str, executor: Executor) -> Any:
        if lane != "process":
            return job.snapshot
        wire = job.snapshot_wire
        if wire is None:
            wire = job.snapshot_wire = executor.encode(job.snapshot)
        return wire

    def _start_attempt(self: Driver, action: act.StartAttempt, told: bool = False) -> None:
        """`told`: the sinks have heard of its start."""
        job = self.jobs[action.run]
        lane, stage = action.lane, action.stage
        if job.listening and not told:
            self._started(job, job.graph.specs[stage].name, action.attempt, lane)
        executor = self.executors.get(lane) or self.executor(lane)
        self.running[action.task] = running = Running(job, action, executor, self._now)
        if job.trace is None:
            direct = job.code.directs[stage]
            if direct is job.code:
                direct = job.code.direct(stage)
            if direct is not None:  # a function of nothing, on this loop: there is nothing to put together
                executor.start(Call(action.task, direct), self._deliver_attempt)
                return
            code = job.code.stage(stage)
            if code.bare and lane == "process":  # as below, without what could be special
                try:
                    values = self._values(job, code.sources, lane, executor)
                    call = Call(
                        action.task, code.shipped, (None, None, *values), action.short, action.alone, code.writable
                    )
                except Exception as error:
                    self._refuse(running, error)
                    return
                executor.start(call, self._deliver_attempt)
                return
        spec = job.graph.specs[stage]
        try:
            if spec.form == "graph":
                self.loop.create_task(self._subpipeline(running, spec))
                return
            code = job.code.stage(action.stage)
            values = self._values(job, code.sources, lane, executor)
            header = snapshot = None  # where nobody could read them
            if code.passes_snapshot:
                snapshot = self._snapshot(job, lane, executor)
            if code.passes_snapshot or job.trace is not None:
                header = self._header_form(job, action, spec, lane, executor)
            shipped = code.call(lane, job.trace)
            policies = spec.policies
            args = (header, snapshot, *values)
            lazy = 0
            if code.gathers and lane == "process":
                width = len(args)
                shipped, args = _in_pieces(code, shipped, args)
                lazy = width if len(args) > width else 0
            call = Call(
                action.task,
                shipped,
                args,
                action.short,
                action.alone,
                code.writable,
                lazy=lazy,
            )
        except Exception as error:
            self._refuse(running, error)
            return
        if policies is not DEFAULT_POLICIES and self.policies is not None and self.policies.wanted(policies):
            self.policies.around(self, running, call, spec)
        else:
            executor.start(call, self._deliver_attempt)

    def _started(self: Driver, job: Job, name: str, attempt: int, lane: str) -> None:
        """`_event`, for an event of every attempt."""
        self._seq = seq = self._seq + 1
        event = Event("stage.started", self.clock.time_ns(), seq, job.run_id, name, None, attempt, lane, {})
        stats, sinks = job.stats, job.sinks
        stats.events += 1
        stats.late.append(event)
        if sinks is not None:
            sinks.emit(event)
        if self.events.listening:
            self.events.emit(event)

    def _refuse(self: Driver, running: Running, error: BaseException) -> None:
        """A call could not even be made: that is its outcome."""
        outcome = Outcome(running.action.task, OutcomeKind.ERROR, error=capture(error), exception=error)
        self.loop.call_soon(self.outcome, outcome)

    def _start_block(self: Driver, action: act.StartBlock) -> None:
        job = self.jobs[action.run]
        spec = job.graph.specs[action.stage]
        lane = action.lane
        executor = self.executors.get(lane) or self.executor(lane)
        running = Running(job, action, executor, self.clock.monotonic())
        self.running[action.task] = running
        if job.doomed:
            self._find_doomed(job, action)
        try:
            code = job.code.stage(action.stage) if action.region is None else job.code.region(action.stage)
            commons = self._values(job, code.sources, lane, executor, many=True)
            pieces, lists = self._pieces(job, action.segments, len(commons), lane)
            if job.code.nested and action.stage in job.code.nested and code.passes_snapshot:
                pieces = tuple(
                    msgspec.structs.replace(piece, paths=tuple(p for _, p in of_segment(segment, job.book.handles)))
                    for piece, segment in zip(pieces, action.segments, strict=True)
                )
            if action.skip:
                pieces = tuple(msgspec.structs.replace(piece, skip=action.skip) for piece in pieces)
            snapshot = self._snapshot(job, lane, executor) if code.passes_snapshot else None
            header = self._header_form(job, action, spec, lane, executor)
            shipped = code.call(lane, job.trace)
            call = Call(
                action.task,
                shipped,
                (header, snapshot, pieces, *commons, *lists),
                action.short,
                action.alone,
                code.writable_from(3),
            )
        except Exception as error:
            self._refuse(running, error)
            return
        if self.policies is not None and self.policies.wanted(spec.policies):
            self.policies.around(self, running, call, spec)
        else:
            executor.start(call, self._deliver_block)

    def _pieces(self: Driver, job: Job, segments: Any, first: int, lane: str) -> tuple[tuple[Piece, ...], list[Any]]:
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

    def _start_fold(self: Driver, action: act.StartFold) -> None:
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
            header = self._header_form(job, action, spec, lane, executor)
            args: tuple[Any, ...]
            if action.job == "merge":
                args = (None, *(handles[h].form(lane == "process") if h else ABSENT for h in action.accumulators))
                writable = -1  # accumulators belong to their fold, which may change them in place
            else:
                commons = self._values(job, code.sources, lane, executor, many=True)
                writable = code.writable_from(4)
                if action.accumulators:
                    writable |= 1 << (4 + len(commons)) if len(commons) < 48 else -1
                    commons.append(handles[action.accumulators[0]].form(lane == "process"))
                pieces, lists = self._pieces(job, action.segments, len(commons), lane)
                args = (pieces, *commons, *lists)
            snapshot = self._snapshot(job, lane, executor) if code.passes_snapshot else None
            call = Call(action.task, shipped, (header, snapshot, action.job, *args), False, action.alone, writable)
        except Exception as error:
            self._refuse(running, error)
            return
        executor.start(call, self._deliver_fold)

    async def _subpipeline(self: Driver, running: Running, spec: Any) -> None:
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


def _once(value: Any, key: Any, shared: dict[Any, Any], executor: Executor | None) -> Any:
    """`value` in the encoded form that every call of the run gets; encoded when first asked for."""
    if type(value) in _WORDS or executor is None:
        return value
    found = shared.get(key)
    if found is None:
        try:
            found = shared[key] = executor.encode(value)
        except Exception:
            return value  # the call that takes it says what is wrong, and where
    return found


def _in_pieces(code: StageCode, shipped: Shipped, args: tuple[Any, ...]) -> tuple[Shipped, tuple[Any, ...]]:
    """The call with its sequences as what they are made of: lists that workers have encoded are not decoded here."""
    whole: list[Any] = []
    pieces: list[Any] = []
    for value in args:
        if isinstance(value, ItemSequence):
            value, own = value.in_pieces(True)
            pieces += own
        whole.append(value)
    return code.gathered(shipped, len(args)), (*whole, *pieces)
