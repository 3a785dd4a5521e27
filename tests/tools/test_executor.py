"""One call, from `tool.invoked` to its one end; and its undo."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from stageflow.core.errors import DefinitionError
from stageflow.core.output import StageArtifact
from stageflow.tools.approval import InMemoryApprovals
from stageflow.tools.definitions import Tool, ToolDefinition, ToolInput, ToolOutput, UndoMetadata
from stageflow.tools.errors import (
    ApprovalCancelledError,
    ApprovalDeniedError,
    ApprovalTimeoutError,
    ToolDeniedError,
    ToolInputError,
    ToolNotFoundError,
    ToolUndoError,
)
from stageflow.tools.executor import ToolExecutor
from stageflow.tools.registry import ToolRegistry, tool, use_registry

ENDS = {"tool.completed", "tool.failed", "tool.denied"}


def make(emitted: Any, function: Any = lambda call: call.value, **fields: Any) -> ToolExecutor:
    """An executor with one tool, `t`."""
    registry = ToolRegistry()
    tool("t", registry=registry, **fields)(_fresh(function))
    return ToolExecutor(registry, emit=emitted)


def _fresh(function: Any) -> Any:
    """A new function object, so that marks of several tests do not meet on one."""
    if inspect.iscoroutinefunction(function):

        async def wrapped(call: ToolInput) -> Any:
            return await function(call)

        return wrapped
    return lambda call: function(call)


def call(payload: Any = None, **fields: Any) -> ToolInput:
    return ToolInput(tool_name="t", payload={} if payload is None else payload, **fields)


async def test_a_call_that_completes(emitted: Any) -> None:
    executor = make(emitted)
    output = await executor.execute(call({"a": 1}, action_id="id-1"))
    assert output == ToolOutput.ok({"a": 1})
    assert emitted.events == [
        (name, {"tool": "t", "action_id": "id-1"}) for name in ("tool.invoked", "tool.started", "tool.completed")
    ]


async def test_sync_tools_run_in_a_thread_and_coroutines_on_the_loop(emitted: Any) -> None:
    main = threading.get_ident()

    async def on_loop(call: ToolInput) -> int:
        await asyncio.sleep(0)
        return threading.get_ident()

    class Async(Tool):
        definition = ToolDefinition(name="t", action_type="t")

        async def execute(self, input: ToolInput) -> ToolOutput:
            return ToolOutput.ok(threading.get_ident())

    assert (await make(emitted, lambda call: threading.get_ident()).execute(call())).data != main
    assert (await make(emitted, on_loop).execute(call())).data == main
    registry = ToolRegistry()
    registry.register(Async())
    with use_registry(registry):
        assert (await ToolExecutor().execute(call())).data == main


async def test_an_unknown_tool_never_starts(emitted: Any) -> None:
    with pytest.raises(ToolNotFoundError) as caught:
        await make(emitted).execute(ToolInput(tool_name="gone"))
    assert caught.value.to_dict()["name"] == "gone"
    assert emitted.names == ["tool.invoked", "tool.failed"]


@pytest.mark.parametrize(("behavior", "reason"), [("exam", "behavior_not_allowed"), (None, "behavior_missing")])
async def test_behaviours_gate(emitted: Any, behavior: str | None, reason: str) -> None:
    executor = make(emitted, allowed_behaviors=["practice"])
    with pytest.raises(ToolDeniedError) as caught:
        await executor.execute(call(behavior=behavior))
    assert caught.value.fields["reason"] == reason
    assert emitted.names == ["tool.invoked", "tool.denied"]
    assert emitted.last("tool.denied")["reason"] == reason
    assert emitted.last("tool.denied")["behavior"] == behavior
    assert (await executor.execute(call(behavior="practice"))).success


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}, "mail": {"type": "string", "format": "email"}},
    "required": ["n"],
    "additionalProperties": False,
}


async def test_the_schema_is_checked_before_anything_runs(emitted: Any) -> None:
    executor = make(emitted, input_schema=SCHEMA)
    assert (await executor.execute(call({"n": 1}))).data == {"n": 1}
    for bad, path in (
        ({}, "$"),
        ({"n": 0}, "$.n"),
        ({"n": 1, "x": 2}, "$"),
        ({"n": 1, "mail": "no"}, "$.mail"),
        ([], "$"),
    ):
        emitted.events.clear()
        with pytest.raises(ToolInputError) as caught:
            await executor.execute(call(bad))
        assert caught.value.fields["problems"][0].startswith(f"{path}:")
        assert emitted.names == ["tool.invoked", "tool.denied"]
        assert emitted.last("tool.denied")["reason"] == "invalid_input"


async def test_bad_schemas_are_the_authors_mistake(emitted: Any) -> None:
    for schema in ({"type": "nonsense"}, {"$ref": "http://127.0.0.1:9/remote.json"}):
        with pytest.raises(DefinitionError, match="input_schema"):
            await make(emitted, input_schema=schema).execute(call({"a": 1}))


async def test_without_the_extra_the_error_says_what_to_install(emitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(DefinitionError, match=r"stageflow\[tools\]"):
        await make(emitted, input_schema=SCHEMA).execute(call({"n": 1}))


class Numbers(msgspec.Struct):
    numbers: list[int]
    scale: int = 1


async def test_declared_types_are_given_converted(emitted: Any) -> None:
    executor = make(emitted, lambda call: sum(call.value.numbers) * call.value.scale, input_type=Numbers)
    assert (await executor.execute(call({"numbers": [1, 2], "scale": 10}))).data == 30
    with pytest.raises(ToolInputError, match=r"numbers\[1\]"):
        await executor.execute(call({"numbers": [1, "2"]}))


async def test_what_was_checked_is_what_runs(emitted: Any) -> None:
    approvals = InMemoryApprovals()
    executor = make(emitted, requires_approval=True)
    executor.approvals = approvals
    payload = {"path": "/tmp/a"}
    running = asyncio.create_task(executor.execute(call(payload)))
    await until_asked(approvals)
    payload["path"] = "/etc/passwd"
    (asked,) = approvals.pending_requests()
    approvals.approve(asked.id)
    assert (await running).data == {"path": "/tmp/a"}


async def until_asked(approvals: InMemoryApprovals) -> None:
    while not approvals.pending_requests():
        await asyncio.sleep(0)


async def ask(
    emitted: Any, manual_time: Any, end: Any, timeout: float = 300.0
) -> tuple[asyncio.Task[ToolOutput], str, InMemoryApprovals]:
    approvals = InMemoryApprovals(clock=manual_time, wall=manual_time, sleep=manual_time.sleep)
    executor = make(emitted, requires_approval=True, approval_message="delete it?")
    executor.approvals, executor.approval_timeout = approvals, timeout
    task = asyncio.create_task(executor.execute(call({"p": 1}, requested_by="ada", pipeline_run_id="run-1")))
    await until_asked(approvals)
    (asked,) = approvals.pending_requests()
    assert (asked.tool, asked.message, asked.requested_by, asked.run_id) == ("t", "delete it?", "ada", "run-1")
    assert asked.to_dict()["arguments"] == {"p": 1}
    if end is not None:
        end(approvals, asked.id)
    return task, asked.id, approvals


async def test_approved(emitted: Any, manual_time: Any) -> None:
    task, request_id, _ = await ask(emitted, manual_time, lambda a, i: a.approve(i, by="bob", reason="ok"))
    assert (await task).success
    assert emitted.names == [
        "tool.invoked", "approval.requested", "approval.decided", "tool.started", "tool.completed",
    ]  # fmt: skip
    decided = emitted.last("approval.decided")
    assert (decided["approved"], decided["decided_by"], decided["request_id"]) == (True, "bob", request_id)
    assert emitted.last("approval.requested")["message"] == "delete it?"


async def test_denied(emitted: Any, manual_time: Any) -> None:
    task, request_id, _ = await ask(emitted, manual_time, lambda a, i: a.deny(i, by="bob", reason="no"))
    with pytest.raises(ApprovalDeniedError, match="by bob: no") as caught:
        await task
    assert caught.value.fields["request_id"] == request_id
    assert emitted.names == ["tool.invoked", "approval.requested", "approval.decided", "tool.denied"]
    assert emitted.last("approval.decided")["approved"] is False
    assert emitted.last("tool.denied")["reason"] == "approval_denied"


async def test_approval_timeout_carries_the_request(emitted: Any, manual_time: Any) -> None:
    task, request_id, _ = await ask(emitted, manual_time, None, timeout=10)
    await manual_time.advance(10)
    with pytest.raises(ApprovalTimeoutError) as caught:
        await task
    assert caught.value.fields["request_id"] == request_id
    assert caught.value.fields["timeout_seconds"] == 10
    assert emitted.last("tool.denied")["reason"] == "approval_timeout"
    assert "approval.decided" not in emitted.names


async def test_a_withdrawn_request_is_no_timeout(emitted: Any, manual_time: Any) -> None:
    task, _, _ = await ask(emitted, manual_time, lambda a, i: a.cancel(i, reason="closing"))
    with pytest.raises(ApprovalCancelledError):
        await task
    assert emitted.last("tool.denied")["reason"] == "approval_cancelled"


async def test_a_caller_that_goes_away_takes_its_request_along(emitted: Any, manual_time: Any) -> None:
    task, _, approvals = await ask(emitted, manual_time, None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert approvals.pending_count == 0
    assert emitted.last("tool.denied")["reason"] == "caller_cancelled"


async def test_approval_needs_a_service(emitted: Any) -> None:
    with pytest.raises(DefinitionError, match="approval service"):
        await make(emitted, requires_approval=True).execute(call())
    assert emitted.names == ["tool.invoked", "tool.failed"]


async def test_failures_raised_and_returned(emitted: Any) -> None:
    def broken(call: ToolInput) -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        await make(emitted, broken).execute(call())
    assert emitted.names == ["tool.invoked", "tool.started", "tool.failed"]
    assert emitted.last("tool.failed")["error_type"] == "KeyError"
    emitted.events.clear()
    output = await make(emitted, lambda call: ToolOutput.fail("full")).execute(call())
    assert (output.success, output.error) == (False, "full")
    assert emitted.names == ["tool.invoked", "tool.started", "tool.failed"]
    assert emitted.last("tool.failed")["error"] == "full"


async def test_a_cancelled_run_is_told(emitted: Any) -> None:
    started = asyncio.Event()

    async def forever(call: ToolInput) -> None:
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(make(emitted, forever).execute(call()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert emitted.last("tool.failed")["error"] == "cancelled"
    assert sum(name in ENDS for name in emitted.names) == 1


async def test_artifact_type_wraps_data_without_artifact(emitted: Any) -> None:
    output = await make(emitted, lambda call: {"text": "x"}, artifact_type="note").execute(call(action_id="id-1"))
    (artifact,) = output.artifacts
    assert (artifact.artifact_type, artifact.id, artifact.name, artifact.data) == ("note", "id-1", "t", {"text": "x"})
    own = StageArtifact.new("own", "1", "n")
    executor = make(emitted, lambda call: ToolOutput.ok_with_artifacts(1, [own]), artifact_type="note")
    assert (await executor.execute(call())).artifacts == (own,)


async def test_a_broken_listener_changes_nothing(emitted: Any) -> None:
    class Context:
        def emit(self, type: str, data: Mapping[str, Any] | None = None) -> None:
            raise RuntimeError("listener")

    assert (await make(emitted).execute(call({"a": 1}), ctx=Context())).success


async def test_a_given_definition_rules(emitted: Any) -> None:
    strict = ToolDefinition(name="strict", action_type="t", allowed_behaviors=("practice",))
    with pytest.raises(ToolDeniedError):
        await make(emitted).execute(call(), strict)


class Undoing:
    """A tool whose undo the test controls."""

    def __init__(self) -> None:
        self.undone: list[UndoMetadata] = []
        self.error: Exception | None = None

    async def undo(self, metadata: UndoMetadata) -> None:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        self.undone.append(metadata)


def undoable(emitted: Any, handler: Any, **fields: Any) -> ToolExecutor:
    return make(
        emitted, lambda call: ToolOutput.ok_with_undo("done", {"was": 1}), undoable=True, undo_handler=handler, **fields
    )


async def test_undo_once(emitted: Any) -> None:
    hand = Undoing()
    executor = undoable(emitted, hand.undo)
    action_id = str(uuid.uuid4())
    await executor.execute(call(action_id=action_id))
    results = await asyncio.gather(executor.undo(action_id), executor.undo(action_id))
    assert sorted(results) == [False, True]
    (metadata,) = hand.undone
    assert (metadata.action_id, metadata.tool_name, metadata.undo_data) == (action_id, "t", {"was": 1})
    assert emitted.last("tool.undone") == {"tool": "t", "action_id": action_id}
    assert await executor.undo(action_id) is False


async def test_a_failed_undo_is_told_and_can_be_tried_again(emitted: Any) -> None:
    hand = Undoing()
    hand.error = OSError("disk")
    executor = undoable(emitted, hand.undo)
    await executor.execute(call(action_id="id-1"))
    with pytest.raises(ToolUndoError) as caught:
        await executor.undo("id-1")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.fields == {"name": "t", "action_id": "id-1", "reason": "disk"}
    assert emitted.last("tool.undo_failed") == {"tool": "t", "action_id": "id-1", "error": "disk"}
    assert "tool.undone" not in emitted.names
    hand.error = None
    assert await executor.undo("id-1") is True


async def test_no_metadata_or_no_handler_is_no_undo(emitted: Any) -> None:
    executor = undoable(emitted, None)
    assert await executor.undo("unknown") is False
    await executor.execute(call(action_id="id-1"))
    assert await executor.undo("id-1") is False
    assert executor.undo_store.get("id-1") is not None
    plain = make(emitted, lambda call: ToolOutput.ok_with_undo(1, {}))
    await plain.execute(call(action_id="id-2"))
    assert await plain.undo("id-2") is False
    failed = make(emitted, lambda call: ToolOutput(success=False, undo_metadata={}), undoable=True)
    await failed.execute(call(action_id="id-3"))
    assert failed.undo_store.get("id-3") is None


async def test_the_tools_own_undo_serves_without_a_handler(emitted: Any) -> None:
    undone: list[str] = []

    class Own(Tool):
        definition = ToolDefinition(name="t", action_type="t", undoable=True)

        def execute(self, input: ToolInput) -> ToolOutput:
            return ToolOutput.ok_with_undo(None, {})

        def undo(self, metadata: UndoMetadata) -> None:
            undone.append(metadata.action_id)

    registry = ToolRegistry()
    registry.register(Own())
    executor = ToolExecutor(registry, emit=emitted)
    await executor.execute(call(action_id="id-1"))
    assert await executor.undo("id-1") is True
    assert undone == ["id-1"]


async def test_an_executor_needs_a_registry() -> None:
    with pytest.raises(DefinitionError):
        ToolExecutor()
