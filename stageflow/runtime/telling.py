"""Tells the sinks, and takes in what running attempts send."""

# mypy: disable-error-code="misc"
# The driver is spread over modules by subject; each method names Driver as its self.

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.core.kinds import StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.events import names
from stageflow.events.event import Event
from stageflow.pipeline.spec import Role
from stageflow.runtime.job import KEPT_FAILURES, Job
from stageflow.runtime.result import FailureRecord
from stageflow.runtime.running import DriverCounters, Running
from stageflow.scheduler import actions as act
from stageflow.scheduler.stops import stopped_info

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver

WIDTH: Final = len(act.ROW)
_log = logging.getLogger("stageflow")


class Telling(DriverCounters):
    """Tells the sinks, and takes in what running attempts send."""

    def _tell(self: Driver, job: Job, result: Any) -> None:
        """Give the caller the result, or the bug that kept us from making a true one."""
        if job.finished.done():
            return
        if job.broken is not None:
            job.finished.set_exception(job.broken)
        else:
            job.finished.set_result(result)

    def event(
        self: Driver, type: str, running: Running, data: dict[str, Any], item: tuple[int, ...] | None = None
    ) -> None:
        """Send an event of an attempt to the sinks."""
        action = running.action
        name = running.job.graph.specs[action.stage].name
        self._event(type, running.job, name, item, action.attempt, action.lane, data)

    def _completed(self: Driver, action: act.Completed) -> None:
        """Stages have succeeded: into the books, and told to whoever listens."""
        job, rows = self.jobs[action.run], action.rows
        if job.context is not None:
            for at in range(0, len(rows), WIDTH):
                self._fill_context(job, rows[at], rows[at + 1])
        told, shared = job.listening, self.events
        if not (told or shared.listening):
            self._seq += len(rows) // WIDTH
            job.stats.take(rows)
            return
        sinks = job.sinks
        job.stats.take(rows, 1 + told)
        specs, lanes, run_id = job.graph.specs, job.code.lanes, job.run_id
        at, seq = self.clock.time_ns(), self._seq  # all of them have ended in this turn
        events: list[Event] = []
        for first in range(0, len(rows), WIDTH):
            stage, attempt, _, duration, seconds, cpu_seconds, bytes_in, bytes_out, pid, started = rows[
                first : first + WIDTH
            ]
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
            seq += 2
            if told:
                events.append(Event("stage.attempt", at, seq - 1, run_id, name, None, attempt, lane, data))
            events.append(Event("stage.completed", at, seq, run_id, name, None, attempt, lane, data))
        self._seq = seq
        if sinks is not None:
            sinks.emit_all(events)
        if shared.listening:
            shared.emit_all(events)

    def _emit(self: Driver, action: act.Emit) -> None:
        job = self.jobs[action.run]
        stage = action.stage
        type_, data = action.type, action.data
        if stage < 0:
            self._event(type_, job, None, None, None, None, self._run_data(job) if type_ == "run.started" else data)
            return
        name = job.graph.specs[stage].name
        if type_ != "stage.completed" or "items_in" in data:
            data = self._book_end(job, name, action)
        if type_ == "stage.completed" and job.context is not None:
            self._fill_context(job, stage, action.attempt)
        self._event(type_, job, name, action.item, action.attempt, job.code.lanes[stage], data)

    def _fill_context(self: Driver, job: Job, stage: int, attempt: int | None) -> None:
        """Write the value of a stage that has succeeded into the outputs of the run's PipelineContext."""
        output = job.book.output(stage)
        if output is not None and job.context is not None:
            job.context.outputs.set_force(job.graph.specs[stage].name, output.data, attempt or 1)

    def _book_end(self: Driver, job: Job, name: str, action: act.Emit) -> dict[str, Any]:
        """Note in the run's book how a stage ended; what the event says."""
        stage, type_, data = action.stage, action.type, action.data
        book = job.book
        if type_ == "stage.failed":
            data = self._book_failure(job, name, action)
        elif type_ == "stage.skipped":
            if stage not in book.ends:
                book.end(stage, StageOutput.skip(data["reason"]))
        elif type_ == "stage.cancelled":
            if action.item is not None:
                action.item = job.paths.pop((stage, action.item[0]), action.item)
                self._book_cancelled_item(job, name, action)
            elif stage not in book.ends or book.ends[stage].status is StageStatus.FAIL:
                output = StageOutput.cancel(data.get("reason") or "cancelled")
                if "items_in" in data:
                    counts = {name: data[name] for name in ("dropped", "failed", "cancelled")}
                    output = msgspec.structs.replace(output, metadata={"items": data["emitted"], **counts})
                book.end(stage, output)
        elif type_ == "stage.completed":
            if job.graph.specs[stage].role != Role.REDUCE:
                counts = {"items": data["emitted"], "dropped": data["dropped"], "failed": data["failed"]}
                if data["cancelled"]:
                    counts["cancelled"] = data["cancelled"]
                book.end(stage, StageOutput(metadata=counts))
        elif type_ == "stage.retrying" and action.item is None:
            book.ends.pop(stage, None)
        return data

    def _book_failure(self: Driver, job: Job, name: str, action: act.Emit) -> dict[str, Any]:
        info: ErrorInfo = action.data["error_info"]
        listed = False
        if action.item is None:
            known = job.book.ends.get(action.stage)
            if known is None or known.error_info is None or known.error_info.message != info.message:
                job.book.failure(action.stage, info)
            # an item whose failure ended the run is in the list already
            listed = any(record.error_info is info and record.item is not None for record in job.failures)
        else:
            job.failed_items += 1
        if len(job.failures) < KEPT_FAILURES and not listed:
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

    def _book_cancelled_item(self: Driver, job: Job, name: str, action: act.Emit) -> None:
        """An item that was stopped is in the list of what did not come through."""
        job.cancelled_items += 1
        if len(job.failures) < KEPT_FAILURES:
            info = stopped_info(name, action.data["reason"], item=action.item)
            job.failures.append(
                FailureRecord(
                    stage=name,
                    error=info.message,
                    error_type=info.type,
                    timestamp=self.clock.time_ns() / 1e9,
                    item=action.item,
                    attempts=action.attempt or 1,
                    error_info=info,
                )
            )

    def _run_data(self: Driver, job: Job) -> dict[str, Any]:
        graph = job.graph
        specs = graph.specs
        data: dict[str, Any] = {
            "pipeline": graph.name,
            "workers": self.machine.lanes["process"].slots,
            "memory_limit": self.memory_limit or None,
            "monotonic": self.clock.monotonic(),
        }
        if job.trace:
            data["traceparent"] = job.trace
        if job.parent_run_id is not None:
            data["parent_run_id"] = job.parent_run_id
        if len(specs) <= 10_000:
            data.update(job.code.outline())
        data.update(job.identity.ids())
        data.update(job.about)
        data.pop("pipeline_run_id", None)
        return data

    def _event(
        self: Driver,
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

    def _noted(self: Driver, call_id: int, kind: str, data: Any) -> None:
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
                data.get("stage", name),
                tuple(item) if item is not None else None,
                data.get("attempt", action.attempt),
                action.lane,
                dict(data.get("data") or {}),
            )
        elif kind == "child":
            self._child_told(job, data)
        elif kind == "defer":
            job.survivors.setdefault(call_id, {})[data["index"]] = (data["call"], data.get("name"))
        elif kind == "deferred":
            job.survivors.pop(call_id, None)
        else:
            fields = dict(data) if isinstance(data, Mapping) else {"value": data}
            item = None
            if kind in ("print", "log"):
                name, item = fields.pop("stage", name), fields.pop("item", None)
                item = tuple(item) if item is not None else None
            self._event(f"stage.{kind}", job, name, item, action.attempt, action.lane, fields)
            if kind in ("print", "log"):
                now, attempt = self.clock.time_ns(), action.attempt
                said = Event(f"stage.{kind}", now, self._seq, job.run_id, name, item, attempt, action.lane, fields)
                self.relay.tell(said, job.sinks, self.events)

    def _child_told(self: Driver, job: Job, data: Mapping[str, Any]) -> None:
        """An event of a child run on another loop: the books of its parent have no part in it, its sinks do."""
        self._seq += 1
        fields = dict(data)
        heard = fields.pop("heard")  # by the engine's own sinks
        item = fields["item"]
        event = Event(**{**fields, "seq": self._seq, "item": tuple(item) if item is not None else None})
        if job.sinks is not None:
            job.sinks.emit(event)
        if self.events.listening and not heard:
            self.events.emit(event)

    def _run_survivors(self: Driver, job: Job, task: int) -> None:
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

    def _worker_event(self: Driver, type: str, data: dict[str, Any]) -> None:
        """Workers serve every run: each run's own sinks are told too, of the same event."""
        self._event(type, None, None, None, None, "process", dict(data))
        for job in self.jobs.values():
            event = Event(type, self.clock.time_ns(), self._seq, job.run_id, lane="process", data=dict(data))
            job.stats.add(event)
            if job.sinks is not None and job.owns_sinks:
                job.sinks.emit(event)

    def loop_blocked(self: Driver, seconds: float, codes: list[Any], stack: str) -> None:
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
