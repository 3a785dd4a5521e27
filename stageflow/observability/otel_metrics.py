"""The metrics of runs as OpenTelemetry instruments, recorded from events. Units follow the conventions: s, By,
{item}."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from stageflow.events import names
from stageflow.events.event import Event

#: Run ids in memory for the pipeline's name as an attribute.
_MAX_RUNS: Final = 4096
_SUMMED: Final = ("ok", "dropped", "failed", "bytes_in", "bytes_out", "cpu_seconds", "queued_ms")
_EVERY_NS: Final = 500_000_000
_CLOSING: Final = names.STAGE_ENDED | names.RUN_ENDED


class Instruments:
    """Creates the instruments on `meter_provider` and records events into them. Attributes: pipeline, stage, lane."""

    def __init__(self, meter_provider: Any) -> None:
        meter = meter_provider.get_meter("stageflow")
        histogram, counter, updown, gauge = (
            meter.create_histogram,
            meter.create_counter,
            meter.create_up_down_counter,
            meter.create_gauge,
        )
        self.run_duration = histogram(
            "stageflow.run.duration", unit="s", description="Time from start to end of a run."
        )
        self.attempt_duration = histogram(
            "stageflow.attempt.duration",
            unit="s",
            description="Time inside the function, per attempt of a plain stage.",
        )
        self.block_duration = histogram(
            "stageflow.block.duration", unit="s", description="Time inside the function, per block of items."
        )
        self.wait = histogram("stageflow.stage.wait", unit="s", description="Time a stage could not run, by reason.")
        self.queued = counter("stageflow.queue.time", unit="s", description="Time between ready and started.")
        self.runs = counter("stageflow.runs", unit="{run}", description="Runs that ended, by status.")
        self.items = counter("stageflow.items", unit="{item}", description="Items that ended, by outcome.")
        self.bytes = counter("stageflow.bytes", unit="By", description="Payload bytes read and written by stages.")
        self.retries = counter(
            "stageflow.retries", unit="{attempt}", description="Attempts that were followed by another."
        )
        self.cpu = counter("stageflow.cpu.time", unit="s", description="CPU time inside stages.")
        self.workers = updown("stageflow.workers", unit="{process}", description="Worker processes alive.")
        self.workers_lost = counter(
            "stageflow.workers.lost", unit="{process}", description="Worker processes that died."
        )
        self.backpressure = updown("stageflow.backpressure", unit="1", description="1 while held back, by reason.")
        self.rss = gauge(
            "stageflow.memory.rss", unit="By", description="Resident memory of the engine and its workers."
        )
        self.live = gauge("stageflow.memory.live", unit="By", description="Live payload bytes.")
        self._pipelines: dict[str | None, str] = {}
        self._streams: set[tuple[str | None, str | None]] = set()
        self._covered: set[tuple[str | None, str | None]] = set()
        self._sums: dict[tuple[str | None, str | None, str | None], dict[str, Any]] = {}
        self._summed_ns = 0
        self._begun: set[tuple[str | None, str | None]] = set()
        self._handlers: dict[str, Callable[[Event], None]] = {
            names.RUN_STARTED: self._run_started,
            names.RUN_COMPLETED: self._run_ended,
            names.RUN_FAILED: self._run_ended,
            names.RUN_CANCELLED: self._run_ended,
            names.STAGE_STARTED: self._stage_started,
            names.STAGE_ITEMS: self._block,
            names.STAGE_ATTEMPT: self._attempt,
            names.STAGE_COMPLETED: self._ended,
            names.STAGE_FAILED: self._ended,
            names.STAGE_CANCELLED: self._ended,
            names.STAGE_RETRYING: self._retrying,
            names.STAGE_WAITED: self._waited,
            names.WORKER_STARTED: self._worker,
            names.WORKER_LOST: self._worker,
            names.WORKER_RECYCLED: self._worker,
            names.BACKPRESSURE_ENTERED: self._pressure,
            names.BACKPRESSURE_LEFT: self._pressure,
            names.ENGINE_SAMPLE: self._sample,
        }

    def add(self, event: Event) -> None:
        """Record one event."""
        if self._sums and event.type in _CLOSING:
            self.flush()
        handler = self._handlers.get(event.type)
        if handler is not None:
            handler(event)

    def _where(self, event: Event) -> dict[str, str]:
        return {
            "pipeline": self._pipelines.get(event.run_id, ""),
            "stage": event.stage or "",
            "lane": event.lane or "",
        }

    def _run_started(self, event: Event) -> None:
        if len(self._pipelines) >= _MAX_RUNS:
            self._forget(next(iter(self._pipelines)))
        self._pipelines[event.run_id] = str(event.data.get("pipeline") or "")

    def _stage_started(self, event: Event) -> None:
        if event.item is None:
            self._begun.add((event.run_id, event.stage))

    def _forget(self, run_id: str | None) -> None:
        self._pipelines.pop(run_id, None)
        self._streams = {key for key in self._streams if key[0] != run_id}
        self._covered = {key for key in self._covered if key[0] != run_id}
        self._begun = {key for key in self._begun if key[0] != run_id}

    def _run_ended(self, event: Event) -> None:
        attributes = {
            "pipeline": self._pipelines.get(event.run_id, ""),
            "status": event.data.get("status") or event.type.partition(".")[2],
        }
        self.runs.add(1, attributes)
        self.run_duration.record((event.data.get("duration_ms") or 0.0) / 1000.0, attributes)
        self._forget(event.run_id)

    def _measure(self, event: Event, where: dict[str, str]) -> None:
        data = event.data
        for key, direction in (("bytes_in", "in"), ("bytes_out", "out")):
            if data.get(key):
                self.bytes.add(data[key], {**where, "direction": direction})
        if data.get("cpu_seconds"):
            self.cpu.add(data["cpu_seconds"], where)
        if data.get("queued_ms"):
            self.queued.add(data["queued_ms"] / 1000.0, where)

    def _block(self, event: Event) -> None:
        """Sum up; an instrument call costs several microseconds, so the sums are recorded twice a second."""
        data = event.data
        key = (event.run_id, event.stage, event.lane)
        sums = self._sums.get(key)
        if sums is None:
            self._streams.add((event.run_id, event.stage))
            sums = self._sums[key] = dict.fromkeys(_SUMMED, 0)
        for name in _SUMMED:
            value = data.get(name)
            if value:
                sums[name] += value
        self.block_duration.record(data.get("seconds") or 0.0, self._where(event))
        if event.time_unix_ns - self._summed_ns > _EVERY_NS:
            self._summed_ns = event.time_unix_ns
            self.flush()

    def flush(self) -> None:
        """Record what was summed up."""
        sums, self._sums = self._sums, {}
        for (run_id, stage, lane), values in sums.items():
            where = {"pipeline": self._pipelines.get(run_id, ""), "stage": stage or "", "lane": lane or ""}
            for outcome in ("ok", "dropped", "failed"):
                if values[outcome]:
                    self.items.add(values[outcome], {**where, "outcome": outcome})
            for key, direction in (("bytes_in", "in"), ("bytes_out", "out")):
                if values[key]:
                    self.bytes.add(values[key], {**where, "direction": direction})
            if values["cpu_seconds"]:
                self.cpu.add(values["cpu_seconds"], where)
            if values["queued_ms"]:
                self.queued.add(values["queued_ms"] / 1000.0, where)

    def _attempt(self, event: Event) -> None:
        where = self._where(event)
        self.attempt_duration.record(
            event.data.get("seconds") or 0.0, {**where, "status": event.data.get("status") or "ok"}
        )
        self._measure(event, where)
        if event.item is None and event.data.get("final") is not False:
            self._covered.add((event.run_id, event.stage))

    def _ended(self, event: Event) -> None:
        data = event.data
        if event.item is not None:
            if event.type == names.STAGE_CANCELLED:  # stopped by itself
                self.items.add(1, {**self._where(event), "outcome": "cancelled"})
            return  # counted with its block
        where = self._where(event)
        key = (event.run_id, event.stage)
        begun = key in self._begun
        self._begun.discard(key)
        for reason, seconds in (data.get("wait") or {}).items():
            self.wait.record(seconds, {**where, "reason": reason})
        if key in self._streams or "items_in" in data:
            return
        status = {names.STAGE_COMPLETED: "ok", names.STAGE_FAILED: "failed"}.get(event.type, "cancelled")
        if status == "cancelled" and not begun:
            return  # it never ran
        self.items.add(1, {**where, "outcome": status})
        if key in self._covered:
            self._covered.discard(key)
            return
        seconds = data.get("seconds")
        if seconds is None:
            seconds = (data.get("duration_ms") or 0.0) / 1000.0
        self.attempt_duration.record(seconds, {**where, "status": status})
        self._measure(event, where)

    def _retrying(self, event: Event) -> None:
        self.retries.add(1, self._where(event))

    def _waited(self, event: Event) -> None:
        reason = str(event.data.get("reason") or "other")
        self.wait.record(event.data.get("seconds") or 0.0, {**self._where(event), "reason": reason})

    def _worker(self, event: Event) -> None:
        if event.type == names.WORKER_STARTED:
            self.workers.add(1)
            return
        self.workers.add(-1)
        if event.type == names.WORKER_LOST:
            self.workers_lost.add(1, {"reason": str(event.data.get("reason") or "")})

    def _pressure(self, event: Event) -> None:
        amount = 1 if event.type == names.BACKPRESSURE_ENTERED else -1
        self.backpressure.add(amount, {"reason": str(event.data.get("reason") or "")})

    def _sample(self, event: Event) -> None:
        if event.data.get("rss_bytes") is not None:
            self.rss.set(event.data["rss_bytes"])
        if event.data.get("live_bytes") is not None:
            self.live.set(event.data["live_bytes"])
