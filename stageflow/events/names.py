"""The name of every event Stageflow emits itself. User events (`ctx.emit`) keep the type their author gave them."""

from __future__ import annotations

from typing import Final

RUN_STARTED: Final = "run.started"
RUN_COMPLETED: Final = "run.completed"
RUN_FAILED: Final = "run.failed"
RUN_CANCELLED: Final = "run.cancelled"

STAGE_STARTED: Final = "stage.started"
STAGE_ATTEMPT: Final = "stage.attempt"
STAGE_ITEMS: Final = "stage.items"
STAGE_COMPLETED: Final = "stage.completed"
STAGE_FAILED: Final = "stage.failed"
STAGE_SKIPPED: Final = "stage.skipped"
STAGE_CANCELLED: Final = "stage.cancelled"
STAGE_RETRYING: Final = "stage.retrying"
STAGE_PLACED: Final = "stage.placed"
STAGE_IDEMPOTENCY_HIT: Final = "stage.idempotency_hit"
STAGE_BLOCKED_LOOP: Final = "stage.blocked_loop"
STAGE_PROGRESS: Final = "stage.progress"
STAGE_WAITING: Final = "stage.waiting"
STAGE_WAITED: Final = "stage.waited"
STAGE_LOG: Final = "stage.log"
STAGE_PRINT: Final = "stage.print"
STAGE_ARTIFACT: Final = "stage.artifact"
STAGE_METRICS: Final = "stage.metrics"
STAGE_CLEANUP_FAILED: Final = "stage.cleanup_failed"
STAGE_IMMUTABILITY_VIOLATED: Final = "stage.immutability_violated"

CIRCUIT_OPENED: Final = "circuit.opened"
CIRCUIT_CLOSED: Final = "circuit.closed"

GUARD_RETRY_ATTEMPT: Final = "guard_retry.attempt"
GUARD_RETRY_SCHEDULED: Final = "guard_retry.scheduled"
GUARD_RETRY_EXHAUSTED: Final = "guard_retry.exhausted"
GUARD_RETRY_RECOVERED: Final = "guard_retry.recovered"

WORKER_STARTED: Final = "worker.started"
WORKER_LOST: Final = "worker.lost"
WORKER_RECYCLED: Final = "worker.recycled"

BACKPRESSURE_ENTERED: Final = "backpressure.entered"
BACKPRESSURE_LEFT: Final = "backpressure.left"
ENGINE_SAMPLE: Final = "engine.sample"
SPANS_RECORDED: Final = "spans.recorded"

PIPELINE_SPAWNED_CHILD: Final = "pipeline.spawned_child"
PIPELINE_CHILD_COMPLETED: Final = "pipeline.child_completed"
PIPELINE_CHILD_FAILED: Final = "pipeline.child_failed"
PIPELINE_CHILD_CANCELLED: Final = "pipeline.child_cancelled"

TOOL_INVOKED: Final = "tool.invoked"
TOOL_DENIED: Final = "tool.denied"
TOOL_STARTED: Final = "tool.started"
TOOL_COMPLETED: Final = "tool.completed"
TOOL_FAILED: Final = "tool.failed"
TOOL_UNDONE: Final = "tool.undone"
TOOL_UNDO_FAILED: Final = "tool.undo_failed"
APPROVAL_REQUESTED: Final = "approval.requested"
APPROVAL_DECIDED: Final = "approval.decided"

CONTEXT_SIZE_RECORDED: Final = "context.size_recorded"
GUARDRAIL_VIOLATIONS_DETECTED: Final = "guardrail.violations_detected"
GUARDRAIL_FAIL_OPEN: Final = "guardrail.fail_open"

STREAM_CHUNK_DROPPED: Final = "stream.chunk_dropped"
STREAM_PRODUCER_BLOCKED: Final = "stream.producer_blocked"
STREAM_THROTTLE_STARTED: Final = "stream.throttle_started"
STREAM_THROTTLE_ENDED: Final = "stream.throttle_ended"
STREAM_QUEUE_CLOSED: Final = "stream.queue_closed"
STREAM_BUFFER_OVERFLOW: Final = "stream.buffer_overflow"
STREAM_BUFFER_UNDERRUN: Final = "stream.buffer_underrun"
STREAM_BUFFER_RECOVERED: Final = "stream.buffer_recovered"

STAGE_WIDE: Final = "stage.wide"
PIPELINE_WIDE: Final = "pipeline.wide"

RUN_ENDED: Final = frozenset({RUN_COMPLETED, RUN_FAILED, RUN_CANCELLED})
STAGE_ENDED: Final = frozenset({STAGE_COMPLETED, STAGE_FAILED, STAGE_SKIPPED, STAGE_CANCELLED})

#: Names older programs use -> the one name that is emitted. An alias is never emitted beside its name.
ALIASES: Final[dict[str, str]] = {
    "pipeline.started": RUN_STARTED,
    "pipeline.completed": RUN_COMPLETED,
    "pipeline.failed": RUN_FAILED,
    "pipeline.cancelled": RUN_CANCELLED,
    "pipeline.canceled": PIPELINE_CHILD_CANCELLED,
    "pipeline_cancelled": RUN_CANCELLED,
    "run.canceled": RUN_CANCELLED,
    "stage.canceled": STAGE_CANCELLED,
    "stage.retry_scheduled": STAGE_RETRYING,
    "stage.retry": STAGE_RETRYING,
    "stage.retry_exhausted": STAGE_FAILED,
    "stage.timeout": STAGE_FAILED,
    "run.wide": PIPELINE_WIDE,
}


def canonical(name: str) -> str:
    """The emitted name for `name` or one of its aliases; a name of the user's own is returned as it is."""
    return ALIASES.get(name, name)
