"""Wide events: everything known about an attempt, or about a run, in one row.

`WideEvents` is a sink that folds the stream and hands the rows, as events of type `stage.wide` and `pipeline.wide`,
to another sink (a JSONL file, a table, a log pipeline). A plain stage has one row per attempt. A stream stage has one
row when it closes, with its counts, and one for each attempt of an item that failed or was retried; `items=True`
gives one for every item.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from stageflow.events import names
from stageflow.events.catalogue import PipelineWide, StageWide
from stageflow.events.event import Event
from stageflow.events.sinks import EventSink
from stageflow.observability.attempts import RetriedAttempts
from stageflow.observability.stats import StatsFold

_IDS: Final = ("request_id", "session_id", "user_id", "org_id", "service", "execution_mode", "topology")
#: Runs that never end (their engine died) are forgotten beyond this many, oldest first.
_MAX_RUNS: Final = 4096
_STATUS: Final = {
    names.STAGE_COMPLETED: "ok",
    names.STAGE_FAILED: "fail",
    names.STAGE_SKIPPED: "skip",
    names.STAGE_CANCELLED: "cancel",
    names.STAGE_RETRYING: "retry",
}


class _Run:
    __slots__ = ("attempts", "data", "error", "fold", "started_ns", "statuses")

    def __init__(self, event: Event) -> None:
        self.data = event.data
        self.started_ns = event.time_unix_ns
        self.fold = StatsFold(event.data.get("stages") or ())
        self.statuses: Counter[str] = Counter()
        self.error: str | None = None
        self.attempts = RetriedAttempts()

    def ids(self) -> dict[str, Any]:
        """The identity fields every row of this run has."""
        return {name: self.data.get(name) for name in _IDS}


class WideEvents:
    """A sink that turns the events of runs into rows for `downstream`. `stage_type` and `run_type` rename the row
    types.

    `details=True` puts the numbers of every stage into the run's row. `extra` (a mapping) is added to each row under
    `extra`.
    """

    def __init__(
        self,
        downstream: EventSink,
        *,
        items: bool = False,
        details: bool = True,
        extra: Mapping[str, Any] | None = None,
        stage_type: str = names.STAGE_WIDE,
        run_type: str = names.PIPELINE_WIDE,
    ) -> None:
        self.downstream = downstream
        self.wants_items = items
        self._details = details
        self._extra = dict(extra or {})
        self._stage_type = stage_type
        self._run_type = run_type
        self._runs: dict[str | None, _Run] = {}

    def emit(self, event: Event) -> None:
        """Fold `event`; hand on the row it completes, if any."""
        type_ = event.type
        if type_ == names.RUN_STARTED:
            if len(self._runs) >= _MAX_RUNS:
                self._runs.pop(next(iter(self._runs)))
            run = self._runs[event.run_id] = _Run(event)
            run.fold.add(event)
            return
        found = self._runs.get(event.run_id)
        if found is None:
            return
        found.fold.add(event)
        retried = found.attempts.add(event)
        if retried is not None:
            self._stage_row(found, retried, "retry")
        elif type_ in names.RUN_ENDED:
            del self._runs[event.run_id]
            self._run_row(found, event)
        elif type_ in names.STAGE_ENDED:
            if event.item is None:
                found.statuses[_STATUS[type_]] += 1
                if type_ == names.STAGE_FAILED and found.error is None:
                    found.error = event.data.get("error")
            self._stage_row(found, event, _STATUS[type_])

    def _stage_row(self, run: _Run, event: Event, status: str) -> None:
        data = event.data
        get = data.get
        fold = run.fold
        stage = event.stage or ""
        counts = fold.stats_of(stage) if event.item is None and status != "retry" else None
        duration = get("duration_ms")
        if duration is None:
            duration = (get("seconds") or 0.0) * 1000.0
        began = event.time_unix_ns - int(duration * 1e6)
        row = StageWide(
            pipeline_run_id=event.run_id,
            pipeline_name=fold.pipeline,
            **run.ids(),
            stage=stage,
            kind=fold.kinds.get(stage, ""),
            lane=event.lane or fold.lanes.get(stage, ""),
            item=list(event.item) if event.item is not None else None,
            attempt=event.attempt,
            final=status != "retry",
            status=status,
            started_at=iso_time(began),
            ended_at=iso_time(event.time_unix_ns),
            duration_ms=duration,
            seconds=counts.busy_seconds if counts else get("seconds") or 0.0,
            cpu_seconds=counts.cpu_seconds if counts else get("cpu_seconds") or 0.0,
            queued_ms=counts.queued_seconds * 1000.0 if counts else get("queued_ms") or 0.0,
            bytes_in=counts.bytes_in if counts else get("bytes_in") or 0,
            bytes_out=counts.bytes_out if counts else get("bytes_out") or 0,
            worker_pid=get("worker_pid") or 0,
            items_in=counts.items_in if counts else 0,
            items_out=counts.items_out if counts else 0,
            dropped=counts.dropped if counts else 0,
            failed=counts.failed if counts else 0,
            retried=counts.retried if counts else 0,
            wait=counts.wait if counts else {},
            data_keys=sorted(get("data_keys") or ()),
            error=get("error"),
            error_type=get("error_type"),
            reason=get("reason"),
            extra=self._extra,
        )
        self._hand_on(self._stage_type, event, row.to_dict())

    def _run_row(self, run: _Run, event: Event) -> None:
        fold = run.fold
        totals = fold.totals()
        data = event.data
        details = [stats.to_dict() for stats in fold.view().values()] if self._details else []
        row = PipelineWide(
            pipeline_run_id=event.run_id,
            pipeline_name=fold.pipeline or run.data.get("topology") or "pipeline",
            **run.ids(),
            status=totals.status,
            started_at=iso_time(run.started_ns),
            ended_at=iso_time(event.time_unix_ns),
            duration_ms=totals.wall_seconds * 1000.0,
            stage_counts=dict(sorted(run.statuses.items())),
            stage_details=details,
            items_in=totals.items_in,
            items_out=totals.items_out,
            dropped=totals.dropped,
            failed=totals.failed,
            cancelled=totals.cancelled,
            attempts=totals.attempts,
            retried=totals.retried,
            busy_seconds=totals.busy_seconds,
            cpu_seconds=totals.cpu_seconds,
            bytes_in=totals.bytes_in,
            bytes_out=totals.bytes_out,
            workers_started=totals.workers_started,
            workers_lost=totals.workers_lost,
            workers_recycled=totals.workers_recycled,
            backpressure_seconds=totals.backpressure_seconds,
            error=data.get("error") or run.error,
            reason=data.get("reason"),
            extra=self._extra,
        )
        self._hand_on(self._run_type, event, row.to_dict())

    def _hand_on(self, type_: str, event: Event, data: dict[str, Any]) -> None:
        row = Event(
            type_, event.time_unix_ns, event.seq, event.run_id, event.stage, event.item, event.attempt, event.lane, data
        )
        self.downstream.emit(row)

    def close(self) -> None:
        """Close the sink behind this one."""
        close = getattr(self.downstream, "close", None)
        if close is not None:
            close()


def iso_time(time_unix_ns: int) -> str:
    """ISO 8601 in UTC with microseconds."""
    moment = datetime.datetime.fromtimestamp(time_unix_ns // 1_000_000_000, datetime.UTC)
    return moment.replace(microsecond=time_unix_ns // 1000 % 1_000_000).isoformat()
