"""`FailureCollector`: what failed and what that allows, folded from a run's events or told by hand.

The engine does not use it: the scheduler decides what runs. It is for code that follows a run from outside (a sink, a
report, a driver of one's own) and wants the same rules.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

from stageflow.core.kinds import FailureMode
from stageflow.events.event import Event
from stageflow.events.names import RUN_ENDED
from stageflow.runtime.result import FailureRecord, FailureSummary


class FailureCollector:
    """Collects failures under a failure mode. Thread-safe; an EventSink as it stands (`event_sinks=[collector]`)."""

    def __init__(self, mode: FailureMode | str = FailureMode.FAIL_FAST) -> None:
        self.mode = FailureMode(mode)
        self._lock = threading.Lock()
        self._failures: list[FailureRecord] = []
        self._failed: set[str] = set()
        self._blocked: set[str] = set()
        self._completed: dict[str, Any] = {}
        self._skipped: set[str] = set()
        self._cancelled: set[str] = set()
        self._failed_items = 0
        self._children: set[str | None] = set()  # runs under way

    # ------------------------------------------------------------ being told

    def record_failure(self, failure: FailureRecord) -> None:
        """A stage, or an item of one, has failed for good."""
        with self._lock:
            self._failures.append(failure)
            if failure.item is None:
                self._failed.add(failure.stage)
                self._completed.pop(failure.stage, None)
            else:
                self._failed_items += 1

    def record_completion(self, stage: str, result: Any = None) -> None:
        """A stage has succeeded; `result` becomes a partial result of the summary. A re-run that passes clears it."""
        with self._lock:
            self._completed[stage] = result
            self._failed.discard(stage)

    def emit(self, event: Event) -> None:
        """Fold an event of a run. Those of its children are theirs: their failure is one of the stage that started
        them."""
        stage, data = event.stage, event.data
        if event.type == "run.started" and data.get("parent_run_id") is not None:
            self._children.add(event.run_id)
        elif event.type in RUN_ENDED:
            self._children.discard(event.run_id)
        if stage is None or event.run_id in self._children:
            return
        if event.type == "stage.completed":
            self.record_completion(stage)
        elif event.type == "stage.failed":
            self.record_failure(
                FailureRecord(
                    stage=stage,
                    error=str(data.get("error", "")),
                    error_type=str(data.get("error_type", "Error")),
                    recoverable=bool(data.get("retryable", False)),
                    timestamp=event.time_unix_ns / 1e9,
                    item=event.item,
                    attempts=event.attempt or 1,
                )
            )
        elif event.type in ("stage.skipped", "stage.cancelled") and event.item is None:
            with self._lock:
                (self._skipped if event.type == "stage.skipped" else self._cancelled).add(stage)

    # ------------------------------------------------------------ being asked

    def has_failed(self, stage: str | None = None) -> bool:
        """Whether the stage (or, without one, anything) has failed."""
        with self._lock:
            return bool(self._failures) if stage is None else stage in self._failed

    def failures(self) -> tuple[FailureRecord, ...]:
        """Every failure in the order it was told."""
        with self._lock:
            return tuple(self._failures)

    def should_stop(self) -> bool:
        """Whether nothing more should start: fail_fast, and something has failed."""
        return self.mode is FailureMode.FAIL_FAST and self.has_failed()

    def can_run(self, stage: str, dependencies: Iterable[str]) -> bool:
        """Whether a stage may run. Under continue_on_failure a stage that may not blocks those behind it in turn: ask
        in topological order."""
        with self._lock:
            if self.mode is FailureMode.BEST_EFFORT:
                return True
            if self.mode is FailureMode.FAIL_FAST:
                return not self._failures
            blocked = any(dep in self._failed or dep in self._blocked for dep in dependencies)
            if blocked:
                self._blocked.add(stage)
            return not blocked

    def summary(self, total_stages: int) -> FailureSummary:
        """The summary so far, with the results that were told."""
        with self._lock:
            partial: Mapping[str, Any] = dict(self._completed)
            return FailureSummary(
                total_stages=total_stages,
                completed_stages=len(self._completed),
                failed_stages=len(self._failed),
                skipped_stages=len(self._skipped | self._blocked),
                cancelled_stages=len(self._cancelled),
                failed_items=self._failed_items,
                failures=tuple(self._failures),
                partial_results=partial,
            )
