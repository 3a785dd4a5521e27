"""What a run leaves behind: outputs, failures, numbers. Partial results are always kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from stageflow.core.errors import StageFailedError, StageTimeoutError, WorkerDiedError
from stageflow.core.failure import revive
from stageflow.core.kinds import StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.observability.stats import StageStats
from stageflow.pipeline.graph import StageGraph


class FailureRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One failure. `item` is the index path of the element for a map."""

    stage: str
    error: str
    error_type: str = "Error"
    recoverable: bool = False
    timestamp: float = 0.0
    item: tuple[int, ...] | None = None
    attempts: int = 1
    error_info: ErrorInfo | None = None
    context: dict[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        shown = {
            "stage": self.stage,
            "error": self.error,
            "error_type": self.error_type,
            "recoverable": self.recoverable,
            "timestamp": self.timestamp,
            "attempts": self.attempts,
        }
        if self.item is not None:
            shown["item"] = list(self.item)
        return shown


class FailureSummary(msgspec.Struct, frozen=True, kw_only=True):
    """How many stages ended how, and every failure (the first `kept` of a map's; `failed_items` counts all).

    `partial_results` has what came out in spite of them, by stage.
    """

    total_stages: int = 0
    completed_stages: int = 0
    failed_stages: int = 0
    skipped_stages: int = 0
    cancelled_stages: int = 0
    failed_items: int = 0
    cancelled_items: int = 0
    failures: tuple[FailureRecord, ...] = ()
    partial_results: Mapping[str, Any] = {}

    def success_rate(self) -> float:
        """Completed stages of all; 0.0 for an empty run."""
        return self.completed_stages / self.total_stages if self.total_stages else 0.0

    def has_failures(self) -> bool:
        """Whether any failure was recorded."""
        return bool(self.failures)

    def __len__(self) -> int:
        return len(self.failures)

    def __iter__(self) -> Iterator[FailureRecord]:
        return iter(self.failures)

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON."""
        return {
            "total_stages": self.total_stages,
            "completed_stages": self.completed_stages,
            "failed_stages": self.failed_stages,
            "skipped_stages": self.skipped_stages,
            "cancelled_stages": self.cancelled_stages,
            "failed_items": self.failed_items,
            "cancelled_items": self.cancelled_items,
            "success_rate": self.success_rate(),
            "failures": [failure.to_dict() for failure in self.failures],
        }


class Outputs(Mapping[str, StageOutput]):
    """The output of every stage that ended, by name. A StageOutput is made when it is looked at."""

    __slots__ = ("_book",)

    def __init__(self, book: Any) -> None:
        self._book = book

    def __getitem__(self, stage: str) -> StageOutput:
        number = self._book.graph.index.get(stage)
        if number is None:
            raise KeyError(stage)
        output: StageOutput | None = self._book.output(number)
        if output is None:
            raise KeyError(stage)
        return output

    def __iter__(self) -> Iterator[str]:
        book = self._book
        return (spec.name for i, spec in enumerate(book.graph.specs) if book.has_output(i))

    def __len__(self) -> int:
        book = self._book
        return sum(1 for i in range(len(book.graph.specs)) if book.has_output(i))

    def __contains__(self, stage: object) -> bool:
        number = self._book.graph.index.get(stage)
        return number is not None and self._book.has_output(number)

    def __repr__(self) -> str:
        return f"<Outputs of {len(self)} stages>"


class Abandoned(msgspec.Struct, frozen=True):
    """A thread attempt that would not end: it goes on in its daemon thread, and its result is discarded."""

    stage: str
    item: tuple[int, ...] | None
    attempt: int
    stack: str


class RunResult:
    """The outcome of one run.

    `status` is "completed", "failed" or "cancelled"; `success` is True only for a run in which nothing ended FAIL or
    CANCEL.
    `outputs` has every stage that ended, also of a failed run; `stats` the numbers per stage. `index` is the place in
    a stream.
    """

    __slots__ = (
        "_book",
        "_stats",
        "abandoned",
        "cancel_reason",
        "duration_ms",
        "error",
        "error_info",
        "failures",
        "graph",
        "index",
        "parent_run_id",
        "run_id",
        "status",
    )

    def __init__(
        self,
        *,
        book: Any,
        graph: StageGraph,
        run_id: str,
        status: str,
        error: str | None,
        error_info: ErrorInfo | None,
        duration_ms: float,
        cancel_reason: str | None,
        failures: FailureSummary,
        stats: Any,
        abandoned: tuple[Abandoned, ...] = (),
        index: int | None = None,
        parent_run_id: str | None = None,
    ) -> None:
        self._book = book
        self._stats = stats
        self.graph = graph
        self.run_id = run_id
        self.status = status
        self.error = error
        self.error_info = error_info
        self.duration_ms = duration_ms
        self.cancel_reason = cancel_reason
        self.failures = failures
        self.abandoned = abandoned
        self.index = index
        self.parent_run_id = parent_run_id

    @property
    def success(self) -> bool:
        """Nothing ended FAIL or CANCEL."""
        return self.status == "completed"

    @property
    def cancelled(self) -> bool:
        """The run was cancelled."""
        return self.status == "cancelled"

    @property
    def outputs(self) -> Mapping[str, StageOutput]:
        """Output per stage that ended."""
        return Outputs(self._book)

    @property
    def stats(self) -> Mapping[str, StageStats]:
        """Numbers per stage, folded from the run's events."""
        view: Mapping[str, StageStats] = self._stats.view()
        return view

    @property
    def totals(self) -> Any:
        """Numbers of the whole run."""
        return self._stats.totals()

    def data(self, stage: Any) -> Any:
        """The value of a stage, given by name or by its function; the failure as an exception where it has none."""
        number = self.graph.number_of(stage)
        output: StageOutput | None = self._book.output(number)
        if output is None or output.status is StageStatus.FAIL:
            raise self._failure(number, output)
        return output.data

    def _failure(self, number: int, output: StageOutput | None) -> StageFailedError:
        name = self.graph.specs[number].name
        info = output.error_info if output is not None else None
        if info is None:
            text = f"stage {name!r} has no value: the run ended {self.status}"
            if self.error:
                text += f" ({self.error})"
            return StageFailedError(text, stage=name, attempts=0, error_info=self.error_info)
        return failure_of(name, info)

    def raise_for_failure(self) -> RunResult:
        """Return the result itself if the run succeeded, else raise StageFailedError with the stage's exception as
        its cause."""
        if self.success:
            return self
        if self.failures.failures:
            first = self.failures.failures[0]
            if first.error_info is not None:
                raise failure_of(first.stage, first.error_info, first.attempts, first.item)
            raise StageFailedError(
                f"stage {first.stage!r} failed: {first.error}", stage=first.stage, attempts=first.attempts
            )
        reason = self.error or self.cancel_reason or self.status
        raise StageFailedError(
            f"the run ended {self.status}: {reason}", stage=None, attempts=0, error_info=self.error_info
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping: ids, status, durations, failures, stats; values are left out."""
        return {
            "run_id": self.run_id,
            "success": self.success,
            "status": self.status,
            "error": self.error,
            "cancel_reason": self.cancel_reason,
            "duration_ms": self.duration_ms,
            "failures": self.failures.to_dict(),
            "stats": {name: stats.to_dict() for name, stats in self.stats.items()},
        }

    def __repr__(self) -> str:
        tail = f": {self.error}" if self.error else ""
        return f"<RunResult {self.graph.name!r} {self.status} in {self.duration_ms:.1f} ms{tail}>"


def failure_of(
    stage: str, info: ErrorInfo, attempts: int | None = None, item: tuple[int, ...] | None = None
) -> StageFailedError:
    """A StageFailedError for `info`, with the stage's own exception as its cause where it could travel."""
    tries = attempts or info.attempt or 1
    where = f" at item {list(item)}" if item else ""
    error = StageFailedError(
        f"stage {stage!r} failed{where} after {tries} attempt{'s' if tries != 1 else ''}: {info.type}: {info.message}",
        stage=stage,
        attempts=tries,
        item=item,
        error_info=info,
    )
    if info.code == "SF-TIMEOUT":
        error.__cause__ = StageTimeoutError(
            info.message, elapsed=info.elapsed, limit=info.limit, abandoned=bool(info.abandoned)
        )
    elif info.code == "SF-WORKER-DIED" and info.pickled is None:
        error.__cause__ = WorkerDiedError(
            info.message,
            worker_pid=info.worker_pid,
            signal=info.signal,
            exit_code=info.exit_code,
            oom_killed=info.oom_killed,
            rss_bytes=info.rss_bytes,
            stderr_tail=info.stderr_tail,
        )
    else:
        error.__cause__ = revive(info)
    return error
