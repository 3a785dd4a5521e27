"""What a stage hands back: `StageOutput`, with artifacts, events and the description of a failure. Immutable data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from stageflow.core.kinds import StageStatus


def _iso_now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A failed attempt as data. `type` is "package.Class"; `traceback` is text with the stage's own frames, whatever
    the lane.

    For a lost worker `signal` or `exit_code`, `oom_killed`, `rss_bytes` and `stderr_tail` are set.
    """

    type: str
    message: str
    traceback: str = ""
    notes: tuple[str, ...] = ()
    cause: ErrorInfo | None = None
    retryable: bool = False
    retry_after: float | None = None  #: seconds, from an exception with a `retry_after` attribute
    code: str | None = None
    lane: str | None = None
    worker_pid: int | None = None
    attempt: int | None = None
    item: tuple[int, ...] | None = None
    signal: int | None = None
    exit_code: int | None = None
    oom_killed: bool | None = None
    rss_bytes: int | None = None
    stderr_tail: str | None = None
    elapsed: float | None = None
    limit: float | None = None
    abandoned: bool | None = None  #: the attempt could not be stopped and goes on in its thread
    pickled: bytes | None = None  #: the exception itself, pickle 5, where it could be pickled

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping for JSON, without absent fields and without the pickled exception."""
        shown: dict[str, Any] = {}
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if name == "pickled" or value is None or value in ((), ""):
                continue
            shown[name] = value.to_dict() if isinstance(value, ErrorInfo) else value
        return shown


class StageArtifact(msgspec.Struct, frozen=True, kw_only=True):
    """A named product of a stage, kept beside its data."""

    artifact_type: str = msgspec.field(name="type")
    id: str
    name: str
    data: Any = None
    metadata: dict[str, Any] = {}
    created_at: str = msgspec.field(default_factory=_iso_now)

    @classmethod
    def new(cls, artifact_type: str, id: str, name: str, data: Any = None) -> StageArtifact:
        """An artifact stamped with the present time."""
        return cls(artifact_type=artifact_type, id=id, name=name, data=data)

    def with_metadata(self, key: str, value: Any) -> StageArtifact:
        """A copy with one more metadata entry."""
        return msgspec.structs.replace(self, metadata={**self.metadata, key: value})

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping; `metadata` only when not empty."""
        shown: dict[str, Any] = {
            "type": self.artifact_type,
            "id": self.id,
            "name": self.name,
            "data": self.data,
            "created_at": self.created_at,
        }
        if self.metadata:
            shown["metadata"] = dict(self.metadata)
        return shown


class StageEvent(msgspec.Struct, frozen=True):
    """An event a stage attaches to its output or emits through its context."""

    type: str
    timestamp: str = msgspec.field(default_factory=_iso_now)
    data: dict[str, Any] = {}

    @classmethod
    def new(cls, type: str) -> StageEvent:
        """An event without data, stamped with the present time."""
        return cls(type)

    @classmethod
    def with_data(cls, type: str, data: Mapping[str, Any]) -> StageEvent:
        """An event with data, stamped with the present time."""
        return cls(type, data=dict(data))

    def add_data(self, key: str, value: Any) -> StageEvent:
        """A copy with one more data entry."""
        return msgspec.structs.replace(self, data={**self.data, key: value})

    @classmethod
    def started(cls, stage: str) -> StageEvent:
        """`stage.started`."""
        return cls("stage.started", data={"stage": stage})

    @classmethod
    def completed(cls, stage: str, duration_ms: float) -> StageEvent:
        """`stage.completed`."""
        return cls("stage.completed", data={"stage": stage, "duration_ms": duration_ms})

    @classmethod
    def failed(cls, stage: str, error: str) -> StageEvent:
        """`stage.failed`."""
        return cls("stage.failed", data={"stage": stage, "error": error})

    @classmethod
    def skipped(cls, stage: str, reason: str) -> StageEvent:
        """`stage.skipped`."""
        return cls("stage.skipped", data={"stage": stage, "reason": reason})

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping; `data` only when not empty."""
        shown: dict[str, Any] = {"type": self.type, "timestamp": self.timestamp}
        if self.data:
            shown["data"] = dict(self.data)
        return shown


class StageOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """The outcome of a stage. Immutable: every `with_*` returns a new one.

    `data` is any value. `ok("x")` keeps "x"; `ok(a=1)` keeps {"a": 1}; `ok({"a": 1}, b=2)` merges the fields into the
    mapping.
    """

    status: StageStatus = StageStatus.OK
    data: Any = None
    artifacts: tuple[StageArtifact, ...] = ()
    events: tuple[StageEvent, ...] = ()
    metadata: dict[str, Any] = {}
    error: str | None = None
    error_info: ErrorInfo | None = None
    skip_reason: str | None = None
    cancel_reason: str | None = None
    retryable: bool = False

    @classmethod
    def ok(cls, data: Any = None, /, **fields: Any) -> StageOutput:
        """Success. Fields merge into a mapping; fields beside data that is no mapping are a TypeError."""
        if fields:
            if data is None:
                data = fields
            elif isinstance(data, Mapping):
                data = {**data, **fields}
            else:
                raise TypeError(f"StageOutput.ok: fields {sorted(fields)} cannot merge into {type(data).__name__} data")
        return cls(StageStatus.OK, data)

    @classmethod
    def ok_empty(cls) -> StageOutput:
        """Success without data (`data` is None)."""
        return cls()

    @classmethod
    def ok_value(cls, key: str, value: Any) -> StageOutput:
        """Success with the mapping {key: value}."""
        return cls(StageStatus.OK, {key: value})

    @classmethod
    def skip(cls, reason: str) -> StageOutput:
        """Deliberately not done; counts as success."""
        return cls(StageStatus.SKIP, skip_reason=reason)

    @classmethod
    def cancel(cls, reason: str) -> StageOutput:
        """Ask to stop the whole run."""
        return cls(StageStatus.CANCEL, cancel_reason=reason)

    @classmethod
    def fail(cls, error: str, *, data: Any = None, retryable: bool = False) -> StageOutput:
        """Failure; `data` may describe it (guards use it), `retryable` lets a retry policy try again."""
        return cls(StageStatus.FAIL, data, error=error, retryable=retryable)

    @classmethod
    def fail_retryable(cls, error: str, *, data: Any = None) -> StageOutput:
        """`fail(error, retryable=True)`."""
        return cls(StageStatus.FAIL, data, error=error, retryable=True)

    @classmethod
    def retry(cls, reason: str) -> StageOutput:
        """Wants another attempt; without a retry policy, or with none left, it ends as a retryable FAIL."""
        return cls(StageStatus.RETRY, error=reason, retryable=True)

    def with_artifacts(self, artifacts: Iterable[StageArtifact]) -> StageOutput:
        """A copy with these artifacts instead."""
        return msgspec.structs.replace(self, artifacts=tuple(artifacts))

    def with_events(self, events: Iterable[StageEvent]) -> StageOutput:
        """A copy with these events instead."""
        return msgspec.structs.replace(self, events=tuple(events))

    def with_metadata(self, metadata: Mapping[str, Any]) -> StageOutput:
        """A copy with this metadata instead."""
        return msgspec.structs.replace(self, metadata=dict(metadata))

    def add_metadata(self, key: str, value: Any) -> StageOutput:
        """A copy with one more metadata entry."""
        return msgspec.structs.replace(self, metadata={**self.metadata, key: value})

    def with_data(self, data: Mapping[str, Any]) -> StageOutput:
        """A copy with `data` merged in; new keys win."""
        base = self.data if isinstance(self.data, Mapping) else {}
        return msgspec.structs.replace(self, data={**base, **data})

    @property
    def is_success(self) -> bool:
        """True for OK and SKIP."""
        return self.status.is_success

    @property
    def is_failure(self) -> bool:
        """True for FAIL and CANCEL."""
        return self.status.is_failure

    @property
    def is_retryable(self) -> bool:
        """The flag, not the status."""
        return self.retryable

    def data_or_empty(self) -> dict[str, Any]:
        """A copy of a mapping's data, else {}."""
        return dict(self.data) if isinstance(self.data, Mapping) else {}

    def get(self, key: str, default: Any = None) -> Any:
        """One value of mapping data, else `default`."""
        return self.data.get(key, default) if isinstance(self.data, Mapping) else default

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping: always `status`; every other key only when set, non-empty or True."""
        shown: dict[str, Any] = {"status": str(self.status)}
        if self.data is not None:
            shown["data"] = self.data
        if self.artifacts:
            shown["artifacts"] = [artifact.to_dict() for artifact in self.artifacts]
        if self.events:
            shown["events"] = [event.to_dict() for event in self.events]
        if self.metadata:
            shown["metadata"] = dict(self.metadata)
        for name in ("error", "skip_reason", "cancel_reason"):
            if (value := getattr(self, name)) is not None:
                shown[name] = value
        if self.error_info is not None:
            shown["error_info"] = self.error_info.to_dict()
        if self.retryable:
            shown["retryable"] = True
        return shown
