"""What a tool is, what it is called with, and what it hands back. Frozen data; nothing runs here."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.core.output import StageArtifact
from stageflow.tools.errors import ToolExecutionError, ToolUndoError

__all__ = ["SandboxLimits", "Tool", "ToolDefinition", "ToolInput", "ToolOutput", "UndoMetadata"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """How long, in seconds, and in how much memory a sandboxed tool may run.

    `memory_limit` (bytes, or text as "256MiB") is what the call may allocate on top of the worker that runs it; None is
    no limit. Enforced by the kernel where it knows RLIMIT_AS (Linux, the BSDs).
    """

    timeout: float = 30.0
    memory_limit: int | str | None = "512MiB"

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise DefinitionError(f"a sandbox timeout is above 0 seconds, not {self.timeout}", timeout=self.timeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoMetadata:
    """What is needed to take one action back. `action_type` finds the tool; empty means `tool_name` does."""

    action_id: str
    tool_name: str
    undo_data: Mapping[str, Any] = field(default_factory=dict)
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds"))
    action_type: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All fields; `action_type` where set."""
        shown: dict[str, Any] = {
            "action_id": self.action_id,
            "tool_name": self.tool_name,
            "undo_data": dict(self.undo_data),
            "created_at": self.created_at,
        }
        if self.action_type:
            shown["action_type"] = self.action_type
        return shown

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> UndoMetadata | None:
        """Read what `to_dict` wrote; None without an `action_id` that is a UUID or without a `tool_name`."""
        try:
            action_id = str(uuid.UUID(str(written.get("action_id"))))
        except ValueError:
            return None
        tool_name = written.get("tool_name")
        if not isinstance(tool_name, str) or not tool_name:
            return None
        undo_data = written.get("undo_data")
        metadata = cls(
            action_id=action_id,
            tool_name=tool_name,
            undo_data=dict(undo_data) if isinstance(undo_data, Mapping) else {},
            action_type=str(written.get("action_type") or ""),
        )
        created_at = written.get("created_at")
        return replace(metadata, created_at=created_at) if isinstance(created_at, str) else metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDefinition:
    """How a tool is offered and under which rules it may run.

    - `input_schema`: JSON Schema of the payload; empty takes anything. Needs the extra `tools` to be checked.
    - `input_type`: a msgspec Struct, dataclass or TypedDict the payload is converted to; the tool reads `input.value`.
    - `allowed_behaviors`: empty allows all; else a call must name one of them, and a call that names none is denied.
    - `artifact_type`: wraps the data of a success that brings no artifact of its own into one of this type.
    - `undo_handler`: takes `UndoMetadata`, sync or async; without it the tool's own `undo` is called.
    - `sandbox`: run every call in a worker process under these limits; the tool must be importable or shippable there.
    """

    name: str
    action_type: str
    description: str = ""
    input_schema: Mapping[str, Any] = field(default_factory=dict)
    input_type: Any = None
    allowed_behaviors: tuple[str, ...] = ()
    requires_approval: bool = False
    approval_message: str | None = None
    undoable: bool = False
    artifact_type: str | None = None
    undo_handler: Callable[[UndoMetadata], Any] | None = None
    sandbox: SandboxLimits | None = None

    def __post_init__(self) -> None:
        if not self.name.strip() or not self.action_type.strip():
            raise DefinitionError("a tool needs a name and an action type", hint="give both as non-blank text")
        object.__setattr__(self, "allowed_behaviors", tuple(self.allowed_behaviors))

    def is_behavior_allowed(self, behavior: str | None) -> bool:
        """Whether a call with this behaviour may run; None only where every behaviour may."""
        return not self.allowed_behaviors or behavior in self.allowed_behaviors

    def parameters(self) -> dict[str, Any]:
        """The JSON Schema to show to a model or a human: the given one, else that of `input_type`, else any object."""
        if self.input_schema:
            return dict(self.input_schema)
        if self.input_type is not None:
            return msgspec.json.schema(self.input_type)
        return {"type": "object"}

    def to_dict(self) -> dict[str, Any]:
        """A JSON form; handlers and types are left out, their schema is not."""
        shown: dict[str, Any] = {
            "name": self.name,
            "action_type": self.action_type,
            "description": self.description,
            "input_schema": self.parameters() if self.input_schema or self.input_type is not None else {},
            "allowed_behaviors": list(self.allowed_behaviors),
            "requires_approval": self.requires_approval,
            "undoable": self.undoable,
        }
        for key in ("approval_message", "artifact_type"):
            if (value := getattr(self, key)) is not None:
                shown[key] = value
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolInput:
    """One call. `value` is what the executor made of `payload` by the definition's `input_type`, else the payload."""

    tool_name: str
    payload: Any = field(default_factory=dict)
    action_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    behavior: str | None = None
    pipeline_run_id: str | None = None
    request_id: str | None = None
    requested_by: str | None = None
    value: Any = None

    @classmethod
    def from_action(
        cls,
        action_id: str,
        name: str,
        payload: Any,
        execution_mode: str | None = None,
        run_id: str | None = None,
        request_id: str | None = None,
    ) -> ToolInput:
        """The call that an action of a run stands for; its execution mode is the behaviour."""
        return cls(
            tool_name=name,
            payload=payload,
            action_id=str(action_id),
            behavior=execution_mode,
            pipeline_run_id=run_id,
            request_id=request_id,
        )

    def to_dict(self) -> dict[str, Any]:
        """Action, tool and payload always; the rest where set."""
        shown: dict[str, Any] = {"action_id": self.action_id, "tool_name": self.tool_name, "payload": self.payload}
        for key in ("behavior", "pipeline_run_id", "request_id", "requested_by"):
            if (value := getattr(self, key)) is not None:
                shown[key] = value
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolOutput:
    """What a tool hands back. `undo_metadata` is the data its undo will need, not the whole record."""

    success: bool
    data: Any = None
    artifacts: tuple[StageArtifact, ...] = ()
    undo_metadata: Mapping[str, Any] | None = None
    error: str | None = None

    @classmethod
    def ok(cls, data: Any = None) -> ToolOutput:
        """Done."""
        return cls(success=True, data=data)

    @classmethod
    def ok_with_artifacts(cls, data: Any, artifacts: Iterable[StageArtifact]) -> ToolOutput:
        """Done, with products."""
        return cls(success=True, data=data, artifacts=tuple(artifacts))

    @classmethod
    def ok_with_undo(cls, data: Any, undo_metadata: Mapping[str, Any]) -> ToolOutput:
        """Done, and can be taken back with this data."""
        return cls(success=True, data=data, undo_metadata=undo_metadata)

    @classmethod
    def fail(cls, error: str) -> ToolOutput:
        """Not done, for a reason the caller should see."""
        return cls(success=False, error=error)

    def to_dict(self) -> dict[str, Any]:
        """`success` always; the rest where set."""
        shown: dict[str, Any] = {"success": self.success}
        if self.data is not None:
            shown["data"] = self.data
        if self.artifacts:
            shown["artifacts"] = [artifact.to_dict() for artifact in self.artifacts]
        if self.undo_metadata is not None:
            shown["undo_metadata"] = dict(self.undo_metadata)
        if self.error is not None:
            shown["error"] = self.error
        return shown


class Tool:
    """Base of tools written as classes: give `definition` and override `execute`, and `undo` where it can be undone.

    Both may be plain methods (they run in a thread) or coroutines (they run on the caller's loop). `execute` may return
    a `ToolOutput` or any value, which becomes `ToolOutput.ok(value)`.
    """

    definition: ToolDefinition

    @property
    def name(self) -> str:
        """Name of the definition."""
        return self.definition.name

    @property
    def action_type(self) -> str:
        """Action type of the definition."""
        return self.definition.action_type

    def execute(self, input: ToolInput) -> Any | Awaitable[Any]:
        """Do it."""
        raise ToolExecutionError(
            f"tool {self.name!r} does not say how it is executed", name=self.name, reason="no execute"
        )

    @property
    def can_undo(self) -> bool:
        """Whether `undo` has something to call."""
        return self.definition.undo_handler is not None or type(self).undo is not Tool.undo

    def undo(self, metadata: UndoMetadata) -> Any | Awaitable[Any]:
        """Take it back, by the definition's handler where there is one."""
        if self.definition.undo_handler is not None:
            return self.definition.undo_handler(metadata)
        raise ToolUndoError(f"tool {self.name!r} cannot be undone", name=self.name, reason="no undo")
