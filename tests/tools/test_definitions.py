"""Definitions, inputs, outputs, undo metadata and errors as data."""

from __future__ import annotations

import pickle
import uuid

import msgspec
import pytest

from stageflow.core.errors import DefinitionError, ResourceError, StageflowError
from stageflow.core.output import StageArtifact
from stageflow.tools import errors
from stageflow.tools.definitions import SandboxLimits, Tool, ToolDefinition, ToolInput, ToolOutput, UndoMetadata
from stageflow.tools.errors import (
    ApprovalTimeoutError,
    ToolError,
    ToolExecutionError,
    ToolNotFoundError,
    ToolUndoError,
)


class Note(msgspec.Struct):
    text: str


def test_defaults_and_behaviours() -> None:
    plain = ToolDefinition(name="Echo", action_type="echo")
    assert (plain.description, dict(plain.input_schema), plain.allowed_behaviors) == ("", {}, ())
    assert (plain.requires_approval, plain.approval_message, plain.undoable, plain.artifact_type) == (
        False, None, False, None,
    )  # fmt: skip
    assert plain.is_behavior_allowed("anything")
    assert plain.is_behavior_allowed(None)
    gated = ToolDefinition(name="Echo", action_type="echo", allowed_behaviors=["practice"])  # type: ignore[arg-type]
    assert gated.allowed_behaviors == ("practice",)
    assert gated.is_behavior_allowed("practice")
    assert not gated.is_behavior_allowed("exam")
    assert not gated.is_behavior_allowed(None)


@pytest.mark.parametrize(("name", "action"), [("", "a"), (" ", "a"), ("a", "")])
def test_blank_names_are_refused(name: str, action: str) -> None:
    with pytest.raises(DefinitionError):
        ToolDefinition(name=name, action_type=action)


def test_definition_dict_leaves_handlers_out() -> None:
    full = ToolDefinition(
        name="n", action_type="a", input_type=Note, undo_handler=print, artifact_type="note", approval_message="sure?"
    )
    shown = full.to_dict()
    assert "undo_handler" not in shown
    assert "input_type" not in shown
    assert shown["artifact_type"] == "note"
    assert shown["approval_message"] == "sure?"
    assert "text" in str(shown["input_schema"])
    assert ToolDefinition(name="n", action_type="a").parameters() == {"type": "object"}
    assert ToolDefinition(name="n", action_type="a", input_schema={"type": "array"}).parameters() == {"type": "array"}


def test_input_from_action_maps_mode_to_behaviour() -> None:
    call = ToolInput.from_action("id-1", "echo", {"a": 1}, "practice", "run-1", None)
    assert (call.action_id, call.behavior, call.pipeline_run_id) == ("id-1", "practice", "run-1")
    assert call.to_dict() == {
        "action_id": "id-1",
        "tool_name": "echo",
        "payload": {"a": 1},
        "behavior": "practice",
        "pipeline_run_id": "run-1",
    }
    fresh = ToolInput(tool_name="echo")
    assert uuid.UUID(fresh.action_id).version == 4
    assert fresh.to_dict().keys() == {"action_id", "tool_name", "payload"}
    assert fresh.action_id != ToolInput(tool_name="echo").action_id


def test_outputs() -> None:
    artifact = StageArtifact.new("doc", "1", "n")
    assert ToolOutput.ok({"a": 1}).to_dict() == {"success": True, "data": {"a": 1}}
    assert ToolOutput.ok().to_dict() == {"success": True}
    assert ToolOutput.ok_with_artifacts(1, [artifact]).to_dict()["artifacts"][0]["type"] == "doc"
    assert ToolOutput.ok_with_undo(1, {"k": 2}).to_dict()["undo_metadata"] == {"k": 2}
    assert ToolOutput.fail("no").to_dict() == {"success": False, "error": "no"}


def test_undo_metadata_needs_action_and_tool() -> None:
    action_id = str(uuid.uuid4())
    full = UndoMetadata(action_id=action_id, tool_name="t", undo_data={"k": 1}, action_type="a")
    assert UndoMetadata.from_dict(full.to_dict()) == full
    bare = UndoMetadata.from_dict({"action_id": action_id, "tool_name": "t", "undo_data": "odd"})
    assert bare is not None
    assert bare.undo_data == {}
    assert bare.created_at.endswith("+00:00")
    assert UndoMetadata.from_dict({"action_id": "no", "tool_name": "t"}) is None
    assert UndoMetadata.from_dict({"action_id": action_id}) is None


def test_the_base_tool_says_what_is_missing() -> None:
    bare = Tool()
    bare.definition = ToolDefinition(name="n", action_type="a")
    assert (bare.name, bare.action_type, bare.can_undo) == ("n", "a", False)
    with pytest.raises(ToolExecutionError):
        bare.execute(ToolInput(tool_name="a"))
    with pytest.raises(ToolUndoError):
        bare.undo(UndoMetadata(action_id="1", tool_name="a"))
    with pytest.raises(DefinitionError):
        SandboxLimits(timeout=0)


def test_errors_are_in_the_tree_and_travel() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, ToolError)
        assert issubclass(kind, StageflowError)
        made = kind("text", hint="do", name="t", request_id="r")
        copy = pickle.loads(pickle.dumps(made))
        assert (type(copy), copy.name, copy.request_id, str(copy)) == (kind, "t", "r", str(made))
        assert copy.to_dict()["message"] == "text"
    assert ToolNotFoundError("x").to_dict()["type"] == "ToolNotFound"
    assert issubclass(ToolNotFoundError, DefinitionError)
    assert issubclass(ApprovalTimeoutError, ResourceError)
    codes = {getattr(errors, name).code for name in errors.__all__}
    assert len(codes) == len(errors.__all__)
