"""Tools a stage may call on behalf of a model or a user, with their schemas and limits.

Stands on the runtime. May not import: `stageflow.helpers`, `stageflow.websearch`, testing, report, cli, demo.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stageflow.tools.approval import (
        ApprovalRequest as ApprovalRequest,
    )
    from stageflow.tools.approval import (
        Approvals as Approvals,
    )
    from stageflow.tools.approval import (
        ApprovalService as ApprovalService,
    )
    from stageflow.tools.approval import (
        ApprovalStatus as ApprovalStatus,
    )
    from stageflow.tools.approval import (
        InMemoryApprovals as InMemoryApprovals,
    )
    from stageflow.tools.approval import (
        arguments_as_json as arguments_as_json,
    )
    from stageflow.tools.approval_sqlite import (
        SQLiteApprovals as SQLiteApprovals,
    )
    from stageflow.tools.approval_stage import (
        ApprovalStage as ApprovalStage,
    )
    from stageflow.tools.definitions import (
        SandboxLimits as SandboxLimits,
    )
    from stageflow.tools.definitions import (
        Tool as Tool,
    )
    from stageflow.tools.definitions import (
        ToolDefinition as ToolDefinition,
    )
    from stageflow.tools.definitions import (
        ToolInput as ToolInput,
    )
    from stageflow.tools.definitions import (
        ToolOutput as ToolOutput,
    )
    from stageflow.tools.definitions import (
        UndoMetadata as UndoMetadata,
    )
    from stageflow.tools.errors import (
        ApprovalCancelledError as ApprovalCancelledError,
    )
    from stageflow.tools.errors import (
        ApprovalDeniedError as ApprovalDeniedError,
    )
    from stageflow.tools.errors import (
        ApprovalMismatchError as ApprovalMismatchError,
    )
    from stageflow.tools.errors import (
        ApprovalTimeoutError as ApprovalTimeoutError,
    )
    from stageflow.tools.errors import (
        ToolDeniedError as ToolDeniedError,
    )
    from stageflow.tools.errors import (
        ToolError as ToolError,
    )
    from stageflow.tools.errors import (
        ToolExecutionError as ToolExecutionError,
    )
    from stageflow.tools.errors import (
        ToolInputError as ToolInputError,
    )
    from stageflow.tools.errors import (
        ToolNotFoundError as ToolNotFoundError,
    )
    from stageflow.tools.errors import (
        ToolUndoError as ToolUndoError,
    )
    from stageflow.tools.executor import (
        ToolExecutor as ToolExecutor,
    )
    from stageflow.tools.registry import (
        FunctionTool as FunctionTool,
    )
    from stageflow.tools.registry import (
        ResolvedToolCall as ResolvedToolCall,
    )
    from stageflow.tools.registry import (
        ToolRegistry as ToolRegistry,
    )
    from stageflow.tools.registry import (
        UnresolvedToolCall as UnresolvedToolCall,
    )
    from stageflow.tools.registry import (
        current_registry as current_registry,
    )
    from stageflow.tools.registry import (
        tool as tool,
    )
    from stageflow.tools.registry import (
        use_registry as use_registry,
    )
    from stageflow.tools.sandbox import (
        ProcessSandbox as ProcessSandbox,
    )
    from stageflow.tools.undo import (
        UndoEntry as UndoEntry,
    )
    from stageflow.tools.undo import (
        UndoStore as UndoStore,
    )

_HOME = {
    **dict.fromkeys(
        (
            "ApprovalRequest",
            "ApprovalService",
            "ApprovalStatus",
            "Approvals",
            "InMemoryApprovals",
            "arguments_as_json",
        ),
        "stageflow.tools.approval",
    ),
    **dict.fromkeys(("SQLiteApprovals",), "stageflow.tools.approval_sqlite"),
    **dict.fromkeys(("ApprovalStage",), "stageflow.tools.approval_stage"),
    **dict.fromkeys(
        (
            "SandboxLimits",
            "Tool",
            "ToolDefinition",
            "ToolInput",
            "ToolOutput",
            "UndoMetadata",
        ),
        "stageflow.tools.definitions",
    ),
    **dict.fromkeys(
        (
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
        ),
        "stageflow.tools.errors",
    ),
    **dict.fromkeys(("ToolExecutor",), "stageflow.tools.executor"),
    **dict.fromkeys(
        (
            "FunctionTool",
            "ResolvedToolCall",
            "ToolRegistry",
            "UnresolvedToolCall",
            "current_registry",
            "tool",
            "use_registry",
        ),
        "stageflow.tools.registry",
    ),
    **dict.fromkeys(("ProcessSandbox",), "stageflow.tools.sandbox"),
    **dict.fromkeys(
        (
            "UndoEntry",
            "UndoStore",
        ),
        "stageflow.tools.undo",
    ),
}

__all__ = [
    "ApprovalCancelledError",
    "ApprovalDeniedError",
    "ApprovalMismatchError",
    "ApprovalRequest",
    "ApprovalService",
    "ApprovalStage",
    "ApprovalStatus",
    "ApprovalTimeoutError",
    "Approvals",
    "FunctionTool",
    "InMemoryApprovals",
    "ProcessSandbox",
    "ResolvedToolCall",
    "SQLiteApprovals",
    "SandboxLimits",
    "Tool",
    "ToolDefinition",
    "ToolDeniedError",
    "ToolError",
    "ToolExecutionError",
    "ToolExecutor",
    "ToolInput",
    "ToolInputError",
    "ToolNotFoundError",
    "ToolOutput",
    "ToolRegistry",
    "ToolUndoError",
    "UndoEntry",
    "UndoMetadata",
    "UndoStore",
    "UnresolvedToolCall",
    "arguments_as_json",
    "current_registry",
    "tool",
    "use_registry",
]

if not TYPE_CHECKING:  # hidden from checkers, or they would accept any name

    def __getattr__(name: str) -> object:
        """Import the module that holds `name` when it is first asked for."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOME[name]), name)

    def __dir__() -> list[str]:
        return sorted((*globals(), *__all__))
