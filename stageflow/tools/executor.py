"""Runs one call of a tool: looked up, checked, approved where it must be, executed, told, and undoable afterwards.

Every call that is announced by `tool.invoked` ends in exactly one of `tool.completed`, `tool.failed`, `tool.denied`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, Final, NoReturn, Protocol

from stageflow.core.errors import DefinitionError
from stageflow.core.output import StageArtifact
from stageflow.tools.approval import ApprovalRequest, ApprovalService, ApprovalStatus, raise_unless_decided
from stageflow.tools.definitions import SandboxLimits, Tool, ToolDefinition, ToolInput, ToolOutput, UndoMetadata
from stageflow.tools.errors import (
    ApprovalDeniedError,
    ToolDeniedError,
    ToolInputError,
    ToolNotFoundError,
    ToolUndoError,
)
from stageflow.tools.registry import ToolRegistry, current_registry
from stageflow.tools.schema import Check, compile_schema, convert_payload
from stageflow.tools.undo import UndoStore

__all__ = ["ToolExecutor"]

logger = logging.getLogger(__name__)

Emit = Callable[[str, Mapping[str, Any]], object]
COMPILED_KEPT: Final = 256
DENIALS: Final = {
    "SF-APPROVAL-DENIED": "approval_denied",
    "SF-APPROVAL-TIMEOUT": "approval_timeout",
    "SF-APPROVAL-CANCELLED": "approval_cancelled",
}


class Emits(Protocol):
    """What the executor needs of a context; a `StageContext` has it."""

    def emit(self, type: str, data: Mapping[str, Any] | None = None) -> object:
        """Take one event."""


class SandboxRunner(Protocol):
    """Runs a tool elsewhere, under limits."""

    async def run(self, tool: Tool, call: ToolInput, limits: SandboxLimits) -> Any:
        """What `tool.execute(call)` returned."""


class ToolExecutor:
    """Executes calls of the tools of one registry (by default the context's).

    - `approvals` is needed by tools with `requires_approval`; `approval_timeout` in seconds, None waits for ever.
    - `undo_store` keeps what undoable tools leave; a new one with its default ttl where none is given.
    - `sandbox` runs tools that declare limits; `ProcessSandbox` where none is given.
    - `emit(type, data)` gets the events of calls made without a context.

    Plain `execute` methods run in a thread of the loop's default pool, so a slow tool never holds up the loop; a thread
    cannot be stopped, so a caller that is cancelled leaves it to end by itself. Tools that must be stoppable are
    coroutines or sandboxed.
    """

    def __init__(
        self,
        registry: ToolRegistry | None = None,
        approvals: ApprovalService | None = None,
        undo_store: UndoStore | None = None,
        *,
        approval_timeout: float | None = 300.0,
        sandbox: SandboxRunner | None = None,
        emit: Emit | None = None,
    ) -> None:
        self.registry = registry if registry is not None else current_registry()
        self.approvals = approvals
        self.undo_store = undo_store if undo_store is not None else UndoStore()
        self.approval_timeout = approval_timeout
        self._sandbox = sandbox
        self._emit = emit
        self._checks: OrderedDict[int, tuple[ToolDefinition, Check]] = OrderedDict()

    async def execute(
        self, call: ToolInput, definition: ToolDefinition | None = None, ctx: Emits | None = None
    ) -> ToolOutput:
        """Run one call and return its output, also one that says it failed; what the tool raises is re-raised.

        The rules are those of `definition`, by default the registered one.

        Raises:
            ToolNotFoundError: no tool for the action.
            ToolDeniedError: the behaviour is not allowed, or none was given where one is needed.
            ToolInputError: the payload does not fit the schema or the type.
            ApprovalDeniedError, ApprovalTimeoutError, ApprovalCancelledError: see there.
        """
        tell = _teller(ctx.emit if ctx is not None else self._emit, call)
        tell("tool.invoked")
        try:
            tool, rules = self._find(call, definition)
            self._allow(call, rules)
            call = self._checked(call, rules)
            if rules.requires_approval:
                await self._approve(call, rules, tell, ctx)
        except ToolDeniedError as error:
            tell("tool.denied", reason=error.fields["reason"], **_only(error.fields, "behavior", "problems"))
            raise
        except Exception as error:
            denial = DENIALS.get(getattr(error, "code", ""))
            if denial is not None:
                tell("tool.denied", reason=denial, request_id=getattr(error, "request_id", None))
            else:
                tell("tool.failed", error=str(error), error_type=type(error).__qualname__)
            raise
        except asyncio.CancelledError:
            tell("tool.denied", reason="caller_cancelled")
            raise
        tell("tool.started")
        try:
            output = _as_output(await self._run(tool, rules, call))
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            tell("tool.failed", error="cancelled" if cancelled else str(error), error_type=type(error).__qualname__)
            raise
        return self._finished(output, rules, call, tell)

    async def undo(self, action_id: str, ctx: Emits | None = None) -> bool:
        """Take an action back. False where nothing is kept for it any more, or its tool has no undo.

        Of several undos of one action only one runs. One that fails can be tried again.

        Raises:
            ToolUndoError: the undo raised, with its error as cause; event `tool.undo_failed`.
        """
        entry = self.undo_store.take(action_id)
        if entry is None:
            return False
        metadata = entry.metadata
        emit = ctx.emit if ctx is not None else self._emit
        event = {"tool": metadata.tool_name, "action_id": action_id}
        try:
            tool = self.registry.get_tool(metadata.action_type or metadata.tool_name)
            handler = entry.handler or (tool.undo if tool is not None and tool.can_undo else None)
            if handler is None:
                self.undo_store.put_back(entry)
                return False
            await _call(handler, metadata)
        except BaseException as error:
            self.undo_store.put_back(entry)
            _safely(emit, "tool.undo_failed", {**event, "error": str(error) or type(error).__qualname__})
            if not isinstance(error, Exception):
                raise
            raise ToolUndoError(
                f"undo of {metadata.tool_name!r} failed: {error}",
                hint="its metadata is kept: it can be tried again until it expires",
                name=metadata.tool_name,
                action_id=action_id,
                reason=str(error),
            ) from error
        _safely(emit, "tool.undone", event)
        return True

    # ------------------------------------------------------------ the steps of a call

    def _find(self, call: ToolInput, definition: ToolDefinition | None) -> tuple[Tool, ToolDefinition]:
        action_type = definition.action_type if definition is not None else call.tool_name
        tool = self.registry.get_tool(action_type)
        if tool is None:
            raise ToolNotFoundError(
                f"no tool is registered for {action_type!r}",
                hint="register it with the executor's registry",
                name=call.tool_name,
            )
        return tool, definition if definition is not None else tool.definition

    @staticmethod
    def _allow(call: ToolInput, rules: ToolDefinition) -> None:
        if rules.is_behavior_allowed(call.behavior):
            return
        missing = call.behavior is None
        raise ToolDeniedError(
            f"tool {rules.name!r} runs only with behaviour {', '.join(rules.allowed_behaviors)}, not {call.behavior!r}",
            hint="give the call a behaviour" if missing else None,
            name=rules.name,
            reason="behavior_missing" if missing else "behavior_not_allowed",
            behavior=call.behavior,
        )

    def _checked(self, call: ToolInput, rules: ToolDefinition) -> ToolInput:
        """The call with a payload of its own: what is checked and approved is what runs, whatever else changes."""
        call = replace(call, payload=copy.deepcopy(call.payload))
        problems = self._check_of(rules)(call.payload) if rules.input_schema else []
        value, misfit = (None, None) if problems else convert_payload(rules, call.payload)
        if misfit is not None:
            problems = [misfit]
        if problems:
            raise ToolInputError(
                f"arguments of tool {rules.name!r} do not fit: {'; '.join(problems)}",
                name=rules.name,
                reason="invalid_input",
                problems=problems,
            )
        return replace(call, value=value)

    def _check_of(self, rules: ToolDefinition) -> Check:
        known = self._checks.get(id(rules))
        if known is None:
            known = self._checks[id(rules)] = (rules, compile_schema(rules.input_schema))
            if len(self._checks) > COMPILED_KEPT:
                self._checks.popitem(last=False)
        return known[1]

    async def _approve(self, call: ToolInput, rules: ToolDefinition, tell: _Tell, ctx: Emits | None) -> None:
        if self.approvals is None:
            raise DefinitionError(
                f"tool {rules.name!r} needs approval and this executor has no approval service",
                hint="ToolExecutor(..., approvals=InMemoryApprovals())",
                name=rules.name,
            )
        asked = self.approvals.request(
            rules.name,
            rules.approval_message or f"Tool {rules.name!r} asks for approval.",
            timeout=self.approval_timeout,
            arguments=call.payload,
            requested_by=call.requested_by or _user_of(ctx),
            run_id=call.pipeline_run_id or getattr(ctx, "run_id", None),
            stage=getattr(ctx, "stage_name", None),
        )
        tell("approval.requested", message=asked.message, request_id=asked.id, expires_at=asked.expires_at)
        waiting = getattr(ctx, "waiting", None)
        try:
            with waiting("approval") if waiting is not None else contextlib.nullcontext():
                ended = await self.approvals.wait(asked.id)
        except asyncio.CancelledError:
            self.approvals.cancel(asked.id, reason="the caller does not wait any more")
            raise
        if ended.status.is_decision:
            tell("approval.decided", **decision_event(ended))
        raise_unless_decided(ended, self.approval_timeout)
        if ended.status is ApprovalStatus.DENIED:
            raise_denied(ended)

    async def _run(self, tool: Tool, rules: ToolDefinition, call: ToolInput) -> Any:
        if rules.sandbox is None:
            return await _call(tool.execute, call)
        if self._sandbox is None:
            from stageflow.tools.sandbox import ProcessSandbox  # brings the engine: only who sandboxes pays

            self._sandbox = ProcessSandbox()
        return await self._sandbox.run(tool, call, rules.sandbox)

    def _finished(self, output: ToolOutput, rules: ToolDefinition, call: ToolInput, tell: _Tell) -> ToolOutput:
        if not output.success:
            tell("tool.failed", error=output.error or "the tool reported a failure")
            return output
        if rules.artifact_type is not None and not output.artifacts and output.data is not None:
            made = StageArtifact.new(rules.artifact_type, call.action_id, rules.name, output.data)
            output = replace(output, artifacts=(made,))
        if rules.undoable and output.undo_metadata is not None:
            metadata = UndoMetadata(
                action_id=call.action_id,
                tool_name=rules.name,
                undo_data=dict(output.undo_metadata),
                action_type=rules.action_type,
            )
            self.undo_store.store(metadata, rules.undo_handler)
        tell("tool.completed")
        return output


class _Tell(Protocol):
    def __call__(self, event_type: str, **data: Any) -> None: ...


def _teller(emit: Emit | None, call: ToolInput) -> _Tell:
    """Emits events that carry tool and action; never raises."""

    def tell(event_type: str, **data: Any) -> None:
        _safely(emit, event_type, {"tool": call.tool_name, "action_id": call.action_id, **data})

    return tell


def _safely(emit: Emit | None, event_type: str, data: Mapping[str, Any]) -> None:
    if emit is None:
        return
    try:
        emit(event_type, data)
    except Exception:
        logger.exception("event %s could not be emitted", event_type)


def _only(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: fields[name] for name in names if name in fields}


def _user_of(ctx: Emits | None) -> str | None:
    user = getattr(getattr(ctx, "snapshot", None), "user_id", None)
    return user if isinstance(user, str) else None


def decision_event(ended: ApprovalRequest) -> dict[str, Any]:
    """Fields of `approval.decided`."""
    return {
        "approved": ended.status is ApprovalStatus.APPROVED,
        "request_id": ended.id,
        "decided_by": ended.decided_by,
        "reason": ended.reason,
    }


def raise_denied(ended: ApprovalRequest) -> NoReturn:
    """Raise ApprovalDeniedError for a request that was denied."""
    by = f" by {ended.decided_by}" if ended.decided_by else ""
    why = f": {ended.reason}" if ended.reason else ""
    raise ApprovalDeniedError(
        f"{ended.tool!r} was denied{by}{why}",
        name=ended.tool,
        request_id=ended.id,
        decided_by=ended.decided_by,
        reason=ended.reason,
    )


async def _call(function: Callable[[Any], Any | Awaitable[Any]], argument: Any) -> Any:
    """Call on the loop where it is a coroutine function, else in a thread; an awaitable result is awaited."""
    if inspect.iscoroutinefunction(function):
        return await function(argument)
    result = await asyncio.to_thread(function, argument)
    return await result if inspect.isawaitable(result) else result


def _as_output(result: Any) -> ToolOutput:
    return result if isinstance(result, ToolOutput) else ToolOutput.ok(result)
