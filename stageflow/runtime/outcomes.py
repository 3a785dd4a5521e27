"""Takes in how calls ended: values into the book, verdicts into signals."""

# mypy: disable-error-code="misc"
# The driver is spread over modules by subject; each method names Driver as its self.

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.context.owning import read_only_items
from stageflow.context.pieces import Done, ItemFailure, mask_from_wire
from stageflow.context.sizes import sized
from stageflow.core.errors import InvariantError, StageflowError, StageTimeoutError
from stageflow.core.executor import Outcome, OutcomeKind
from stageflow.core.failure import capture
from stageflow.core.kinds import StageKind, StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.runtime.job import Job
from stageflow.runtime.moving import named
from stageflow.runtime.paths import located, of_block, of_results
from stageflow.runtime.result import Abandoned
from stageflow.runtime.running import DriverCounters, Running
from stageflow.runtime.sequence import Values
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver
    from stageflow.runtime.strategies import Verdict

_OK: Final = OutcomeKind.OK
#: values of which nothing needs to be looked at: they are no payload, output, mapping or route
_SCALARS: Final = frozenset({bool, int, float, str, bytes, list, tuple})
_log = logging.getLogger("stageflow")


class Outcomes(DriverCounters):
    """Takes in how calls ended: values into the book, verdicts into signals."""

    def outcome(self: Driver, outcome: Outcome) -> None:
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

    def _guarded(self: Driver, take: Callable[[Outcome], None]) -> Callable[[Outcome], None]:
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

    def _misread(self: Driver, running: Running, outcome: Outcome, error: BaseException) -> None:
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

    def _attempt_outcome(self: Driver, outcome: Outcome) -> None:
        """An attempt of a plain stage has ended."""
        if not outcome.final:
            return
        running = self.running.pop(outcome.call_id, None)
        if running is None:
            return
        if outcome.kind is not _OK and self._moved(running, outcome):
            return
        try:
            job, action, value = running.job, running.action, outcome.value
            code, kind, stage = job.code, type(value), action.stage
            held = False  # the value is one that a worker has encoded
            if (
                outcome.kind is _OK
                and outcome.meta is None
                and running.timeout is None
                and not code.routes
                and not job.survivors
                and (
                    value is None
                    or (kind in _SCALARS and not code.empty[stage])
                    or (held := action.lane == "process" and stage not in code.hinted and self.is_payload(value))
                )
            ):
                # most outcomes, so `_ended` and `_succeeded` are spelled out for them; it must do what they do
                book = job.book
                if book.shared or book.outputs or book.ends:
                    book.put(stage, value, encoded=held, meta=None)
                else:
                    book.values[stage] = value
                    book.encoded[stage] = held
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
                    self._look(job, stage, outcome, value)
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

    def _look(self: Driver, job: Job, stage: int, outcome: Outcome, value: Any) -> None:
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

    def _ended(self: Driver, running: Running, outcome: Outcome) -> sig.AttemptEnded:
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
        self: Driver, job: Job, action: Any, ended: sig.AttemptEnded, outcome: Outcome, meta: StageOutput | None
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
        self: Driver, job: Job, running: Running, ended: sig.AttemptEnded, meta: StageOutput, outcome: Outcome
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

    def _unsuccessful(self: Driver, running: Running, ended: sig.AttemptEnded, outcome: Outcome) -> None:
        job, action = running.job, running.action
        kind = outcome.kind
        info = outcome.error
        if info is not None:
            info = named(job, action, _located(info, action.lane, outcome.worker_pid, action.attempt))
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
        self: Driver, running: Running, ended: sig.AttemptEnded, info: ErrorInfo, exception: BaseException | None
    ) -> None:
        verdict = self.judge(running, running.action.stage, info, exception)
        if verdict is None:
            return
        ended.retry, ended.wait, ended.roll = verdict.retry, verdict.wait, verdict.roll
        if verdict.broken is not None:
            ended.error = msgspec.structs.replace(_raised(verdict, running), cause=info)

    def _judge_timeout(self: Driver, running: Running, key: Any, ended: sig.AttemptEnded) -> None:
        """The attempt was stopped for its timeout: that is the failure to judge, whatever it answered."""
        verdict = self._timeout_verdict(running, key)
        if verdict is not None:
            ended.retry, ended.wait, ended.roll = verdict.retry, verdict.wait, verdict.roll
            if verdict.broken is not None:
                ended.broken = _raised(verdict, running)

    def _timeout_verdict(self: Driver, running: Running, key: Any) -> Verdict | None:
        if running.job.graph.specs[_stage_of(key)].policies.retry is None:
            return None
        limit = running.timeout or 0.0
        elapsed = self.clock.monotonic() - running.since
        error = StageTimeoutError(f"the attempt exceeded {limit:g} s", elapsed=elapsed, limit=limit)
        return self.judge(running, key, capture(error), error)

    def judge(
        self: Driver, running: Running, key: Any, info: ErrorInfo, exception: BaseException | None
    ) -> Verdict | None:
        """The user's strategies and the dice, on one failure; None where there is no retry policy. `key`: the stage,
        and which of its items, if it has some."""
        job = running.job
        retry = job.graph.specs[_stage_of(key)].policies.retry
        if retry is None:
            return None
        now = self.clock.monotonic()
        first = self.first_starts.setdefault((job.id, key), running.since)
        from stageflow.runtime.strategies import judge

        return judge(retry, info, exception, running.action.attempt, now - first, 0.0, job.dice_for(retry.seed, key))

    def _route(self: Driver, job: Job, stage: int, value: Any) -> tuple[str, ...] | ErrorInfo:
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

    def _forward(self: Driver, job: Job, action: Any, meta: StageOutput) -> None:
        """Events and artifacts attached to an output go to the sinks."""
        name = job.graph.specs[action.stage].name
        for event in meta.events:
            self._event(event.type, job, name, None, action.attempt, action.lane, dict(event.data))
        for artifact in meta.artifacts:
            data = {"type": artifact.artifact_type, "id": artifact.id, "name": artifact.name}
            self._event("stage.artifact", job, name, None, action.attempt, action.lane, data)

    def _block_outcome(self: Driver, outcome: Outcome) -> None:
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
            if outcome.kind is not _OK and self._moved(running, outcome):
                return
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
                    if meta.handed:
                        self.failing.note_given(job, action, meta, part.handle)
                self._judge_items(running, part, meta.failures)
            if running.timeout is not None:
                verdict = self._timeout_verdict(running, (_timed(action), action.segments[0][0]))
                if verdict is not None:
                    part.broken = _raised(verdict, running) if verdict.broken is not None else None
                    part.retries = ((verdict.retry, verdict.wait, verdict.roll),) * max(1, len(meta.failures))
        elif outcome.kind != OutcomeKind.OK:
            self._block_failed(running, part, outcome)
        self.signal(part)

    def _trace(self: Driver, running: Any, part: sig.BlockPart, meta: Done) -> Done:
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

    def _hold(self: Driver, job: Job, lane: str, outcome: Outcome) -> tuple[int, int]:
        self._next_handle = handle = self._next_handle + 1
        if self.is_payload(outcome.value):
            nbytes = outcome.bytes_out
            job.book.hold(handle, Values(None, outcome.value, nbytes))
        else:
            nbytes = sized(outcome.value)
            job.book.hold(handle, Values(read_only_items(outcome.value), None, nbytes))
        return handle, nbytes

    def _judge_items(self: Driver, running: Running, part: sig.BlockPart, failures: Any) -> None:
        """The verdicts on the items of a part that failed; one whose judge raised ends with that error."""
        retries: list[tuple[bool | None, float | None, float]] = []
        judged: list[ItemFailure] = []
        for given in failures:
            failure = given if isinstance(given, ItemFailure) else ItemFailure(*given)
            action = running.action
            stage = action.stage if action.region is None else action.region[failure.member]
            verdict = self.judge(running, (stage, failure.index), failure.info, None)
            retries.append((None, None, 1.0) if verdict is None else (verdict.retry, verdict.wait, verdict.roll))
            if verdict is not None and verdict.broken is not None:
                info = msgspec.structs.replace(_raised(verdict, running), cause=failure.info, item=failure.path)
                failure = msgspec.structs.replace(failure, info=info)
            judged.append(failure)
        part.retries = tuple(retries)
        part.done = msgspec.structs.replace(part.done, failures=tuple(judged))

    def _block_failed(self: Driver, running: Running, part: sig.BlockPart, outcome: Outcome) -> None:
        action = running.action
        if running.job.listening:
            self.failing.note(running.job, action)
        info = outcome.error
        if info is not None:
            info = named(running.job, action, _located(info, action.lane, outcome.worker_pid, action.attempt))
        part.error = info
        if action.stage in running.job.code.nested:
            part.paths = of_block(action.segments, running.job.book.handles)
        if outcome.kind == OutcomeKind.LOST:
            part.status, part.suspect = "lost", outcome.suspect
            self._run_survivors(running.job, action.task)
            return
        if outcome.kind == OutcomeKind.CANCELLED:
            part.status = "cancelled"
            self._run_survivors(running.job, action.task)
            if running.timeout is not None:
                verdict = self._timeout_verdict(running, (_timed(action), action.segments[0][0]))
                if verdict is not None:
                    part.broken = _raised(verdict, running) if verdict.broken is not None else None
                    part.retries = ((verdict.retry, verdict.wait, verdict.roll),)
            if isinstance(outcome.meta, dict) and outcome.meta.get("abandoned"):
                part.abandoned = True
                name = running.job.graph.specs[action.stage].name
                first = action.segments[0][0]
                item = (first,) if part.paths is None else part.paths.get(first, (first,))
                running.job.abandoned.append(Abandoned(name, item, action.attempt, outcome.meta.get("stack", "")))
            return
        part.status = "refused" if outcome.kind == OutcomeKind.REFUSED else "error"
        verdict = self.judge(running, (action.stage, action.segments[0][0]), info, outcome.exception) if info else None
        if verdict is not None:
            part.retries = ((verdict.retry, verdict.wait, verdict.roll),)
            if verdict.broken is not None:
                part.error = msgspec.structs.replace(_raised(verdict, running), cause=info)

    def _fold_outcome(self: Driver, outcome: Outcome) -> None:
        """A step of a reduce has ended."""
        if not outcome.final:
            return
        running = self.running.pop(outcome.call_id, None)
        if running is None:
            return
        if outcome.kind is not _OK and self._moved(running, outcome):
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
            if job.listening:
                self.failing.note_step(job, action)
            self._unsuccessful(running, ended, outcome)
        if running.timeout is not None:
            self._judge_timeout(running, action.stage, ended)
        self.signal(ended)


def _raised(verdict: Verdict, running: Running) -> ErrorInfo:
    """What a user's strategy raised."""
    assert verdict.broken is not None
    return capture(verdict.broken, lane=running.action.lane, attempt=running.action.attempt)


def _done(meta: Any) -> Done:
    """What a part says, with masks as whole numbers whatever form they crossed in."""
    done = meta if isinstance(meta, Done) else Done(*meta)
    if done.handed:
        handed = tuple((lo, hi, mask_from_wire(mask), member) for lo, hi, mask, member in done.handed)
        done = msgspec.structs.replace(done, handed=handed)
    if any(not isinstance(mask, int) for _, _, mask in done.ranges):
        done = msgspec.structs.replace(
            done, ranges=tuple((lo, hi, mask_from_wire(mask)) for lo, hi, mask in done.ranges)
        )
    return done


def _survivors(done: Any) -> bool:
    return bool(done.ranges or done.flows or done.handed)


def _stage_of(key: Any) -> int:
    """The stage of what is judged."""
    stage: int = key[0] if isinstance(key, tuple) else key
    return stage


def _timed(action: act.StartBlock) -> int:
    """The stage of a block that its timeout is of."""
    return action.stage if action.region is None else action.region[-1]


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
    from stageflow.store.keys import digest

    try:
        return digest((text, data))
    except Exception:  # what cannot be hashed by its content is told by its looks
        return digest((text, repr(data)))
