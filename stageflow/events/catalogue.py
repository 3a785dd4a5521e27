"""What `Event.data` holds, type by type, as frozen structs: the contract between the engine and every view.

The engine fills plain dicts (building a struct per event would cost more than the event); `typed(event)` reads one back
as its struct. Unknown keys are ignored and absent ones have defaults, so older files stay readable. Durations whose
name ends in `_ms` are milliseconds, all others seconds; `started` is the machine's monotonic clock; sizes are bytes.

**Blocks.** A map, source, reduce or sink reports one `stage.items` per finished block, not one event per item. Its
`seconds`, `cpu_seconds` and bytes cover the last attempt of each item in it; an attempt that will be retried has its
own `stage.attempt` (with `item`). An item that failed for good has a `stage.failed` with `item`, emitted before the
block that counts it in `failed`.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgspec

from stageflow.events import names
from stageflow.events.event import Event

Wait: TypeAlias = dict[str, float]


class EventData(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the structs below."""

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping of every field, for `Event.data`."""
        return msgspec.structs.asdict(self)


class Identified(EventData, frozen=True, kw_only=True):
    """The ids of a run's identity."""

    request_id: str | None = None
    session_id: str | None = None
    user_id: str | None = None
    org_id: str | None = None
    service: str | None = None
    execution_mode: str | None = None
    topology: str | None = None


class Measured(EventData, frozen=True, kw_only=True):
    """What an attempt, or a block of items, took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    worker_pid: int = 0
    queued_ms: float = 0.0
    started: float = 0.0
    rss_bytes: int = 0


# ---------------------------------------------------------------- runs


class RunStarted(Identified, frozen=True, kw_only=True):
    """A run began. `shapes` says source, map, reduce, sink or stage for each stage; ids are the run identity's."""

    pipeline: str = ""
    stages: list[str] = []
    lanes: dict[str, str] = {}
    kinds: dict[str, str] = {}
    shapes: dict[str, str] = {}
    edges: list[tuple[str, str]] = []
    workers: int = 0
    memory_limit: int | None = None
    parent_run_id: str | None = None
    monotonic: float | None = (
        None  #: the machine's monotonic clock at this event's time: relates `started` to Unix time
    )
    traceparent: str | None = None  #: W3C trace context the caller was in


class RunEnded(EventData, frozen=True, kw_only=True):
    """A run ended; `status` is completed, failed or cancelled, as in the event's type."""

    status: str = ""
    duration_ms: float = 0.0
    error: str | None = None
    error_type: str | None = None
    reason: str | None = None
    failed_stage: str | None = None


# ---------------------------------------------------------------- stages


class StageStarted(EventData, frozen=True, kw_only=True):
    """The first attempt of a stage (or the first item of a stream stage) was handed to its lane."""

    queued_ms: float = 0.0


class StageAttempt(Measured, frozen=True, kw_only=True):
    """An attempt ended: `status` is ok, fail, retry, skip or cancel; `final` False means another attempt follows."""

    status: str = "ok"
    final: bool = True
    error: str | None = None
    error_type: str | None = None


class StageItems(Measured, frozen=True, kw_only=True):
    """Items `lo` to `hi` (exclusive) of a stream stage ended; `emitted` is what left if that is not `ok`. `cancelled`
    items came in and were not finished: the stage or the run was over."""

    lo: int = 0
    hi: int = 0
    items: list[list[int]] | None = None  #: the index paths, where they are not (lo,) to (hi - 1,)
    ranges: list[list[int]] | None = None  #: the indices, where blocks with gaps between them were merged
    longest: list[int] | None = None  #: which of them took `max_seconds` an item, where blocks were merged
    ok: int = 0
    dropped: int = 0
    failed: int = 0
    cancelled: int = 0
    emitted: int | None = None
    max_seconds: float | None = None


class StageCompleted(Measured, frozen=True, kw_only=True):
    """A stage ended well. Stream stages have the item counts; `wait` splits the time it could not run by reason."""

    duration_ms: float = 0.0
    data_keys: list[str] = []
    wait: Wait = {}
    items_in: int | None = None
    items_out: int | None = None
    dropped: int | None = None
    failed: int | None = None
    cancelled: int | None = None
    emitted: int | None = None


class StageFailed(EventData, frozen=True, kw_only=True):
    """A stage, or with `item` set one item of it, ended FAIL. `error_info` is `ErrorInfo.to_dict()`."""

    error: str = ""
    error_type: str = ""
    retryable: bool = False
    duration_ms: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    worker_pid: int = 0
    started: float = 0.0
    traceback: str = ""
    error_info: dict[str, Any] = {}
    wait: Wait = {}
    items_in: int | None = None
    items_out: int | None = None
    dropped: int | None = None
    failed: int | None = None


class StageSkipped(EventData, frozen=True, kw_only=True):
    """A stage was deliberately not run."""

    reason: str = ""


class StageCancelled(EventData, frozen=True, kw_only=True):
    """A stage was stopped, or asked the pipeline to stop. Stream stages have the item counts."""

    reason: str = ""
    duration_ms: float = 0.0
    wait: Wait = {}
    items_in: int | None = None
    items_out: int | None = None
    dropped: int | None = None
    failed: int | None = None
    cancelled: int | None = None
    emitted: int | None = None


class StageRetrying(EventData, frozen=True, kw_only=True):
    """Attempt `attempt` ended badly and the next starts after `delay_ms`. Alias: `stage.retry_scheduled`."""

    attempt: int = 1
    max_attempts: int | None = None
    delay_ms: float = 0.0
    error: str = ""
    error_type: str = ""


class StagePlaced(EventData, frozen=True, kw_only=True):
    """A stage runs elsewhere than the plan said."""

    lane: str = ""
    reason: str = ""


class StageIdempotencyHit(EventData, frozen=True, kw_only=True):
    """A stored result was used instead of running the stage."""

    key: str = ""


class StageWaiting(EventData, frozen=True, kw_only=True):
    """An attempt waits for something outside (`ctx.waiting`); what it is in one word."""

    reason: str = ""


class StageWaited(EventData, frozen=True, kw_only=True):
    """An attempt has what it waited for, or gave up."""

    reason: str = ""
    seconds: float = 0.0


class StageProgress(EventData, frozen=True, kw_only=True):
    """What `ctx.progress` last said. At most a few per second and attempt reach the stream."""

    done: float = 0.0
    total: float | None = None
    note: str | None = None


class StageLog(EventData, frozen=True, kw_only=True):
    """A log record from an attempt in another process. `extra` holds the caller's own fields."""

    level: int = 20
    logger: str = ""
    message: str = ""
    created: float = 0.0
    pathname: str = ""
    lineno: int = 0
    func: str = ""
    thread: str = ""
    exc_text: str | None = None
    worker_pid: int = 0
    extra: dict[str, Any] = {}


class StagePrint(EventData, frozen=True, kw_only=True):
    """Text an attempt wrote to `stdout` or `stderr`."""

    stream: str = "stdout"
    text: str = ""
    worker_pid: int = 0


class GuardRetry(EventData, frozen=True, kw_only=True):
    """One step of a guard's retry loop; `reason` only when exhausted: timeout, stagnation or max_attempts."""

    guard: str = ""
    attempt: int = 0
    attempts: int = 0
    retry_stage: str = ""
    max_attempts: int = 0
    stagnation_hits: int = 0
    timeout_seconds: float | None = None
    reason: str | None = None


# ---------------------------------------------------------------- engine


class WorkerStarted(EventData, frozen=True, kw_only=True):
    """A worker process is ready."""

    pid: int = 0
    start_ms: float = 0.0


class WorkerLost(EventData, frozen=True, kw_only=True):
    """A worker process died; the attempt it ran is blamed in a `stage.retrying` or `stage.failed` of its own."""

    pid: int = 0
    reason: str = ""
    signal: int | None = None
    exit_code: int | None = None
    oom_killed: bool | None = None
    rss_bytes: int | None = None
    stderr_tail: str | None = None


class WorkerRecycled(EventData, frozen=True, kw_only=True):
    """A worker process was replaced on purpose."""

    pid: int = 0
    reason: str = ""
    rss_bytes: int | None = None


class BlockedLoop(EventData, frozen=True, kw_only=True):
    """A stage on the event loop let nobody else run for so long (`stage.blocked_loop`); sent while it does."""

    seconds: float = 0.0
    stack: str = ""


class Backpressure(EventData, frozen=True, kw_only=True):
    """Something that was allowed is not (`backpressure.entered`), or is again (`backpressure.left`)."""

    reason: str = ""
    level: int = 0


class EngineSample(EventData, frozen=True, kw_only=True):
    """A reading of the monitor, about once a second. Mappings are per stage, `workers` is pid -> anonymous RSS."""

    rss_bytes: int = 0
    live_bytes: int = 0
    memory_limit: int | None = None
    machine_available: int | None = None
    cpu_percent: float = 0.0
    loop_lag_ms: float = 0.0
    queued: dict[str, int] = {}
    running: dict[str, int] = {}
    waiting: dict[str, str] = {}
    totals: dict[str, int] = {}
    workers: dict[int, int] = {}


class SpansRecorded(EventData, frozen=True, kw_only=True):
    """Spans a stage opened inside a worker, as `stageflow.context.tracing` collects them."""

    spans: list[dict[str, Any]] = []
    dropped: int = 0


# ---------------------------------------------------------------- children, tools, wide events


class ChildSpawned(EventData, frozen=True, kw_only=True):
    """A run started another run."""

    child_run_id: str = ""
    depth: int = 0


class ChildEnded(EventData, frozen=True, kw_only=True):
    """A child run ended. Alias of the cancelled form: `pipeline.canceled`."""

    child_run_id: str = ""
    duration_ms: float = 0.0
    error: str | None = None
    reason: str | None = None


class ToolStep(EventData, frozen=True, kw_only=True):
    """One step of a tool call; `error`, `reason` and `behavior` where they apply."""

    tool: str = ""
    action_id: str | None = None
    error: str | None = None
    reason: str | None = None
    behavior: str | None = None


class ApprovalRequested(EventData, frozen=True, kw_only=True):
    """A person must approve a tool call."""

    tool: str = ""
    message: str = ""


class ApprovalDecided(EventData, frozen=True, kw_only=True):
    """A person decided."""

    tool: str = ""
    approved: bool = False


class ContextSize(EventData, frozen=True, kw_only=True):
    """How large a stage's context was."""

    size_bytes: int = 0


class StageArtifactMade(EventData, frozen=True, kw_only=True):
    """A stage left an artifact beside its data, which stays with its output."""

    type: str = ""
    id: str = ""
    name: str = ""


class StageMetrics(EventData, frozen=True, kw_only=True):
    """What `MetricsInterceptor` tells after every attempt."""

    status: str = ""
    seconds: float = 0.0
    retryable: bool = False
    attempt: int = 1
    lane: str | None = None


class CleanupFailed(EventData, frozen=True, kw_only=True):
    """A cleanup that an attempt had registered did not end well; the others ran."""

    cleanup: str = ""
    error: str = ""


class ImmutabilityViolated(EventData, frozen=True, kw_only=True):
    """An attempt changed what other stages may be reading."""

    changed: list[str] = []


class Circuit(EventData, frozen=True, kw_only=True):
    """A circuit breaker refuses attempts for `cooldown` seconds, or lets them through again."""

    failures: int = 0
    cooldown: float = 0.0


class GuardrailFound(EventData, frozen=True, kw_only=True):
    """A guardrail found something, and failed its stage or let it pass. `violations` quote no content."""

    pipeline_run_id: str | None = None
    request_id: str | None = None
    execution_mode: str | None = None
    violation_count: int = 0
    fail_on_violation: bool = True
    violations: list[dict[str, Any]] = []


class ChunkStream(EventData, frozen=True, kw_only=True):
    """What happened to a queue of chunks; each type has the fields it needs."""

    queue_size: int = 0
    max_size: int | None = None
    reason: str | None = None
    blocked_ms: float | None = None
    fill_percentage: float | None = None
    total_items: int | None = None
    dropped_items: int | None = None
    max_queue_size: int | None = None
    blocked_puts: int | None = None
    total_blocked_ms: float | None = None
    drop_rate: float | None = None


class SoundBuffer(EventData, frozen=True, kw_only=True):
    """A buffer of sound ran over, ran dry, or has enough again."""

    duration_ms: float | None = None
    dropped_bytes: int | None = None
    dropped_ms: float | None = None
    requested_ms: float | None = None
    available_ms: float | None = None


class StageWide(Identified, frozen=True, kw_only=True):
    """Everything known about one attempt or one closed stream stage, in one row."""

    pipeline_run_id: str | None = None
    pipeline_name: str = ""
    stage: str = ""
    kind: str = ""
    lane: str = ""
    item: list[int] | None = None
    attempt: int | None = None
    final: bool = True
    status: str = ""
    started_at: str = ""
    ended_at: str = ""
    duration_ms: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    queued_ms: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    worker_pid: int = 0
    items_in: int = 0
    items_out: int = 0
    dropped: int = 0
    failed: int = 0
    retried: int = 0
    wait: Wait = {}
    data_keys: list[str] = []
    error: str | None = None
    error_type: str | None = None
    reason: str | None = None
    extra: dict[str, Any] = {}


class PipelineWide(Identified, frozen=True, kw_only=True):
    """Everything known about one run, in one row. `status` is the run's true status: completed, failed or cancelled."""

    pipeline_run_id: str | None = None
    pipeline_name: str = ""
    status: str = ""
    started_at: str = ""
    ended_at: str = ""
    duration_ms: float = 0.0
    stage_counts: dict[str, int] = {}
    stage_details: list[dict[str, Any]] = []
    items_in: int = 0
    items_out: int = 0
    dropped: int = 0
    failed: int = 0
    cancelled: int = 0
    attempts: int = 0
    retried: int = 0
    busy_seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    workers_started: int = 0
    workers_lost: int = 0
    workers_recycled: int = 0
    backpressure_seconds: Wait = {}
    error: str | None = None
    reason: str | None = None
    extra: dict[str, Any] = {}


#: Event type -> the struct of its data.
CATALOGUE: Final[dict[str, type[EventData]]] = {
    names.RUN_STARTED: RunStarted,
    names.RUN_COMPLETED: RunEnded,
    names.RUN_FAILED: RunEnded,
    names.RUN_CANCELLED: RunEnded,
    names.STAGE_STARTED: StageStarted,
    names.STAGE_ATTEMPT: StageAttempt,
    names.STAGE_ITEMS: StageItems,
    names.STAGE_COMPLETED: StageCompleted,
    names.STAGE_FAILED: StageFailed,
    names.STAGE_SKIPPED: StageSkipped,
    names.STAGE_CANCELLED: StageCancelled,
    names.STAGE_RETRYING: StageRetrying,
    names.STAGE_PLACED: StagePlaced,
    names.STAGE_IDEMPOTENCY_HIT: StageIdempotencyHit,
    names.STAGE_BLOCKED_LOOP: BlockedLoop,
    names.STAGE_PROGRESS: StageProgress,
    names.STAGE_WAITING: StageWaiting,
    names.STAGE_WAITED: StageWaited,
    names.STAGE_LOG: StageLog,
    names.STAGE_PRINT: StagePrint,
    names.STAGE_ARTIFACT: StageArtifactMade,
    names.STAGE_METRICS: StageMetrics,
    names.STAGE_CLEANUP_FAILED: CleanupFailed,
    names.STAGE_IMMUTABILITY_VIOLATED: ImmutabilityViolated,
    names.CIRCUIT_OPENED: Circuit,
    names.CIRCUIT_CLOSED: Circuit,
    names.GUARD_RETRY_ATTEMPT: GuardRetry,
    names.GUARD_RETRY_SCHEDULED: GuardRetry,
    names.GUARD_RETRY_EXHAUSTED: GuardRetry,
    names.GUARD_RETRY_RECOVERED: GuardRetry,
    names.WORKER_STARTED: WorkerStarted,
    names.WORKER_LOST: WorkerLost,
    names.WORKER_RECYCLED: WorkerRecycled,
    names.BACKPRESSURE_ENTERED: Backpressure,
    names.BACKPRESSURE_LEFT: Backpressure,
    names.ENGINE_SAMPLE: EngineSample,
    names.SPANS_RECORDED: SpansRecorded,
    names.PIPELINE_SPAWNED_CHILD: ChildSpawned,
    names.PIPELINE_CHILD_COMPLETED: ChildEnded,
    names.PIPELINE_CHILD_FAILED: ChildEnded,
    names.PIPELINE_CHILD_CANCELLED: ChildEnded,
    names.TOOL_INVOKED: ToolStep,
    names.TOOL_DENIED: ToolStep,
    names.TOOL_STARTED: ToolStep,
    names.TOOL_COMPLETED: ToolStep,
    names.TOOL_FAILED: ToolStep,
    names.TOOL_UNDONE: ToolStep,
    names.TOOL_UNDO_FAILED: ToolStep,
    names.APPROVAL_REQUESTED: ApprovalRequested,
    names.APPROVAL_DECIDED: ApprovalDecided,
    names.CONTEXT_SIZE_RECORDED: ContextSize,
    names.GUARDRAIL_VIOLATIONS_DETECTED: GuardrailFound,
    names.GUARDRAIL_FAIL_OPEN: GuardrailFound,
    names.STREAM_CHUNK_DROPPED: ChunkStream,
    names.STREAM_PRODUCER_BLOCKED: ChunkStream,
    names.STREAM_THROTTLE_STARTED: ChunkStream,
    names.STREAM_THROTTLE_ENDED: ChunkStream,
    names.STREAM_QUEUE_CLOSED: ChunkStream,
    names.STREAM_BUFFER_OVERFLOW: SoundBuffer,
    names.STREAM_BUFFER_UNDERRUN: SoundBuffer,
    names.STREAM_BUFFER_RECOVERED: SoundBuffer,
    names.STAGE_WIDE: StageWide,
    names.PIPELINE_WIDE: PipelineWide,
}


def typed(event: Event) -> EventData | None:
    """The event's data as its struct; None for a user's own type.

    Raises:
        msgspec.ValidationError: a field holds a value of another type than the catalogue says.
    """
    struct = CATALOGUE.get(names.canonical(event.type))
    if struct is None:
        return None
    return msgspec.convert(event.data, struct, strict=False)
