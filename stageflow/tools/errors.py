"""What can go wrong between a call and a tool. All are `ToolError`; each is also sorted by whose fault it is."""

from __future__ import annotations

from typing import Any

from stageflow.core.errors import DefinitionError, ResourceError, StageflowError

__all__ = [
    "ApprovalCancelledError",
    "ApprovalDeniedError",
    "ApprovalMismatchError",
    "ApprovalTimeoutError",
    "ToolDeniedError",
    "ToolError",
    "ToolExecutionError",
    "ToolInputError",
    "ToolNotFoundError",
    "ToolUndoError",
]


class ToolError(StageflowError):
    """A call of a tool that did not do what was asked. Field `name` is the tool."""

    code = "SF-TOOL"

    def to_dict(self) -> dict[str, Any]:
        """`type` (the class without "Error"), `code`, `message`, `hint` and the fields."""
        return {**super().to_dict(), "type": type(self).__name__.removesuffix("Error")}


class ToolNotFoundError(ToolError, DefinitionError):
    """No tool is registered for the action; nothing was asked, nothing ran."""

    code = "SF-TOOL-NOT-FOUND"


class ToolDeniedError(ToolError, DefinitionError):
    """The call is not allowed (fields `reason`, `behavior`); nothing ran."""

    code = "SF-TOOL-DENIED"


class ToolInputError(ToolDeniedError):
    """The arguments do not fit the tool's schema or type; `problems` lists each with its path. Nothing ran."""

    code = "SF-TOOL-INPUT"


class ApprovalDeniedError(ToolError):
    """Somebody said no (fields `request_id`, `decided_by`, `reason`); nothing ran."""

    code = "SF-APPROVAL-DENIED"


class ApprovalTimeoutError(ToolError, ResourceError):
    """Nobody decided in time (fields `request_id` of the approval, `timeout_seconds`); nothing ran."""

    code = "SF-APPROVAL-TIMEOUT"


class ApprovalCancelledError(ToolError):
    """The request was withdrawn (fields `request_id`, `decided_by`, `reason`); nothing ran."""

    code = "SF-APPROVAL-CANCELLED"


class ApprovalMismatchError(ToolError, DefinitionError):
    """The key was used before for another question (fields `key`, `request_id`): an old answer must not serve it."""

    code = "SF-APPROVAL-MISMATCH"


class ToolExecutionError(ToolError, ResourceError):
    """The tool ran and broke (field `reason`); in a sandbox also by time or memory."""

    code = "SF-TOOL-EXECUTION"


class ToolUndoError(ToolError, ResourceError):
    """The undo of an action broke (fields `action_id`, `reason`); its metadata is kept for another try."""

    code = "SF-TOOL-UNDO"
